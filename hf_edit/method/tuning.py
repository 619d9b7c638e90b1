"""Settings that find themselves: how often to sync, how much later to apply it, and in how few bytes. Pure.

From what the replicas measured of their last syncs and told in the exchange, so that all come to the same settings. The
aim: nothing of a sync keeps the training waiting, and syncs are no rarer and no later than that needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from hf_edit.method.compression import bytes_per_element

KINDS = ("none", "bf16", "int8", "int4")  # from most to fewest bytes
COARSER = {"none": "int8", "bf16": "int8", "int8": "int4", "int4": None}  # what is tried next
FEWEST_STEPS = 16  # of an interval: shorter ones learn less (the outer momentum multiplies the learning rate)
MARGIN = 1.25  # of the delay over the network's seconds
GROWTH = 8  # of an interval at once, so that one pause of the network does not set it
WORK_SHARE = 0.01  # of an interval that a sync's own work may take
KEPT = 3  # measurements; a slower network counts at once, a faster one when all of them say so
SLACK = 0.6  # an interval is kept while more of it is needed than this
SPARED = 1.6  # times the steps to learn in, for which coarser codes are taken; they learn as much (measured)
BACK = 1.2  # finer ones again, where they need no more than so many times the steps
DELAY_WEIGHT = 2  # steps of an interval that a step of delay costs in learning


def learning_steps(interval: float, delay_steps: float) -> float:
    """Inner steps of the interval whose prompt syncs learn as much: replicas that apply a sync d steps late are as far
    apart as with 2 d steps more between two (measured, examples/benchmarks/ideas.py).

    >>> learning_steps(16, 4)
    24
    """
    return interval + DELAY_WEIGHT * delay_steps


@dataclass(frozen=True)
class Tuned:
    """What is in force: inner steps between two syncs, steps until one is applied, codes."""

    interval: int
    delay_steps: int
    compression: str


@dataclass(frozen=True)
class Measured:
    """Seconds: of the slowest replica's step, of the network for one sync, and that whom no other replica kept waiting
    waited for it."""

    step: float
    network: float
    exposed: float
    settings: Tuned  # of that sync

    def network_with(self, compression: str) -> float:
        return self.network * bytes_per_element(compression) / bytes_per_element(self.settings.compression)

    @property
    def work(self) -> float:
        """What it would have waited for, were the network a very fast one."""
        return max(0.0, self.exposed - max(0.0, self.network - self.settings.delay_steps * self.step))


def measure(tallies: dict[str, Tensor], settings: Tuned) -> Measured | None:
    """From the `tallies` of a sync, [R] each, which tell of the one before; None if there is nothing to be learnt.

    Args:
        settings: that the one before had.
    """
    steps = tallies["interval_steps"]
    if float(steps.min()) <= 0:
        return None
    slowest = float((tallies["training_seconds"] / steps).max())
    network = float(tallies["before_network_seconds"].max())
    exposed = float((tallies["before_exposed_seconds"] - tallies["before_wait_seconds"]).min())
    if not (math.isfinite(network + exposed) and slowest > 0):
        return None
    return Measured(slowest, network, exposed, settings)


@dataclass
class Tuner:
    """Looks at what was measured of each sync, and says what is to be in force.

    Args:
        wanted: what the user has set. Codes become coarser where that spares many `learning_steps`, and never finer
            than these.
        parts: the fragments, of which each has a sync in an interval.

    >>> from dataclasses import replace
    >>> tuner = Tuner(Tuned(128, 4, "none"))
    >>> now = Tuned(128, 4, "none")
    >>> fast = Measured(step=0.5, network=1.0, exposed=0.0, settings=now)
    >>> for _ in range(3): settings, why = tuner.look(fast, now)
    >>> settings                       # 1 s with its margin is three steps, and one more
    Tuned(interval=16, delay_steps=4, compression='none')
    >>> tuner.look(replace(fast, network=40.0, exposed=38.0), settings)[0]
    Tuned(interval=28, delay_steps=27, compression='int8')
    """

    wanted: Tuned
    parts: int = 1
    history: list[Measured] = field(default_factory=list)

    def look(self, measured: Measured, now: Tuned) -> tuple[Tuned, str]:
        """The settings from the next sync on, and why; `now` and "" where they are to stay."""
        if self.history and self.history[-1].settings.compression != measured.settings.compression:
            self.history.clear()  # latency and work of the codes are not as their bytes
        self.history = [*self.history, measured][-KEPT:]
        sure = len(self.history) == KEPT
        settings = self._chosen(now, sure)
        if settings == now:
            return now, ""
        network = max(m.network_with(settings.compression) for m in self.history)
        return settings, (
            f"a step takes {self._step:.3g} s and a sync as {settings.compression} {network:.3g} s of the network, so "
            f"its sync is every {settings.interval} steps and applied {settings.delay_steps} later "
            f"(was {now.interval}, {now.delay_steps}, {now.compression})"
        )

    def _chosen(self, now: Tuned, sure: bool) -> Tuned:
        kind = self.wanted.compression
        while (coarser := COARSER[kind]) is not None and self._length(kind) >= SPARED * self._length(coarser):
            kind = coarser
        if _coarser(now.compression, kind) and not (
            sure and self._length(kind) <= BACK * self._length(now.compression)
        ):
            kind = now.compression
        interval, delay = self._needed(kind)
        interval = min(interval, GROWTH * max(now.interval, self._fewest))
        longer, much_shorter = interval > now.interval, sure and interval < SLACK * now.interval
        if kind == now.compression and not longer and not much_shorter:
            later, much_sooner = delay > now.delay_steps, sure and delay < SLACK * now.delay_steps
            interval, delay = now.interval, delay if later or much_sooner else now.delay_steps
        return Tuned(interval, min(delay, interval), kind)

    def _needed(self, compression: str) -> tuple[int, int]:
        """Steps of an interval, and of the delay."""
        network = max(m.network_with(compression) for m in self.history)
        work = min(m.work for m in self.history)
        delay = math.ceil(MARGIN * network / self._step - 1e-9) + 1
        spread = min(self.wanted.interval, math.ceil(work / (WORK_SHARE * self._step)))
        return _rounded(max(self._fewest, delay, spread)), delay

    def _length(self, compression: str) -> float:
        interval, delay = self._needed(compression)
        return learning_steps(self.parts * interval, delay)

    @property
    def _step(self) -> float:
        return sorted(m.step for m in self.history)[len(self.history) // 2]

    @property
    def _fewest(self) -> int:
        return max(1, min(FEWEST_STEPS // self.parts, self.wanted.interval))


def _coarser(one: str, other: str) -> bool:
    return KINDS.index(one) > KINDS.index(other)


def _rounded(steps: int) -> int:
    """Up, to three bits and one: what differs by little is the same.

    >>> [_rounded(steps) for steps in (7, 16, 17, 37, 100)]
    [7, 16, 18, 40, 104]
    """
    unit = 1 << max(0, steps.bit_length() - 4)
    return -(-steps // unit) * unit


NUMBERS = 3 + 6 * KEPT
NOTHING = -1.0


def to_numbers(tuner: Tuner, now: Tuned) -> list[float]:
    """The settings in force and the history, for a checkpoint."""
    found = [*_numbers_of(now)]
    for m in tuner.history:
        found += [m.step, m.network, m.exposed, *_numbers_of(m.settings)]
    return found + [NOTHING] * (NUMBERS - len(found))


def from_numbers(tuner: Tuner, numbers: Sequence[float]) -> Tuned | None:
    """The settings that were in force, None if none were saved; `tuner` takes the history."""
    if numbers[0] == NOTHING:
        return None
    rows = [numbers[start : start + 6] for start in range(3, NUMBERS, 6)]
    tuner.history = [Measured(row[0], row[1], row[2], _settings_of(row[3:])) for row in rows if row[0] != NOTHING]
    return _settings_of(numbers[:3])


def _numbers_of(settings: Tuned) -> list[float]:
    return [settings.interval, settings.delay_steps, KINDS.index(settings.compression)]


def _settings_of(numbers: Sequence[float]) -> Tuned:
    interval, delay_steps, kind = (round(number) for number in numbers)
    return Tuned(interval, delay_steps, KINDS[kind])
