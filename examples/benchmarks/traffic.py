#!/usr/bin/env python
"""What crosses between two hosts in inner steps (next to nothing) and in a sync (the parameters once).

    sudo python examples/benchmarks/traffic.py --json traffic.jsonl

Trains a Llama on two hosts, and counts what each sends in 20 steps on the way, and in the sync at the end. --busy adds
what else could leak: logging and token counting in every step, an evaluation and a saved model at the sync. With
--by_time the syncs are triggered by time (A-EDiT); --compression is EDiTConfig's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lib.bench import markdown_table
from lib.hosts import Hosts, unavailable
from lib.results import add_run, open_results

FIRST_STEPS, INNER_STEPS = 4, 20
STEPS = {False: FIRST_STEPS + INNER_STEPS + 2, True: 40}  # by time, the slower host takes fewer
TRIGGERS = {False: {"sync_interval": 1000}, True: {"sync_seconds": 1e6}}  # none but the end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--per_host", type=int, default=2, help="ranks on a host: 2 is FSDP2 shards, 1 is DDP")
    parser.add_argument("--busy", action="store_true", help="evaluate, log every step, save, count tokens")
    parser.add_argument("--by_time", action="store_true", help="A-EDiT")
    parser.add_argument("--compression", default="none", help="none, bf16, int8 or int4 (none)")
    parser.add_argument("--json", type=Path, metavar="JSONL", help="add the figures to this file")
    arguments = parser.parse_args()
    if (reason := unavailable()) is not None:
        sys.exit(f"traffic.py: {reason}")
    results = open_results(arguments.json, {})
    [result] = measure(arguments.per_host, [Job(arguments.busy, arguments.by_time, arguments.compression)])
    for name, value in result.items():
        print(f"{name:<32}{value}")
    if arguments.json:
        add_run(results, result, arguments.json)


@dataclass(frozen=True)
class Job:
    busy: bool
    by_time: bool = False
    compression: str = "none"


def measure(per_host: int, jobs: Sequence[Job]) -> list[dict[str, object]]:
    """Bytes that host 0 and host 1 send in each of `jobs`, one after the other in the same processes."""
    todo = [(STEPS[job.by_time], {**TRIGGERS[job.by_time], "compression": job.compression}, job.busy) for job in jobs]
    with tempfile.TemporaryDirectory() as folder, Hosts(2) as hosts:
        hosts.torchrun(per_host, "lib.traffic_worker", folder, json.dumps(todo))
        reports = [json.loads(Path(folder, f"{host}.json").read_text(encoding="utf-8")) for host in (0, 1)]
    found: list[dict[str, object]] = []
    for job, *both in zip(jobs, *reports, strict=True):
        assert both[0]["world_size"] == 2 * per_host, both
        assert both[0]["num_replicas"] == 2, both
        sent = [report["sent"] for report in both]
        found.append(
            {
                "ranks_per_host": per_host,
                **asdict(job),
                "parameter_bytes": both[0]["parameter_bytes"],
                "bytes_of_20_inner_steps": [
                    host[FIRST_STEPS + INNER_STEPS - 1] - host[FIRST_STEPS - 1] for host in sent
                ],
                "bytes_of_one_sync": [(host[-1] - host[-2]) // both[0]["syncs"] for host in sent],
            }
        )
    return found


def table(results: dict[str, Any]) -> str:
    """Markdown: what each host sent, of the newest measurement without compression."""
    run = [run for run in results["runs"] if run.get("compression", "none") == "none"][-1]
    labels = {"bytes_of_20_inner_steps": "20 inner steps", "bytes_of_one_sync": "one sync"}
    rows = [[label, *(f"{number:,} bytes" for number in run[name])] for name, label in labels.items()]
    return markdown_table(["sent in", "host 0", "host 1"], rows)


if __name__ == "__main__":
    main()
