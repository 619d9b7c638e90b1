#!/usr/bin/env python
"""Writes the tables and figures of README.md and examples/benchmarks/README.md from examples/benchmarks/results.

    python examples/benchmarks/report.py
    python examples/benchmarks/report.py --check

A table stands between <!-- table NAME --> and <!-- end -->; what is written around it stays as it is.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu
import ideas
import learning
import overhead
import peers
import plan
import slow_network
import soak
import stale
import stragglers
import traffic
import tuning
from lib import convergence_report, overview
from lib.results import BENCHMARKS, RESULTS, read_results

PAGES = (BENCHMARKS.parents[1] / "README.md", BENCHMARKS / "README.md")
FIGURES = BENCHMARKS / "figures"
TABLE = re.compile(r"(<!-- table (?P<name>[\w ]+) -->\n)(?P<text>.*?)(\n<!-- end -->)", re.DOTALL)


@functools.cache
def read(name: str) -> dict[str, Any]:
    return read_results(RESULTS / f"{name}.jsonl")


@functools.cache
def plan_cells() -> list[plan.Cell]:
    return plan.all_cells()


def table(name: str) -> str:
    """The table that a page calls `name`: a results file, for convergence with the scenario after a space.

    Raises:
        SystemExit: there is no such table.
    """
    if name == "overview":
        return overview.table(read)
    if name in plan.PAGE:
        return plan.PAGE[name](plan_cells())
    file, _, scenario = name.partition(" ")
    makers: dict[str, Callable[[dict[str, Any]], str]] = {
        "slow_network": slow_network.table,
        "stragglers": stragglers.table,
        "peers": peers.table,
        "gpu": gpu.table,
        "soak": soak.table,
        "stale": stale.table,
        "traffic": traffic.table,
        "tuning": tuning.table,
        "overhead": overhead.table,
        "learning": learning.table,
        "finetuning": learning.table,
        "ideas": ideas.table,
        "convergence": lambda results: convergence_report.scenario_table(results, scenario),
    }
    kinds = [kind for kind in makers if file == kind or file.startswith(kind + "_")]
    if not kinds or (kinds == ["convergence"]) != bool(scenario):
        sys.exit(f"report.py: there is no table {name!r}")
    return makers[kinds[0]](read(file))


def filled(text: str) -> str:
    """`text` with its tables made anew."""
    return TABLE.sub(lambda found: found[1] + table(found["name"]) + found[4], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a table is not that of the results"
    )
    arguments = parser.parse_args()
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        if filled(before) == before:
            continue
        if arguments.check:
            sys.exit(f"{page} shows other tables than the results give. Run {Path(sys.argv[0]).name} without --check.")
        page.write_text(filled(before), encoding="utf-8")
    if not arguments.check:
        FIGURES.mkdir(exist_ok=True)
        for kind in overview.PAGES:
            overview.draw(read, kind, FIGURES / f"overview-{kind}.svg")


if __name__ == "__main__":
    main()
