"""When an outer sync is due: after a synchronous warm-up, every N inner steps or every T seconds.

Pure: the clock is an input, and what the ranks of a replica must agree on is the caller's to share.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class SyncSchedule:
    """Counts optimizer steps and says when a sync is due (EDiT, Algorithm 1).

    A step that fp16 skips is no inner step, but it counts for the trigger: another replica may not have skipped it, and
    all must come to the same syncs.

    Args:
        sync_interval: inner steps between syncs; not looked at when `sync_seconds` is set.
        sync_seconds: seconds between syncs (A-EDiT), from the moment that one no longer keeps anyone waiting; or None.
        warmup_steps: synchronous steps first; they are no inner steps.
        clock: monotonic seconds.

    >>> schedule = SyncSchedule(sync_interval=2, warmup_steps=1)
    >>> [schedule.advance() for _ in range(3)]
    [False, False, True]
    """

    sync_interval: int = 128
    sync_seconds: float | None = None
    warmup_steps: int = 0
    clock: Callable[[], float] = time.monotonic
    step: int = 0
    inner_steps: int = 0  # since the last sync
    interval_steps: int = 0  # since the last sync, skipped steps too
    _timed_from: float | None = field(init=False)  # None: the timer stands still until restart_timer()

    def __post_init__(self) -> None:
        self._timed_from = self.clock()
        self.go_on_at(self.step)

    def go_on_at(self, step: int) -> None:
        """The training goes on behind its optimizer step number `step`."""
        self.step = self._first_step = step
        self._begun_at = self.clock()

    @property
    def warming_up(self) -> bool:
        """True if the next optimizer step is a synchronous one."""
        return self.step < self.warmup_steps

    @property
    def step_seconds(self) -> float:
        """Of a step, in the mean of all since the training went on, with what lay between them."""
        return (self.clock() - self._begun_at) / max(1, self.step - self._first_step)

    def advance(self, skipped: bool = False) -> bool:
        """Counts one optimizer step that was taken, or `skipped`; True if a sync is due now."""
        if self.warming_up:
            self.step += not skipped
            if not self.warming_up:
                self._timed_from = self.clock()
            return False
        self.step += not skipped
        self.inner_steps += not skipped
        self.interval_steps += 1
        if self.sync_seconds is not None:
            return self._timed_from is not None and self.clock() - self._timed_from >= self.sync_seconds
        return self.interval_steps >= self.sync_interval

    def restart(self) -> None:
        """A sync begins: its steps are counted off, and the timer stands still until it keeps nobody waiting."""
        self.inner_steps = self.interval_steps = 0
        self._timed_from = None

    def restart_timer(self, at: float) -> None:
        """The sync kept nobody waiting from the time `at`, so all are in step again, whoever waited."""
        if self._timed_from is None:
            self._timed_from = at

    def rest_timer(self) -> None:
        """What all replicas did together since the last sync (an evaluation) does not count into the interval."""
        self._timed_from = self.clock()


def interval_at(progress: float, first: int, last: int, begin: int, end: int) -> int:
    """Inner steps between syncs where the training is, on a straight line between two.

    Args:
        progress: global steps taken.
        first, last: at these steps the interval is `begin`, `end`.

    >>> [interval_at(step, 100, 1100, 32, 8) for step in (100, 600, 1100, 2000)]
    [32, 20, 8, 8]
    """
    share = min(1.0, max(0.0, (progress - first) / max(1, last - first)))
    return max(1, round(begin + (end - begin) * share))


def fragments(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Units of `sizes` in `count` parts of about the same size: the largest first, each to the part that has least.

    >>> fragments([10, 30, 60, 40, 60], 2)
    [[0, 1, 4], [2, 3]]
    """
    parts: list[list[int]] = [[] for _ in range(count)]
    for unit in sorted(range(len(sizes)), key=lambda unit: -sizes[unit]):
        min(parts, key=lambda part: sum(sizes[i] for i in part)).append(unit)
    return sorted(sorted(part) for part in parts)


@dataclass
class GlobalProgress:
    """Steps of all replicas / R: exact at every sync, in between estimated from this replica's own (A-EDiT).

    `recent` [R] holds each replica's steps in the last syncs, the older the less; from it follows how far all
    replicas together come in one step of this one.

    >>> fast = GlobalProgress(replica=0)
    >>> for _ in range(10): fast.take_step()
    >>> fast.value                # nothing is known of the others: as if they were as fast
    10.0
    >>> fast.hand_over()          # a sync begins
    >>> fast.confirm([10.0, 5.0])  # and has reported
    >>> fast.take_step()
    >>> fast.value                # 7.5, and three quarters
    8.25
    """

    replica: int
    confirmed: float = 0.0
    own_steps: int = 0  # since the last sync began
    handed_over: int = 0  # reported to a sync under way
    recent: list[float] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)  # the steps of each replica, as they have reported
    # Of the last sync, from what the replicas reported alone, and so equal on all of them:
    at_apply: float = 0.0  # the value where it is applied, if all take its whole delay until then
    furthest: float = 0.0  # no replica's estimate is beyond it there

    @property
    def rate(self) -> float:
        """Global steps in one step of this replica."""
        return self._rate_of(self.replica)

    @property
    def value(self) -> float:
        """The estimate; never needs the other replicas."""
        return self.confirmed + self.rate * (self.handed_over + self.own_steps)

    @property
    def behind(self) -> float:
        """Steps that the replica which has taken most has reported more of than this one."""
        return max(self.totals) - self.totals[self.replica] if self.totals else 0.0

    def take_step(self) -> None:
        self.own_steps += 1

    def hand_over(self) -> None:
        """A sync begins, which will tell the steps of all replicas up to now."""
        self.handed_over, self.own_steps = self.handed_over + self.own_steps, 0

    def confirm(self, steps: Sequence[float], delay_steps: int = 0, some_away: bool = False) -> None:
        """The replicas took `steps` [R] between the last two syncs' beginnings, and at most `delay_steps` own ones from
        there to where each comes to know it. `some_away`: one without steps does not wait for the others, it is gone.
        """
        estimates = [self._rate_of(i) * (count + delay_steps) for i, count in enumerate(steps)]
        self.furthest = self.confirmed + max(estimates)
        self.confirmed += sum(steps) / len(steps)
        self.at_apply = self.confirmed + delay_steps
        self.handed_over = 0
        self.totals = [old + new for old, new in zip(self.totals or [0.0] * len(steps), steps, strict=True)]
        if some_away:
            self.recent = list(steps) if max(steps) > 0 else self.recent
        elif min(steps) > 0:  # else one was waiting for the others, which says nothing of how fast it is
            before = self.recent or [0.0] * len(steps)
            self.recent = [old / 2 + new for old, new in zip(before, steps, strict=True)]

    def _rate_of(self, replica: int) -> float:
        taken = self.recent[replica] if self.recent else 0.0
        return sum(self.recent) / len(self.recent) / taken if taken > 0 else 1.0
