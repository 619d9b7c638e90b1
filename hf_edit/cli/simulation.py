"""What syncs leave of a training's speed, before it runs, and which settings to take: plain numbers in and out.

The same seed gives the same result. What a setting costs in learning is not in it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from hf_edit.cli.events import DRAWN_STEPS, FORWARD_SHARE, SimulatedReplica, SimulatedTraining, uptime
from hf_edit.cli.job import (
    BYTES_PER_ELEMENT,
    CPU_SECONDS_PER_BYTE,
    OVERLAPS,
    PROTOCOL_OVERHEAD,
    Numbers,
    Outcome,
    Settings,
)
from hf_edit.method.tuning import learning_steps

__all__ = [
    "BYTES_PER_ELEMENT", "CPU_SECONDS_PER_BYTE", "OVERLAPS", "PROTOCOL_OVERHEAD", "TAUS", "TOLERANCE", "Numbers",
    "Outcome", "Settings", "candidates", "interval_steps", "needed_delay_steps", "rank", "recommend", "simulate",
    "steps_to_learn_in", "synchronous",
]  # fmt: skip

TAUS = (8, 16, 32, 64, 128, 256, 512, 1024)
TOLERANCE = 0.02  # of the best share, that a smaller tau may cost
NUM_SYNCS = 64
SETTLING_SYNCS = 12  # first, and not counted: all start at once, and a delay lets the fast get ahead for a while


def simulate(numbers: Numbers, settings: Settings, *, steps: int | None = None, seed: int = 0) -> Outcome:
    """The training of `numbers` with `settings`, for 64 syncs or as many as fit into `steps` inner steps.

    On paper: a sync of 2.5 MB at 100 Mbit/s takes 0.21 s with the protocol's 5 %, 8 steps of 0.21 s take 1.68 s:

    >>> numbers = Numbers(parameters=625_000, num_replicas=2, step_seconds=0.21, bits_per_second=1e8)
    >>> round(simulate(numbers, Settings(sync_interval=8, overlap="none")).share, 4)  # 8 / 9
    0.8889
    >>> simulate(numbers, Settings(sync_interval=8, overlap="delayed", delay_steps=2)).share
    1.0
    """
    training = SimulatedTraining(numbers, settings, seed)
    num_syncs = NUM_SYNCS if steps is None else max(1, steps // settings.sync_interval)
    for _ in range(SETTLING_SYNCS):
        training.sync()
    training.restart_counts()
    for _ in range(num_syncs):
        training.sync()
    return training.outcome(num_syncs)


def synchronous(numbers: Numbers, *, seed: int = 0) -> Outcome:
    """DDP's or HSDP's: gradients are averaged in every step, and the slowest replica decides. Its processors' work for
    it is left out, so this is the most that can be hoped for.

    >>> numbers = Numbers(parameters=625_000, num_replicas=2, step_seconds=0.3, bits_per_second=1e8, num_units=10)
    >>> round(synchronous(numbers).share, 3)  # 0.21 s, beside 0.2 s of backward pass, which ends with the tenth unit
    0.909
    """
    units = range(numbers.num_units)
    sent_bytes = numbers.sent_bytes(numbers.gradient_bytes)
    on_link = numbers.link_seconds(sent_bytes) / len(units)
    latency = numbers.latency_seconds
    network = len(units) * on_link + latency
    drawn = [SimulatedReplica.of(numbers, seed, index) for index in range(numbers.num_replicas)]
    num_steps = DRAWN_STEPS[0] if numbers.step_spread else 1
    waited = elapsed = 0.0
    for _ in range(num_steps):
        seconds = [replica.step(1) for replica in drawn]
        slowest = max(seconds)
        ended = slowest + len(units) * (on_link + latency)
        if numbers.gradients_overlap:
            free = 0.0
            for unit in units:
                ready = slowest * (FORWARD_SHARE + (1 - FORWARD_SHARE) * (unit + 1) / len(units))
                free = max(free, ready) + on_link
            ended = free + latency
        waited += slowest - sum(seconds) / len(seconds)
        elapsed += ended
    computed = sum(replica.computed for replica in drawn) / len(drawn)
    share = num_steps * len(drawn) / elapsed / sum(num_steps / replica.computed for replica in drawn)
    step_seconds = elapsed / num_steps
    return Outcome(
        settings=None, share=share, exposed_share=1 - computed / elapsed, wait_share=waited / elapsed,
        goodput=share * uptime(numbers, 1, step_seconds), bytes_per_sync=sent_bytes, bytes_per_step=sent_bytes,
        network_seconds=network, longest_sync_seconds=step_seconds, interval_seconds=step_seconds, steps_per_sync=1,
    )  # fmt: skip


def candidates(numbers: Numbers, taus: Sequence[int] = TAUS, compression: str = "none") -> list[Settings]:
    """What `recommend` tries: every interval with every overlap, and by time too where replicas are uneven."""
    found = []
    for tau, overlap in itertools.product(taus, OVERLAPS):
        delay_steps = min(tau, needed_delay_steps(numbers, compression)) if overlap == "delayed" else 4
        by_steps = Settings(tau, None, overlap, delay_steps, compression)
        found.append(by_steps)
        if numbers.uneven:
            seconds = float(f"{tau / numbers.steps_per_second:.2g}")
            found.append(replace(by_steps, sync_interval=Settings.sync_interval, sync_seconds=seconds))
    return found


def needed_delay_steps(numbers: Numbers, compression: str = "none") -> int:
    """Steps that hide a sync: its network, and a step of the slowest that it may have to wait for."""
    network = simulate(numbers, Settings(overlap="none", compression=compression), steps=1).network_seconds
    slowest, fastest = (numbers.step_seconds / edge(numbers.all_speeds) for edge in (min, max))
    return math.ceil((network + slowest * (1 + numbers.step_spread)) / fastest - 1e-9)


def recommend(numbers: Numbers, taus: Sequence[int] = TAUS, compression: str = "none", seed: int = 0) -> list[Outcome]:
    """The outcomes of `candidates`, in the order of `rank`."""
    return rank([simulate(numbers, each, seed=seed) for each in candidates(numbers, taus, compression)], numbers)


def rank(outcomes: Sequence[Outcome], numbers: Numbers) -> list[Outcome]:
    """First the one to take: of those whose share is within `TOLERANCE` of the best, the one that learns most (fewest
    `learning_steps`); of equal ones by steps before by time, and the plainer overlap. Then the others by share.
    """
    best = max(outcomes, key=lambda outcome: outcome.share)

    def preference(outcome: Outcome) -> tuple[float, ...]:
        settings = outcome.settings or Settings(1)
        delay_steps = settings.delay_steps if settings.overlap == "delayed" else 0
        return (round(math.log2(steps_to_learn_in(numbers, settings))), settings.sync_seconds is not None,
                OVERLAPS.index(settings.overlap), delay_steps)  # fmt: skip

    near = sorted((outcome for outcome in outcomes if outcome.share >= best.share - TOLERANCE), key=preference)
    others = sorted(
        (outcome for outcome in outcomes if outcome.share < best.share - TOLERANCE), key=lambda each: -each.share
    )
    all_near = f"within {100 * TOLERANCE:g} % of the best share ({best.share:.3f})"
    ordered = [replace(outcome, reason=f"is {all_near}, but learns less or is less plain") for outcome in near]
    ordered[0] = replace(near[0], reason=f"learns most of all {all_near}: rarer and later syncs learn less")
    return ordered + [replace(each, reason=f"is {best.share - each.share:.3f} below the best share") for each in others]


def interval_steps(numbers: Numbers, settings: Settings) -> float:
    """Inner steps of an interval: tau, or what `sync_seconds` hold of them."""
    if settings.sync_seconds is None:
        return settings.sync_interval
    return float(f"{settings.sync_seconds * numbers.steps_per_second:.2g}")


def steps_to_learn_in(numbers: Numbers, settings: Settings) -> float:
    """`learning_steps` of these settings."""
    late = settings.delay_steps if settings.overlap == "delayed" else 0
    return learning_steps(interval_steps(numbers, settings), late)
