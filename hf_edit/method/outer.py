"""The outer step of EDiT (Algorithm 2, Sync): the anchor moves against the averaged pseudo-gradient.

Anchor, momentum and pseudo-gradient of a unit are flat fp32 tensors [n], n being the elements of the unit's
parameters on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class OuterRule:
    """SGD's settings for the outer step. `lr=1, momentum=0` takes the average of the replicas."""

    lr: float
    momentum: float
    nesterov: bool
    warmup_syncs: int = 0

    @classmethod
    def named(cls, name: str, lr: float, momentum: float, warmup_syncs: int = 0) -> OuterRule:
        if name == "none":
            return cls(lr=1.0, momentum=0.0, nesterov=False)
        return cls(lr=lr, momentum=momentum, nesterov=name == "nesterov", warmup_syncs=warmup_syncs)

    def at(self, sync: int) -> OuterRule:
        """The settings for the sync number `sync`, from 0.

        The momentum grows as min(momentum, sync / (sync + warmup_syncs)), and the learning rate goes from 1 to `lr` in
        proportion, so the first sync takes the average. Not the paper's, whose settings suit runs of many syncs: at
        once they overshoot what a short run has learnt (examples/benchmarks/convergence.py).

        >>> rule = OuterRule(lr=0.8, momentum=0.85, nesterov=True, warmup_syncs=5)
        >>> [(round(r.momentum, 3), round(r.lr, 3)) for r in (rule.at(0), rule.at(5), rule.at(100))]
        [(0.0, 1.0), (0.5, 0.882), (0.85, 0.8)]
        """
        if not self.warmup_syncs or not self.momentum:
            return self
        momentum = min(self.momentum, sync / (sync + self.warmup_syncs))
        return replace(self, momentum=momentum, lr=1.0 - (1.0 - self.lr) * momentum / self.momentum)


@torch.no_grad()
def outer_step_(anchor: Tensor, gradient: Tensor, momentum: Tensor | None, rule: OuterRule) -> None:
    """One step of `torch.optim.SGD(lr, momentum, nesterov)` on `anchor`, in place, bit for bit.

    `momentum` [n] starts as zeros and is updated in place; None when `rule.momentum` is 0. `gradient` is used up.

    >>> anchor, velocity = torch.tensor([1.0]), torch.tensor([0.0])
    >>> outer_step_(anchor, torch.tensor([0.5]), velocity, OuterRule(lr=0.5, momentum=0.5, nesterov=True))
    >>> anchor, velocity          # 1 - 0.5 (0.5 + 0.5 * 0.5)
    (tensor([0.6250]), tensor([0.5000]))
    """
    if momentum is not None:
        momentum.mul_(rule.momentum).add_(gradient)
        if rule.nesterov:
            gradient.add_(momentum, alpha=rule.momentum)
        else:
            gradient = momentum
    anchor.add_(gradient, alpha=-rule.lr)


@dataclass
class OuterState:
    """What one unit keeps between two syncs on this rank.

    `anchor` [n] fp32 holds the parameters as of the last sync; `shapes` are those of the rank's parts of the
    parameters, in order. `tensors`, each [n] fp32, are what the rule keeps, by name ("momentum"). `optimizer` is a
    user's own, which works on `optimizer_params`, views of the anchor in the parameters' shapes.
    """

    anchor: Tensor
    shapes: tuple[torch.Size, ...]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    optimizer: torch.optim.Optimizer | None = None
    optimizer_params: tuple[Tensor, ...] = ()

    def views(self, flat: Tensor) -> list[Tensor]:
        """`flat` [n] as one view for each parameter, in the parameters' shapes."""
        pieces = torch.split(flat, [shape.numel() for shape in self.shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]


def new_state(
    parts: Sequence[Tensor], rule: OuterRule | Callable[[list[Tensor]], torch.optim.Optimizer], offload: bool
) -> OuterState:
    """The state of a unit whose parameters on this rank are `parts`; the anchor is a copy of them."""
    device = torch.device("cpu") if offload else parts[0].device
    pin = offload and parts[0].device.type != "cpu"
    shapes = tuple(part.shape for part in parts)
    size = sum(shape.numel() for shape in shapes)
    state = OuterState(torch.empty(size, dtype=torch.float32, device=device, pin_memory=pin), shapes)
    for view, part in zip(state.views(state.anchor), parts, strict=True):
        view.copy_(part)
    if isinstance(rule, OuterRule):
        if rule.momentum:
            state.tensors["momentum"] = torch.zeros(size, dtype=torch.float32, device=device, pin_memory=pin)
    else:
        state.optimizer_params = tuple(view.requires_grad_() for view in state.views(state.anchor))
        state.optimizer = rule(list(state.optimizer_params))
        if not isinstance(state.optimizer, torch.optim.Optimizer):
            raise ValueError(
                f"outer_optimizer returned {type(state.optimizer).__name__}, but a torch.optim.Optimizer is needed. "
                "Give a callable such as `lambda params: torch.optim.SGD(params, lr=0.7)`."
            )
    return state


@torch.no_grad()
def apply_outer_step(state: OuterState, gradient: Tensor, rule: Any) -> Tensor:
    """Moves `state.anchor` by one outer step and returns the new anchor [n] on `gradient`'s device.

    `gradient` [n] is the weighed, averaged and clipped pseudo-gradient; it is used up. An offloaded state is brought
    to the device for the built-in rules; a user's optimizer runs where its state lives.
    """
    if state.optimizer is not None:
        grads = state.views(gradient.to(state.anchor.device))
        for param, grad in zip(state.optimizer_params, grads, strict=True):
            param.grad = grad
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        return state.anchor.to(gradient.device)
    anchor = state.anchor.to(gradient.device, non_blocking=True)
    tensors = {name: tensor.to(gradient.device, non_blocking=True) for name, tensor in state.tensors.items()}
    outer_step_(anchor, gradient, tensors.get("momentum"), rule)
    if anchor is not state.anchor:
        state.anchor.copy_(anchor, non_blocking=True)
        for name, tensor in tensors.items():
            state.tensors[name].copy_(tensor, non_blocking=True)
    return anchor
