"""Runs one training of the network benchmarks on two hosts, and what both drivers do alike: flags, files, reports."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lib.bench import NUM_PARAMETERS, exit_on_signals
from lib.hosts import Hosts, share_cores, unavailable
from lib.network_job import Job
from lib.results import open_results, read_results

NUM_HOSTS = 2
WARM_UP_STEPS = 8
PINNED = "the ranks of a host are bound to the host's own cores, so that hosts do not slow one another"

Meanwhile = Callable[[Hosts, Path], None]  # gets the hosts, and the file that appears when training begins


def train(
    settings: dict[str, Any],
    *,
    rate: str = "unlimited",
    delay_milliseconds: float = 0.0,
    quotas: Sequence[float | None] | None = None,
    timeout: float,
    meanwhile: Meanwhile | None = None,
    **job: Any,
) -> dict[str, Any]:
    """One training on fresh hosts; what `network_job.combine` says of it, and `total_bytes_sent` by host.

    Args:
        settings: a `Job`'s fields, together with `job`.
        quotas: processor seconds per second of each host.
        timeout: seconds after which it has failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        complete = Job(**{**settings, **job}, report=str(report))
        with Hosts(NUM_HOSTS, rate, delay_milliseconds, share_cores(NUM_HOSTS), quotas) as hosts:

            def watch() -> None:
                if meanwhile is not None:
                    meanwhile(hosts, Path(str(report) + ".started"))

            words = complete.ranks_per_replica, "lib.network_worker", complete.to_json()
            hosts.torchrun(*words, timeout=timeout, meanwhile=watch)
            figures: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
            return {**figures, "total_bytes_sent": hosts.bytes_sent()}


def job_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What all jobs of a benchmark have in common, and a results file keeps."""
    return {
        "batch_size": arguments.batch_size,
        "sequence_length": arguments.sequence_length,
        "ranks_per_replica": arguments.ranks_per_host,
    }


def file_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What all runs of one results file have in common."""
    return {
        "batch_size": arguments.batch_size,
        "sequence_length": arguments.sequence_length,
        "parameters": NUM_PARAMETERS,
        "hosts": NUM_HOSTS,
        "ranks_per_host": arguments.ranks_per_host,
        "cores_of_hosts": share_cores(NUM_HOSTS),
        "pinning": PINNED,
    }


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch_size", type=int, default=1, help="sequences of one rank in one step (1)")
    parser.add_argument("--sequence_length", type=int, default=64, help="tokens of a sequence (64)")
    parser.add_argument("--ranks_per_host", type=int, default=2, help="a host is a replica of so many ranks (2)")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds that one training may take (1800)")
    parser.add_argument("--json", type=Path, metavar="JSONL",
                        help="keep every finished run here; an existing file is continued")  # fmt: skip
    parser.add_argument("--png", type=Path, help="the plot (the name of --json with .png)")
    parser.add_argument("--quick", action="store_true", help="a few short runs, to see that it works")
    parser.add_argument("--table", type=Path, metavar="JSONL", help="print the tables of this file, run nothing")


def measure_or_report(
    arguments: argparse.Namespace,
    settings: dict[str, Any],
    measure: Callable[[dict[str, Any], argparse.Namespace], None],
    table: Callable[[dict[str, Any]], str],
    plot: Callable[[dict[str, Any], Path], None],
    *,
    with_delay: bool = False,
) -> None:
    """A driver's main(): measures, keeps the runs in --json and prints their table; with --table that of a file alone.

    Args:
        settings: what the results of one file have in common, beside what those of both drivers have.
        with_delay: the network shall have a delay.
    """
    png = arguments.png
    if arguments.table:
        results = read_results(arguments.table)
    else:
        if arguments.ranks_per_host < 2 and "hsdp" in getattr(arguments, "methods", ()):
            sys.exit(f"--ranks_per_host {arguments.ranks_per_host}: HSDP shards over at least 2. Give other --methods.")
        if (reason := unavailable(delay=with_delay)) is not None:
            sys.exit(f"{Path(sys.argv[0]).name}: {reason}")
        exit_on_signals()
        results = open_results(arguments.json, {**file_settings(arguments), **settings})
        measure(results, arguments)
        png = png or (arguments.json and arguments.json.with_suffix(".png"))
        print()
    print(table(results))
    if png:
        plot(results, png)
