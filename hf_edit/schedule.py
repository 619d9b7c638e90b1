"""When an outer sync is due: after a synchronous warm-up, every N inner steps or every T seconds.

Pure: the clock is an input, and what the ranks of a replica must agree on is the caller's to share.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class SyncSchedule:
    """Counts optimizer steps and says when a sync is due (EDiT, Algorithm 1).

    A step that fp16 skips is no inner step, but it counts for the trigger: another replica may not have skipped it, and
    all must come to the same syncs.

    Args:
        sync_interval: inner steps between syncs; not looked at when `sync_seconds` is set.
        sync_seconds: seconds between syncs (A-EDiT), from the end of one to the start of the next; or None.
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
    turns: int = 0  # since the last sync, skipped steps too
    _restarted_at: float = field(init=False)

    def __post_init__(self) -> None:
        self._restarted_at = self.clock()

    @property
    def warming_up(self) -> bool:
        """True if the next optimizer step is a synchronous one."""
        return self.step < self.warmup_steps

    def advance(self, skipped: bool = False) -> bool:
        """Counts one optimizer step that was taken, or `skipped`; True if a sync is due now."""
        if self.warming_up:
            self.step += not skipped
            if not self.warming_up:
                self._restarted_at = self.clock()
            return False
        self.step += not skipped
        self.inner_steps += not skipped
        self.turns += 1
        if self.sync_seconds is not None:
            return self.clock() - self._restarted_at >= self.sync_seconds
        return self.turns >= self.sync_interval

    def restart(self) -> None:
        """A sync has been carried out: the next interval begins now, after the wait."""
        self.inner_steps = self.turns = 0
        self._restarted_at = self.clock()
