"""The learning rate of inner steps, where it is another than that of synchronous ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class InnerRate:
    """Multiplies the learning rates of an optimizer while it takes an inner step.

    By hooks of torch's optimizer, so that schedulers and logs see the schedule's learning rates, whenever they look.

    Args:
        optimizer: torch's, or Accelerate's around it.
        scale: the factor.
        synchronous: whether the step that is taken averages gradients over all replicas, and so goes without.
    """

    def __init__(self, optimizer: Any, scale: float, synchronous: Callable[[], bool]) -> None:
        self._scale, self._synchronous = scale, synchronous
        self._before: list[tuple[dict[str, Any], Any]] = []  # groups and their own rates, while an inner step is taken
        self._hooks = []
        if scale != 1.0:
            torchs = getattr(optimizer, "optimizer", optimizer)
            self._hooks = [torchs.register_step_pre_hook(self._scaled), torchs.register_step_post_hook(self._as_before)]

    def _scaled(self, optimizer: Any, *_: Any) -> None:
        if not self._synchronous():
            self._before = [(group, group["lr"]) for group in optimizer.param_groups]
            for group, rate in self._before:
                group["lr"] = rate * self._scale  # a new tensor, if it is one

    def _as_before(self, *_: Any) -> None:
        for group, rate in self._before:
            group["lr"] = rate
        self._before = []

    def remove(self) -> None:
        """The optimizer is as it was, also if a step was broken off."""
        self._as_before()
        for hook in self._hooks:
            hook.remove()
