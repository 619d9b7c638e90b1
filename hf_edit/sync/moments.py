"""The inner optimizer's moments, averaged at a sync as the pseudo-gradients are: by the same weights, unit by unit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_edit.optim.muon import MuonAdamW
from hf_edit.sync.units import Unit, local_part

# Whose state is understood. Each moment forgets by a factor a step, whatever is added.
KNOWN = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Muon, MuonAdamW)


@dataclass(frozen=True)
class Moment:
    """A tensor of the optimizer's state of one parameter."""

    param: nn.Parameter
    group: int
    key: str

    def kept(self, group: dict[str, Any], steps: int) -> float:
        """What is left of it after so many steps."""
        if self.key == "momentum_buffer":
            return float(group["momentum"]) ** steps
        return float(group["betas"][self.key == "exp_avg_sq"]) ** steps


class Moments:
    """The moments of each unit on this rank, read and written as one flat tensor.

    Args:
        optimizer: torch's, or as Accelerate prepared it; None only without a choice.
        choice: of EDiTConfig's `sync_moments`.
        every: at every so many syncs of a unit.

    Raises:
        ValueError: moments of this optimizer are not known, or it has none.
    """

    def __init__(self, units: Sequence[Unit], optimizer: Any, choice: str, every: int = 1) -> None:
        self._optimizer, self._bounded, self._every = optimizer, choice == "first", every
        self.of_unit: list[list[Moment]] = [[] for _ in units]
        if choice == "none":
            return
        torchs = getattr(optimizer, "optimizer", optimizer)
        groups = {param: number for number, group in enumerate(torchs.param_groups) for param in group["params"]}
        keys = [_keys(group)[: 2 if choice == "both" else 1] for group in torchs.param_groups]
        self.of_unit = [
            [Moment(p, groups[p], key) for p in unit.params if p in groups for key in keys[groups[p]]] for unit in units
        ]
        if type(torchs) not in KNOWN or not any(self.of_unit):
            names = ", ".join(kind.__name__ for kind in KNOWN)
            raise ValueError(
                f"sync_moments={choice!r} averages the moments of {names} (with a momentum); the optimizer is "
                f"{type(torchs).__name__}. Take one of these, or leave sync_moments out."
            )

    def due(self, unit: int, syncs: int) -> int:
        """Numbers of a unit on this rank, after `syncs` of it; 0 where none are to be averaged."""
        return 0 if syncs % self._every else sum(local_part(moment.param).numel() for moment in self.of_unit[unit])

    @torch.no_grad()
    def read(self, unit: int, out: Tensor) -> Tensor:
        """A unit's, one after the other, into `out` [size] fp32; zeros where the optimizer has none yet."""
        for view, moment in self._views(unit, out):
            state = self._optimizer.state.get(moment.param, {})
            if moment.key in state:
                view.copy_(local_part(state[moment.key]))
            else:
                view.zero_()
        return out

    @torch.no_grad()
    def write(self, unit: int, mean: Tensor, before: Tensor | None = None, steps: int = 0) -> None:
        """A unit's become `mean` [size], where the optimizer has some.

        Args:
            before: what was read, `steps` ago: what is left by now of the difference is added. Exactly what they would
                be had they become `mean` then, but that later gradients were taken elsewhere.
        """
        means = self._views(unit, mean)
        befores = means if before is None else self._views(unit, before)
        for (new, moment), (old, _) in zip(means, befores, strict=True):
            state = self._optimizer.state.get(moment.param, {})
            if moment.key not in state:  # it was cleared, or the parameter never had a gradient
                continue
            own = local_part(state[moment.key])
            if before is None or not steps:
                own.copy_(new, non_blocking=True)
                continue
            kept = moment.kept(self._optimizer.param_groups[moment.group], steps)
            own.add_(new.to(own.device, non_blocking=True) - old.to(own.device, non_blocking=True), alpha=kept)
            if moment.key == "exp_avg_sq":
                own.clamp_(min=0.0)  # what rounding could bring below
        if self._bounded:
            self._bound(unit)

    def _bound(self, unit: int) -> None:
        """First moments of Adam to what belongs to the second ones, which are the replica's own: where it has seen no
        gradient, as of a token that it never met, these are 0, and a mean over them would be a step of any size."""
        for moment in self.of_unit[unit]:
            state = self._optimizer.state.get(moment.param, {})
            group = self._optimizer.param_groups[moment.group]
            if moment.key == "exp_avg" and moment.key in state and (ratio := largest_ratio(*group["betas"])) < math.inf:
                bound = local_part(state["exp_avg_sq"]).sqrt().mul_(ratio)
                first = local_part(state["exp_avg"])
                torch.clamp(first, -bound, bound, out=first)

    def _views(self, unit: int, flat: Tensor) -> list[tuple[Tensor, Moment]]:
        parts = [local_part(moment.param) for moment in self.of_unit[unit]]
        pieces = flat.split([part.numel() for part in parts])
        shaped = [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]
        return list(zip(shaped, self.of_unit[unit], strict=True))


def largest_ratio(beta1: float, beta2: float) -> float:
    """That Adam's first moment can have to the root of its second one, whatever the gradients (Cauchy-Schwarz).

    >>> round(largest_ratio(0.9, 0.999), 2)
    7.27
    """
    spread = 1 - beta1**2 / beta2
    return math.inf if spread <= 0 or beta2 == 1 else (1 - beta1) / math.sqrt((1 - beta2) * spread)


def _keys(group: dict[str, Any]) -> list[str]:
    if group.get("muon") or "betas" not in group:
        return ["momentum_buffer"] if group.get("momentum") else []
    return ["exp_avg", "exp_avg_sq"]
