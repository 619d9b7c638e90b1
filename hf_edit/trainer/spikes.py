"""The loss of every step is watched, and where it spikes the replica responds as the settings say.

The replica's loss is the mean over its ranks; in the warm-up, whose steps all take together, over all ranks. With
`on_loss_spike="log"` nothing waits for it: on CUDA a loss is looked at once it has come to the host. The other
responses must know it before the optimizer steps, and wait.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from torch import Tensor

from hf_edit.config import EDiTConfig
from hf_edit.method.conductor import Conductor
from hf_edit.method.spikes import LossMonitor, Place
from hf_edit.peers.layout import Layout
from hf_edit.sync.engine import Engine
from hf_edit.sync.measure import HostCopy
from hf_edit.trainer.base import TrainerToBe
from hf_edit.trainer.position import DataPosition
from hf_edit.trainer.progress import GlobalSteps


class TrainerSpikes(TrainerToBe):
    """The part of `EDiTMixin` that watches the loss."""

    edit_config: EDiTConfig
    edit_layout: Layout
    _conductor: Conductor
    _engine: Engine | None
    _position: DataPosition
    _steps: GlobalSteps

    def _start_spikes(self) -> None:
        config = self.edit_config
        self._monitor = LossMonitor(config.loss_spike_threshold, config.max_consecutive_spikes)
        self._step_loss: Tensor | None = None  # of the step under way, on this rank
        self._losses: deque[tuple[HostCopy, Place]] = deque()

    def _add_to_step_loss(self, loss: Tensor) -> None:
        loss = loss.detach().double()
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss

    def _watch_loss(self) -> None:
        """The optimizer is about to step."""
        assert self._engine is not None
        loss, self._step_loss, self._steps.dropped = self._step_loss, None, False
        if loss is None or self._steps.empty:
            return
        loss = self._engine.peers.inside.sum((loss / self.edit_layout.replica_size)[None])
        if self._engine.warming_up:
            self._engine.peers.average(loss)
        place = Place(self.state.global_step + 1, self._position.epoch, self._position.num_batches)
        self._losses.append((HostCopy(loss), place))
        if self.edit_config.on_loss_spike != "log" and (size := self._read_losses(wait=True)):
            self._respond(size, place)

    def _read_losses(self, wait: bool = False) -> float:
        """Looks at the losses that have come to the host; the size of the last one's spike, 0 if it is none."""
        size = 0.0
        while self._losses and (wait or self._losses[0][0].ready):
            copy, place = self._losses.popleft()
            size = self._monitor.update(copy.read()[0], place)
        return size

    def _respond(self, size: float, place: Place) -> None:
        """Of all ranks that share the loss: the step is left out, and what else is asked for."""
        assert self._engine is not None
        self._steps.dropped = True
        self._drop_gradients()
        response = self.edit_config.on_loss_spike
        beyond_help = math.isinf(size) and self._monitor.streak > self.edit_config.max_consecutive_spikes
        if response == "rollback" and not self._engine.warming_up and not beyond_help:
            self._engine.go_back(clear=math.isinf(size))
            self._forget_rows()
        if response == "stop" or beyond_help:
            self._conductor.request({"stop"})
            self._say_once(
                f"the training stops at the next sync: the loss of step {place.step} "
                + ("is not finite" if math.isinf(size) else f"lies {size:.1f} standard deviations above its mean")
                + (f", as those of the {self._monitor.streak - 1} steps before." if beyond_help else ".")
            )

    def _drop_gradients(self) -> None:
        """Without gradients an optimizer moves neither parameters nor moments."""
        if self.accelerator.scaler is not None and not self.args.max_grad_norm:
            self.accelerator.unscale_gradients(self.optimizer)  # the scaler wants to have seen them
        self.model_wrapped.zero_grad()

    def _spike_tallies(self) -> dict[str, Tensor | float]:
        """For the others, at a sync that begins; the same on all ranks of the replica, so one tells it."""
        self._read_losses()
        told = self._monitor.take()
        first = self.edit_layout.shard == 0
        return {name: float(value) if first else 0.0 for name, value in told.items()}

    def _spike_state(self) -> dict[str, Any]:
        """For a checkpoint."""
        self._read_losses(wait=True)
        return self._monitor.state()

    def _restore_spikes(self, state: dict[str, Any]) -> None:
        self._monitor.restore(state)
