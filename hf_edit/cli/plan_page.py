"""The page of `hf-edit plan`: what was assumed, the table, what to take, what it is to be held against, when not to."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hf_edit import EDiTConfig
from hf_edit.cli.events import elastic_uptime
from hf_edit.cli.job import MOMENTS
from hf_edit.cli.simulation import (
    CPU_SECONDS_PER_BYTE,
    TOLERANCE,
    Numbers,
    Outcome,
    Settings,
    interval_steps,
    recommend,
    simulate,
    steps_to_learn_in,
    synchronous,
)

LEAST_SYNCS = 30
FAST_ENOUGH = 0.95  # of the speed, that synchronous training keeps: nothing to gain
TOO_SLOW = 0.9  # of the speed, that no setting keeps
DAY_SECONDS = 86400
# What one rank's sync moved through host memory on one GPU machine (examples/benchmarks/results/gpu.jsonl).
HOST_BITS_PER_SECOND = 12e9
LARGEST_MEASURED_DELAY = 24  # steps, in examples/benchmarks/results
MOST_MEASURED_REPLICAS = 4
COLUMNS = (("none", False), ("forward", False), ("delayed", False), ("forward", True), ("delayed", True))


def page(numbers: Numbers, outcomes: Sequence[Outcome], together: Outcome, steps: int | None) -> str:
    """The whole of it; `outcomes` are recommend()'s, `together` is synchronous training's."""
    best = outcomes[0]
    against = reasons_against(numbers, best, together, steps)
    parts = [
        ("Assumed", assumptions(numbers, best, steps)),
        ("Share of the speed of replicas that never sync (simulated)", table(numbers, outcomes)),
        (
            f"Recommended{', if EDiT at all' if against else ''}: {percent(best.share)} of that speed",
            recommendation(numbers, best, outcomes),
        ),
        ("Beside it", comparison(numbers, best, together)),
        ("Not to be used here" if against else "Nothing here speaks against EDiT", [f"- {each}" for each in against]),
        ("Not in these numbers", caveats(numbers, best, steps)),
    ]
    return "\n\n".join("\n".join([title, *map(_indented, lines)]) for title, lines in parts)


def _indented(line: str) -> str:
    """Two spaces before it; the items of a list are folded."""
    if not line.startswith("- "):
        return f"  {line}".rstrip()
    return textwrap.fill(line, 100, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def assumptions(numbers: Numbers, best: Outcome, steps: int | None) -> list[str]:
    ranks = f" of {numbers.replica_size} ranks" if numbers.replica_size > 1 else ""
    lines = [
        f"{quantity(numbers.parameters)} trained parameters, {numbers.num_replicas} replicas{ranks}, "
        f"{numbers.step_seconds:g} s a step" + (f", {steps:,} steps" if steps else ""),
        f"{rate_text(numbers.bits_per_second)} each way for a replica, round trip "
        f"{1000 * numbers.round_trip_seconds:g} ms; 5 % of the traffic are headers",
    ]
    if numbers.speeds:
        each = " / ".join(f"{numbers.step_seconds / speed:.3g}" for speed in numbers.speeds)
        lines.append(f"speeds {', '.join(f'{speed:g}' for speed in numbers.speeds)}: {each} s a step")
    if numbers.step_spread:
        lines.append(f"steps vary by {numbers.step_spread:.0%} of their mean at random (log-normal)")
    if numbers.processor_seconds_per_byte:
        cores = CPU_SECONDS_PER_BYTE / numbers.processor_seconds_per_byte
        lines.append(f"no GPUs: a sync's work falls on the {cores:g} core(s) that train (measured on one machine)")
    if numbers.hours_between_failures:
        lines.append(f"a failure every {numbers.hours_between_failures:g} h, {numbers.restart_seconds:g} s to restart, "
                     f"a checkpoint every {numbers.checkpoint_steps} steps")  # fmt: skip
    return lines


def table(numbers: Numbers, outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each interval, a column for each way to sync; the recommended one is marked."""
    found: dict[tuple[int, str, bool], Outcome] = {}
    for outcome in outcomes:
        settings = outcome.settings or Settings()
        tau = 2 ** round(math.log2(interval_steps(numbers, settings)))
        found[tau, settings.overlap, settings.sync_seconds is not None] = outcome
    columns = [column for column in COLUMNS if any(key[1:] == column for key in found)]
    widths = [max(13, len(_name(*column)) + 3) for column in columns]
    heading = f"{'tau':>6}{'trains for':>12}"
    lines = [heading + "".join(f"{_name(*each):>{width}} " for each, width in zip(columns, widths, strict=True))]
    for tau in sorted({key[0] for key in found}):
        line = f"{tau:>6}{duration(tau / numbers.steps_per_second):>12}"
        for (overlap, timed), width in zip(columns, widths, strict=True):
            outcome = found[tau, overlap, timed]
            assert outcome.settings is not None
            delay = f"{outcome.settings.delay_steps:>4}" if overlap == "delayed" else ""
            line += f"{percent(outcome.share) + delay:>{width}}" + ("*" if outcome is outcomes[0] else " ")
        lines.append(line)
    lines += ["", "none: training waits for the whole sync; forward: hides it behind the next forward pass; delayed",
              "hides it behind the next steps, whose number (delay_steps) stands beside; *: recommended"]  # fmt: skip
    if numbers.uneven:
        lines.append("by time (A-EDiT): sync_seconds of that length; by steps the fast replicas wait for the slow")
    return lines


def _name(overlap: str, timed: bool) -> str:
    return overlap + (" by time" if timed else "")


def config_of(numbers: Numbers, best: Outcome) -> dict[str, Any]:
    """The recommended EDiTConfig's fields; with a longer time limit where a sync or the wait for it needs one."""
    assert best.settings is not None
    values: dict[str, Any] = {"num_replicas": numbers.num_replicas, **best.settings.config_fields()}
    if numbers.moments:
        values["sync_moments"] = MOMENTS[numbers.moments]
    if 2 * best.longest_sync_seconds > EDiTConfig().sync_timeout_seconds:
        values["sync_timeout_seconds"] = 60.0 * math.ceil(3 * best.longest_sync_seconds / 60)
    EDiTConfig(**values)  # what it would refuse is not recommended
    return values


def recommendation(numbers: Numbers, best: Outcome, outcomes: Sequence[Outcome]) -> list[str]:
    """The configuration in both its forms, why it, and what it is worth if the numbers given are not quite right."""
    assert best.settings is not None
    values = config_of(numbers, best)
    code = ", ".join(f"{name}={json.dumps(value)}" for name, value in values.items())
    lines = [f"EDiTConfig({code})", "", *(f"{name}: {value}" for name, value in values.items()), ""]
    lines.append(f"It {best.reason}.")
    slower = f", {percent(best.wait_share)} for slower replicas" if numbers.uneven else ""
    still = f"training stands still for {percent(best.exposed_share)} of the time{slower}"
    lines.append(f"A sync begins every {duration(best.interval_seconds)}; {still}.")
    if not math.isinf(numbers.bits_per_second):
        half = simulate(replace(numbers, bits_per_second=numbers.bits_per_second / 2), best.settings)
        lines.append(f"Should the link give half of its rate, it keeps {percent(half.share)}.")
    if best.settings.overlap == "delayed":
        plain = next(each for each in outcomes if each.settings and each.settings.overlap == "forward")
        lines.append(f"Without a delay the best is {_words(plain)}: {percent(plain.share)}.")
    if best.settings.compression == "none":
        lines.append(_what_codes_give(numbers, best, outcomes))
    if numbers.hours_between_failures:
        elastic = best.share * elastic_uptime(numbers, best.interval_seconds)
        lines.append(f"With the failures {percent(best.goodput)} of the speed are left; with elastic=True, where the "
                     f"other replicas train on, {percent(elastic)}.")  # fmt: skip
    if "sync_timeout_seconds" in values:
        lines.append(f"The time limit is longer because a sync may take {duration(best.longest_sync_seconds)}.")
    return lines


def _what_codes_give(numbers: Numbers, best: Outcome, outcomes: Sequence[Outcome]) -> str:
    """Whether compression pays here: it learns as much, so it does where it lets replicas sync more often."""
    taus = sorted({outcome.settings.sync_interval for outcome in outcomes if outcome.settings})
    coded = recommend(numbers, taus, "int8")[0]
    assert coded.settings is not None
    before, after = (steps_to_learn_in(numbers, outcome.settings or Settings()) for outcome in (best, coded))
    if after < 0.75 * before:
        return f"With {_words(coded)} it learns more and keeps {percent(coded.share)}."
    if coded.share > best.share + TOLERANCE:
        return f"With compression='int8' it would keep {percent(coded.share)}."
    every = interval_steps(numbers, coded.settings)
    return f"compression does not pay here: int8 would keep {percent(coded.share)} with a sync every {every:.3g} steps."


def _words(outcome: Outcome) -> str:
    return ", ".join(f"{name}={value}" for name, value in (outcome.settings or Settings()).config_fields().items())


def comparison(numbers: Numbers, best: Outcome, together: Outcome) -> list[str]:
    """Synchronous training, and what both send."""
    half = synchronous(replace(numbers, gradient_bytes=2.0))
    other = f" ({percent(half.share)} with gradients in 2 bytes)" if numbers.gradient_bytes != 2 else ""
    failed = f", {percent(together.goodput)} with the failures" if numbers.hours_between_failures else ""
    lines = [f"DDP/HSDP, gradients averaged in every step: {percent(together.share)} of the speed{other}{failed}"]
    if together.share > 0:
        times = best.share / together.share
        lines.append(f"EDiT takes {times:,.{0 if times >= 100 else 2}f} times as many steps in the same time")
    for name, outcome, when in (("EDiT", best, "a sync"), ("DDP/HSDP", together, "a step")):
        daily = outcome.bytes_per_step * outcome.share * numbers.steps_per_second * DAY_SECONDS
        lines.append(f"{name + ':':<10}{size(outcome.bytes_per_sync)} sent by a replica in {when}, "
                     f"{duration(outcome.network_seconds)} on the network; {size(daily)} a day")  # fmt: skip
    return lines


def reasons_against(numbers: Numbers, best: Outcome, together: Outcome, steps: int | None) -> list[str]:
    """When to train synchronously, or otherwise, instead."""
    found = []
    if together.share >= FAST_ENOUGH:
        found.append(f"DDP/HSDP keeps {percent(together.share)} of the speed on this network and learns more from the "
                     "same tokens: take the plain Trainer.")  # fmt: skip
    elif synchronous(replace(numbers, gradient_bytes=2.0)).share >= FAST_ENOUGH:
        found.append(f"DDP/HSDP with gradients in 2 bytes would keep {FAST_ENOUGH:.0%} of the speed or more, and learn "
                     "more from the same tokens: try that first.")  # fmt: skip
    if steps is not None and steps / best.steps_per_sync < LEAST_SYNCS:
        found.append(f"{steps:,} steps have room for {steps / best.steps_per_sync:.0f} syncs; with fewer than about "
                     f"{LEAST_SYNCS} the outer optimizer hardly helps. Train longer or synchronously.")  # fmt: skip
    if best.share < TOO_SLOW:
        found.append(_too_slow(numbers, best))
    if numbers.hours_between_failures and best.goodput < TOO_SLOW * best.share:
        found.append(f"Failures take {percent(1 - best.goodput / best.share)} of the time: a lost rank ends the run. "
                     "Let the others train on (elastic=True), save more often, or restart faster.")  # fmt: skip
    return found


def _too_slow(numbers: Numbers, best: Outcome) -> str:
    text = f"The best setting keeps {percent(best.share)} of the speed: "
    if best.wait_share > best.exposed_share / 2:
        return text + "replicas wait for a slow one. Leave it out, or give it less to do in a step."
    seconds = best.network_seconds
    return text + (
        f"a sync is {duration(seconds)} on the network, {seconds * numbers.steps_per_second:,.0f} steps. Train fewer "
        "parameters (LoRA), find a faster link, or sync less often than this table does."
    )


def caveats(numbers: Numbers, best: Outcome, steps: int | None) -> list[str]:
    """What the simulation does not know, as far as it matters for this job."""
    lines = [
        "- what a setting costs in learning: a larger tau learns less from the same tokens; a step of delay counts as "
        "two of tau"
    ]
    settings = best.settings or Settings()
    if settings.overlap == "delayed":
        if settings.delay_steps > LARGEST_MEASURED_DELAY:
            lines.append(
                f"- delays of more than {LARGEST_MEASURED_DELAY} steps: none has been measured (examples/benchmarks)"
            )
        if numbers.bits_per_second / numbers.replica_size > HOST_BITS_PER_SECOND:
            lines.append("- delayed syncs go through host memory, which on one GPU machine gave a rank "
                         f"{rate_text(HOST_BITS_PER_SECOND)}: less than this link")  # fmt: skip
    if steps is None:
        least = math.ceil(LEAST_SYNCS * best.steps_per_sync)
        seconds = least / (best.share * numbers.steps_per_second)
        lines.append(f"- the length of the run: it should have at least {LEAST_SYNCS} syncs, here {least:,} steps "
                     f"({duration(seconds)}); --steps says yours")  # fmt: skip
    if numbers.num_replicas > MOST_MEASURED_REPLICAS:
        lines.append(f"- more than {MOST_MEASURED_REPLICAS} replicas: none have been measured, for speed or learning")
    if not numbers.uneven:
        lines.append("- replicas of unequal or varying speed, which wait for each other: see --speeds, --spread")
    return lines


# -- quantities -------------------------------------------------------------------------------------------------------


def percent(share: float) -> str:
    """
    >>> percent(0.98765), percent(0.9999), percent(0.0001)
    ('98.8 %', '100.0 %', 'below 0.1 %')
    """
    return "below 0.1 %" if 0 < share < 5e-4 else f"{100 * share:.1f} %"


def quantity(value: float) -> str:
    """
    >>> quantity(1_100_000_000), quantity(120e6), quantity(950)
    ('1.1B', '120M', '950')
    """
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:g}"


def size(num_bytes: float) -> str:
    """
    >>> size(4.4e9), size(0)
    ('4.4 GB', '0 MB')
    """
    for scale, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB")):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes / 1e6:.3g} MB"


def rate_text(bits_per_second: float) -> str:
    if math.isinf(bits_per_second):
        return "an unlimited rate"
    scale, unit = (1e9, "Gbit/s") if bits_per_second >= 1e9 else (1e6, "Mbit/s")
    return f"{bits_per_second / scale:g} {unit}"


def duration(seconds: float) -> str:
    """
    >>> duration(0.034), duration(8), duration(5400), duration(400_000)
    ('0.034 s', '8 s', '90 min', '4.6 days')
    """
    if seconds < 600:
        return f"{seconds:.3g} s"
    if seconds < 3 * 3600:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h" if seconds < 2 * DAY_SECONDS else f"{seconds / DAY_SECONDS:.2g} days"
