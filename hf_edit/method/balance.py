"""Shares of a batch that keep machines of different speed busy for equally long. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

MEMORY = 0.5  # of the speeds measured before, in their mean
GAIN = 0.03  # of a step's seconds, that other shares must save


def deal(rows: int, speeds: Sequence[float]) -> list[int]:
    """`rows` dealt out by `speeds`, at least one each, so that the last to end ends as early as can be.

    >>> deal(16, [4.0, 1.0]), deal(16, [1.0, 1.0]), deal(4, [100.0, 1.0])
    ([13, 3], [8, 8], [3, 1])
    """
    shares = [1] * len(speeds)
    for _ in range(rows - len(speeds)):
        next_one = min(range(len(speeds)), key=lambda i: ((shares[i] + 1) / speeds[i], i))
        shares[next_one] += 1
    return shares


def longest(shares: Sequence[int], speeds: Sequence[float]) -> float:
    """Seconds until the last has ended."""
    return max(share / speed for share, speed in zip(shares, speeds, strict=True))


@dataclass
class Balance:
    """
    Args:
        shares: rows of each replica, as they are dealt now.
        speeds: rows in a second, mean over the measurements so far; none at first.

    >>> balance = Balance([8, 8])
    >>> balance.look([16.0, 16.0], seconds=[1.0, 4.0])  # in an interval
    [13, 3]
    >>> balance.look([26.0, 6.0], seconds=[1.7, 1.6]) is None  # good enough
    True
    """

    shares: list[int]
    speeds: list[float] = field(default_factory=list)

    def look(self, rows: Sequence[float], seconds: Sequence[float]) -> list[int] | None:
        """New shares after an interval in which the replicas took so many `rows` in so many `seconds`; None: the old
        ones stay."""
        if min(rows) <= 0 or min(seconds) <= 0:
            return None
        measured = [count / took for count, took in zip(rows, seconds, strict=True)]
        before = self.speeds or measured
        self.speeds = [MEMORY * old + (1 - MEMORY) * new for old, new in zip(before, measured, strict=True)]
        dealt = deal(sum(self.shares), self.speeds)
        if longest(dealt, self.speeds) > (1 - GAIN) * longest(self.shares, self.speeds):
            return None
        self.shares = dealt
        return dealt
