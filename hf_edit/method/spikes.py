"""Loss spikes: a step's loss that lies far above its moving mean. Pure; host numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

ALPHA = 0.05  # weight of the newest loss in the moving mean and variance
WARMUP_STEPS = 20  # losses to see before one can be a spike


@dataclass(frozen=True)
class Place:
    """Where a training is: its optimizer step, and in the data its epoch and the batches read of that."""

    step: int
    epoch: int
    batch: int


@dataclass
class LossMonitor:
    """Watches the loss of every step.

    A loss is a spike if it is not finite (its size is inf), or if `WARMUP_STEPS` have been seen and it lies more than
    `threshold` standard deviations above the moving mean (of `ema_update` in penalty.py). Spikes feed no statistics;
    the `max_consecutive`-th finite one in a row is the new normal, from which the statistics begin again.

    `spikes` and `worst` (size, loss, step, epoch, batch) are of the time since `take`.

    >>> monitor = LossMonitor(threshold=6.0, max_consecutive=3)
    >>> max(monitor.update(2.0 + step % 2, Place(step, 0, step)) for step in range(40))
    0.0
    >>> round(monitor.update(30.0, Place(40, 0, 40)))
    55
    >>> monitor.take()["spike_step"]
    40
    """

    threshold: float
    max_consecutive: int
    mean: float = 0.0
    variance: float = 0.0
    count: int = 0
    streak: int = 0  # spikes in a row
    spikes: int = 0
    worst: tuple[float, ...] = field(default=(0.0, 0.0, 0, 0, 0))

    def update(self, loss: float, place: Place) -> float:
        """Takes the loss of the step at `place`; its size in standard deviations if it is a spike, else 0."""
        size = self._size(loss)
        if not size:
            self._learn(loss)
            return 0.0
        self.spikes += 1
        self.streak += 1
        if size > self.worst[0]:
            self.worst = (size, loss, place.step, place.epoch, place.batch)
        if self.streak >= self.max_consecutive and math.isfinite(loss):
            self.count = 0
        return size

    def _size(self, loss: float) -> float:
        if not math.isfinite(loss):
            return math.inf
        if self.count < WARMUP_STEPS or self.variance == 0:
            return 0.0
        z = (loss - self.mean) / math.sqrt(self.variance)
        return z if z > self.threshold else 0.0

    def _learn(self, loss: float) -> None:
        weight, distance = max(ALPHA, 1 / (self.count + 1)), loss - self.mean
        self.mean += weight * distance
        self.variance = (1 - weight) * (self.variance + weight * distance * distance)
        self.count, self.streak = self.count + 1, 0

    def take(self) -> dict[str, float]:
        """The spikes since the last call: how many, and of the largest its size, loss and place."""
        names = ("spike_size", "spike_loss", "spike_step", "spike_epoch", "spike_batch")
        found = {"spikes": self.spikes, **dict(zip(names, self.worst, strict=True))}
        self.spikes, self.worst = 0, (0.0, 0.0, 0, 0, 0)
        return found

    def state(self) -> dict[str, float | list[float]]:
        """For a checkpoint: everything but the settings."""
        return {**{name: getattr(self, name) for name in _KEPT}, "worst": list(self.worst)}

    def restore(self, state: dict[str, Any]) -> None:
        for name in _KEPT:
            setattr(self, name, state[name])
        self.worst = tuple(state["worst"])


_KEPT = ("mean", "variance", "count", "streak", "spikes")
