"""Settings that find themselves, held against a network that is a few lines of arithmetic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from hf_edit.method.compression import bytes_per_element
from hf_edit.method.tuning import (
    KINDS,
    NUMBERS,
    Measured,
    Tuned,
    Tuner,
    from_numbers,
    learning_steps,
    measure,
    to_numbers,
)

START = Tuned(128, 4, "none")


@dataclass
class Link:
    """`network` seconds for a sync without compression, of which `latency` for any; `work` that nothing hides."""

    step: float
    network: float
    work: float = 0.0
    latency: float = 0.0

    def measured(self, settings: Tuned) -> Measured:
        ratio = bytes_per_element(settings.compression) / 4
        network = self.latency + (self.network - self.latency) * ratio
        exposed = self.work + max(0.0, network - settings.delay_steps * self.step)
        return Measured(self.step, network, exposed, settings)

    def share(self, settings: Tuned) -> float:
        return settings.interval * self.step / (settings.interval * self.step + self.measured(settings).exposed)

    def train(self, tuner: Tuner, settings: Tuned) -> Iterator[tuple[Tuned, str]]:
        """What holds behind each sync, whose exchange tells of the one before."""
        before = settings
        while True:
            chosen, why = tuner.look(self.measured(before), settings)
            before, settings = settings, chosen
            yield settings, why


def best(link: Link) -> float:
    grid = itertools.product((16, 32, 64, 128, 256, 512), (0.25, 0.5, 1.0), KINDS)
    return max(link.share(Tuned(tau, max(1, int(share * tau)), kind)) for tau, share, kind in grid)


LINKS = [
    Link(0.4, 0.07), Link(0.4, 10.0, work=0.08), Link(0.4, 100.0, latency=1.0), Link(0.1, 30.0, work=0.05),
    Link(2.0, 500.0, work=1.0, latency=5.0),
]  # fmt: skip


@pytest.mark.parametrize("link", LINKS)
def test_it_comes_within_3_percent_of_the_best_of_a_grid(link: Link) -> None:
    """And no more than a sync in SLACK of the interval would need."""
    course = link.train(Tuner(START), START)
    settings, _ = [next(course) for _ in range(8)][-1]
    assert link.share(settings) >= 0.97 * best(link)
    network = link.measured(settings).network
    assert settings.interval <= max(16, (1.25 * network / link.step + 2) / 0.6, 1.2 * link.work / (0.01 * link.step))
    later = [next(course) for _ in range(10)]
    assert {chosen for chosen, _ in later} == {settings}, "it stays where nothing changes"
    assert all(why == "" for _, why in later)


@pytest.mark.parametrize("link", [*LINKS, Link(0.4, 2.4), Link(0.4, 4.0, work=0.02), Link(0.4, 5.5), Link(0.4, 25.0)])
@pytest.mark.parametrize("wanted", [START, Tuned(128, 4, "int8")])
def test_codes_are_taken_where_they_let_replicas_learn_much_more(link: Link, wanted: Tuned) -> None:
    """No other codes would need many steps fewer, and no finer ones as few."""
    tuner = Tuner(wanted)
    course = link.train(tuner, wanted)
    settings, _ = [next(course) for _ in range(12)][-1]

    def needed(kind: str) -> float:
        delay = math.ceil(1.25 * tuner.history[-1].network_with(kind) / link.step - 1e-9) + 1
        work = math.ceil(tuner.history[-1].work / (0.01 * link.step))
        return learning_steps(max(16, delay, min(128, work)), delay)

    mine = needed(settings.compression)
    allowed = KINDS[KINDS.index(wanted.compression) :]
    assert all(mine < 1.9 * needed(kind) for kind in allowed if kind != "bf16")
    finer = [kind for kind in allowed if KINDS.index(kind) < KINDS.index(settings.compression) and kind != "bf16"]
    assert all(needed(kind) > 1.15 * mine for kind in finer), "the codes are worth it"


@pytest.mark.parametrize("link", LINKS)
def test_it_is_back_within_3_intervals_after_the_rate_has_dropped_to_a_tenth(link: Link) -> None:
    tuner = Tuner(START)
    course = link.train(tuner, START)
    settings, _ = [next(course) for _ in range(8)][-1]
    slow = replace(link, network=link.latency + 10 * (link.network - link.latency))
    again = slow.train(tuner, settings)
    settings, why = [next(again) for _ in range(3)][-1]
    assert slow.share(settings) >= 0.97 * best(slow), (settings, why)


def test_it_goes_back_where_the_link_is_fast_again() -> None:
    tuner, slow, fast = Tuner(START), Link(0.4, 100.0), Link(0.4, 0.8)
    course = slow.train(tuner, START)
    coarse, _ = [next(course) for _ in range(8)][-1]
    assert coarse.compression in ("int8", "int4")
    course = fast.train(tuner, coarse)
    found = [next(course) for _ in range(10)]
    assert found[-1][0] == Tuned(16, 4, "none")
    assert "was" in next(why for _, why in found if why)


@pytest.mark.parametrize("base", [1.0, 2.0, 3.0, 3.5, 4.0, 8.0, 20.0, 22.0, 24.0, 40.0])
def test_noise_changes_nothing(base: float) -> None:
    """A tenth more or less from sync to sync: in 50 of them not more than two changes, once it has begun."""
    generator = torch.Generator().manual_seed(0)
    tuner, settings, changes = Tuner(START), START, 0
    before = settings
    for number in range(60):
        step, network = (mean * (0.9 + 0.2 * float(torch.rand((), generator=generator))) for mean in (0.4, base))
        chosen, why = tuner.look(Link(step, network, work=0.05).measured(before), settings)
        before, settings = settings, chosen
        changes += bool(why) and number >= 10
    assert changes <= 2


def test_the_users_codes_and_short_intervals_are_kept() -> None:
    wanted = Tuned(8, 4, "int8")
    course = Link(0.4, 0.1).train(Tuner(wanted), wanted)
    settings, _ = [next(course) for _ in range(8)][-1]
    assert (settings.interval, settings.compression) == (8, "int8")


def test_fragments_share_the_interval() -> None:
    wanted = Tuned(32, 4, "int4")  # of each of four fragments
    course = Link(0.4, 8.0).train(Tuner(wanted, parts=4), wanted)
    settings, _ = [next(course) for _ in range(8)][-1]
    assert settings == Tuned(5, 5, "int4"), "1 s with its margin is 4 steps, and one more"


def test_what_cannot_be_measured_is_none() -> None:
    told = {name: torch.tensor([4.0, 2.0]) for name in ("interval_steps", "training_seconds")}
    told |= {f"before_{name}_seconds": torch.tensor([1.0, 3.0]) for name in ("network", "exposed")}
    told["before_wait_seconds"] = torch.tensor([0.0, 2.5])  # of the second, for the first
    told["training_seconds"] = torch.tensor([4.0, 3.0])
    assert measure(told, START) == Measured(1.5, 3.0, 0.5, START)
    assert measure({**told, "interval_steps": torch.tensor([4.0, 0.0])}, START) is None
    assert measure({**told, "before_network_seconds": torch.tensor([1.0, math.nan])}, START) is None


def test_numbers_for_a_checkpoint() -> None:
    tuner = Tuner(START)
    course = Link(0.4, 20.0, work=0.1).train(tuner, START)
    settings = next(course)[0]
    settings = next(course)[0]
    numbers = to_numbers(tuner, settings)
    assert len(numbers) == NUMBERS
    other = Tuner(START)
    assert from_numbers(other, torch.tensor(numbers, dtype=torch.float64).tolist()) == settings
    assert other.history == tuner.history
