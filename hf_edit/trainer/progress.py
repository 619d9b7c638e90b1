"""Where a training is whose replicas take different numbers of steps (A-EDiT).

The Trainer's step count, epochs, learning-rate schedule and end follow the steps of all replicas / R: exact, and equal
on all ranks, where the replicas meet and tell each other; between two meetings each goes by its own estimate. What
falls due on the way is decided by the Trainer's own rules, once for every global step.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from transformers import DefaultFlowCallback, Trainer, TrainerControl
from transformers.trainer_utils import has_length

from hf_edit.checkpoint.manifest import Manifest, has_edit_state
from hf_edit.checkpoint.state import read_host
from hf_edit.config import EDiTConfig
from hf_edit.method.schedule import GlobalProgress
from hf_edit.peers.layout import Layout
from hf_edit.sync.engine import Engine
from hf_edit.trainer.checks import passed_over

_TrainerToBe: Any = Trainer if TYPE_CHECKING else object  # so that the mixin knows what it will be mixed into

FLAGS = {  # the engine's REQUESTS and the Trainer's flags
    "evaluate": "should_evaluate",
    "save": "should_save",
    "stop": "should_training_stop",
    "epoch_stop": "should_epoch_stop",
}


class FollowProgress:
    """A learning-rate scheduler that stands at the global step, however many steps this replica takes.

    Args:
        scheduler: torch's; what it has, this one has, too.
        progress: which it follows from where it stands, up to the step `last`.
    """

    def __init__(self, scheduler: Any, progress: GlobalProgress, last: int) -> None:
        self.scheduler, self.progress = scheduler, progress
        self._stands_at, self._last = scheduler.last_epoch, last

    def step(self, *args: Any, **kwargs: Any) -> None:
        """After an optimizer step, which `progress` has not been told of yet."""
        due = min(int(self.progress.value + self.progress.rate), self._last)
        for _ in range(self._stands_at, due):
            self.scheduler.step(*args, **kwargs)
        self._stands_at = max(self._stands_at, due)

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler" or name.startswith("__"):  # asked of a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self.scheduler, name)


class _FirstBatches:
    """The first `length` batches of a loader, as far as the Trainer asks before the training."""

    def __init__(self, loader: Any, length: int) -> None:
        self.dataset, self._length = getattr(loader, "dataset", None), length

    def __len__(self) -> int:
        return self._length


class TrainerProgress(_TrainerToBe):
    """The part of `EDiTMixin` that follows the global progress."""

    edit_config: EDiTConfig
    edit_layout: Layout
    _engine: Engine | None
    _resumed: tuple[Path, Manifest] | None
    _resumed_host: dict[str, Any]
    _flow: DefaultFlowCallback | None = None
    _own_steps: int = 0  # optimizer steps of this replica, since the training began and over all its resumptions
    _counted_steps: int  # of these, what the engine has been told of
    _data_is_sized: bool
    lr_scheduler: Any

    @property
    def _by_time(self) -> bool:
        return self.edit_config.sync_seconds is not None and self.edit_layout.num_replicas > 1

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple[Any, ...]:
        """As the Trainer's, but an epoch is as long on all ranks as on that with the fewest batches; and with A-EDiT a
        fast replica may go through its data as often as all replicas together."""
        if self.edit_layout.num_replicas > 1:
            dataloader = self._as_long_as_the_shortest(dataloader)
        # A stream may end on one replica before it does on another, and then nobody can count on the others' steps.
        self._data_is_sized = has_length(dataloader)
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

    def _as_long_as_the_shortest(self, dataloader: Any) -> Any:
        """Ranks may have different numbers of batches (even_batches=False, a loader of the user's own): each would end
        its epochs by itself, and the ranks of one replica would wait for each other's gradients for ever.

        Raises:
            ValueError: a rank has no batch at all, or only some ranks know how many they have.
        """
        mine = len(dataloader) if has_length(dataloader) else None
        lengths: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(lengths, mine)
        if len(set(lengths)) == 1 and mine != 0:
            return dataloader
        if None in lengths or 0 in lengths:
            raise ValueError(
                f"Batches in an epoch by rank: {lengths} (None: no length). Every rank needs at least one, and all or "
                "none a length."
            )
        self._say_once(
            f"ranks have between {min(lengths)} and {max(lengths)} batches in an epoch; it ends after {min(lengths)} "
            "on all of them."
        )
        return _FirstBatches(dataloader, min(lengths))

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
        if not resume_from_checkpoint or not has_edit_state(Path(resume_from_checkpoint)):
            return position
        folder = Path(resume_from_checkpoint)
        host = read_host(folder, Manifest.read(folder), self.edit_layout)
        if host["rank"] is None or self.edit_layout.num_replicas == 1:
            return position
        self._own_steps = host["rank"]["own_steps"]
        if not self._by_time or self.args.ignore_data_skip:
            return position
        epochs, steps = divmod(self._own_steps, num_update_steps_per_epoch)
        return epochs, steps * self.args.gradient_accumulation_steps

    def _start_progress(self) -> None:
        """The engine is ready: the schedule follows it with A-EDiT. One that follows a metric is left alone."""
        assert self._engine is not None
        if not self._by_time:
            return
        self.state.num_train_epochs = self._num_epochs
        self._agreed_step = self._logged_at = self.state.global_step
        if self._resumed is None or self._resumed_host["rank"] is None:  # else it is this rank's own from before
            self._engine.progress.confirmed = float(self.state.global_step)
        scheduler = self.lr_scheduler
        if isinstance(scheduler, FollowProgress):  # of an earlier training
            scheduler = scheduler.scheduler
        if hasattr(scheduler, "last_epoch") and hasattr(scheduler, "base_lrs"):
            scheduler = FollowProgress(scheduler, self._engine.progress, self.state.max_steps)
        self.lr_scheduler = self.callback_handler.lr_scheduler = scheduler

    def _before_the_trainer_counts(self) -> None:
        """An optimizer step was taken, which the Trainer will count next: the sum shall be the global step.

        Raises:
            RuntimeError: the engine has not been told of the one before.
        """
        if self._own_steps != self._counted_steps:
            raise passed_over(self, "_maybe_log_save_evaluate")
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
