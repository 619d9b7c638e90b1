"""Stalls of whole hosts, random but the same in every run."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from pathlib import Path

from lib.hosts import Hosts


@dataclass
class Stalls:
    """Stops a random host for a random time, again and again, from the start of training on.

    Args:
        seed: the same one gives the same stalls, by time since the start.
        mean_gap_seconds: between the end of a stall and the next; exponential.
        longest_seconds: a stall takes a quarter of it to all of it, all alike.
    """

    seed: int
    mean_gap_seconds: float
    longest_seconds: float
    stalls: list[dict[str, float]] = field(default_factory=list)
    _next_seconds: float | None = None  # when the stall under way ends or the next begins, since the start
    _stalled_host: int | None = None

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def __call__(self, hosts: Hosts, started: Path) -> None:
        if not started.exists():
            return
        now = time.time() - started.stat().st_mtime
        if self._next_seconds is None:
            self._next_seconds = self._random.expovariate(1 / self.mean_gap_seconds)
        if now < self._next_seconds:
            return
        if self._stalled_host is None:
            self._stalled_host = self._random.randrange(len(hosts.names))
            seconds = self._random.uniform(self.longest_seconds / 4, self.longest_seconds)
            self.stalls.append({"host": self._stalled_host, "from_seconds": now, "seconds": seconds})
            self._next_seconds += seconds
            hosts.pause(self._stalled_host)
        else:
            hosts.resume(self._stalled_host)
            self._stalled_host = None
            self._next_seconds += self._random.expovariate(1 / self.mean_gap_seconds)
