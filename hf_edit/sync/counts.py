"""What a replica has done since the last sync: its steps, what each rank counted, and how far all have come."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_edit.method.schedule import GlobalProgress, SyncSchedule
from hf_edit.sync.fragments import Fragments, Part

# What every rank counts between two syncs over its own micro-batches, so that the sum over the replica's ranks is the
# replica's: training loss, tokens (for the throughput), tokens as the Trainer counts them, floating point operations.
# The learning rate is summed over inner steps, where the outer momentum follows it.
TALLIES = ("loss", "tokens", "input_tokens", "flos", "learning_rate")
SHARED_PROGRESS = ("confirmed", "recent", "totals", "at_apply", "furthest")  # equal on all replicas


class Counts:
    """A sync takes the counts with it when it begins; one that comes to nothing gives them back.

    Args:
        ranks: of this replica.
    """

    def __init__(self, schedule: SyncSchedule, progress: GlobalProgress, fragments: Fragments, ranks: int) -> None:
        self.schedule, self.progress, self.fragments = schedule, progress, fragments
        self.tallies: dict[str, Any] = dict.fromkeys(TALLIES, 0.0)
        self._ranks = ranks

    def tally(self, **amounts: Tensor | float) -> None:
        """Adds to this rank's counts since the last sync (see `TALLIES`); a sync sums each over the replica's ranks."""
        for name, amount in amounts.items():
            if isinstance(amount, Tensor):
                amount = amount.double()  # a loss can be bf16, which would add up in bf16
            self.tallies[name] = self.tallies[name] + amount

    def end_warmup(self) -> None:
        self.tallies.update(loss=0.0, tokens=0.0)  # of the interval that begins; the others are totals

    def report(self, syncs: int, whole: bool) -> tuple[dict[str, Tensor | float], Part]:
        """What this rank has for the sync after `syncs` others, and its units: all if `whole`, else whose turn it is.

        Changes nothing; `restart` follows when the sync has begun.
        """
        schedule, size = self.schedule, self._ranks
        part = self.fragments.of_sync(syncs, schedule.inner_steps, whole)
        # Steps are equal on all ranks of a replica, and what is gathered is the sum over them.
        steps = {"inner_steps": schedule.inner_steps / size, "interval_steps": schedule.interval_steps / size}
        if len(self.fragments) > 1:
            steps |= {f"fragment_steps_{number}": count / size for number, count in enumerate(part.told)}
        return {**self.tallies, **steps}, part

    def restart(self, part: Part) -> None:
        """A sync of `part` has begun, with what was reported."""
        schedule = self.schedule
        self._reported = self.tallies, schedule.inner_steps, schedule.interval_steps, self.fragments.steps
        self.fragments.steps = part.after
        self.tallies = dict.fromkeys(TALLIES, 0.0)
        schedule.restart()
        self.progress.hand_over()

    def take_back(self, now: float) -> None:
        """The sync under way has come to nothing: all is as if it had not begun, and the timer runs from `now`."""
        tallies, inner_steps, interval_steps, fragment_steps = self._reported
        self.tally(**tallies)
        self.fragments.steps = fragment_steps
        self.schedule.inner_steps += inner_steps
        self.schedule.interval_steps += interval_steps
        self.schedule.restart_timer(now)

    def shared(self) -> dict[str, Any]:
        """Of the progress, what is equal on all replicas."""
        return {name: getattr(self.progress, name) for name in SHARED_PROGRESS}

    def share(self, progress: dict[str, Any]) -> None:
        """Takes what another replica's `shared` gave."""
        for name in SHARED_PROGRESS:
            setattr(self.progress, name, progress[name])

    def forget(self) -> None:
        """What was learnt since the last sync is given up, so there is nothing to tell of these steps."""
        self.schedule.inner_steps = 0
        self.fragments.forget()
