#!/usr/bin/env python
"""What `hf-edit plan` predicts beside every share that was measured here, with its misses.

    python examples/benchmarks/plan.py
    python examples/benchmarks/plan.py --check

Reads results/ and trains nothing. The simulator is told what a user could know: parameters, replicas, rate, delay, and
the step time of the run that never syncs and belongs to the measured one; nothing of the measured run itself. With it
goes one constant for hosts without accelerators, `CPU_SECONDS_PER_BYTE`, which the processors' counters gave and not
the speeds. Nothing is fitted to a cell.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import slow_network
import stragglers
from lib.bench import NUM_PARAMETERS, markdown_table, pair_range, ratio_of_medians, share_text
from lib.cost_model import NUM_UNITS, bits_per_second
from lib.network_job import COMPRESSIONS, OVERLAPS, SETTLING_SYNCS, TIMED
from lib.results import RESULTS, read_results

from hf_edit.cli.simulation import (
    CPU_SECONDS_PER_BYTE,
    TOLERANCE,
    Numbers,
    Outcome,
    Settings,
    rank,
    simulate,
    synchronous,
)

ALLOWED_ERROR = 0.05
PEERS = {  # those of peers.py that sync as the simulator does: overlap, delay_steps
    "ddp": None,
    "local-sgd": ("none", 1),
    "post-local-sgd": ("none", 1),
    "diloco": ("none", 1),
    "edit-forward": ("forward", 1),
    "edit-delayed": ("delayed", 8),
}


@dataclass(frozen=True)
class Cell:
    """A share that was measured, over `num_runs` runs or pairs, and what was predicted for it."""

    network: str
    method: str
    tau: int | None
    measured: float
    measured_range: tuple[float, float]
    num_runs: int
    predicted: Outcome
    numbers: Numbers
    step_work: float | None = None  # processor seconds of a step, over those of the run that it is held against
    bytes_ratio: float | None = None  # what left a host, over what was predicted

    @property
    def error(self) -> float:
        return self.predicted.share - min(1.0, self.measured)  # above 1 is noise

    @property
    def hit(self) -> bool:
        return abs(self.error) <= ALLOWED_ERROR


def numbers_of(step_seconds: float, rate: str, **more: Any) -> Numbers:
    """The benchmarks' two hosts of one core each; DDP alone sends gradients beside the backward pass there."""
    return Numbers(
        parameters=NUM_PARAMETERS, num_replicas=2, num_units=NUM_UNITS, step_seconds=step_seconds,
        bits_per_second=bits_per_second(rate), processor_seconds_per_byte=CPU_SECONDS_PER_BYTE,
        **{"replica_size": 2, "gradients_overlap": False, **more},
    )  # fmt: skip


def predict(numbers: Numbers, settings: Settings | None) -> Outcome:
    return synchronous(numbers) if settings is None else simulate(numbers, settings)


def step_work(runs: list[dict[str, Any]], bounds: list[dict[str, Any]]) -> float | None:
    """Processor seconds of a step in `runs` over those in `bounds`, median; None where they were not kept."""
    each = [[[r.get("cpu_seconds_per_step") for r in run["replicas"]] for run in kind] for kind in (runs, bounds)]
    ratios = [sum(mine) / sum(alone) for mine, alone in zip(*each, strict=True) if None not in mine + alone]
    return statistics.median(ratios) if ratios else None


def counted_work() -> tuple[float, int]:
    """What `CPU_SECONDS_PER_BYTE` comes from: processor seconds that a sync adds, for a byte sent; median, and runs."""
    found = []
    for path in RESULTS.glob("slow_network*.jsonl"):
        for run in read_results(path)["runs"]:
            each = [[r.get("cpu_seconds_per_step") for r in run[kind]["replicas"]] for kind in ("figures", "never")]
            if (
                run["tau"] == 8 and run["method"] not in COMPRESSIONS and None not in each[0] + each[1]
            ):  # longer intervals hide it in the steps' own noise
                more = (sum(each[0]) - sum(each[1])) / len(each[0])
                found.append(run["tau"] * more / (4 * NUM_PARAMETERS))
    return statistics.median(found), len(found)


def median(outcomes: list[Outcome]) -> Outcome:
    return sorted(outcomes, key=lambda outcome: outcome.share)[len(outcomes) // 2]


# -- what was measured ------------------------------------------------------------------------------------------------


def slow_network_cells(path: Path) -> Iterator[Cell]:
    results = read_results(path)
    for found in slow_network.summary(results):
        if found["method"] in SETTLING_SYNCS:  # whose settings find themselves
            continue
        runs = [run for run in results["runs"] if all(run.get(name) == found[name] for name in slow_network.CELL)]
        delay = found["delay_milliseconds"]
        of_runs = [
            numbers_of(slow_network.step_seconds(run["never"]), run["rate"], round_trip_seconds=2 * delay / 1000)
            for run in runs
        ]
        predicted = [predict(*each) for each in zip(of_runs, map(slow_network_settings, runs), strict=True)]
        asked = results["settings"]
        tokens = asked["batch_size"] * asked["sequence_length"] * asked["ranks_per_host"]
        by_steps = found["tau"] is not None and found["method"] not in TIMED
        yield Cell(
            f"{found['rate']}, {delay:g} ms, batch {asked['batch_size']}", slow_network.label(found), found["tau"],
            found["share"], found["share_range"], len(runs), median(predicted), of_runs[0],
            step_work([run["figures"] for run in runs], [run["never"] for run in runs]),
            found["bytes_per_token"] * tokens / predicted[0].bytes_per_step if by_steps else None,
        )  # fmt: skip


def slow_network_settings(run: dict[str, Any]) -> Settings | None:
    if run["method"] == "hsdp":
        return None
    timed = run["sync_seconds"] is not None
    return Settings(
        sync_interval=Settings.sync_interval if timed else run["tau"],
        sync_seconds=run["sync_seconds"],
        overlap=OVERLAPS[run["method"]],
        delay_steps=run["delay_steps"] or 1,
        compression=COMPRESSIONS.get(run["method"], "none"),
        units_in_flight=run.get("units_in_flight") or Settings.units_in_flight,
    )


def straggler_cells(path: Path) -> Iterator[Cell]:
    results = read_results(path)
    asked = results["settings"]
    for found in stragglers.summary(results):
        if found["method"] in SETTLING_SYNCS:
            continue
        alone = found["alone_inner_steps_per_second"]
        mean_speed = statistics.mean(alone)
        spread = stall_spread(1 / mean_speed, asked) if found["scenario"] == "stalls" else 0.0
        speeds = tuple(speed / mean_speed for speed in alone)
        numbers = numbers_of(1 / mean_speed, asked["rate"], speeds=speeds, step_spread=spread)
        settings, method = None, found["method"]
        if method != "hsdp":
            timed = asked["sync_seconds"] if method in TIMED else None
            tau = Settings.sync_interval if timed else asked["tau"]
            settings = Settings(tau, timed, OVERLAPS[method], asked["delay_steps"])
        label = f"{method}, {asked['sync_seconds']:g} s" if method in TIMED else method
        yield Cell(
            f"hosts {found['scenario']}", label, None if method in TIMED or method == "hsdp" else asked["tau"],
            found["share"], found["share_range"], found["runs"], predict(numbers, settings), numbers,
            step_work(*map(list, zip(*stragglers.paired(results, found["scenario"], method), strict=True))),
        )  # fmt: skip


def stall_spread(step_seconds: float, asked: dict[str, Any]) -> float:
    """Standard deviation over mean of a step in which a host now and then stops for a time.

    A stall of a quarter of `stall_seconds` to all of it comes `gap_seconds` after the last one, to either host alike.
    """
    least, most = asked["stall_seconds"] / 4, asked["stall_seconds"]
    stalls_of_a_step = step_seconds / (2 * (asked["gap_seconds"] + (least + most) / 2))
    mean_square = (least**2 + least * most + most**2) / 3
    return (stalls_of_a_step * mean_square) ** 0.5 / step_seconds


def peers_cells(path: Path) -> Iterator[Cell]:
    results = read_results(path)
    tau, rate = results["settings"]["tau"], results["settings"]["rate"]
    runs = [run for run in results["runs"] if "not run" not in run]
    seconds = {(run["method"], run["repeat"]): max(run["seconds"]) / run["measured_steps"] for run in runs}
    for method, asked in PEERS.items():
        repeats = [repeat for name, repeat in seconds if name == method and ("bound", repeat) in seconds]
        mine, bounds = ([seconds[name, repeat] for repeat in repeats] for name in (method, "bound"))
        of_runs = [numbers_of(bound, rate, replica_size=1, gradients_overlap=method == "ddp") for bound in bounds]
        settings = asked and Settings(tau, None, asked[0], asked[1])
        if repeats:
            yield Cell(
                f"{rate}, peers.py", method, tau if settings else None, ratio_of_medians(bounds, mine),
                pair_range(bounds, mine), len(repeats), median([predict(each, settings) for each in of_runs]),
                of_runs[0],
            )  # fmt: skip


def all_cells() -> list[Cell]:
    """Of every file in results/ that holds shares of a never-syncing run."""
    found: list[Cell] = []
    for pattern, read in (
        ("slow_network*.jsonl", slow_network_cells),
        ("stragglers*.jsonl", straggler_cells),
        ("peers.jsonl", peers_cells),
    ):
        for path in sorted(RESULTS.glob(pattern)):
            found += read(path)
    return found


# -- the report -------------------------------------------------------------------------------------------------------


def table(cells: list[Cell]) -> str:
    """Markdown: a row for each cell."""
    rows = [
        [cell.network, cell.method, cell.tau or "", share_text(cell.measured),
         "{:.3f} to {:.3f} ({})".format(*cell.measured_range, cell.num_runs), f"{cell.predicted.share:.3f}",
         f"{cell.error:+.3f}", "" if cell.hit else f"**miss**: {why(cell)}"]
        for cell in cells
    ]  # fmt: skip
    heading = ["network", "method", "tau", "measured share", "range (runs)", "predicted", "error", "miss"]
    return markdown_table(heading, rows)


def why(cell: Cell) -> str:
    """What is known to make a difference and is not in the simulation."""
    reasons = []
    if cell.method == "hsdp":
        reasons.append("the processors' work for the gradients is left out")
    if cell.numbers.round_trip_seconds:
        reasons.append("the delay is made by a program on the cores that train")
    work = cell.step_work
    if work is not None and abs(work - 1) > 0.1:
        reasons.append(f"its steps took {work:.2f} times the processor seconds of those that it is held against")
    if not reasons and cell.num_runs == 1:
        reasons.append("a single run; the machine's own speed changes by 10 % between two")
    return "; ".join(reasons) or "no known reason"


def summary(cells: list[Cell]) -> str:
    misses = [cell for cell in cells if not cell.hit]
    errors = [abs(cell.error) for cell in cells]
    text = f"{len(cells) - len(misses)} of {len(cells)} cells are within {ALLOWED_ERROR:g}, {len(misses)} are missed; "
    text += f"the median error is {statistics.median(errors):.3f}, the largest {max(errors):.3f}."
    ratios = [cell.bytes_ratio for cell in cells if cell.bytes_ratio is not None]
    text += f" Bytes that left a host over those predicted (without headers): median {statistics.median(ratios):.3f}, "
    text += f"{min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} cells that sync by steps."
    work, count = counted_work()
    return (
        text + f" Processor seconds that a sync adds for a byte, by the counters of {count} runs at tau 8: {work:.1e}."
    )


def choices(cells: list[Cell]) -> list[tuple[str, Cell, Cell]]:
    """For every network with several settings: the one that the simulator would take of those measured, and the one
    that was fastest. Other `units_in_flight` than EDiTConfig's are none that it would propose."""
    found = []
    for network in dict.fromkeys(cell.network for cell in cells):
        here = [cell for cell in cells if cell.network == network and cell.predicted.settings is not None]
        here = [cell for cell in here if "units_in_flight" not in cell.method]
        if len({cell.predicted.settings for cell in here}) > 1:
            first = rank([cell.predicted for cell in here], here[0].numbers)[0]
            chosen = next(cell for cell in here if cell.predicted.settings == first.settings)
            found.append((network, chosen, max(here, key=lambda cell: cell.measured)))
    return found


def choice_table(cells: list[Cell]) -> str:
    rows: list[list[str]] = []
    for network, chosen, best in choices(cells):
        lost = min(1.0, best.measured) - min(1.0, chosen.measured)
        names = [f"{cell.method}" + (f", tau {cell.tau}" if cell.tau else "") for cell in (chosen, best)]
        rows.append([network, names[0], share_text(chosen.measured), names[1], share_text(best.measured),
                     f"{lost:.3f}", "" if lost <= TOLERANCE else "**miss**"])  # fmt: skip
    heading = ["network", "taken, of the settings measured", "its measured share", "fastest", "measured share", "lost",
               f"miss (above {TOLERANCE:g})"]  # fmt: skip
    near = sum(not row[-1] for row in rows)
    return markdown_table(heading, rows) + f"\n\n{near} of {len(rows)} choices are within {TOLERANCE:g} of the fastest."


PAGE = {"plan": table, "plan_summary": summary, "plan_choices": choice_table}  # what a page may call for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", nargs="?", type=int, const=-1, metavar="CELLS",
                        help="exit with 1 if fewer cells than this are within 0.05 (all)")  # fmt: skip
    arguments = parser.parse_args()
    cells = all_cells()
    print("\n\n".join([table(cells), summary(cells), choice_table(cells)]))
    if arguments.check is not None:
        least = len(cells) if arguments.check < 0 else arguments.check
        sys.exit(int(sum(cell.hit for cell in cells) < least))


if __name__ == "__main__":
    main()
