#!/usr/bin/env python
"""What two hosts still do together when one of them is slow, or stalls now and then, by method.

    sudo python examples/benchmarks/stragglers.py --json stragglers.jsonl
    python examples/benchmarks/stragglers.py --table stragglers.jsonl

Two hosts (network namespaces) with two ranks each train a Llama of 8.4M parameters. Host 1 gets the whole, half or a
quarter of its core (a control group's quota), or a random host is stopped for a random time again and again, from the
same seed in every run. "never", which does not sync, shows at the same time what each host does alone; a method's share
is the inner steps per second of both hosts, by the rows that they take, over the sum of what both do alone. A host's
idle share is what it does less than alone; its wait share is the part of its time that it waited at syncs.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.bench import markdown_table, mean, pair_range, share_text, subplots
from lib.cost_model import bits_per_second
from lib.network_job import METHODS, TIMED, window
from lib.results import add_run
from lib.stalls import Stalls
from lib.training import NUM_HOSTS, WARM_UP_STEPS, add_common_arguments, job_settings, measure_or_report, train

SLOW_HOST = 1
QUOTAS = {"even": 1.0, "2x": 0.5, "4x": 0.25, "stalls": 1.0}  # of the slow host, in processor seconds per second
DEFAULT_METHODS = ["hsdp", "edit-forward", "edit-delayed", "a-edit", "a-edit-delayed"]
CALIBRATION_STEPS = 30
ROWS = "rows a step, host 0 / 1"  # a column for hosts that take different numbers
QUICK = {"scenarios": ["2x"], "repeats": 1, "seconds": 10.0, "syncs": 3, "methods": ["edit-forward"]}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--scenarios", nargs="+", choices=QUOTAS, default=list(QUOTAS), metavar="SCENARIO",
                        help=f"of {', '.join(QUOTAS)} (all)")  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=DEFAULT_METHODS, metavar="METHOD",
                        help=f"of {', '.join(METHODS)} ({' '.join(DEFAULT_METHODS)})")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=1, help="runs for each figure (1)")
    parser.add_argument("--seconds", type=float, default=60.0,
                        help="about how long a run without a timed sync is measured (60)")  # fmt: skip
    parser.add_argument("--sync_seconds", type=float, default=4.0, help="between the timed methods' syncs (4)")
    parser.add_argument("--syncs", type=int, default=51,
                        help="syncs of a run of a timed method; the first is not measured (51)")  # fmt: skip
    parser.add_argument("--tau", type=int, default=16, help="inner steps between the other methods' syncs (16)")
    parser.add_argument("--delay_steps", type=int, default=4, help="of the delayed methods (4)")
    parser.add_argument("--rate", default="unlimited", help="of the network, as tc writes it (unlimited)")
    parser.add_argument("--gap_seconds", type=float, default=8.0, help="mean time between stalls (8)")
    parser.add_argument("--stall_seconds", type=float, default=2.0, help="longest stall (2)")
    add_common_arguments(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        parser.set_defaults(**QUICK)
        arguments = parser.parse_args()  # what is given holds all the same
    try:
        bits_per_second(arguments.rate)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def main() -> None:
    arguments = parse()
    names = ("sync_seconds", "tau", "delay_steps", "rate", "gap_seconds", "stall_seconds")
    measure_or_report(arguments, {name: getattr(arguments, name) for name in names}, measure, table, plot)


# -- measuring --------------------------------------------------------------------------------------------------------


def plan(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What to run: in every repeat of a scenario "never" comes first, then last, then first, ..."""
    for repeat, scenario in itertools.product(range(arguments.repeats), arguments.scenarios):
        methods = ["never", *arguments.methods]
        for method in methods if repeat % 2 == 0 else methods[::-1]:
            yield {"scenario": scenario, "method": method, "repeat": repeat}


def measure(results: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Adds to `results` what is not there yet, and keeps it in the file after every run."""
    if "full_speed" not in results:
        steps = (WARM_UP_STEPS + CALIBRATION_STEPS,) * NUM_HOSTS
        figures, _ = run_one("never", "even", arguments, steps, 0)
        results["full_speed"] = speeds(figures)
        print(f"inner steps per second at full speed: {results['full_speed']}", flush=True)
    done = [{name: run[name] for name in ("scenario", "method", "repeat")} for run in results["runs"]]
    for item in plan(arguments):
        if item in done:
            continue
        alone = [run for run in results["runs"] if (run["scenario"], run["method"]) == (item["scenario"], "never")]
        expected = speeds(alone[-1]["figures"]) if alone else guess(results["full_speed"], item["scenario"])
        steps, least = lengths(item["method"], expected, arguments)
        figures, stalls = run_one(item["method"], item["scenario"], arguments, steps, least)
        add_run(results, {**item, "figures": figures, "stalls": stalls}, arguments.json)
        by_host = ", ".join(f"{speed:.2f}" for speed in speeds(figures))
        print(f"{item['scenario']} {item['method']}: {by_host} inner steps per second", flush=True)


def guess(full_speed: list[float], scenario: str) -> list[float]:
    """Inner steps per second of each host alone, before that has been measured."""
    return [speed * (QUOTAS[scenario] if host == SLOW_HOST else 1.0) for host, speed in enumerate(full_speed)]


def lengths(method: str, alone: list[float], arguments: argparse.Namespace) -> tuple[tuple[int, ...], int]:
    """For each replica the steps to take, and the length of the measured window in steps (0: to the end).

    Args:
        alone: inner steps per second of each host alone.
    """
    if method == "never":
        return tuple(WARM_UP_STEPS + math.ceil(arguments.seconds * speed) for speed in alone), 0
    if method in TIMED:  # steps are counted as their mean over the replicas
        steps = math.ceil((arguments.syncs + 0.5) * arguments.sync_seconds * mean(alone)) + arguments.delay_steps
        return (steps,) * NUM_HOSTS, 0
    least = math.ceil(arguments.seconds * min(alone))
    if method == "hsdp":
        first, length = WARM_UP_STEPS, least
    else:
        first, length = window(method, arguments.tau, arguments.delay_steps, least)
    return (first + length + 2,) * NUM_HOSTS, length


def run_one(
    method: str, scenario: str, arguments: argparse.Namespace, steps: tuple[int, ...], length: int
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """One training's figures, and the stalls that it suffered."""
    first = WARM_UP_STEPS
    if method not in TIMED and method not in ("never", "hsdp"):
        first, _ = window(method, arguments.tau, arguments.delay_steps, length)
    stalls = Stalls(17, arguments.gap_seconds, arguments.stall_seconds) if scenario == "stalls" else None
    quotas = [QUOTAS[scenario] if host == SLOW_HOST else None for host in range(NUM_HOSTS)]
    figures = train(
        job_settings(arguments),
        rate=arguments.rate,
        quotas=quotas,
        timeout=arguments.timeout,
        meanwhile=stalls,
        method=method,
        replica_steps=steps,
        first_step=first,
        measured_steps=length,
        tau=arguments.tau,
        sync_seconds=arguments.sync_seconds,
        delay_steps=arguments.delay_steps,
    )
    return figures, stalls.stalls if stalls else []


def speeds(figures: dict[str, Any]) -> list[float]:
    """Inner steps per second of each host."""
    return [replica["inner_steps_per_second"] for replica in figures["replicas"]]


def work(figures: dict[str, Any]) -> list[float]:
    """Steps of equal rows per second of each host, by the rows that it takes."""
    rows = uneven_rows(figures)
    if rows is None:
        return speeds(figures)
    return [speed * part * len(rows) / sum(rows) for speed, part in zip(speeds(figures), rows, strict=True)]


# -- reporting ------------------------------------------------------------------------------------------------------


def summary(results: dict[str, Any]) -> list[dict[str, Any]]:
    """For every scenario and method the medians over its repeats; lists have one figure a host."""
    found = []
    for scenario, method in dict.fromkeys((run["scenario"], run["method"]) for run in results["runs"]):
        pairs = [] if method == "never" else paired(results, scenario, method)
        if not pairs:
            continue
        runs, bounds = zip(*pairs, strict=True)
        mine, alone = ([statistics.median(host) for host in zip(*map(speeds, f), strict=True)] for f in (runs, bounds))
        longest = max(runs, key=lambda figures: len(waits_of(figures)))
        waits = waits_of(longest)
        half = len(waits) // 2
        done = [statistics.median(host) for host in zip(*map(work, runs), strict=True)]
        found.append(
            {
                "scenario": scenario,
                "method": method,
                "runs": len(runs),
                "inner_steps_per_second": mine,
                "alone_inner_steps_per_second": alone,
                "share": sum(done) / sum(alone),
                "share_range": pair_range(*([sum(work(f)) for f in each] for each in (runs, bounds))),
                "rows": uneven_rows(longest),
                "idle_share": [1 - speed / bound for speed, bound in zip(done, alone, strict=True)],
                "wait_share": wait_shares(longest) if waits else None,
                "syncs": len(waits),
                "wait_seconds": waits,
                "wait_seconds_first_half": mean(waits[:half]) if half else None,
                "wait_seconds_second_half": mean(waits[-half:]) if half else None,
            }
        )
    return found


def paired(results: dict[str, Any], scenario: str, method: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The figures of a method's runs, each with those of "never" in the same repeat."""
    kinds = {"never": {}, method: {}}
    for run in results["runs"]:
        if run["scenario"] == scenario and run["method"] in kinds:
            kinds[run["method"]][run["repeat"]] = run["figures"]
    return [(figures, kinds["never"][repeat]) for repeat, figures in kinds[method].items() if repeat in kinds["never"]]


def waits_of(figures: dict[str, Any]) -> list[float]:
    """For every sync of the window the seconds that the host which came first waited for the other.

    The windows begin with the same sync. A host that ends earlier leaves out its last one, which the other may keep.

    Raises:
        ValueError: the windows differ by more than that.
    """
    hosts = [replica["syncs"]["wait_seconds"] for replica in figures["replicas"]]
    lengths = sorted(len(waits) for waits in hosts)
    if lengths[-1] - lengths[0] > 1:
        raise ValueError(f"The hosts' windows hold {lengths} syncs; all take part in each, so at most one is missing.")
    return [max(waits) for waits in zip(*hosts, strict=False)]


def uneven_rows(figures: dict[str, Any]) -> list[float] | None:
    """Each host's rows of a step, if they differ."""
    rows = [replica.get("rows_per_step", 0.0) for replica in figures["replicas"]]
    return rows if len(set(rows)) > 1 else None


def wait_shares(figures: dict[str, Any]) -> list[float]:
    """The part of the window that each host waited for the other at syncs."""
    return [sum(replica["syncs"]["wait_seconds"]) / replica["window_seconds"] for replica in figures["replicas"]]


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each scenario and method."""

    def shares(values: list[float] | None) -> str:
        return " / ".join(f"{100 * value:.1f} %" for value in values) if values else ""

    rows = []
    for cell in summary(results):
        speed = " / ".join(f"{value:.2f}" for value in cell["inner_steps_per_second"])
        alone = " / ".join(f"{value:.2f}" for value in cell["alone_inner_steps_per_second"])
        halves = [cell["wait_seconds_first_half"], cell["wait_seconds_second_half"]]
        waits = "" if None in halves else " then ".join(f"{value:.2f}" for value in halves)
        dealt = "" if cell["rows"] is None else " / ".join(f"{number:.1f}" for number in cell["rows"])
        rows.append([cell["scenario"], cell["method"], dealt, speed, alone, share_text(cell["share"]),
                     "{:.3f} to {:.3f} ({})".format(*cell["share_range"], cell["runs"]), shares(cell["idle_share"]),
                     shares(cell["wait_share"]), waits, cell["syncs"] or ""])  # fmt: skip
    heading = ["scenario", "method", ROWS, "inner steps/s, host 0 / 1", "alone", "share of both alone",
               "lowest to highest (runs)", "idle, host 0 / 1",
               "waiting at syncs", "s waited per sync, first half then second", "syncs"]  # fmt: skip
    if not any(row[heading.index(ROWS)] for row in rows):
        for row in (heading, *rows):
            del row[2]
    return markdown_table(heading, rows)


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars of the share by scenario and method; and the wait of every sync, to see that it does not grow."""
    cells = summary(results)
    scenarios = list(dict.fromkeys(cell["scenario"] for cell in cells))
    methods = list(dict.fromkeys(cell["method"] for cell in cells))
    figure, (bars, lines) = subplots(1, 2)
    for number, method in enumerate(methods):
        shares = {cell["scenario"]: cell["share"] for cell in cells if cell["method"] == method}
        places = [
            place + 0.8 * ((number + 0.5) / len(methods) - 0.5)
            for place, name in enumerate(scenarios)
            if name in shares
        ]
        bars.bar(places, list(shares.values()), width=0.8 / len(methods), label=method)
    bars.set_xticks(range(len(scenarios)), scenarios)
    bars.set(xlabel="scenario", ylabel="inner steps/s, share of both alone")
    bars.axhline(1.0, color="grey", linewidth=0.8)
    figure.legend(*bars.get_legend_handles_labels(), loc="outside lower left", ncol=len(methods), fontsize="small")
    for cell in cells:
        if cell["method"] in TIMED:
            lines.plot(range(1, cell["syncs"] + 1), cell["wait_seconds"], label=f"{cell['method']}, {cell['scenario']}")
    lines.set(xlabel="sync", ylabel="seconds that the first host waited")
    if lines.lines:
        lines.legend(fontsize="small")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
