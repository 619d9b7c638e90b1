"""Where a training is whose replicas take different numbers of steps (A-EDiT).

The Trainer's step count, epochs, learning-rate schedule and end follow the steps of all replicas / R: exact, and equal
on all ranks, where the replicas meet and tell each other; between two meetings each goes by its own estimate. What
falls due on the way is decided by the Trainer's own rules, once for every global step.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import DefaultFlowCallback, Trainer, TrainerControl

from hf_edit.checkpoint.manifest import Manifest, has_edit_state
from hf_edit.checkpoint.state import read_host
from hf_edit.config import EDiTConfig
from hf_edit.method.schedule import GlobalProgress
from hf_edit.peers.layout import Layout
from hf_edit.sync.engine import Engine

_TrainerToBe: Any = Trainer if TYPE_CHECKING else object  # so that the mixin knows what it will be mixed into

FLAGS = {  # the engine's REQUESTS and the Trainer's flags
    "evaluate": "should_evaluate",
    "save": "should_save",
    "stop": "should_training_stop",
    "epoch_stop": "should_epoch_stop",
}


class FollowProgress:
    """A learning-rate scheduler that stands at the global step, however many steps this replica takes."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.progress: GlobalProgress | None = None  # None: one step is one step
        self._stands_at = self._last = 0

    def follow(self, progress: GlobalProgress, stands_at: int, last: int) -> None:
        """From here on it follows `progress`, up to the step `last`."""
        self.progress, self._stands_at, self._last = progress, stands_at, last

    def step(self, *args: Any, **kwargs: Any) -> None:
        """After an optimizer step, which `progress` has not been told of yet."""
        due = self._stands_at + 1
        if self.progress is not None:
            due = min(int(self.progress.value + self.progress.rate), self._last)
        for _ in range(self._stands_at, due):
            self.scheduler.step(*args, **kwargs)
        self._stands_at = max(self._stands_at, due)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scheduler, name)


class TrainerProgress(_TrainerToBe):
    """The part of `EDiTMixin` that follows the global progress."""

    edit_config: EDiTConfig
    edit_layout: Layout
    _engine: Engine | None
    _resumed: tuple[Path, Manifest] | None
    _resumed_host: dict[str, Any]
    _flow: DefaultFlowCallback | None = None
    _own_steps: int = 0  # optimizer steps of this replica, since the training began and over all its resumptions

    @property
    def _by_time(self) -> bool:
        return self.edit_config.sync_seconds is not None and self.edit_layout.num_replicas > 1

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple[Any, ...]:
        """As the Trainer's, but a fast replica may go through its data as often as all replicas together."""
        values = super().set_initial_training_values(args, dataloader)
        if not self._by_time:
            return values
        epochs, steps_per_epoch, examples, samples, batch, batches_per_epoch, max_steps = values
        self._num_epochs, self._steps_per_epoch = epochs, steps_per_epoch
        replicas = self.edit_layout.num_replicas
        if not self._data_is_sized:  # one epoch is all there is
            steps_per_epoch, batches_per_epoch = steps_per_epoch * replicas, batches_per_epoch * replicas
        # What it does by its rules is done below for every global step, not for every step of this replica.
        self._flow = self.pop_callback(DefaultFlowCallback) or self._flow
        return epochs * replicas + 1, steps_per_epoch, examples, samples, batch, batches_per_epoch, max_steps

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, resume_from_checkpoint: Any,
        trial: Any,
    ) -> tuple[int, int]:  # fmt: skip
        # Private in transformers 5.23, which reads from the step count where in its data a resumed run goes on. Here
        # that is another place for every replica. tests/launch/by_time.py fails when it moves.
        position = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self._own_steps = self.state.global_step
        rank = None
        if resume_from_checkpoint and has_edit_state(Path(resume_from_checkpoint)):
            folder = Path(resume_from_checkpoint)
            rank = read_host(folder, Manifest.read(folder), self.edit_layout)["rank"]
        if rank is not None and self.edit_layout.num_replicas > 1:
            self._own_steps = rank["own_steps"]
            if self._by_time and not self.args.ignore_data_skip:
                epochs, steps = divmod(self._own_steps, num_update_steps_per_epoch)
                position = epochs, steps * self.args.gradient_accumulation_steps
        return self._place_in_data(rank, position)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, standing at the global step with A-EDiT. One that follows a metric is left alone."""
        scheduler: Any = super().create_scheduler(*args, **kwargs)
        if self._by_time and hasattr(scheduler, "last_epoch") and hasattr(scheduler, "base_lrs"):
            self.lr_scheduler = scheduler = FollowProgress(scheduler)
        return scheduler

    def _start_progress(self) -> None:
        """The engine is ready: the schedule follows it."""
        assert self._engine is not None
        if not self._by_time:
            return
        self.state.num_train_epochs = self._num_epochs
        self._agreed_step = self._logged_at = self.state.global_step
        if self._resumed is None or self._resumed_host["rank"] is None:  # else it is this rank's own from before
            self._engine.progress.confirmed = float(self.state.global_step)
        if isinstance(self.lr_scheduler, FollowProgress):
            self.lr_scheduler.follow(self._engine.progress, self.lr_scheduler.last_epoch, self.state.max_steps)

    def _before_the_trainer_counts(self) -> None:
        """An optimizer step was taken, which the Trainer will count next: the sum shall be the global step."""
        self._own_steps += 1
        if self._by_time and self._engine is not None:
            progress = self._engine.progress
            estimate = min(int(progress.value + progress.rate), self.state.max_steps - 1)
            self.state.global_step = max(self.state.global_step, estimate) - 1

    def _log_by_progress(self) -> None:
        """Between two meetings: sets the Trainer's flag for logging if a global step on the way asks for it."""
        self.state.epoch = self.state.global_step / self._steps_per_epoch
        if self._due_in(self._logged_at, self.state.global_step).should_log:
            self.control.should_log = True
        self._logged_at = max(self._logged_at, self.state.global_step)

    def _agree_on_step(self) -> set[str]:
        """All replicas know of each other's steps: the global step becomes the same on all, and so what is due.

        It may only depend on what they have told each other. `max_steps` is their mean; where a slow replica applies a
        delayed sync before its `delay_steps`, the mean is less than that many steps below it.
        """
        assert self._engine is not None
        state, progress = self.state, self._engine.progress
        before = self._agreed_step
        if progress.at_apply >= state.max_steps:
            state.global_step = state.max_steps
        else:
            furthest = int(max(progress.furthest, progress.at_apply))
            state.global_step = max(before, min(furthest, state.max_steps - 1))
        self._agreed_step = state.global_step
        state.epoch = state.global_step / self._steps_per_epoch
        due = self._due_in(before, state.global_step)
        return {request for request, flag in FLAGS.items() if getattr(due, flag)}

    def _due_in(self, first: int, last: int) -> TrainerControl:
        """What the Trainer's own rules ask for after the global steps first + 1 ... last."""
        due = TrainerControl()
        assert self._flow is not None
        for step in range(first + 1, last + 1):
            self._flow.on_step_end(self.args, replace(self.state, global_step=step), due)
        if last // self._steps_per_epoch > first // self._steps_per_epoch:
            self._flow.on_epoch_end(self.args, self.state, due)
        return due

    def _stop_following(self) -> None:
        """The training has ended; `_own_steps` and the step count are those of its last step."""
        if self._flow is not None:
            self.callback_handler.callbacks.insert(0, self._flow)
            self._flow = None
