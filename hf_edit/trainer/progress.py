"""Where a training is whose replicas take different numbers of steps (A-EDiT).

The Trainer's step count, epochs, learning-rate schedule and end follow the steps of all replicas / R: exact, and equal
on all ranks, where the replicas tell each other; in between each goes by its own estimate. What falls due on the way is
decided by the Trainer's own rules, once for every global step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import DefaultFlowCallback, TrainerControl
from transformers.trainer_utils import has_length

from hf_edit.checkpoint.manifest import Manifest, has_edit_state
from hf_edit.checkpoint.state import read_host
from hf_edit.config import EDiTConfig
from hf_edit.method.schedule import GlobalProgress
from hf_edit.peers.layout import Layout
from hf_edit.sync.engine import Engine
from hf_edit.trainer.base import TrainerToBe
from hf_edit.trainer.checks import passed_over

FLAGS = {  # the conductor's REQUESTS and the Trainer's flags
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
        """After an optimizer step, which `progress` does not count yet."""
        self.go_to(int(self.progress.value + self.progress.rate), *args, **kwargs)

    def go_to(self, step: int, *args: Any, **kwargs: Any) -> None:
        """The global step is `step` or later; a scheduler that has been ahead of it waits there."""
        due = min(step, self._last)
        for _ in range(self._stands_at, due):
            self.scheduler.step(*args, **kwargs)
        self._stands_at = max(self._stands_at, due)

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler" or name.startswith("__"):  # asked of a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self.scheduler, name)


@dataclass
class GlobalSteps:
    """The steps of one training, as one rank counts them; all that the other parts of the Trainer know of it.

    Args:
        begun: False before the first training.
        by_time: replicas take different numbers of steps.
        sized: the data have a length.
        lockstep: all replicas are known to come to the same steps and epochs' ends.
        own: optimizer steps of this replica, since the training began and over all its resumptions.
        flow: the Trainer's own rules of what is due at which step.
    """

    begun: bool = False
    by_time: bool = False
    sized: bool = True
    lockstep: bool = True
    own: int = 0
    flow: DefaultFlowCallback | None = None
    num_epochs: int = 0
    steps_per_epoch: int = 1
    uncounted: bool = False  # the engine does not know of the last step yet
    warm_up: bool = False  # the last step was a synchronous one
    empty: bool = False  # no batch of the step under way has a label on any rank of the replica
    dropped: bool = False  # the gradients of the step under way, for its loss
    at_log: int = 0  # own steps at the last log entry
    agreed: int = 0  # the global step at which all last agreed
    logged: int = 0  # the global step up to which is logged what is due
    _new: bool = False
    _epoch_began_at: int = 0

    @property
    def out_of_data(self) -> bool:
        """True if an epoch has ended without a step: this rank's data are used up, and the Trainer asks for the end."""
        return self._epoch_began_at == self.own

    def begin_epoch(self, had_steps: bool = False) -> None:
        self._epoch_began_at = self.own - had_steps

    def take(self, warm_up: bool) -> None:
        """An optimizer step was taken."""
        self.own += 1
        self.uncounted = self._new = True
        self.warm_up = warm_up

    def take_new(self) -> bool:
        """True if a step was taken since the last call."""
        new, self._new = self._new, False
        return new

    def estimate(self, state: Any, progress: GlobalProgress) -> int:
        """The global step behind the step that was just taken, which `progress` does not count yet."""
        return max(state.global_step, min(int(progress.value + progress.rate), state.max_steps - 1))

    def agree(self, args: Any, state: Any, progress: GlobalProgress) -> set[str]:
        """All replicas know of each other's steps: the global step becomes the same on all; what is due by it.

        It may only depend on what they have reported to each other. `max_steps` is their mean; where a slow replica
        applies a delayed sync before its `delay_steps`, the mean is less than that many steps below it.
        """
        before = self.agreed
        if progress.at_apply >= state.max_steps:
            state.global_step = state.max_steps
        else:
            furthest = int(max(progress.furthest, progress.at_apply))
            state.global_step = max(before, min(furthest, state.max_steps - 1))
        self.agreed = state.global_step
        state.epoch = state.global_step / self.steps_per_epoch
        due = self.due_in(args, state, before, state.global_step)
        return {request for request, flag in FLAGS.items() if getattr(due, flag)}

    def log_is_due(self, args: Any, state: Any, stepped: bool) -> bool:
        """True if the Trainer's rules ask for a log here: the same on all ranks of a replica, unlike a flag."""
        if not self.by_time:
            rules, due = DefaultFlowCallback(), TrainerControl()
            (rules.on_step_end if stepped else rules.on_epoch_end)(args, state, due)
            return due.should_log
        state.epoch = state.global_step / self.steps_per_epoch
        due = self.due_in(args, state, self.logged, state.global_step)
        self.logged = max(self.logged, state.global_step)
        return due.should_log

    def due_in(self, args: Any, state: Any, first: int, last: int) -> TrainerControl:
        """What the Trainer's own rules ask for after the global steps first + 1 ... last."""
        due = TrainerControl()
        assert self.flow is not None
        for step in range(first + 1, last + 1):
            self.flow.on_step_end(args, replace(state, global_step=step), due)
        if last // self.steps_per_epoch > first // self.steps_per_epoch:
            self.flow.on_epoch_end(args, state, due)
        return due


class _FirstBatches:
    """The first `length` batches of a loader, as far as the Trainer asks before the training."""

    def __init__(self, loader: Any, length: int) -> None:
        self.dataset, self._length = getattr(loader, "dataset", None), length

    def __len__(self) -> int:
        return self._length


class TrainerProgress(TrainerToBe):
    """The part of `EDiTMixin` that follows the global progress."""

    edit_config: EDiTConfig
    edit_layout: Layout
    lr_scheduler: Any
    _engine: Engine | None
    _steps: GlobalSteps

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple[Any, ...]:
        """As the Trainer's, but an epoch is as long on all ranks as on that with the fewest batches; and with A-EDiT a
        fast replica may go through its data as often as all replicas together."""
        if self.edit_layout.num_replicas > 1:
            dataloader = self._as_long_as_the_shortest(dataloader)
        values = super().set_initial_training_values(args, dataloader)
        replicas = self.edit_layout.num_replicas
        by_time = (self.edit_config.sync_seconds is not None or self.edit_config.elastic) and replicas > 1
        # A stream may end on one replica before it does on another, and then nobody can count on the others' steps.
        sized = has_length(dataloader)
        self._steps = GlobalSteps(begun=True, by_time=by_time, sized=sized, lockstep=sized and not by_time)
        if not by_time:
            return values
        epochs, steps_per_epoch, examples, samples, batch, batches_per_epoch, max_steps = values
        self._steps.num_epochs, self._steps.steps_per_epoch = epochs, steps_per_epoch
        if not has_length(dataloader):  # one epoch is all there is
            steps_per_epoch, batches_per_epoch = steps_per_epoch * replicas, batches_per_epoch * replicas
        # What it does by its rules is done for every global step, not for every step of this replica.
        self._steps.flow = self.pop_callback(DefaultFlowCallback) or DefaultFlowCallback()
        return epochs * replicas + 1, steps_per_epoch, examples, samples, batch, batches_per_epoch, max_steps

    def _as_long_as_the_shortest(self, dataloader: Any) -> Any:
        """Ranks may have different numbers of batches (even_batches=False, a loader of the user's own): each would end
        its epochs by itself, and the ranks of one replica would wait for each other's gradients for ever.

        Raises:
            ValueError: a rank has no batch at all, or only some ranks know how many they have.
        """
        mine = len(dataloader) if has_length(dataloader) else None
        lengths = self._get_peers().gather_object(mine)
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
        # that is another place for every replica. tests/launch/scripts/by_time.py fails when it moves.
        position = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self._steps.own = self.state.global_step
        rank = None
        if resume_from_checkpoint and has_edit_state(Path(resume_from_checkpoint)):
            folder = Path(resume_from_checkpoint)
            host = read_host(folder, Manifest.read(folder), self.edit_layout, self.edit_config.elastic)
            rank = host["rank"]
            if rank is None and self.edit_config.elastic and host["totals"]:  # what the writer knew of this replica
                rank = {"own_steps": round(host["totals"][self.edit_layout.replica]), "data": None}
        if rank is not None and self.edit_layout.num_replicas > 1:
            self._steps.own = rank["own_steps"]
            if self._steps.by_time and not self.args.ignore_data_skip:
                epochs, steps = divmod(self._steps.own, num_update_steps_per_epoch)
                position = epochs, steps * self.args.gradient_accumulation_steps
        return self._place_in_data(rank, position)

    def _start_progress(self, first: bool) -> None:
        """The engine is ready: the schedule follows it. `first`: this rank has no progress of its own from before."""
        assert self._engine is not None
        steps = self._steps
        steps.begin_epoch()
        steps.agreed = steps.logged = self.state.global_step
        if not steps.by_time:
            return
        self.state.num_train_epochs = steps.num_epochs
        if first:
            self._engine.progress.confirmed = float(self.state.global_step)
            self._engine.set_interval()
        scheduler = self.lr_scheduler
        if isinstance(scheduler, FollowProgress):  # of an earlier training
            scheduler = scheduler.scheduler
        if hasattr(scheduler, "last_epoch") and hasattr(scheduler, "base_lrs"):
            scheduler = FollowProgress(scheduler, self._engine.progress, self.state.max_steps)
        self.lr_scheduler = self.callback_handler.lr_scheduler = scheduler

    def _before_the_trainer_counts(self) -> None:
        """An optimizer step was taken, which the Trainer will count next: the sum shall be the global step."""
        if self._engine is None:
            return
        if self._steps.uncounted:
            raise passed_over(self, "_maybe_log_save_evaluate")
        self._steps.take(self._engine.warming_up)
        if self._steps.by_time:
            self.state.global_step = self._steps.estimate(self.state, self._engine.progress) - 1

    def _stop_following(self) -> None:
        """The training has ended; the step counts are those of its last step."""
        if self._steps.flow is not None:
            self.callback_handler.callbacks.insert(0, self._steps.flow)
            self._steps.flow = None
