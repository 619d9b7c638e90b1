"""One unit's values: read as a pseudo-gradient, written from an anchor. Flat fp32 [n] against its parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_edit.method.outer import OuterState
from hf_edit.method.penalty import pseudo_gradient
from hf_edit.sync.units import Unit


def read(
    unit: Unit, state: OuterState, device: torch.device, new_like: Callable[[Tensor], Tensor] = torch.empty_like
) -> Tensor:
    """The pseudo-gradient: `state`'s anchor minus the parameters, in a buffer of its own."""
    anchor = state.anchor.to(device, non_blocking=True)
    flat = new_like(anchor) if anchor is state.anchor else anchor
    for view, before, part in zip(state.views(flat), state.views(anchor), unit.parts(), strict=True):
        pseudo_gradient(before, part, out=view)
    return flat


def add_given(unit: Unit, state: OuterState, flat: Tensor, anchor: Tensor, sign: int) -> None:
    """Adds to `flat`, in place, what the parameters are given of `anchor`: it, rounded to their dtype."""
    here = anchor.to(flat.device, non_blocking=True)
    for view, value, part in zip(state.views(flat), state.views(here), unit.parts(), strict=True):
        view.add_(value.to(part.dtype), alpha=sign)


def write(unit: Unit, state: OuterState, flat: Tensor, add: bool = False) -> None:
    """The parameters become `flat`, or `flat` is added to them; copies of them that were gathered are dropped."""
    unit.drop_gathered()
    for part, value in zip(unit.parts(), state.views(flat), strict=True):
        if add:
            part.add_(value)
        else:
            part.copy_(value)
