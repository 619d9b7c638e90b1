"""The Trainer's own progress bars show the last sync, in a terminal and in a notebook."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import pytest
from transformers import ProgressCallback

from hf_edit.telemetry.logs import EDiTStats
from hf_edit.trainer.logs import TrainerLogs


def show(callback: Any, exposed: float, waited: float) -> None:
    trainer = TrainerLogs.__new__(TrainerLogs)
    trainer.edit_stats = EDiTStats(syncs=7)
    trainer.callback_handler = types.SimpleNamespace(callbacks=[types.SimpleNamespace(), callback])
    trainer._show_sync(types.SimpleNamespace(exposed_seconds=exposed, wait_seconds=waited, slowest_replica=1))  # type: ignore[arg-type]


def test_in_a_terminal() -> None:
    class Bar:
        def set_postfix_str(self, text: str) -> None:
            self.text = text

    callback = ProgressCallback()
    callback.training_bar = None
    show(callback, 0.5, 0.0)  # another rank than the first has none
    callback.training_bar = Bar()
    show(callback, 0.5, 0.0)
    assert callback.training_bar.text == "7 syncs, 0.50 s exposed"
    show(callback, 0.5, 0.25)
    assert callback.training_bar.text == "7 syncs, 0.50 s exposed, 0.25 s of it for replica 1"


def test_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    display: Any = types.ModuleType("IPython.display")  # what transformers' bar is drawn with
    display.HTML, display.display = shown.append, lambda *_, **__: types.SimpleNamespace(update=lambda *_: None)
    jupyter: Any = types.ModuleType("IPython")
    jupyter.display = display
    monkeypatch.setitem(sys.modules, "IPython", jupyter)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook", raising=False)
    notebook = importlib.import_module("transformers.utils.notebook")
    callback = notebook.NotebookProgressCallback()
    callback.training_tracker = notebook.NotebookTrainingTracker(10, ["Step", "Training Loss"])
    show(callback, 0.5, 0.25)
    callback.training_tracker.update(3, force_update=True)
    assert any("7 syncs, 0.50 s exposed, 0.25 s of it for replica 1" in html for html in shown), shown[-1:]
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook")
