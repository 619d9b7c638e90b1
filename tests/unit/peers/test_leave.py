"""At a process' end gloo's threads get the time to let go of their tensors, whoever ended the groups."""

from __future__ import annotations

import sys
import time

import pytest
import torch.distributed as dist

from hf_edit.peers import faults
from hf_edit.peers.elastic import ElasticPeers
from hf_edit.peers.group import ProcessGroupPeers
from hf_edit.peers.layout import Layout
from tests.dist.threads import run_ranks


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    done: list[str] = []
    monkeypatch.delattr(sys, "last_value", raising=False)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("groups ended"))
    monkeypatch.setattr(time, "sleep", lambda seconds: done.append(f"waited {seconds >= 0.3}"))
    return done


@pytest.mark.parametrize(
    ("initialized", "expected"),
    [(True, ["groups ended", "waited True"]), (False, ["waited True"])],
    ids=["groups are there", "the script has ended them"],
)
def test_the_threads_get_their_time(
    initialized: bool, expected: list[str], done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: initialized)
    faults._leave()
    assert done == expected


def test_a_failed_process_leaves_at_once(done: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "last_value", RuntimeError("lost"), raising=False)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    faults._leave()
    assert done == []


@pytest.mark.parametrize("kind", ["elastic", "group"])
def test_whoever_trains_with_replicas_leaves_so(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(f"hf_edit.peers.{kind}.leave_cleanly_at_exit", lambda: called.append(kind))
    if kind == "elastic":
        ElasticPeers(Layout(2, 1, 0), 30.0, 1.0, 1.0, 1, "127.0.0.1:1")
    else:
        run_ranks(2, lambda rank: ProcessGroupPeers(Layout(2, 1, rank), 30.0))
    assert set(called) == {kind}
