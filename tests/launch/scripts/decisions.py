"""Run by every rank of a launch: flags that callbacks set on one rank. Arguments as for scenarios.py."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from hf_edit import EDiTConfig
from hf_edit.checkpoint.manifest import problem
from tests.launch.scripts.features import run
from tests.launch.scripts.labels import batches_without_labels_teach_nothing  # noqa: F401
from tests.launch.scripts.scenarios import FOLDER, make_rows

EVENTS = [
    "on_train_begin", "on_epoch_begin", "on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step",
    "on_step_end", "on_log", "on_evaluate", "on_prediction_step", "on_save", "on_epoch_end",
]  # fmt: skip
FLAGS = ["should_log", "should_evaluate", "should_save", "should_epoch_stop"]
MODES: dict[str, dict[str, Any]] = {
    "at syncs and between": {"sync_interval": 3},
    "delayed": {"sync_interval": 4, "overlap": "delayed", "delay_steps": 2},
    "warm-up": {"sync_interval": 3, "warmup_steps": 200},
    "by time": {"sync_seconds": 0.05},
    "by time, delayed": {"sync_seconds": 0.05, "overlap": "delayed", "delay_steps": 2},
}


class AllPairs(TrainerCallback):
    """Sets each flag at each event once, each time on another rank alone; in the end one asks for the stop."""

    def __init__(self) -> None:
        self.left = [(event, flag) for event in EVENTS for flag in FLAGS]
        self.turn = 0
        self.done: list[tuple[str, int]] = []
        for event in EVENTS:
            setattr(self, event, lambda args, state, control, event=event, **_: self.seen(event, args, state, control))

    def seen(self, event: str, args: Any, state: Any, control: Any) -> None:
        if event in ("on_evaluate", "on_save"):
            self.done.append((event, state.global_step))
        for pair in self.left:
            if pair[0] == event:
                self.left.remove(pair)
                self.turn += 1
                if args.process_index == EVENTS.index(event) % args.world_size:
                    setattr(control, pair[1], True)
                return
        left = {event for event, _ in self.left} - {"on_train_begin"}
        if event == "on_step_end" and not left and args.process_index == args.world_size - 1:
            control.should_training_stop = True


def a_flag_of_one_rank_at_any_event_ends_in_one_decision() -> dict[str, Any]:
    found = {}
    for number, (mode, settings) in enumerate(MODES.items()):
        callback, late = AllPairs(), number % 2 == 0  # by add_callback
        trainer = run(
            None, config=EDiTConfig(sync_timeout_seconds=60, **settings), late_callbacks=[callback] if late else [],
            callbacks=[] if late else [callback], rows=make_rows(6 * 2 * 2 * 4), max_steps=150, logging_steps=5,
            gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=12, save_strategy="steps", save_steps=12,
            save_total_limit=1, output_dir=str(FOLDER / f"flags-{number}"),
        )  # fmt: skip
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (trainer.state.global_step, callback.done))
        assert all(other == everyone[0] for other in everyone), (mode, everyone)
        step, done = everyone[0]
        assert step < 150, (mode, step, callback.left)
        assert {event for event, _ in done} == {"on_evaluate", "on_save"}
        if mode == "at syncs and between":
            assert all(at % 3 == 0 for _, at in done), done
        found[f"{mode}, late: {late}"] = len(done)
    return found


TERMINATED: list[dict[str, Any]] = [
    {"sync_interval": 32},
    {"sync_interval": 32, "warmup_steps": 64},
    {"sync_interval": 32, "overlap": "delayed"},
    {"sync_seconds": 1000.0},
]


class Terminated(TrainerCallback):
    """SIGTERM comes at another step of each replica."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


def sigterm_saves_one_step_with_all() -> dict[str, Any]:
    """Between two syncs, by steps and by time: one whole checkpoint, and all stop at once."""
    found = []
    for number, settings in enumerate(TERMINATED):
        folder = FOLDER / f"terminated-{number}"
        at = 5 + dist.get_rank() if dist.is_initialized() else 5
        trainer = run(
            None, config=EDiTConfig(sync_timeout_seconds=60, **settings), callbacks=[Terminated(at)], max_steps=96,
            save_strategy="steps", save_steps=1000, output_dir=str(folder), enable_jit_checkpoint=True, no_wait=True,
        )  # fmt: skip
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (trainer.state.global_step, trainer._steps.own))
        steps = {step for step, _ in everyone}
        assert len(steps) == 1, everyone
        assert max(own for _, own in everyone) <= 9 + dist.get_world_size(), everyone
        saved = sorted(folder.glob("checkpoint-*"))
        assert [path.name for path in saved] == [f"checkpoint-{steps.pop()}"]
        assert problem(saved[0]) is None
        found.append(everyone)
    return {"steps": found}
