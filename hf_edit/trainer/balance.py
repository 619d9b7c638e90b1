"""Each replica's share of the batch follows its speed: who reads which rows, and how a larger share is computed.

A micro-batch of the whole job has R x S x per_device_train_batch_size rows, whatever the shares, so a position in the
data does not depend on them, and every row is read once. A rank computes its rows in pieces of at most
per_device_train_batch_size, so that it needs no more memory than before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor, nn
from torch.utils.data import BatchSampler

from hf_edit.config import EDiTConfig
from hf_edit.method.balance import Balance
from hf_edit.method.plan import SyncRecord
from hf_edit.peers.layout import Layout
from hf_edit.sync.engine import Engine
from hf_edit.trainer.base import TrainerToBe
from hf_edit.trainer.world import num_targets

READ_AHEAD = 2  # batches by Accelerate's loader, beside its workers


class UnevenBatchSampler:
    """Batches for the ranks in turn, as `BatchSamplerShard` deals them out, each of as many rows as its replica takes.

    The last micro-batch of an epoch is filled up from the epoch's first rows, as Accelerate does, unless `drop_last`.

    Args:
        inner: gives the rows, in batches of `batch_size`.
        plan: from when on which shares [R] hold: ((epoch, micro-batch), rows of a rank of each replica).
    """

    def __init__(self, inner: BatchSampler, layout: Layout, plan: list[tuple[tuple[int, int], list[int]]]) -> None:
        self.inner, self.layout, self.plan = inner, layout, plan
        self.sampler, self.drop_last = inner.sampler, inner.drop_last
        self.epoch = 0
        self._rows = inner.batch_size * layout.num_replicas * layout.replica_size  # of a micro-batch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        for part in (self.inner, self.sampler):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def shares(self, number: int) -> list[int]:
        """Of the micro-batch of this number in the epoch."""
        return [shares for start, shares in self.plan if start <= (self.epoch, number)][-1]

    def __len__(self) -> int:
        rows = len(self.inner.sampler)  # type: ignore[arg-type]
        whole = rows // self._rows if self.drop_last else -(-rows // self._rows)
        return whole * self.layout.num_replicas * self.layout.replica_size

    def __iter__(self) -> Iterator[list[int]]:
        first: list[int] = []
        rows: list[int] = []
        number = 0
        for row in self.inner.sampler:
            rows.append(row)
            if len(rows) == self._rows:
                first = first or rows
                yield from self._dealt(rows, number)
                rows, number = [], number + 1
        if rows and not self.drop_last:
            first = first or rows
            while len(rows) < self._rows:
                rows = rows + first[: self._rows - len(rows)]
            yield from self._dealt(rows, number)

    def _dealt(self, rows: list[int], number: int) -> Iterator[list[int]]:
        start = 0
        for share in self.shares(number):
            for _ in range(self.layout.replica_size):
                yield rows[start : start + share]
                start += share


class TrainerBalance(TrainerToBe):
    """The part of `EDiTMixin` that deals rows out by speed."""

    edit_config: EDiTConfig
    edit_layout: Layout
    _engine: Engine | None
    current_gradient_accumulation_steps: Any
    _balance: Balance | None = None
    _rows = 0  # of this rank since the last sync

    def _start_balance(self) -> None:
        """Before the first batch is drawn."""
        self._balance, self._rows = None, 0
        if not self.edit_config.balance:
            return
        loader, size = self.callback_handler.train_dataloader, self._train_batch_size
        shard = getattr(loader, "batch_sampler", None)
        if isinstance(shard, BatchSamplerShard) and isinstance(shard.batch_sampler, UnevenBatchSampler):
            shard.batch_sampler = shard.batch_sampler.inner  # of an earlier training
        inner = getattr(shard, "batch_sampler", None)
        if not isinstance(shard, BatchSamplerShard) or shard.split_batches or type(inner) is not BatchSampler:
            raise ValueError(
                "balance=True deals the rows of a data set out by the replicas' speeds, and needs one with a length "
                f"and torch's own BatchSampler; here the loader has {type(shard).__name__} of {type(inner).__name__}. "
                "Use a map-style data set without split_batches, or leave balance out and set sync_seconds (A-EDiT)."
            )
        if inner.batch_size != size:
            raise ValueError(
                f"balance=True: the loader's batches have {inner.batch_size} rows, and per_device_train_batch_size is "
                f"{size}. Give both the same number."
            )
        if size < 2 or self.args.auto_find_batch_size:
            raise ValueError(
                f"balance=True with per_device_train_batch_size={size}, auto_find_batch_size="
                f"{self.args.auto_find_batch_size}: it moves rows of a rank's batch to faster replicas, so there must "
                "be at least 2, and their number must stay. Raise it and lower gradient_accumulation_steps."
            )
        equal = [size] * self.edit_layout.num_replicas
        self._balance = Balance(equal)
        self._plan: list[tuple[tuple[int, int], list[int]]] = [((0, 0), equal)]
        shard.batch_sampler = UnevenBatchSampler(inner, self.edit_layout, self._plan)
        shard.batch_size, shard.even_batches = None, False  # its batches are of many sizes, and as many for each rank
        workers = getattr(loader, "num_workers", 0) * (getattr(loader, "prefetch_factor", None) or 0)
        self._ahead = max(self._get_peers().gather_object(READ_AHEAD + workers))

    # -- at a sync ----------------------------------------------------------------------------------------------------

    def _row_tallies(self) -> dict[str, float]:
        """What the others are told at a sync."""
        if self._balance is None:
            return {}
        rows, self._rows = self._rows, 0
        share = self._balance.shares[self.edit_layout.replica] / self.edit_layout.replica_size
        return {"rows": float(rows), "share": share}

    def _forget_rows(self) -> None:
        """What was learnt from them since the last sync is given up."""
        self._rows = 0

    def _rebalance(self, record: SyncRecord) -> None:
        """All ranks have the same numbers and are at the same step."""
        if self._balance is None:
            return
        told = record.plan.tallies
        shares = self._balance.look(told["rows"].tolist(), told["training_seconds"].tolist())
        if shares is None:
            return
        self._plan.append(((self._position.epoch, self._position.num_batches + self._ahead), shares))
        (epoch, number), _ = self._plan[-1]
        rows = ", ".join(map(str, shares))
        self._say_once(f"from batch {number} of epoch {epoch} on, replicas take {rows} rows.")

    def _balance_state(self) -> dict[str, Any] | None:
        """For a checkpoint."""
        if self._balance is None:
            return None
        plan = [[epoch, number, *shares] for (epoch, number), shares in self._plan]
        return {"plan": plan, "shares": self._balance.shares, "speeds": self._balance.speeds}

    def _restore_balance(self, state: dict[str, Any] | None) -> None:
        assert self._engine is not None
        if self._balance is None or state is None or self._engine.warming_up:  # in which all have the same share
            return
        if sum(state["shares"]) == sum(self._balance.shares):
            self._balance = Balance(list(state["shares"]), list(state["speeds"]))
            self._plan[:] = [((epoch, number), shares) for epoch, number, *shares in state["plan"]]

    # -- in a step ----------------------------------------------------------------------------------------------------

    def _step_in_pieces(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> Tensor:
        """`training_step` of the Trainer, for a share that may be larger than a rank's batch; the loss of all."""
        step = super().training_step
        if self._balance is None:
            return step(model, inputs, num_items_in_batch)
        assert self._engine is not None
        rows = _num_rows(inputs)
        dealt = [shares[self.edit_layout.replica] for _, shares in self._plan]
        if rows not in dealt:
            raise ValueError(
                f"balance=True deals {dealt[-1]} rows to a rank here, but its batch has {rows}. Use a data collator "
                "that gives a row for each example, or leave balance out."
            )
        if not self._engine.warming_up:
            self._rows += rows
        size = self._train_batch_size
        if rows <= size:
            return step(model, inputs, num_items_in_batch)
        num_pieces = -(-rows // size)
        edges = [rows * i // num_pieces for i in range(num_pieces + 1)]  # one shape is faster than two in turn
        cuts = list(itertools.pairwise(edges))
        pieces = [{name: _cut(value, *cut, rows) for name, value in inputs.items()} for cut in cuts]
        # Private in transformers 5.24; see `TrainerStep._look_for_labels`.
        targets = [num_targets(piece, self._loss_shifts_labels) for piece in pieces]
        known = [int(count) for count in targets if count is not None]
        counts = known if len(known) == num_pieces else [end - start for start, end in cuts]
        whole = sum(counts)
        losses = [
            self._step_piece(step, piece, count, whole, model, num_items_in_batch)
            for piece, count in zip(pieces, counts, strict=True)
        ]
        return torch.stack(losses).sum()

    def _step_piece(
        self, step: Any, piece: Any, count: int, whole: int, model: nn.Module, num_items_in_batch: Any
    ) -> Tensor:
        """`count` of the `whole` labels (or rows) are in this piece, so much a mean over it counts; a sum over all
        labels is divided already."""
        if count == 0:  # a mean over none is 0/0
            with self.accelerator.without_gradient(model):
                return torch.zeros_like(step(model, piece, num_items_in_batch))
        accumulation = self.current_gradient_accumulation_steps
        self.current_gradient_accumulation_steps = accumulation * whole / count
        try:
            return step(model, piece, num_items_in_batch)
        finally:
            self.current_gradient_accumulation_steps = accumulation


def _num_rows(inputs: Any) -> int:
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)] if isinstance(inputs, Mapping) else []
    sizes = {len(tensor) for tensor in tensors if tensor.ndim}
    if len(sizes) != 1:
        raise ValueError(
            f"balance=True cuts batches by rows, but this one has tensors of {sorted(sizes)} rows. Use a data collator "
            "that gives a row for each example, or leave balance out."
        )
    return sizes.pop()


def _cut(value: Any, start: int, end: int, rows: int) -> Any:
    if isinstance(value, Tensor):
        return value[start:end] if value.ndim else value
    return value[start:end] if isinstance(value, list) and len(value) == rows else value
