from __future__ import annotations

import re
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hf_edit.config import EDiTConfig
from hf_edit.peers.group import ProcessGroupPeers
from hf_edit.peers.layout import Layout, default_num_replicas
from hf_edit.sync.engine import Engine
from hf_edit.sync.units import Unit, _is_gathering, find_units, like_param, local_part
from tests.dist.nets import UNITS, Net, shard, train
from tests.dist.threads import run_ranks


def test_ranks_are_laid_out_row_by_row() -> None:
    layout = Layout.split(6, 2, rank=4)
    assert (layout.num_replicas, layout.replica_size, layout.replica, layout.shard) == (2, 3, 1, 1)
    assert layout.replica_ranks(1) == [3, 4, 5]
    assert layout.sync_ranks(1) == [1, 4]
    assert str(layout) == "2 replicas x 3 shards"


@pytest.mark.parametrize(
    ("world", "replicas", "text"),
    [
        (2, 4, "num_replicas=4, but only 2 process(es) take part: a replica needs at least one. Launch at least 4"),
        (4, 3, "num_replicas=3 does not divide the 4 processes"),
        (4, 3, "With 4 processes num_replicas can be one of [1, 2, 4]."),
    ],
)
def test_impossible_layouts_are_refused(world: int, replicas: int, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        Layout.split(world, replicas, rank=0)


@pytest.mark.parametrize(
    ("world", "local", "fsdp", "given", "expected"),
    [
        (8, 8, True, 2, 2),  # Accelerate's dp_replicate_size
        (8, 4, True, None, 2),  # one per node
        (8, 4, False, None, 2),
        (8, 8, True, None, 1),  # one node: one in all with FSDP
        (8, 8, True, 1, 1),
        (8, 8, False, None, 8),  # one per process without
    ],
)
def test_default_number_of_replicas(
    world: int, local: int, fsdp: bool, given: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    assert default_num_replicas(world, fsdp=fsdp, dp_replicate_size=given) == expected


def test_machines_of_different_size_need_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for machines in ((8, 4), (8, 4, 4)):
        monkeypatch.setenv("GROUP_WORLD_SIZE", str(len(machines)))
        for here in machines:  # on every one of them, or the others would wait
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
            with pytest.raises(
                ValueError, match=rf"{here} of {sum(machines)} processes are on this one of .* Set num_r"
            ):
                default_num_replicas(sum(machines), fsdp=True, dp_replicate_size=None)
            assert default_num_replicas(sum(machines), fsdp=True, dp_replicate_size=4) == 4


def test_a_short_limit_for_syncs_is_none_inside_a_replica() -> None:
    """There a rank may write a checkpoint while the others wait."""

    def body(rank: int) -> tuple[float, float]:
        peers = ProcessGroupPeers(Layout.split(4, 2, rank), timeout_seconds=5.0)
        return peers._timeout.total_seconds(), peers.inside._timeout.total_seconds()

    assert run_ranks(4, body) == [(5.0, 1800.0)] * 4


def test_the_three_calls_to_the_other_replicas() -> None:
    def body(rank: int) -> tuple[Any, ...]:
        peers = ProcessGroupPeers(Layout.split(6, 3, rank), 30.0)
        table = peers.gather(torch.tensor([float(rank), 1.0]))()
        one, two = torch.full((4,), float(rank)), torch.ones(2)
        peers.all_reduce([one, two]).wait()
        inside = peers.inside.sum(torch.tensor([float(rank)]))
        return table.tolist(), one.tolist(), two.tolist(), inside.item(), peers.commit(1), peers.bytes_sent

    results = run_ranks(6, body)
    gathered = 2 * 8 // 2 * 2  # two fp32 scalars to two others
    reduced = (16 + 8) * 2 * 2 // 3
    for rank, result in enumerate(results):
        shard_index, replica = rank % 2, rank // 2
        assert result[0] == [[float(shard_index + 2 * i), 1.0] for i in range(3)]
        assert result[1] == [float(3 * shard_index + 6)] * 4
        assert result[2] == [3.0] * 2
        assert result[3] == float(4 * replica + 1)
        assert result[4] is True
        assert result[5] == gathered + reduced


def test_a_delayed_sync_stays_away_from_groups_that_cannot_take_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """With NCCL alone for the training, what runs beside it must not be on NCCL: the ranks' order would be chance."""
    config = EDiTConfig(sync_interval=2, overlap="delayed", delay_steps=1)
    backends: list[str] = []

    def recording(collective: Any) -> Any:
        def recorded(*args: Any, group: Any, async_op: bool = False, **more: Any) -> Any:
            if dist.get_process_group_ranks(group) in ([0, 2], [1, 3]):  # what goes between the replicas
                backends.append(dist.get_backend(group))
            return collective(*args, group=group, async_op=async_op, **more)

        return recorded

    expected = run_ranks(4, lambda rank: train(rank, 2, config, 7))
    monkeypatch.setattr(dist, "all_reduce", recording(dist.all_reduce))
    monkeypatch.setattr(dist, "all_gather", recording(dist.all_gather))
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")

    def body(rank: int) -> Any:
        run = train(rank, 2, config, 7)
        made = run.engine.peers._host_sync_group
        run.engine.peers.make_host_groups()
        assert run.engine.peers._host_sync_group is made, "once is enough"
        return run

    runs = run_ranks(4, body)
    assert set(backends) == {"gloo"}
    assert len(backends) == 4 * (1 + 4 * (1 + len(UNITS))), "of four ranks: digests at the start, then four syncs"
    for run, other in zip(runs, expected, strict=True):
        assert all(torch.equal(run.params[name], other.params[name]) for name in other.params)


@pytest.mark.parametrize(("replicas", "size"), [(2, 1), (1, 2), (2, 2)])
def test_both_kinds_of_replica_are_cut_alike(replicas: int, size: int) -> None:
    def body(rank: int) -> list[tuple[str, list[str]]]:
        model = shard(Net(), Layout.split(replicas * size, replicas, rank))
        return [(unit.name, unit.names) for unit in find_units(model)]

    units = run_ranks(replicas * size, body)[0]
    assert [name for name, _ in units] == UNITS
    assert [name for _, names in units for name in names] == [name for name, _ in Net().named_parameters()]


def test_a_part_stays_where_it_is_in_a_whole_of_another_device() -> None:
    """Offloaded state is in host memory, the parameters' mesh is of the GPU; "meta" stands for what is elsewhere."""

    @torch.no_grad()
    def body(rank: int) -> bool:
        param = next(iter(shard(Net(), Layout.split(2, 1, rank)).parameters()))
        part = torch.empty(local_part(param.detach()).shape, dtype=torch.float64, device="meta")
        whole = like_param(param, part)
        return (whole.shape, whole.dtype) == (param.shape, part.dtype) and local_part(whole) is part

    assert run_ranks(2, body) == [True, True]


def test_frozen_parameters_are_in_no_unit_and_an_empty_unit_is_skipped() -> None:
    def body(rank: int) -> list[tuple[str, list[str]]]:
        net = Net()
        net.embed.requires_grad_(False)
        net.norm.requires_grad_(False)
        return [(unit.name, unit.names) for unit in find_units(shard(net, Layout.split(2, 1, rank)))]

    units = dict(run_ranks(2, body)[0])
    assert list(units) == ["blocks.0", "blocks.1", "norm+head"]
    assert units["norm+head"] == ["head.weight", "head.bias"]


def test_nothing_to_train_is_refused() -> None:
    net = Net()
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="No parameter of the model requires gradients"):
        find_units(net)


def test_settings_that_differ_between_ranks_are_refused() -> None:
    def body(rank: int) -> str:
        config = EDiTConfig(sync_interval=4 + rank // 2)
        with pytest.raises(ValueError, match="EDiTConfig differs between the ranks") as caught:
            train(rank, 2, config, 1)
        return str(caught.value)

    for text in run_ranks(4, body):
        assert "{'sync_interval': {0: 4, 1: 4, 2: 5, 3: 5}}" in text


def test_models_that_differ_between_ranks_are_refused() -> None:
    def body(rank: int) -> str:
        layout = Layout.split(2, 2, rank)
        model = Net(num_blocks=2)
        if rank:
            model.head.bias.requires_grad_(False)
        with pytest.raises(ValueError, match="differ between the ranks: fingerprints by rank") as caught:
            Engine(model, torch.optim.SGD(model.parameters()), EDiTConfig(), ProcessGroupPeers(layout, 30.0))
        return str(caught.value)

    assert len(run_ranks(2, body)) == 2


def test_frozen_parameters_that_differ_between_replicas_are_refused() -> None:
    def body(rank: int) -> str:
        net = Net(seed=0)
        net.embed.requires_grad_(False)
        with torch.no_grad():
            net.embed.bias += rank
        layout = Layout.split(2, 2, rank)
        with pytest.raises(RuntimeError, match=r"The frozen parameter embed\.bias differs between the replicas"):
            Engine(net, torch.optim.SGD(net.parameters()), EDiTConfig(), ProcessGroupPeers(layout, 30.0))
        return "refused"

    assert run_ranks(2, body) == ["refused"] * 2


class Counting:
    """Counts the collectives of each process group that go through torch.distributed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, int]] = []
        for name in ("all_reduce", "all_gather", "broadcast", "all_gather_object"):
            monkeypatch.setattr(dist, name, self._wrap(name, getattr(dist, name)))

    def _wrap(self, name: str, original: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if dist.get_rank() == 0:
                self.calls.append((name, id(kwargs.get("group"))))
            return original(*args, **kwargs)

        return counted


@pytest.mark.parametrize("shape", [(2, 1), (2, 2)])
def test_inner_steps_call_no_other_replica_and_a_sync_calls_once_a_unit(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting(monkeypatch)
    marks: list[list[str]] = []

    def before_step(step: int, engine: Any, model: Any, optimizer: Any) -> None:
        if engine.peers.layout.rank == 0:
            group = id(engine.peers.sync_group)
            marks.append([name for name, used in counting.calls if used == group])
            counting.calls.clear()

    config = EDiTConfig(sync_interval=3, overlap="none")
    run_ranks(shape[0] * shape[1], lambda rank: train(rank, shape[0], config, 8, before_step=before_step))
    sync = ["all_gather"] + ["all_reduce"] * len(UNITS)
    assert marks == [["all_gather"], [], [], sync, [], [], sync, []]


def test_every_unit_is_gathered_in_order_with_its_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the forward pass each unit's all-gather is issued by the sync itself, the last one's too."""
    gathered: list[str] = []
    original = Unit.start_gathering

    def counted(unit: Unit) -> None:
        if dist.get_rank() == 0:
            gathered.append(unit.name)
        original(unit)

    monkeypatch.setattr(Unit, "start_gathering", counted)
    config = EDiTConfig(sync_interval=2)
    run_ranks(4, lambda rank: train(rank, 2, config, 5))
    assert gathered == UNITS * 2


def test_who_has_ended_waits_for_the_exchange_of_the_others() -> None:
    """As long as allowed, and no longer once they have come; rank 1 is one exchange behind, and on its way."""

    def body(rank: int) -> tuple[Any, ...]:
        peers = ProcessGroupPeers(Layout.split(2, 2, rank), 5.0)
        peers.gather(torch.zeros(1))()
        waits = []
        for seconds in (0.4, 30.0) if rank == 0 else ():
            begun = time.monotonic()
            peers.wait_for_arrivals(seconds)
            waits.append(time.monotonic() - begun)
        if rank == 1:
            time.sleep(1.2)
        return *waits, peers.gather(torch.ones(1) + rank)().tolist()

    first, _ = run_ranks(2, body)
    assert 0.4 <= first[0] < 0.9, "longer than it may it does not wait here"
    assert 0.5 < first[1] < 5.0, "until rank 1 has come"
    assert first[2] == [[1.0], [2.0]]


def test_what_is_on_its_way_is_known() -> None:
    """hf_edit.sync.units asks by private names; this fails when they move."""

    def body(rank: int) -> list[bool]:
        block = shard(Net(), Layout.split(2, 1, rank)).blocks[0]
        seen = [_is_gathering(block)]
        handle = block.unshard(async_op=True)
        seen.append(_is_gathering(block))
        handle.wait()
        return [*seen, _is_gathering(block)]

    assert run_ranks(2, body) == [[False, True, False]] * 2
