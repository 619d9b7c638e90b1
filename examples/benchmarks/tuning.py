#!/usr/bin/env python
"""tune="auto" on a link whose rate drops to a tenth in the middle of the run: the settings, and what waits, by sync.

    sudo python examples/benchmarks/tuning.py --json tuning.jsonl
    python examples/benchmarks/tuning.py --table tuning.jsonl

Two hosts with two ranks each, as in slow_network.py, which compares tune="auto" with replicas that never sync. The rate
at first is chosen by rho (see there) for 32 steps of a step measured before.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from lib.bench import markdown_table, subplots
from lib.cost_model import bits_per_second, rate_of
from lib.hosts import Hosts
from lib.results import add_run
from lib.training import NUM_HOSTS, WARM_UP_STEPS, add_common_arguments, job_settings, measure_or_report, train

TAU, DELAY_STEPS = 32, 8  # at first
CALIBRATION_STEPS = 30


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rho", type=float, default=0.3, help="of the link before the drop, for 32 steps (0.3)")
    parser.add_argument("--steps", type=int, default=420, help="inner steps of the run (420)")
    parser.add_argument("--drop_step", type=int, default=200, help="about when the rate drops (200)")
    add_common_arguments(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        parser.set_defaults(steps=120, drop_step=80)
        arguments = parser.parse_args()
    return arguments


def main() -> None:
    arguments = parse()
    settings = {name: getattr(arguments, name) for name in ("rho", "steps", "drop_step")}
    measure_or_report(arguments, settings, measure, table, plot)


def measure(results: dict[str, Any], arguments: argparse.Namespace) -> None:
    """One run, beside one of "never" for the seconds of a step."""
    common: dict[str, Any] = dict(timeout=arguments.timeout, tau=TAU, sync_seconds=0.0, delay_steps=DELAY_STEPS)
    steps = (WARM_UP_STEPS + CALIBRATION_STEPS,) * NUM_HOSTS
    never = train(
        job_settings(arguments),
        method="never",
        replica_steps=steps,
        first_step=WARM_UP_STEPS,
        measured_steps=0,
        **common,
    )
    step = sum(r["window_seconds"] / r["window_steps"] for r in never["replicas"]) / NUM_HOSTS
    rate = rate_of(arguments.rho, TAU, step)
    slower = f"{round(bits_per_second(rate) / 10_000)}kbit"
    drop = Drop(slower, arguments.drop_step * step)
    figures = train(
        job_settings(arguments), rate=rate, meanwhile=drop, method="edit-auto",
        replica_steps=(arguments.steps,) * NUM_HOSTS, first_step=1, measured_steps=0, **common,
    )  # fmt: skip
    run = {"step_seconds": step, "rate": rate, "slower_rate": slower, "dropped_after_seconds": drop.seconds,
           "figures": figures}  # fmt: skip
    add_run(results, run, arguments.json)


class Drop:
    """Lowers the rate once, some seconds after the training has begun."""

    def __init__(self, rate: str, seconds: float) -> None:
        self.rate, self.seconds = rate, seconds
        self._begun: float | None = None
        self._done = False

    def __call__(self, hosts: Hosts, started: Path) -> None:
        if self._begun is None and started.exists():
            self._begun = time.monotonic()
        if self._begun is not None and not self._done and time.monotonic() - self._begun > self.seconds:
            hosts.set_rate(self.rate)
            self._done = True


def syncs_of(run: dict[str, Any]) -> list[dict[str, float]]:
    """Of host 0, one after the other; `share`: of an interval's seconds that training did not wait."""
    columns = run["figures"]["replicas"][0]["syncs"]
    found, elapsed = [], 0.0
    for index in range(len(columns["exposed_seconds"])):
        sync = {name: values[index] for name, values in columns.items()}
        trained = sync["sync_interval"] * run["step_seconds"]
        elapsed += trained + sync["exposed_seconds"]
        found.append({**sync, "share": trained / (trained + sync["exposed_seconds"]), "elapsed_seconds": elapsed})
    return found


def table(results: dict[str, Any]) -> str:
    """Markdown: the syncs of the newest run."""
    run = results["runs"][-1]
    rows = []
    for number, sync in enumerate(syncs_of(run), 1):
        slow = sync["elapsed_seconds"] > run["dropped_after_seconds"]
        rows.append([
            number, run["slower_rate"] if slow else run["rate"], f"{sync['sync_interval']:.0f}",
            f"{sync['delay_steps']:.0f}", f"{sync['bytes_per_parameter']:.3g}", f"{sync['sync_seconds']:.1f}",
            f"{sync['exposed_seconds']:.2f}", f"{sync['share']:.3f}",
        ])  # fmt: skip
    heading = ["sync", "rate, about", "sync_interval", "delay_steps", "bytes a parameter", "s from due to applied",
               "exposed s", "share of the interval"]  # fmt: skip
    return markdown_table(heading, rows)


def plot(results: dict[str, Any], path: Path) -> None:
    """The share and the interval of each sync."""
    figure, (shares, intervals) = subplots(1, 2)
    syncs = syncs_of(results["runs"][-1])
    numbers = range(1, len(syncs) + 1)
    shares.plot(numbers, [sync["share"] for sync in syncs], marker="o")
    shares.set(xlabel="sync", ylabel="share of the interval that did not wait", ylim=(0, 1.05))
    for name in ("sync_interval", "delay_steps"):
        intervals.step(numbers, [sync[name] for sync in syncs], where="mid", label=name)
    intervals.set(xlabel="sync", ylabel="steps")
    intervals.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
