"""What the Trainer gathers over the world in every step: here over the replica, or at the next sync.

Tokens for the scale of the loss, tokens seen, floating point operations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer

from hf_edit.method.plan import SyncRecord
from hf_edit.peers.group import ProcessGroupPeers
from hf_edit.peers.layout import Layout
from hf_edit.sync.engine import Engine
from hf_edit.telemetry.logs import GlobalCount
from hf_edit.trainer.accelerate_hook import of_nested

_TrainerToBe: Any = Trainer if TYPE_CHECKING else object  # so that the mixin knows what it will be mixed into


class TrainerCounts(_TrainerToBe):
    """The part of `EDiTMixin` that counts."""

    current_flos: float
    edit_layout: Layout
    _engine: Engine | None
    _peers: ProcessGroupPeers | None

    def _start_counts(self) -> None:
        self._input_tokens = GlobalCount(self.edit_layout.num_replicas, self.state.num_input_tokens_seen)
        self._flos = GlobalCount(self.edit_layout.num_replicas, self.state.total_flos)

    def _counts(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"input_tokens": asdict(self._input_tokens), "flos": asdict(self._flos)}

    def _restore_counts(self, state: dict[str, Any]) -> None:
        self._input_tokens = GlobalCount(**state["input_tokens"])
        self._flos = GlobalCount(**state["flos"])

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        # Private in transformers 5.23, as are the other underscored methods below; tests/launch counts the bytes that
        # cross between replicas and compares losses, so it fails when one of them moves.
        if self._engine is None or self._engine.warming_up:
            return super()._get_num_items_in_batch(batch_samples, device)
        with self._gather_in_replica():
            items = super()._get_num_items_in_batch(batch_samples, device)
        if items is not None and self.args.average_tokens_across_devices:
            # The loss is multiplied by all R * S processes, the gradient averaged over S: as if every replica had as
            # many tokens as this one.
            items = items * self.edit_layout.num_replicas
        return items

    def _track_num_input_tokens(self, inputs: Any) -> None:
        if self._engine is None:
            return super()._track_num_input_tokens(inputs)
        before = self.state.num_input_tokens_seen
        with self._gather_in_replica():
            super()._track_num_input_tokens(inputs)
        counted = self.state.num_input_tokens_seen - before
        self._input_tokens.add(counted)
        self._engine.tally(input_tokens=counted / self.edit_layout.replica_size)
        self.state.num_input_tokens_seen = round(self._input_tokens.value)

    def store_flos(self) -> None:
        if self._engine is None:
            return super().store_flos()
        self._flos.add(self.current_flos * self.edit_layout.replica_size)
        self._engine.tally(flos=self.current_flos)
        self.current_flos = 0
        self.state.total_flos = self._flos.value

    @contextlib.contextmanager
    def _gather_in_replica(self) -> Iterator[None]:
        """Inside, `accelerator.gather` (and so `gather_for_metrics`) reaches the ranks of the replica only."""
        assert self._peers is not None
        self.accelerator.gather = of_nested(self._peers.inside.gather)
        try:
            yield
        finally:
            del self.accelerator.gather

    def _hand_over_counts(self) -> None:
        self._input_tokens.hand_over()
        self._flos.hand_over()

    def _confirm_counts(self, record: SyncRecord) -> None:
        self._input_tokens.confirm(float(record.plan.tallies["input_tokens"].sum()))
        self._flos.confirm(float(record.plan.tallies["flos"].sum()))
        self.state.total_flos = self._flos.value
        if self.args.include_num_input_tokens_seen != "no":  # else it stays 0, as the Trainer leaves it
            self.state.num_input_tokens_seen = round(self._input_tokens.value)
