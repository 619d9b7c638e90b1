"""One training step, in the world of the replica: its loss, and what the Trainer counts in it.

Labels for the scale of the loss, tokens seen, floating point operations: over the replica, or at the next sync.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from hf_edit.method.plan import SyncRecord
from hf_edit.peers.layout import Layout
from hf_edit.sync.engine import Engine
from hf_edit.telemetry.logs import GlobalCount
from hf_edit.trainer.base import TrainerToBe
from hf_edit.trainer.progress import GlobalSteps
from hf_edit.trainer.world import generators_of, modules_of, num_targets


class TrainerStep(TrainerToBe):
    """The part of `EDiTMixin` that takes steps and counts."""

    current_flos: float
    edit_layout: Layout
    _engine: Engine | None
    _steps: GlobalSteps

    def _start_counts(self) -> None:
        self._step_modules, self._generators = modules_of(self), generators_of(self.model)
        self._unlabelled: list[Any] = []  # batches of the step under way that have no label on this rank
        self._saw_step = self._batch_size_agreed = False
        self._input_tokens = GlobalCount(self.edit_layout.num_replicas, self.state.num_input_tokens_seen)
        self._flos = GlobalCount(self.edit_layout.num_replicas, self.state.total_flos)

    def _counts(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"input_tokens": asdict(self._input_tokens), "flos": asdict(self._flos)}

    def _restore_counts(self, state: dict[str, Any]) -> None:
        self._input_tokens = GlobalCount(**state["input_tokens"])
        self._flos = GlobalCount(**state["flos"])

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self._engine is None:
            return super().training_step(model, inputs, num_items_in_batch)
        self._keep_driver_last()
        self._saw_step = True
        main_input_name = getattr(self.model, "main_input_name", "input_ids")
        main_input = inputs.get(main_input_name) if isinstance(inputs, Mapping) else None
        tokens = main_input.numel() if isinstance(main_input, Tensor) else 0
        unlabelled = any(inputs is batch for batch in self._unlabelled)
        seen = self.state.num_input_tokens_seen
        with contextlib.ExitStack() as stack:
            if self.args.auto_find_batch_size:
                stack.enter_context(self._same_batch_size())
            stack.enter_context(self._in_step())
            if unlabelled:
                stack.enter_context(self.accelerator.without_gradient(model))
            loss = self._step_in_pieces(model, inputs, num_items_in_batch)
        if unlabelled:
            loss = torch.zeros_like(loss)
        if self.state.num_input_tokens_seen != seen:  # GRPO counts them here
            self._count_input_tokens(seen, in_replica=not self._engine.warming_up)
        self._engine.counts.tally(loss=loss / self.edit_layout.replica_size, tokens=tokens)
        self._add_to_step_loss(loss)
        return loss

    @contextlib.contextmanager
    def _same_batch_size(self) -> Iterator[None]:
        """The first batch fits all ranks, or all raise what makes auto_find_batch_size try a smaller one."""
        assert self._engine is not None
        failure: RuntimeError | None = None
        try:
            yield
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if self._batch_size_agreed:
                raise RuntimeError(
                    f"Step {self.state.global_step + 1} ran out of memory with a batch size that fitted all ranks at "
                    "first; the other replicas train on and cannot change it now. Set a smaller "
                    "per_device_train_batch_size."
                ) from error
            failure = error
        if self._batch_size_agreed:
            return
        if self._engine.agree({"smaller_batch"} if failure else ()):
            raise failure or RuntimeError("CUDA out of memory. (On another rank: all take a smaller batch.)")
        self._batch_size_agreed = True

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        if self._engine is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        with self._in_step():
            batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._look_for_labels(batches, device)
        return batches, items.clamp(min=1) if isinstance(items, Tensor) else items

    def _look_for_labels(self, batches: list[Any], device: torch.device) -> None:
        """Which batches of an optimizer step have nothing to learn from on this rank, and whether none has on any rank
        of the replica."""
        assert self._engine is not None
        self._unlabelled, self._steps.empty = [], False
        # Private in transformers 5.24: whether the first label of a row is no target. tests/launch fail when it moves.
        counts = [num_targets(batch, self._loss_shifts_labels) for batch in batches]
        known = [count.to(device) for count in counts if count is not None]
        if not known or len(known) < len(counts):
            return
        own = torch.stack(known)
        everyones = self._engine.peers.inside.sum(own.sum()[None])
        *numbers, in_replica = torch.cat([own, everyones]).tolist()
        self._unlabelled = [batch for batch, number in zip(batches, numbers, strict=True) if number == 0]
        # In the warm-up the other replicas' gradients are averaged into this one's.
        self._steps.empty = in_replica == 0 and not self._engine.warming_up

    def _leave_out_empty_step(self) -> None:
        """The optimizer is about to step."""
        if self._steps.empty:
            self._drop_gradients()
            self._steps.at_log += 1  # it has no loss that the next log entry could average

    def _track_num_input_tokens(self, inputs: Any) -> None:
        # Private in transformers 5.24; tests/launch counts the bytes that cross between replicas.
        if self._engine is None:
            return super()._track_num_input_tokens(inputs)
        before = self.state.num_input_tokens_seen
        with self.accelerator.in_replica(self._engine.peers):
            super()._track_num_input_tokens(inputs)
        self._count_input_tokens(before, in_replica=True)

    def _count_input_tokens(self, before: int, in_replica: bool) -> None:
        """The state's count has gone up since `before` by this replica's tokens, or by those of all."""
        assert self._engine is not None
        counted = self.state.num_input_tokens_seen - before
        if not in_replica:
            counted /= self.edit_layout.num_replicas
        self._input_tokens.add(counted)
        self._engine.counts.tally(input_tokens=counted / self.edit_layout.replica_size)
        self.state.num_input_tokens_seen = round(self._input_tokens.value)

    def store_flos(self) -> None:
        if self._engine is None:
            return super().store_flos()
        self._flos.add(self.current_flos * self.edit_layout.replica_size)
        self._engine.counts.tally(flos=self.current_flos)
        self.current_flos = 0
        self.state.total_flos = self._flos.value

    def _in_step(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the world is that of the step: the replica, and in the warm-up all of it."""
        if self._engine is None or self._engine.warming_up:
            return contextlib.nullcontext()
        return self.accelerator.in_replica(self._engine.peers, self._step_modules, self._generators)

    def _hand_over_counts(self) -> dict[str, Tensor | float]:
        self._input_tokens.hand_over()
        self._flos.hand_over()
        return {**self._spike_tallies(), **self._row_tallies()}

    def _confirm_counts(self, record: SyncRecord) -> None:
        self._input_tokens.confirm(float(record.plan.tallies["input_tokens"].sum()))
        self._flos.confirm(float(record.plan.tallies["flos"].sum()))
        self.state.total_flos = self._flos.value
        self.state.num_input_tokens_seen = round(self._input_tokens.value)
