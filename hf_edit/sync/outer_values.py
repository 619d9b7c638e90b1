"""What outer syncs keep from one to the next: anchors and outer state, detectors, residuals of codes, counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import hf_edit.sync.unit_values as unit_values
from hf_edit.config import EDiTConfig
from hf_edit.method.compression import CODECS
from hf_edit.method.outer import OuterState, outer_rule
from hf_edit.method.penalty import DetectorState
from hf_edit.peers.group import Conversation
from hf_edit.sync.measure import phase
from hf_edit.sync.reduction import Reduction
from hf_edit.sync.units import Unit


class OuterValues:
    """Of one model, in the order of its units; on this rank, its shards of them.

    Args:
        units: what is synchronised together, equal on all replicas.
        peers: the other replicas.
        config: the method's settings.
        optimizer: the inner optimizer; its state of a unit is cleared where the unit went non-finite.
    """

    def __init__(self, units: Sequence[Unit], peers: Conversation, config: EDiTConfig, optimizer: Any = None) -> None:
        self.units = list(units)
        self.config = config
        self.device = self.units[0].parts()[0].device
        self.sync_count = 0
        self.tuning: Tensor | None = None  # what settings that find themselves come from, for checkpoints
        self.whole = True  # the last sync was of all units, or there was none yet
        self.unit_syncs = torch.zeros(len(self.units), dtype=torch.int64)  # in which each unit took part
        self.unit_rates = torch.zeros(len(self.units), dtype=torch.float64)  # inner learning rates of each one's last
        self.states: list[OuterState] = []
        self.detectors = DetectorState.zeros(len(self.units), peers.num_replicas)
        self.rule = outer_rule(
            config.outer_optimizer, config.outer_lr, config.outer_momentum, config.outer_warmup_syncs
        )
        self.reduction = Reduction(peers)
        self.compression: str = config.compression
        self._optimizer = optimizer

    @torch.no_grad()
    def take_anchors(self) -> None:
        """The anchor becomes the current parameters, the outer state what it is at first."""
        self.states = [self.rule.init(unit.parts(), self.config.offload_outer_state) for unit in self.units]
        self.reduction.residuals = []
        self.use_codes(self.compression)
        self.whole = True

    def use_codes(self, compression: str) -> None:
        """What is sent from the next sync on; one of EDiTConfig's `compression`."""
        self.compression, self.reduction.codec = compression, CODECS.get(compression)
        if self.reduction.codec is not None:
            self.keep_residuals()

    def keep_residuals(self) -> None:
        """There is room for what codes leave out, zeros where there was none."""
        if not self.reduction.residuals:
            in_host = self.config.offload_outer_state or self.config.overlap == "delayed"
            device = torch.device("cpu") if in_host else self.device
            pin = device != self.device
            self.reduction.residuals = [
                torch.zeros(state.anchor.shape, device=device, pin_memory=pin) for state in self.states
            ]

    @phase("step")
    def step(self, index: int, average: Tensor | None, factor: Tensor | None, learning_rate: float) -> Tensor:
        """The outer step of a unit; the new anchor, on the training's device.

        Args:
            average: the averaged pseudo-gradient, which is used up; None where nobody has learnt anything.
            factor: what it is multiplied by; None: 1.
            learning_rate: inner, of the interval.
        """
        state = self.states[index]
        if average is None:
            return self.here(state.anchor)
        gradient = self.here(average)
        if factor is not None:
            gradient.mul_(factor)
        before = float(self.unit_rates[index])
        shrinks = self.config.momentum_follows_lr and 0 < learning_rate < before
        return self.rule.step(state, gradient, int(self.unit_syncs[index]), learning_rate / before if shrinks else 1.0)

    def count(self, indices: Sequence[int], learning_rate: float) -> None:
        """These units have taken an outer step behind an interval with that inner learning rate."""
        stepped = torch.tensor(indices, dtype=torch.int64)
        self.unit_syncs[stepped] += 1
        self.unit_rates[stepped] = learning_rate or self.unit_rates[stepped]

    @phase("write")
    def write(self, index: int, anchor: Tensor, correction: Tensor | None, broken: bool) -> None:
        """A unit takes the anchor, or adds the correction; if it is `broken` the anchor, without inner state."""
        unit, state = self.units[index], self.states[index]
        if correction is None or broken:
            unit_values.write(unit, state, anchor)
        else:
            unit_values.write(unit, state, correction, add=True)
        if broken:
            self.clear_inner_state(unit)

    def take_back(self, index: int, since: Tensor | None, clear: bool) -> None:
        """A unit's parameters become what the replica was given of the anchor, less `since`, in place of what was
        learnt behind that.

        Args:
            clear: the inner optimizer's state goes, too.
        """
        unit, state = self.units[index], self.states[index]
        if since is None:
            flat = self.here(state.anchor)
        else:
            flat = self.here(since).neg()
            unit_values.add_given(unit, state, flat, state.anchor, 1)
        unit_values.write(unit, state, flat)
        if clear:
            self.clear_inner_state(unit)

    def clear_inner_state(self, unit: Unit) -> None:
        if self._optimizer is not None:
            for param in unit.params:
                self._optimizer.state.pop(param, None)

    def here(self, tensor: Tensor) -> Tensor:
        """On the training's device."""
        return tensor.to(self.device, non_blocking=True)

    def scalar(self, value: Tensor | float) -> Tensor:
        """On that device, [] float64, without waiting for it."""
        if isinstance(value, Tensor):
            return value.to(self.device, torch.float64)
        return torch.full((), value, dtype=torch.float64, device=self.device)
