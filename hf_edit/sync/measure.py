"""Figures of a sync without stopping the device: small copies to the host, and the time that training waited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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

    def __enter__(self) -> None:
        self._started = self._now()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        self._marks.append((self._started, self._now()))

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
