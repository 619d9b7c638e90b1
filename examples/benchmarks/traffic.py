#!/usr/bin/env python
"""What crosses between two hosts in inner steps (next to nothing) and in a sync (the parameters once).

    sudo python examples/benchmarks/traffic.py --json traffic.jsonl

Trains a Llama on two hosts in pairs of runs that differ by 20 inner steps, or by one sync; the differences are what
these cost. --busy adds what else could leak: evaluation, logging every step, saving, token counting. With --by_time
the syncs are triggered by time (A-EDiT).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from lib.bench import markdown_table
from lib.hosts import Hosts, unavailable
from lib.results import add_run, open_results

INNER_STEPS = 20
SELDOM = {False: 1000.0, True: 1e6}  # steps or, by time, seconds: longer than any run
OFTEN = {False: 2.0, True: 1e-3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--per_host", type=int, default=2, help="ranks on a host: 2 is FSDP2 shards, 1 is DDP")
    parser.add_argument("--busy", action="store_true", help="evaluate, log every step, save, count tokens")
    parser.add_argument("--by_time", action="store_true", help="A-EDiT")
    parser.add_argument("--json", type=Path, metavar="JSONL", help="add the figures to this file")
    arguments = parser.parse_args()
    if (reason := unavailable()) is not None:
        sys.exit(f"traffic.py: {reason}")
    results = open_results(arguments.json, {})
    result = measure(arguments.per_host, arguments.busy, arguments.by_time)
    for name, value in result.items():
        print(f"{name:<32}{value}")
    if arguments.json:
        add_run(results, result, arguments.json)


def measure(per_host: int, busy: bool, by_time: bool = False) -> dict[str, object]:
    """Bytes that host 0 and host 1 send, by what differs between two runs.

    A sync's acknowledgements alone vary by kilobytes from run to run, so the inner steps are measured with a model
    whose syncs are small.
    """
    job = {"per_host": per_host, "busy": busy, "by_time": by_time}
    few, _ = run(**job, size="small", steps=4, interval=SELDOM[by_time])
    more, _ = run(**job, size="small", steps=4 + INNER_STEPS, interval=SELDOM[by_time])
    once, report = run(**job, size="large", steps=4, interval=SELDOM[by_time])
    often, report_often = run(**job, size="large", steps=4, interval=OFTEN[by_time])
    more_syncs = report_often["syncs"] - report["syncs"]
    assert more_syncs >= 1, (report, report_often)
    return {
        "ranks_per_host": per_host,
        "busy": busy,
        "by_time": by_time,
        "parameter_bytes": report["parameter_bytes"],
        "bytes_of_20_inner_steps": [b - a for a, b in zip(few, more, strict=True)],
        "bytes_of_one_sync": [(b - a) // more_syncs for a, b in zip(once, often, strict=True)],
    }


def run(
    per_host: int, busy: bool, by_time: bool, size: str, steps: int, interval: float
) -> tuple[list[int], dict[str, int]]:
    """What each host sent in one training, without what TCP sent again, and its first rank's report."""
    trigger = {"sync_seconds": interval} if by_time else {"sync_interval": int(interval)}
    with tempfile.TemporaryDirectory() as folder, Hosts(2) as hosts:
        path = Path(folder) / "report.json"
        hosts.torchrun(per_host, "lib.traffic_worker", str(path), size, str(steps), json.dumps(trigger), str(int(busy)))
        report = json.loads(path.read_text(encoding="utf-8"))
        assert report["world_size"] == 2 * per_host, report
        assert report["num_replicas"] == 2, report
        sent = zip(hosts.bytes_sent(), hosts.bytes_resent(), strict=True)
        return [everything - again for everything, again in sent], report


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each pair of runs, of the newest measurement."""
    run = results["runs"][-1]
    labels = {"bytes_of_20_inner_steps": "20 inner steps", "bytes_of_one_sync": "one sync"}
    rows = [[label, *(f"{number:,} bytes" for number in run[name])] for name, label in labels.items()]
    return markdown_table(["two runs that differ by", "host 0", "host 1"], rows)


if __name__ == "__main__":
    main()
