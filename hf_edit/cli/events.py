"""The events of a simulated training: a step ends, a replica comes to a sync, a unit is on the link, a unit has landed.

They follow the engine (hf_edit/sync): what begins when, what waits for what. All seconds are simulated ones.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from hf_edit import EDiTConfig
from hf_edit.cli.job import Numbers, Outcome, Settings

FORWARD_SHARE = 1 / 3  # of a step's computation; backward is the rest
DRAWN_STEPS = (2003, 40009)  # least and most random steps of a replica, used again when they are through
DRAWS = 200_000  # over all replicas


@functools.lru_cache(maxsize=256)
def drawn_ends(spread: float, count: int, seed: int, index: int) -> list[float]:
    """When each of `count` steps of mean 1 ends that are taken one after the other."""
    sigma = math.sqrt(math.log1p(spread**2))
    draws = random.Random(f"{seed} {index}")
    return list(itertools.accumulate(draws.lognormvariate(-(sigma**2) / 2, sigma) for _ in range(count)))


@dataclass
class SimulatedReplica:
    """One replica's clock; `ends` are its random steps', in units of `mean_seconds`, or () if all steps are alike."""

    mean_seconds: float
    ends: Sequence[float]
    now: float = 0.0  # where its last step ended
    steps: int = 0
    computed: float = 0.0
    exposed: float = 0.0
    waited: float = 0.0
    counted_from: float = 0.0
    taken: int = 0  # of `ends`, never set back

    @classmethod
    def of(cls, numbers: Numbers, seed: int, index: int) -> SimulatedReplica:
        ends: Sequence[float] = ()
        if numbers.step_spread:
            least, most = DRAWN_STEPS
            count = min(most, max(least, DRAWS // numbers.num_replicas)) | 1  # odd: intervals fall on other steps
            ends = drawn_ends(numbers.step_spread, count, seed, index)
        return cls(numbers.step_seconds / numbers.all_speeds[index], ends)

    def _end(self, step: int) -> float:
        if not self.ends:
            return step * self.mean_seconds
        rounds, left = divmod(step, len(self.ends))
        return (rounds * self.ends[-1] + (self.ends[left - 1] if left else 0.0)) * self.mean_seconds

    def step(self, count: int) -> float:
        """Takes `count` steps; their seconds."""
        seconds = self._end(self.taken + count) - self._end(self.taken)
        self.taken += count
        self.steps += count
        self.computed += seconds
        self.now += seconds
        return seconds

    def steps_until(self, time: float) -> int:
        """Steps up to the first that ends at `time` or later."""
        missing = time - self.now
        if missing <= 0:
            return 0
        if not self.ends:
            return math.ceil(missing / self.mean_seconds - 1e-9)
        target = (self._end(self.taken) + missing) / self.mean_seconds
        rounds = int(target // self.ends[-1])
        found = rounds * len(self.ends) + bisect.bisect_left(self.ends, target - rounds * self.ends[-1]) + 1
        return max(1, found - self.taken)


class SimulatedTraining:
    """Replicas between two syncs: each call of `sync` goes from where one is due to where the next one is."""

    def __init__(self, numbers: Numbers, settings: Settings, seed: int) -> None:
        self.numbers, self.settings = numbers, settings
        self.replicas = [SimulatedReplica.of(numbers, seed, index) for index in range(numbers.num_replicas)]
        self.sent_bytes = numbers.sync_bytes(settings.compression)
        # Processors do the same work whatever is sent; a slow replica's take longer.
        work = numbers.sync_bytes("none") * numbers.processor_seconds_per_byte / numbers.num_units
        self.unit_work = [work / speed for speed in numbers.all_speeds]
        self.longest_sync = 0.0
        for replica in self.replicas:
            self._go_on(replica, 0.0, 0)

    def _go_on(self, replica: SimulatedReplica, timed_from: float, steps_before: int) -> None:
        """Takes steps until the next sync is due."""
        seconds, left = self.settings.sync_seconds, self.settings.sync_interval - steps_before
        replica.step(left if seconds is None else replica.steps_until(timed_from + seconds))

    def sync(self) -> None:
        begins = [replica.now for replica in self.replicas]
        all_came = max(begins)
        start = all_came + self.numbers.latency_seconds  # the exchange of norms
        delayed = self.settings.overlap == "delayed"
        landed = self._beside(start) if delayed else self._between(begins, all_came, start)
        self.longest_sync = max(self.longest_sync, landed - min(begins))

    def _between(self, begins: list[float], all_came: float, start: float) -> float:
        """A sync that is waited for, at once or unit by unit in the next forward pass."""
        in_forward = self.settings.overlap == "forward"
        forwards = [0.0] * len(begins)
        rest = [0.0] * len(begins)
        for index, replica in enumerate(self.replicas):
            if in_forward:
                seconds = replica.step(1)
                forwards[index], rest[index] = FORWARD_SHARE * seconds, (1 - FORWARD_SHARE) * seconds
        landed, used, forward_ends = self._through_units(start, forwards)
        for index, replica in enumerate(self.replicas):
            replica.waited += all_came - begins[index]
            replica.exposed += forward_ends[index] - forwards[index] - begins[index]
            replica.now = forward_ends[index] + rest[index]
            self._go_on(replica, used[index], int(in_forward))
        return landed

    def _beside(self, start: float) -> float:
        """A sync in the background, which each replica takes up after `delay_steps`, or before the next one is due."""
        landed, _, _ = self._through_units(start, [0.0] * len(self.replicas))
        seconds, delay = self.settings.sync_seconds, self.settings.delay_steps
        for replica, work in zip(self.replicas, self.unit_work, strict=True):
            replica.now += work * self.numbers.num_units  # takes its turn on the processors that train
            due = math.inf if seconds is None else start + seconds
            steps = delay if seconds is None else max(1, min(delay, replica.steps_until(due)))
            replica.step(steps)
            is_due = replica.now >= due
            wait = max(0.0, landed - replica.now)
            replica.waited += max(0.0, min(landed, start) - replica.now)
            replica.exposed += wait
            replica.now += wait
            if seconds is None or not is_due:
                self._go_on(replica, start, steps)
        return landed

    def _through_units(self, start: float, forwards: list[float]) -> tuple[float, list[float], list[float]]:
        """All units' all-reduces, one after the other on the link and some in flight at a time.

        Args:
            forwards: seconds of each replica's forward pass; a unit's part of it needs that unit.

        Returns:
            When the last unit has landed; and for each replica when it had used it, and when its forward pass ended.
        """
        num_units = self.numbers.num_units
        on_link = self.numbers.link_seconds(self.sent_bytes) / num_units
        clocks = [start] * len(forwards)
        used = clocks
        link_free = start + self.numbers.ramp_seconds(self.sent_bytes)
        landed: list[float] = []
        for unit in range(num_units):
            while len(landed) < min(num_units, unit + self.settings.units_in_flight):
                clocks = [clock + work for clock, work in zip(clocks, self.unit_work, strict=True)]
                link_free = max(link_free, *clocks) + on_link
                landed.append(link_free + self.numbers.latency_seconds)
            used = [max(clock, landed[unit]) for clock in clocks]
            clocks = [clock + seconds / num_units for clock, seconds in zip(used, forwards, strict=True)]
        return landed[-1], used, clocks

    def restart_counts(self) -> None:
        self.longest_sync = 0.0
        for replica in self.replicas:
            replica.counted_from, replica.steps = replica.now, 0
            replica.computed = replica.exposed = replica.waited = 0.0

    def outcome(self, num_syncs: int) -> Outcome:
        """Of all syncs since `restart_counts`."""
        count = len(self.replicas)
        elapsed = [replica.now - replica.counted_from for replica in self.replicas]
        done = [replica.steps / seconds for replica, seconds in zip(self.replicas, elapsed, strict=True)]
        alone = [replica.steps / replica.computed for replica in self.replicas]
        exposed = sum(r.exposed / seconds for r, seconds in zip(self.replicas, elapsed, strict=True)) / count
        waited = sum(r.waited / seconds for r, seconds in zip(self.replicas, elapsed, strict=True)) / count
        steps_per_sync = sum(replica.steps for replica in self.replicas) / count / num_syncs
        share = min(1.0, sum(done) / sum(alone))  # rounding
        latency = self.numbers.latency_seconds
        network = latency + self._through_units(0.0, [0.0] * count)[0]
        return Outcome(
            settings=self.settings, share=share, exposed_share=exposed, wait_share=waited,
            goodput=share * uptime(self.numbers, steps_per_sync, count / sum(done)),
            bytes_per_sync=self.sent_bytes, bytes_per_step=self.sent_bytes / steps_per_sync,
            network_seconds=network, longest_sync_seconds=self.longest_sync,
            interval_seconds=sum(elapsed) / count / num_syncs, steps_per_sync=steps_per_sync,
        )  # fmt: skip


def uptime(numbers: Numbers, steps_per_sync: float, step_seconds: float) -> float:
    """The part of the time that is kept where failures come at random (exponentially): each costs the restart, and what
    was done since the last checkpoint, which is written at the first sync after `checkpoint_steps`.
    """
    if numbers.hours_between_failures is None:
        return 1.0
    between = 3600 * numbers.hours_between_failures
    kept = math.ceil(numbers.checkpoint_steps / steps_per_sync - 1e-9) * steps_per_sync * step_seconds
    if kept / between > 700:
        return 0.0
    return kept / ((between + numbers.restart_seconds) * math.expm1(kept / between))


def elastic_uptime(numbers: Numbers, interval_seconds: float) -> float:
    """The same where the other replicas train on (elastic=True): each failure costs one of them its restart and half an
    interval, of whose steps nobody knows; and the others a heartbeat.
    """
    if numbers.hours_between_failures is None:
        return 1.0
    between, heartbeat = 3600 * numbers.hours_between_failures, EDiTConfig().heartbeat_seconds
    own = between * numbers.num_replicas
    return own / (own + numbers.restart_seconds + interval_seconds / 2) * between / (between + heartbeat)
