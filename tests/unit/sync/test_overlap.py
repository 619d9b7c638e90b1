"""The thread of a delayed sync."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_edit.sync.overlap import Delayed, at_once


def test_its_thread_has_the_trainings_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread's is device 0, on which every rank would make itself a context."""
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    device = torch.device("cuda", 3)
    sync: Any = SimpleNamespace(
        device=device, await_plan=lambda run: calls.append("plan"), reduce=lambda run: calls.append("reduce")
    )
    written = SimpleNamespace(synchronize=lambda: calls.append("written"))
    Delayed(sync, at_once)._beside(run=None, written=written, decided=threading.Event())  # type: ignore[arg-type]
    assert calls == [device, "written", "plan", "reduce"]
