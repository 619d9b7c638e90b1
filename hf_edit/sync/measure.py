"""What a sync measures without stopping the device, and the host memory that it uses again."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.profiler import record_function

P = ParamSpec("P")
T = TypeVar("T")


def phase(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Calls of the decorated function are `hf_edit::name` in a torch profile."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def recorded(*args: P.args, **kwargs: P.kwargs) -> T:
            with record_function(f"hf_edit::{name}"):
                return function(*args, **kwargs)

        return recorded

    return decorate


class HostCopy:
    """A small device tensor on its way to the host; `read` waits for nothing that comes after it."""

    def __init__(self, tensor: Tensor) -> None:
        self._event = None
        self._values = tensor
        if tensor.device.type == "cuda":
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def ready(self) -> bool:
        """True if `read` will not wait."""
        return self._event is None or bool(self._event.query())

    def read(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()


class Stopwatch:
    """Adds up the time that training spends in its `with` blocks: of the host, or on CUDA of the current stream."""

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self._cuda = device.type == "cuda"
        self._clock = clock
        self._marks: list[tuple[Any, Any]] = []
        self._depth = 0

    def _now(self) -> Any:
        if not self._cuda:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self._started = self._now()
        self._depth += 1

    def stop(self) -> None:
        self._depth -= 1
        self._marks.append((self._started, self._now()))

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def lap(self) -> Callable[[], float]:
        """Seconds since the last lap, to be asked for later; called inside a block, up to now."""
        marks, self._marks = self._marks, []
        if self._depth:
            marks.append((self._started, self._now()))
            self._started = marks[-1][1]

        def seconds() -> float:
            if not self._cuda:
                return sum(end - start for start, end in marks)
            if marks:
                marks[-1][1].synchronize()
            return sum(start.elapsed_time(end) for start, end in marks) / 1000.0

        return seconds


@dataclass
class Interval:
    """What a replica has measured between the beginnings of two syncs, all in seconds. "Before" is of the first one."""

    begun_at: float
    exposed: Callable[[], float] = lambda: math.nan  # that training waited for it; to be asked for later
    wait_seconds: float = math.nan  # of it, for the slowest replica
    network: Callable[[], float] = lambda: math.nan  # from when all had come until all was reduced
    rested_seconds: float = 0.0  # that evaluations, checkpoints and waiting at the end took

    def tallies(self, now: float) -> dict[str, float]:
        """For the exchange of the second one, which begins `now`."""
        exposed = self.exposed()
        waited = 0.0 if math.isnan(exposed) else exposed
        return {
            "training_seconds": max(0.0, now - self.begun_at - waited - self.rested_seconds),
            "before_exposed_seconds": exposed,
            "before_wait_seconds": self.wait_seconds,
            "before_network_seconds": self.network(),
        }


class Scratch:
    """Flat host tensors that one delayed sync leaves to the next: fresh memory costs a page fault every 4 KiB.

    Args:
        device: the training's; for CUDA they are pinned, so that copying keeps no host waiting. What is given back may
            be on its way to the device yet: writing to it must be ordered after that, as a delayed sync does.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: dict[tuple[int, torch.dtype], list[Tensor]] = {}

    def take(self, like: Tensor) -> Tensor:
        """An uninitialised host tensor of `like`'s shape [n] and dtype."""
        free = self._free.get((like.numel(), like.dtype))
        return free.pop() if free else torch.empty(like.shape, dtype=like.dtype, pin_memory=self._device.type == "cuda")

    def to_host(self, tensor: Tensor) -> Tensor:
        """A CUDA tensor on its way into host memory, ordered on the current stream; a host tensor as it is."""
        return tensor if tensor.device.type == "cpu" else self.take(tensor).copy_(tensor, non_blocking=True)

    def give(self, tensor: Tensor) -> None:
        self._free.setdefault((tensor.numel(), tensor.dtype), []).append(tensor)
