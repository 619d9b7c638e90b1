"""`hf-edit plan`: what a network leaves of the speed, which settings to take, and when to take none.

    hf-edit plan --parameters 1.1b --replicas 2 --ranks 8 --step-seconds 0.8 --rate 1gbit

Nothing is trained: the numbers given are simulated (see simulation.py).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from hf_edit.cli.job import MOMENTS
from hf_edit.cli.plan_page import LEAST_SYNCS, config_of, page, reasons_against
from hf_edit.cli.simulation import (
    BYTES_PER_ELEMENT,
    CPU_SECONDS_PER_BYTE,
    TAUS,
    Numbers,
    Outcome,
    recommend,
    synchronous,
)

SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
EVERYDAY = (  # flag, type, default, metavar, help
    ("--parameters", "count", None, "N", "trained, such as 1.1b or 350m (needed)"),
    ("--replicas", "whole", None, "R", "copies of the model, often one a host (needed)"),
    ("--step-seconds", "number", None, "S", "one optimizer step in a replica (needed)"),
    ("--rate", "rate", None, "RATE", "of their link: 100mbit, 1gbit, unlimited (needed)"),
    ("--round-trip-ms", "least0", 0.0, "MS", "between two replicas, as ping says (0)"),
    ("--ranks", "whole", 1, "N", "GPUs of a replica, which share its link (1)"),
    ("--spread", "least0", 0.0, "F", "steps' standard deviation over their mean (0)"),
    ("--speeds", "speeds", (), "1,0.5", "each replica's; S is that of speed 1 (all 1)"),
    ("--steps", "count", None, "N", "optimizer steps planned"),
    ("--hours-between-failures", "number", None, "H", "of the whole job (none)"),
    ("--cpu", "number", None, "CORES", "no GPUs: a replica trains on that many cores"),
)
RARE = (
    ("--units", "count", 10, "N", "messages of a sync: blocks + 2 (10)"),
    ("--restart-seconds", "least0", 300.0, "S", "from a failure to the next step (300)"),
    ("--checkpoint-steps", "count", 500, "N", "steps between checkpoints, save_steps (500)"),
    ("--gradient-bytes", "number", 4.0, "B", "of a gradient in DDP/HSDP: 4, or 2 in bf16 (4)"),
    ("--seed", "count", 1, "N", "of random steps (1)"),
)


# -- what is given ----------------------------------------------------------------------------------------------------


def count(text: str) -> int:
    """
    >>> count("1.1b"), count("350m"), count("20000")
    (1100000000, 350000000, 20000)
    """
    found = re.fullmatch(r"([0-9_]*\.?[0-9]+(?:e[0-9]+)?)([kmbgt]?)", text.strip().lower())
    value = float(found[1]) * SCALES[found[2]] if found else 0.0
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number of at least 1, such as 20000, 350m or 1.1b")
    return round(value)


def whole(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of at least 1")
    return value


def rate(text: str) -> float:
    """Bits per second.

    >>> rate("100mbit"), rate("25Gbit/s"), rate("unlimited")
    (100000000.0, 25000000000.0, inf)
    """
    word = text.strip().lower()
    if word == "unlimited":
        return math.inf
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([kmgt]?)(?:bit|bit/s|bits|bits/s|bps)", word)
    if not found or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give bits per second above 0 with their unit, such as 100mbit, 1gbit, 25gbit, or unlimited "
            "(a byte is 8 bits)"
        )
    return float(found[1]) * SCALES[found[2]]


def number(text: str, least: float | None = None) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 if least is None else value >= least) or value == math.inf:
        what = "above 0" if least is None else f"of at least {least:g}"
        raise argparse.ArgumentTypeError(f"{text!r}: give a number {what}, without a unit")
    return value


def speeds(text: str) -> tuple[float, ...]:
    return tuple(number(word) for word in text.split(","))


KINDS: dict[str, Callable[[str], Any]] = {
    "count": count, "whole": whole, "rate": rate, "number": number, "least0": lambda text: number(text, 0.0),
    "speeds": speeds,
}  # fmt: skip


class _HelpOnAll(argparse.Action):
    """Prints the help with the rare flags in it; `const` are these, and what is said of each."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        for action, text in self.const:
            action.help = text
        parser.print_help()
        parser.exit()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "hf-edit plan --parameters N --replicas R --step-seconds S --rate RATE ..."
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, max_help_position=30)
    for flag, kind, default, metavar, text in EVERYDAY:
        parser.add_argument(flag, type=KINDS[kind], default=default, metavar=metavar, help=text)
    rare = []
    for flag, kind, default, metavar, text in RARE:
        action = parser.add_argument(flag, type=KINDS[kind], default=default, metavar=metavar, help=argparse.SUPPRESS)
        rare.append((action, text))
    parser.add_argument("--compression", choices=BYTES_PER_ELEMENT, default="none", metavar="KIND",
                        help=f"of what a sync sends: {', '.join(BYTES_PER_ELEMENT)}")  # fmt: skip
    parser.add_argument("--sync-moments", choices=MOMENTS, default="none", metavar="KIND",
                        help=f"averaged at a sync, too: {', '.join(MOMENTS)}")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of the page")
    parser.add_argument("--help-all", action=_HelpOnAll, nargs=0, const=rare, help="show the rarer settings, too")


def numbers_of(arguments: argparse.Namespace) -> Numbers:
    """
    Raises:
        ValueError: something is missing, or does not go together.
    """
    missing = [flag for flag, _, default, _, text in EVERYDAY
               if "(needed)" in text and getattr(arguments, flag[2:].replace("-", "_")) is None]  # fmt: skip
    if missing:
        raise ValueError(
            f"missing: {', '.join(missing)}. A step's seconds are in the log of any short run on one replica; the rate "
            "of a link is what iperf3 says. For example: hf-edit plan --parameters 1.1b --replicas 2 --step-seconds "
            "0.8 --rate 1gbit"
        )
    if arguments.replicas < 2:
        raise ValueError("--replicas 1: one replica has nobody to sync with, and EDiTTrainer is a plain Trainer then. "
                         "Give 2 or more, or train as ever.")  # fmt: skip
    if arguments.speeds and len(arguments.speeds) != arguments.replicas:
        raise ValueError(f"--speeds has {len(arguments.speeds)} numbers, --replicas is {arguments.replicas}: give one "
                         "speed a replica, such as --replicas 2 --speeds 1,0.5")  # fmt: skip
    if arguments.spread > 2:
        raise ValueError(f"--spread {arguments.spread:g}: a fraction of the mean is needed; 10 % is 0.1.")
    return Numbers(
        parameters=arguments.parameters,
        num_replicas=arguments.replicas,
        step_seconds=arguments.step_seconds,
        bits_per_second=arguments.rate,
        round_trip_seconds=arguments.round_trip_ms / 1000,
        replica_size=arguments.ranks,
        step_spread=arguments.spread,
        speeds=arguments.speeds,
        num_units=arguments.units,
        hours_between_failures=arguments.hours_between_failures,
        restart_seconds=arguments.restart_seconds,
        checkpoint_steps=arguments.checkpoint_steps,
        processor_seconds_per_byte=CPU_SECONDS_PER_BYTE / arguments.cpu if arguments.cpu else 0.0,
        gradient_bytes=arguments.gradient_bytes,
        moments=MOMENTS.index(arguments.sync_moments),
        gradients_overlap=arguments.cpu is None or arguments.ranks == 1,  # DDP's do, FSDP2's on processors do not
    )


def taus_for(steps: int | None) -> Sequence[int]:
    """Those with which a run of `steps` has syncs enough; all if none has."""
    return [tau for tau in TAUS if steps is None or tau * LEAST_SYNCS <= steps] or TAUS[:1]


# -- what is said -----------------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> int:
    try:
        numbers = numbers_of(arguments)
    except ValueError as error:
        print(f"hf-edit plan: {error}", file=sys.stderr)
        return 2
    outcomes = recommend(numbers, taus_for(arguments.steps), arguments.compression, arguments.seed)
    together = synchronous(numbers, seed=arguments.seed)
    if arguments.json:
        print(as_json(numbers, outcomes, together, arguments.steps))
    else:
        print(page(numbers, outcomes, together, arguments.steps))
    return 0


def as_json(numbers: Numbers, outcomes: Sequence[Outcome], together: Outcome, steps: int | None) -> str:
    """Everything by name; an unlimited rate is null."""
    given = asdict(numbers)
    if math.isinf(numbers.bits_per_second):
        given["bits_per_second"] = None
    best = outcomes[0]
    found = {
        "numbers": given,
        "config": config_of(numbers, best),
        "recommended": asdict(best),
        "synchronous": asdict(together),
        "reasons_against": reasons_against(numbers, best, together, steps),
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
    return json.dumps(found, indent=2, allow_nan=False)
