"""The Trainer's data: who reads them, where a stream ends, and the place in them that a resumed run finds again."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from hf_edit.checkpoint.manifest import Manifest
from hf_edit.method.conductor import Conductor
from hf_edit.peers.layout import Layout
from hf_edit.sync.engine import Engine
from hf_edit.trainer.accelerate_hook import dispatching
from hf_edit.trainer.base import TrainerToBe
from hf_edit.trainer.position import DataPosition
from hf_edit.trainer.progress import GlobalSteps

logger = logging.getLogger(__name__)


class TrainerData(TrainerToBe):
    """The part of `EDiTMixin` that reads the data, and keeps the position in them."""

    edit_layout: Layout
    _conductor: Conductor
    _engine: Engine | None
    _steps: GlobalSteps
    _resumed: tuple[Path, Manifest] | None
    _position: DataPosition
    _begin_at: tuple[int, int] = (0, 0)  # epoch, batches
    _saved_position: dict[str, Any] | None = None
    _is_restored = False
    _dispatch_asked: bool | None = None
    _said_uneven = False
    _ended_early: Any = None  # the epoch's iterator that has ended on some rank which steps with this one

    def _place_in_data(self, rank: dict[str, Any] | None, otherwise: tuple[int, int]) -> tuple[int, int]:
        """Epoch, and batches of it, that this rank's saved state says; `otherwise` if that does not fit this run."""
        saved = rank and rank["data"]
        self._begin_at, self._saved_position = otherwise, None
        if saved and not self.args.ignore_data_skip:
            if saved["batch"] == self._batch():
                self._begin_at, self._saved_position = (saved["epoch"], saved["num_batches"]), saved
            else:
                self._say_once(
                    f"batch size and accumulation were {saved['batch']} at the checkpoint and are {self._batch()}: the "
                    "data go on where a plain Trainer's would."
                )
        return self._begin_at

    def _batch(self) -> list[int]:
        return [self._train_batch_size, self.args.gradient_accumulation_steps]

    def _start_position(self) -> None:
        self._position = DataPosition(self.callback_handler.train_dataloader, *self._begin_at, self._saved_position)
        self._begin_at, self._saved_position, self._is_restored = (0, 0), None, False

    def _end_position(self) -> None:
        if hasattr(self, "_position"):  # the training has begun
            self._position.let_go()

    def _position_state(self) -> dict[str, Any]:
        return {**self._position.state(), "batch": self._batch()}

    def _begin_epoch(self) -> None:
        self._steps.begin_epoch(had_steps=bool(self._position.num_batches))  # a resumed run goes on in an epoch

    def _end_epoch(self) -> None:
        if self._position.must_move:  # the checkpoint was behind the epoch's last step, so that no batch was asked for
            self._go_to_saved_place(None)
        if not self._conductor.stopping:  # else it may be in the middle of the epoch
            unused = 0 if self._steps.sized else self._position.num_batches % self.args.gradient_accumulation_steps
            self._position.end_epoch(unused)
        self._ended_early = None

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """As the Trainer's; the first call of a resumed run goes to the place in the data first."""
        if self._engine is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._position.must_move:
            self._go_to_saved_place(epoch_iterator)
        batches = self._position.watch(epoch_iterator)
        if not self._steps.sized:
            batches = self._as_many_as_the_others(batches, epoch_iterator, num_batches, device)
        return super().get_batch_samples(batches, num_batches, device)

    def _as_many_as_the_others(
        self, batches: Iterator[Any], epoch_iterator: Any, num_batches: int, device: Any
    ) -> Iterator[Any]:
        """A stream may end on one rank before it does on another; those that step together end it together."""
        assert self._engine is not None
        warming_up, peers = self._engine.warming_up, self._engine.peers
        if peers.inside.size == 1 and not warming_up:
            return batches
        if self._ended_early is epoch_iterator:
            return iter(())
        drawn = list(islice(batches, num_batches))
        if warming_up:
            counts = peers.gather_object(len(drawn))
        else:
            counts = peers.inside.gather(torch.tensor(len(drawn), device=device)).tolist()
        if min(counts) < num_batches:
            self._ended_early = epoch_iterator
            self._position.num_batches -= len(drawn) - min(counts)
        if min(counts) < max(counts) and self.edit_layout.shard == 0 and not self._said_uneven:
            self._said_uneven = True
            logger.warning(
                "EDiT: on a rank that steps with replica %d a stream has ended before it has on others; an epoch ends "
                "with the first.", self.edit_layout.replica,
            )  # fmt: skip
        return iter(drawn[: min(counts)])

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's. All ranks evaluate together, so process 0 may read a stream for all, as is Accelerate's
        default: each for itself they might have different numbers of batches. Batches of different widths need
        `accelerator_config={"dispatch_batches": False}`, as Accelerate then says."""
        with self._dispatching():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As `get_eval_dataloader`."""
        with self._dispatching():
            return super().get_test_dataloader(*args, **kwargs)

    def _dispatching(self) -> contextlib.AbstractContextManager[None]:
        if self.edit_layout.num_replicas == 1:
            return contextlib.nullcontext()
        return dispatching(self.accelerator.dataloader_config, self._dispatch_asked)

    def _go_to_saved_place(self, epoch_iterator: Any) -> None:
        problem = self._position.move(epoch_iterator)
        if problem and self.edit_layout.shard == 0:
            logger.warning(
                "EDiT: replica %d goes on with other data than if it had never stopped: %s.",
                self.edit_layout.replica, problem,
            )  # fmt: skip
        if self._position.num_batches and self._resumed:
            # Private in transformers 5.24, which would do this after the batches are drawn. The state is that of the
            # checkpoint's moment: a collator or data set of this process goes on drawing from it.
            super()._load_rng_state(self._place_of_random_state(str(self._resumed[0])))
            self._is_restored = True

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._is_restored:
            self._is_restored = False
            return
        super()._load_rng_state(checkpoint and self._place_of_random_state(checkpoint))
