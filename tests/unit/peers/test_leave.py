"""At a process' end gloo's threads get the time to let go of their tensors, whoever ended the groups."""

from __future__ import annotations

import sys
import time

import pytest
import torch.distributed as dist

from hf_edit.peers import faults


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
