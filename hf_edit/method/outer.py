"""The outer step of EDiT (Algorithm 2, Sync): the anchor moves against the averaged pseudo-gradient.

Anchor, pseudo-gradient and what a rule keeps are flat fp32 tensors [n], n being the elements of the unit's parameters
on this rank. A new rule is a `FlatRule` with its `tensor_names` and `update`; checkpoints take its tensors by these
names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

UserOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass
class OuterState:
    """What one unit keeps between two syncs on this rank.

    `anchor` [n] fp32 holds the parameters as of the last sync; `shapes` are those of the rank's parts of the
    parameters, in order. `tensors`, each [n] fp32, are the rule's by its `tensor_names`. `optimizer` is of a user's
    callable, which works on `optimizer_params`, views of the anchor in the parameters' shapes.
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


class OuterOptimizer(Protocol):
    """An outer rule: one object for all units, which keeps nothing itself."""

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Of the tensors in each state, for checkpoints."""
        ...

    def init(self, parts: Sequence[Tensor], offload: bool) -> OuterState:
        """The state of a unit whose parameters on this rank are `parts`; the anchor is a copy of them.

        Args:
            offload: it lives in host memory, pinned where the parts are not.
        """
        ...

    def step(self, state: OuterState, gradient: Tensor, sync: int, kept: float = 1.0) -> Tensor:
        """Moves `state.anchor` by one step and returns the new anchor [n] on `gradient`'s device.

        Args:
            gradient: [n], the weighed, averaged and clipped pseudo-gradient; it is used up.
            sync: the sync's number, from 0.
            kept: what the rule's tensors, of earlier pseudo-gradients, are multiplied by before; a user's optimizer
                keeps its own as they are.
        """
        ...


class FlatRule(ABC):
    """A rule of tensors that begin as zeros. An offloaded state is brought to the device for the step, and back."""

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return ()

    @abstractmethod
    def update(self, anchor: Tensor, gradient: Tensor, tensors: dict[str, Tensor], sync: int) -> None:
        """One step, in place, all on one device; arguments as of `OuterOptimizer.step`."""

    def init(self, parts: Sequence[Tensor], offload: bool) -> OuterState:
        state = _anchored(parts, offload)
        pin = offload and parts[0].device.type != "cpu"
        state.tensors = {name: torch.zeros_like(state.anchor, pin_memory=pin) for name in self.tensor_names}
        return state

    @torch.no_grad()
    def step(self, state: OuterState, gradient: Tensor, sync: int, kept: float = 1.0) -> Tensor:
        there = {"": state.anchor, **state.tensors}
        here = {name: tensor.to(gradient.device, non_blocking=True) for name, tensor in there.items()}
        anchor = here.pop("")
        if kept != 1.0:
            for tensor in here.values():
                tensor.mul_(kept)
        self.update(anchor, gradient, here, sync)
        for name, tensor in {"": anchor, **here}.items():
            if tensor is not there[name]:
                there[name].copy_(tensor, non_blocking=True)
        return anchor


@dataclass(frozen=True)
class Sgd(FlatRule):
    """`torch.optim.SGD`. `lr=1, momentum=0` takes the average of the replicas."""

    lr: float
    momentum: float = 0.0
    nesterov: bool = False
    warmup_syncs: int = 0

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return ("momentum",) if self.momentum else ()

    def at(self, sync: int) -> tuple[float, float]:
        """Learning rate and momentum for the sync number `sync`, from 0.

        The momentum grows as min(momentum, sync / (sync + warmup_syncs)), and the learning rate goes from 1 to `lr` in
        proportion, so the first sync takes the average. Not the paper's, whose settings suit runs of many syncs: at
        once they overshoot what a short run has learnt (examples/benchmarks/convergence.py).

        >>> rule = Sgd(lr=0.8, momentum=0.85, nesterov=True, warmup_syncs=5)
        >>> [tuple(round(number, 3) for number in rule.at(sync)) for sync in (0, 5, 100)]
        [(1.0, 0.0), (0.882, 0.5), (0.8, 0.85)]
        """
        if not self.warmup_syncs or not self.momentum:
            return self.lr, self.momentum
        momentum = min(self.momentum, sync / (sync + self.warmup_syncs))
        return 1.0 - (1.0 - self.lr) * momentum / self.momentum, momentum

    def update(self, anchor: Tensor, gradient: Tensor, tensors: dict[str, Tensor], sync: int) -> None:
        """Bit for bit as torch's.

        >>> anchor, velocity = torch.tensor([1.0]), torch.tensor([0.0])
        >>> Sgd(0.5, 0.5, nesterov=True).update(anchor, torch.tensor([0.5]), {"momentum": velocity}, sync=0)
        >>> anchor, velocity          # 1 - 0.5 (0.5 + 0.5 * 0.5)
        (tensor([0.6250]), tensor([0.5000]))
        """
        lr, momentum = self.at(sync)
        if self.momentum:
            velocity = tensors["momentum"]
            velocity.mul_(momentum).add_(gradient)
            gradient = gradient.add_(velocity, alpha=momentum) if self.nesterov else velocity
        anchor.add_(gradient, alpha=-lr)


@dataclass(frozen=True)
class Torchs:
    """A user's callable of the parameters that returns a torch optimizer, which runs where its state lives."""

    make: UserOptimizer
    tensor_names: tuple[str, ...] = ()

    def init(self, parts: Sequence[Tensor], offload: bool) -> OuterState:
        state = _anchored(parts, offload)
        state.optimizer_params = tuple(view.requires_grad_() for view in state.views(state.anchor))
        state.optimizer = self.make(list(state.optimizer_params))
        if not isinstance(state.optimizer, torch.optim.Optimizer):
            raise ValueError(
                f"outer_optimizer returned {type(state.optimizer).__name__}, but a torch.optim.Optimizer is needed. "
                "Give a callable such as `lambda params: torch.optim.SGD(params, lr=0.7)`."
            )
        return state

    @torch.no_grad()
    def step(self, state: OuterState, gradient: Tensor, sync: int, kept: float = 1.0) -> Tensor:
        assert state.optimizer is not None
        grads = state.views(gradient.to(state.anchor.device))
        for param, grad in zip(state.optimizer_params, grads, strict=True):
            param.grad = grad
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        return state.anchor.to(gradient.device)


def outer_rule(choice: str | UserOptimizer, lr: float, momentum: float, warmup_syncs: int = 0) -> OuterOptimizer:
    """The rule that a configuration's `outer_optimizer` chooses."""
    if not isinstance(choice, str):
        return Torchs(choice)
    if choice == "none":
        return Sgd(lr=1.0)
    return Sgd(lr, momentum, choice == "nesterov", warmup_syncs)


def _anchored(parts: Sequence[Tensor], offload: bool) -> OuterState:
    device = torch.device("cpu") if offload else parts[0].device
    shapes = tuple(part.shape for part in parts)
    size = sum(shape.numel() for shape in shapes)
    pin = offload and parts[0].device.type != "cpu"
    state = OuterState(torch.empty(size, dtype=torch.float32, device=device, pin_memory=pin), shapes)
    for view, part in zip(state.views(state.anchor), parts, strict=True):
        view.copy_(part)
    return state
