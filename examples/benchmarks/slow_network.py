#!/usr/bin/env python
"""How much of the throughput is left when two hosts train over a slow network, by method.

    sudo python examples/benchmarks/slow_network.py --json slow_network.jsonl
    python examples/benchmarks/slow_network.py --table slow_network.jsonl

Two hosts (network namespaces) with two ranks each train a Llama of 8.4M parameters: HSDP, local SGD in its forms, and
"never", which does not sync and so bounds what a method can reach. Every run of a method is paired with one of "never"
on the same network, in alternating order; a method's share of the bound is the ratio of the medians of these pairs'
tokens per second. A timed method's sync_seconds is tau times the seconds of a step of "never". The bytes between the
hosts are those of the interfaces' counters. What a straight-line cost model (cost_model.py) says stands beside it.

How hard a setting is on a machine is said by rho: the seconds that a host's bytes of one uncompressed sync take at the
link's rate, over the seconds of its tau inner steps. --rhos chooses the rates from the measured step.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.bench import markdown_table, mean, pair_range, ratio_of_medians, share_text, subplots
from lib.cost_model import bits_per_second, expected_of_method, rate_of
from lib.network_job import METHODS, OVERLAPS, TIMED, window
from lib.results import add_run
from lib.training import NUM_HOSTS, WARM_UP_STEPS, add_common_arguments, job_settings, measure_or_report, train

CELL = ("rate", "rho", "delay_milliseconds", "tau", "method", "units_in_flight")
QUICK = {
    "rates": ["100mbit"], "delays": [0.0], "taus": [8], "methods": ["hsdp", "edit-none", "edit-forward"],
    "repeats": 1, "steps": 8, "hsdp_steps": 3,
}  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rates", nargs="+", default=["unlimited", "1gbit", "100mbit", "50mbit"], metavar="RATE",
                        help="of each host in each direction: unlimited, or as tc writes it (unlimited 1gbit 100mbit "
                        "50mbit)")  # fmt: skip
    parser.add_argument("--rhos", nargs="+", type=float, metavar="RHO", help="in the place of rates")
    parser.add_argument("--delays", nargs="+", type=float, default=[0.0], metavar="MILLISECONDS",
                        help="of the network, one way; above 0 needs gcc (0)")  # fmt: skip
    parser.add_argument("--taus", nargs="+", type=int, default=[32], metavar="STEPS", help="sync intervals (32)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD",
                        help=f"of {', '.join(METHODS)} (all)")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs for each figure (3)")
    parser.add_argument("--steps", type=int, default=64,
                        help="least steps of a measured window, rounded up to whole intervals (64)")  # fmt: skip
    parser.add_argument("--hsdp_steps", type=int, default=16, help="the same for HSDP, which syncs in every step (16)")
    parser.add_argument("--delay_steps", type=int, help="of the delayed methods; at most the interval (half of it)")
    parser.add_argument("--units_in_flight", nargs="+", type=int, default=[None], metavar="UNITS",
                        help="EDiTConfig's (its default)")  # fmt: skip
    add_common_arguments(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        parser.set_defaults(**QUICK)
        arguments = parser.parse_args()  # what is given holds all the same
    for rate in arguments.rates:
        try:
            bits_per_second(rate)
        except ValueError as error:
            parser.error(str(error))
    return arguments


def main() -> None:
    arguments = parse()
    settings = {"delay_steps": arguments.delay_steps or "half the interval"}
    measure_or_report(arguments, settings, measure, tables, plot, with_delay=any(arguments.delays))


# -- measuring --------------------------------------------------------------------------------------------------------


def cells(arguments: argparse.Namespace, step_seconds: float) -> Iterator[dict[str, Any]]:
    """What to measure, every repeat of everything before the next; HSDP has no interval and is there once."""
    links = (
        [(rate, None) for rate in arguments.rates] if arguments.rhos is None else [(None, r) for r in arguments.rhos]
    )
    for repeat, (rate, rho), delay in itertools.product(range(arguments.repeats), links, arguments.delays):
        setting = {"rate": rate, "rho": rho, "delay_milliseconds": delay}
        if "hsdp" in arguments.methods and rho is None:
            yield {**setting, "tau": None, "method": "hsdp", "units_in_flight": None, "repeat": repeat}
        for tau, method, units in itertools.product(arguments.taus, arguments.methods, arguments.units_in_flight):
            if method != "hsdp":
                chosen = rate if rho is None else rate_of(rho, tau, step_seconds)
                cell = {**setting, "rate": chosen, "tau": tau, "method": method, "units_in_flight": units}
                yield {**cell, "repeat": repeat}


def measure(results: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Adds to `results` what is not there yet, and keeps it in the file after every pair."""
    if "step_seconds" not in results:
        never = run_one("never", {"rate": "unlimited", "delay_milliseconds": 0.0}, arguments, None, 0)
        results["step_seconds"] = step_seconds(never)
        print(f"a step of never takes {results['step_seconds']:.3f} s", flush=True)
    done = [{**key(run), "repeat": run["repeat"]} for run in results["runs"]]
    for number, cell in enumerate(cells(arguments, results["step_seconds"])):
        if cell in done:
            continue
        run = measure_pair(cell, arguments, results["step_seconds"], never_first=(number + cell["repeat"]) % 2 == 0)
        add_run(results, run, arguments.json)
        name = " ".join(str(cell[part]) for part in ("rate", "rho", "delay_milliseconds", "tau"))
        print(f"{name} {label(cell)}: {run['share']:.3f} of never; the model says {run['expected_share']:.3f}, "
              f"{run['expected_error']:+.3f} off", flush=True)  # fmt: skip


def measure_pair(
    cell: dict[str, Any], arguments: argparse.Namespace, usual_step_seconds: float, never_first: bool
) -> dict[str, Any]:
    """A run of a method and one of "never", on the same network, one after the other."""
    tau = cell["tau"] or 2
    delay_steps = tau if cell["method"] == "co2" else min(arguments.delay_steps or tau // 2, tau) or 1
    sync_seconds = round(tau * usual_step_seconds, 2) if cell["method"] in TIMED else None
    pair = {}
    for method in ("never", cell["method"]) if never_first else (cell["method"], "never"):
        pair[method] = run_one(method, cell, arguments, sync_seconds, delay_steps)
    never, figures = pair["never"], pair[cell["method"]]
    expected = expected_of_method(
        cell["method"],
        step_seconds=step_seconds(never),
        delay_steps=delay_steps,
        num_replicas=NUM_HOSTS,
        **{name: cell[name] for name in ("tau", "rate", "delay_milliseconds")},
    )
    share = figures["tokens_per_second"] / never["tokens_per_second"]
    return {
        **cell,
        "delay_steps": delay_steps if OVERLAPS.get(cell["method"]) == "delayed" else None,
        "sync_seconds": sync_seconds,
        "never_first": never_first,
        "share": share,
        "expected_share": expected,
        "expected_error": expected - share,
        "figures": figures,
        "never": never,
    }


def run_one(
    method: str, cell: dict[str, Any], arguments: argparse.Namespace, sync_seconds: float | None, delay_steps: int
) -> dict[str, Any]:
    first, length = WARM_UP_STEPS, arguments.steps
    if method == "hsdp":
        length = arguments.hsdp_steps
    elif method != "never":
        first, length = window(method, cell["tau"], delay_steps, arguments.steps)
    steps = first + length + 2  # two more: the sync that ends the training has something to do, after the window
    if method in TIMED:
        steps = length + 2 * cell["tau"] + delay_steps + 2  # an interval before and one after the window
    return train(
        job_settings(arguments),
        rate=cell["rate"],
        delay_milliseconds=cell["delay_milliseconds"],
        timeout=arguments.timeout,
        method=method,
        replica_steps=(steps,) * NUM_HOSTS,
        first_step=first,
        measured_steps=length,
        tau=cell.get("tau") or 0,
        sync_seconds=sync_seconds or 0.0,
        delay_steps=delay_steps,
        units_in_flight=cell.get("units_in_flight"),
    )


def step_seconds(figures: dict[str, Any]) -> float:
    """Seconds of an inner step, mean over the replicas."""
    return mean([replica["window_seconds"] / replica["window_steps"] for replica in figures["replicas"]])


# -- reporting ------------------------------------------------------------------------------------------------------


def summary(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Every cell's figures over its repeats; the fastest network first, then by delay, interval and method."""
    found = []
    for cell in sorted({tuple(key(run).values()) for run in results["runs"]}, key=_place):
        runs = [run for run in results["runs"] if tuple(key(run).values()) == cell]
        speeds, bounds = ([run[kind]["tokens_per_second"] for run in runs] for kind in ("figures", "never"))
        exposed = [s for run in runs for r in run["figures"]["replicas"] for s in r["syncs"]["exposed_seconds"]]
        share = ratio_of_medians(speeds, bounds)
        expected = statistics.median(run["expected_share"] for run in runs)
        found.append(
            {
                **dict(zip(CELL, cell, strict=True)),
                "pairs": len(runs),
                "share": share,
                "share_range": pair_range(speeds, bounds),
                "tokens_per_second": statistics.median(speeds),
                "bytes_per_token": statistics.median(run["figures"]["bytes_per_token"] for run in runs),
                "exposed_seconds_per_sync": mean(exposed) if exposed else None,
                "expected_share": expected,
                "expected_error": expected - share,
            }
        )
    return found


def key(run: dict[str, Any]) -> dict[str, Any]:
    """Which cell `run` is of; `units_in_flight` is None where it was EDiTConfig's default."""
    return {name: run.get(name) for name in CELL}


def label(cell: dict[str, Any]) -> str:
    """The method, and what of it was not its default."""
    units = cell["units_in_flight"]
    return cell["method"] + (f", units_in_flight={units}" if units else "")


def _place(cell: tuple[str, float | None, float, int | None, str, int | None]) -> tuple[float, ...]:
    rate, rho, delay, tau, method, units = cell
    return -bits_per_second(rate), rho or 0.0, delay, tau or 0, METHODS.index(method), units or 0


def panels(figures: list[dict[str, Any]]) -> dict[tuple[int, float], list[dict[str, Any]]]:
    """The cells by interval and delay; HSDP, which has no interval, is in each of its delay's, at the rates there."""
    keys = sorted({(cell["tau"], cell["delay_milliseconds"]) for cell in figures if cell["tau"] is not None})
    keys = keys or sorted({(0, cell["delay_milliseconds"]) for cell in figures})
    found = {}
    for tau, delay in keys:
        inside = [c for c in figures if c["tau"] in (tau, None) and c["delay_milliseconds"] == delay]
        rates = {c["rate"] for c in inside if c["tau"] == tau or tau == 0}
        found[tau, delay] = [c for c in inside if c["rate"] in rates]
    return found


def _labels(cells: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(label(cell) for cell in sorted(cells, key=lambda c: METHODS.index(c["method"]))))


def tables(results: dict[str, Any]) -> str:
    """Markdown: shares of the bound by rate, if they were not chosen by rho, and then everything."""
    figures = [cell for cell in summary(results) if cell["rho"] is None]
    parts = []
    for (tau, delay), inside in panels(figures).items():
        methods = _labels(inside)
        shares = {(cell["rate"], label(cell)): share_text(cell["share"]) for cell in inside}
        rates = sorted({cell["rate"] for cell in inside}, key=bits_per_second, reverse=True)
        rows = [[rate, *(shares.get((rate, method), "") for method in methods)] for rate in rates]
        title = f"Share of the bound, tau {tau}, delay {delay:g} ms:"
        parts += [title, markdown_table(["rate", *methods], rows)]
    return "\n\n".join([*parts, table(results)])


def _link(cell: dict[str, Any]) -> str:
    return cell["rate"] if cell["rho"] is None else f"rho {cell['rho']:g} ({cell['rate']})"


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each cell."""
    rows = []
    for cell in summary(results):
        low, high = cell["share_range"]
        exposed = cell["exposed_seconds_per_sync"]
        rows.append(
            [
                _link(cell), f"{cell['delay_milliseconds']:g} ms", cell["tau"] or "", label(cell),
                f"{cell['tokens_per_second']:.0f}", share_text(cell["share"]),
                f"{low:.3f} to {high:.3f} ({cell['pairs']})", "" if exposed is None else f"{exposed:.2f}",
                f"{cell['bytes_per_token']:,.0f}",
                # The model does not know the settings that have found themselves.
                *(["", ""] if cell["method"] == "edit-auto" else
                  [f"{cell['expected_share']:.3f}", f"{cell['expected_error']:+.3f}"]),
            ]
        )  # fmt: skip
    heading = ["rate", "delay", "tau", "method", "tokens/s", "share of the bound", "pairs' range (number)",
               "exposed s per sync", "bytes per token", "model", "model's error"]  # fmt: skip
    return markdown_table(heading, rows)


def plot(results: dict[str, Any], path: Path) -> None:
    """Share of the bound by method: against the rate, or as bars of the only one; a panel an interval and delay."""
    inside = panels(summary(results))
    figure, axes = subplots(-(-len(inside) // 3), min(3, len(inside)))
    for axis, ((tau, delay), found) in zip(axes, inside.items(), strict=False):
        rates = sorted({cell["rate"] for cell in found}, key=bits_per_second)
        shares = {name: {cell["rate"]: cell["share"] for cell in found if label(cell) == name}
                  for name in _labels(found)}  # fmt: skip
        if len(rates) == 1:
            axis.barh(list(shares), [by_rate[rates[0]] for by_rate in shares.values()])
            axis.set(xlabel="share of the bound", title=f"{rates[0]}, tau {tau}, delay {delay:g} ms")
            axis.axvline(1.0, color="grey", linewidth=0.8)
            axis.invert_yaxis()
            continue
        for name, by_rate in shares.items():
            places = [place for place, rate in enumerate(rates) if rate in by_rate]
            axis.plot(places, [by_rate[rates[place]] for place in places], marker="o" if name in METHODS else "x",
                      label=name, color=f"C{METHODS.index(name.split(',')[0])}")  # fmt: skip
        axis.set_xticks(range(len(rates)), rates)
        axis.set(title=f"tau {tau}, delay {delay:g} ms", xlabel="rate of a host", ylabel="share of the bound")
        axis.set_ylim(0, None)
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.grid(alpha=0.3)
    labels = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if labels:
        figure.legend(labels.values(), labels.keys(), loc="outside lower left", ncol=5, fontsize="small")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
