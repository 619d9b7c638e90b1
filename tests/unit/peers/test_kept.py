"""No thread of gloo is the last to hold a tensor that Python knows: our collectives are kept long after their end."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hf_edit.peers import faults
from hf_edit.peers.group import ProcessGroupPeers
from hf_edit.peers.layout import Layout
from hf_edit.peers.replica import Replica
from tests.dist.threads import run_ranks


class Work:
    """What a gloo thread holds: the tensors it was given."""

    def __init__(self, *tensors: Any) -> None:
        self.tensors, self.waited = tensors, False

    def wait(self) -> None:
        self.waited = True

    def is_completed(self) -> bool:
        return self.waited


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Work]:
    begun: list[Work] = []

    def collective(*tensors: Any, **more: Any) -> Work:
        assert more["async_op"] is True
        begun.append(Work(*tensors))
        return begun[-1]

    faults.Kept.alive.clear()
    for name in ("all_reduce", "all_gather", "broadcast"):
        monkeypatch.setattr(dist, name, collective)
    return begun


def alive() -> list[Any]:
    return [kept.work for kept in faults.Kept.alive]


def test_a_collective_works_on_the_same_memory_and_gives_it_up_at_its_end(begun: list[Work]) -> None:
    tensor, rows = torch.arange(8.0)[2:6], [torch.zeros(2), torch.zeros(2)]
    reduced, gathered = (
        faults.start(dist.all_reduce, tensor, group=None),
        faults.start(dist.all_gather, rows, tensor, group=None),
    )
    (alias,), (row_aliases, _) = begun[0].tensors, begun[1].tensors
    assert alias is not tensor
    alias.mul_(2)
    row_aliases[1].fill_(7.0)
    reduced.wait()
    gathered.wait()
    assert tensor.tolist() == [4.0, 6.0, 8.0, 10.0]
    assert rows[1].tolist() == [7.0, 7.0]
    assert [t.untyped_storage().nbytes() for t in (alias, *row_aliases)] == [0, 0, 0], "kept tensors keep no memory"


def test_a_collective_is_kept_until_later_ones_have_ended_and_time_has_passed(
    begun: list[Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for _ in range(3 * faults.KEEP_LATER):
        faults.run(dist.all_reduce, torch.ones(1), group=None)
    assert alive() == begun, "however many have ended since"
    now += 2 * faults.KEEP_SECONDS
    assert alive() == begun, "nothing goes by itself, as at an epoch's end"
    faults.run(dist.all_reduce, torch.ones(1), group=None)
    assert alive() == begun[-faults.KEEP_LATER :], "however long ago"


def test_one_that_nobody_waited_for_is_kept_until_it_has_ended(
    begun: list[Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    given_up = faults.start(dist.all_reduce, torch.ones(1), group=None).work
    for ended in (False, True, True):
        given_up.waited = ended
        now += 2 * faults.KEEP_SECONDS
        assert given_up in alive()
        for _ in range(2 * faults.KEEP_LATER):
            faults.run(dist.all_reduce, torch.ones(1), group=None)
    assert given_up not in alive()


def test_a_replica_of_one_rank_says_nothing(begun: list[Work]) -> None:
    replica, tensor = Replica(Layout(2, 1, 0), 1.0), torch.ones(2)
    assert replica.sum(tensor) is tensor
    assert replica.gather(torch.tensor(3.0)).tolist() == [3.0]
    replica.broadcast(tensor)
    assert replica.lead(True)
    assert begun == []


def test_objects_travel_in_collectives_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_kept(*_: Any, **__: Any) -> None:
        raise AssertionError("torch's own drops its works at once")

    monkeypatch.setattr(dist, "all_gather_object", not_kept)
    values = [{"one": 1}, ["a much longer value"] * 100, None]

    def body(rank: int) -> None:
        peers = ProcessGroupPeers(Layout.split(3, 1, rank), 30.0)
        assert peers.gather_object(values[rank]) == values
        assert peers.inside.gather_object(values[rank]) == values

    run_ranks(3, body)
