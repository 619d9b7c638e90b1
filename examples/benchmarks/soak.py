#!/usr/bin/env python
"""Replicas that come and go: random faults from a seed, and what the others make of them.

    sudo python examples/benchmarks/soak.py --json soak.jsonl
    python examples/benchmarks/soak.py --table soak.jsonl

Each host (network namespace) is a launch of its own and one replica; a lighthouse runs on a host more. Again and again
one that trains is killed, stopped for a time, or its link is cut, and the killed are launched again. The same without
faults stands beside it. A run in which a rank fails, replicas end with other parameters, or the time is over, is noted
with what went wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.arguments import add_files, parse_with_files
from lib.bench import exit_on_signals, markdown_table
from lib.hosts import Hosts, unavailable
from lib.results import add_run, open_results, read_results
from lib.soak_worker import Job

PORT = 29400
KINDS = ("kill", "stop", "cut")
SETTINGS = ("hosts", "ranks", "steps", "tau", "delay_steps", "step_seconds", "heartbeat_seconds", "batch", "block",
            "hidden_size", "layers", "learning_rate", "gap_seconds", "away_seconds")  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--hosts", type=int, default=3, help="R")
    add("--ranks", type=int, default=1, help="S, of each host")
    add("--seeds", type=int, nargs="+", default=[0], help="of the faults, and of the training")
    add("--faults", type=int, nargs="+", default=[40], help="most faults of a run; 0 for one without")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of faults")
    add("--gap_seconds", type=float, default=12.0, help="mean time from one fault to the next")
    add("--away_seconds", type=float, default=4.0, help="mean time that a host is away")
    add("--steps", type=int, default=6000, help="of all replicas / R")
    add("--tau", type=int, default=16, help="inner steps between syncs")
    add("--delay_steps", type=int, default=4, help="until a sync is applied")
    add("--step_seconds", type=float, default=0.06, help="that a step takes at least")
    add("--heartbeat_seconds", type=float, default=1.0, help="after which a host that is not heard of is gone")
    add("--batch", type=int, default=4, help="sequences of a rank in a step")
    add("--block", type=int, default=64, help="bytes of a sequence")
    add("--hidden_size", type=int, default=32, help="width of the model")
    add("--layers", type=int, default=2, help="transformer blocks")
    add("--learning_rate", type=float, default=3e-3, help="of AdamW")
    add("--timeout", type=float, default=1800.0, help="seconds that a run may take")
    add_files(add)
    return parse_with_files(parser)


def main() -> None:
    exit_on_signals()
    arguments = parse()
    if arguments.table:
        print(table(read_results(arguments.table)))
        return
    if why := unavailable():
        sys.exit(f"soak.py: {why}")
    results = open_results(arguments.json, {name: getattr(arguments, name) for name in SETTINGS})
    for seed in arguments.seeds:
        for faults in arguments.faults:
            run = {"seed": seed, "faults_wanted": faults, **soak(arguments, seed, faults)}
            add_run(results, run, arguments.json)
            print(json.dumps(run), flush=True)
    print("\n" + table(results))


# -- running ----------------------------------------------------------------------------------------------------------


def soak(arguments: argparse.Namespace, seed: int, most: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, Hosts(arguments.hosts + 1) as hosts:
        job = Job(
            folder=folder, seed=seed, replicas=arguments.hosts, ranks=arguments.ranks, steps=arguments.steps,
            train_file=arguments.train_file and str(arguments.train_file.resolve()),
            validation_file=arguments.validation_file and str(arguments.validation_file.resolve()),
            **{name: getattr(arguments, name) for name in SETTINGS if name in Job.__annotations__ and name not in (
                "steps", "ranks")},
        )  # fmt: skip
        run = Run(hosts, job, arguments, random.Random(seed), most)
        problem = run.until_the_end()
        return {**figures(run), "problem": problem}


class Run:
    """The launches of one run, and what is done to them."""

    def __init__(self, hosts: Hosts, job: Job, arguments: argparse.Namespace, chance: random.Random, most: int) -> None:
        self.hosts, self.job, self.arguments, self.chance, self.most = hosts, job, arguments, chance, most
        self.folder = Path(job.folder)
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.launched: dict[int, list[float]] = {host: [] for host in range(job.replicas)}
        self.faults: list[dict[str, Any]] = []
        self.away: dict[int, tuple[str, float]] = {}  # kind, until when
        self.joined: set[tuple[int, int]] = set()  # host, and which of its launches
        self.began_at = time.time()

    def until_the_end(self) -> str | None:
        """What went wrong, or None."""
        lighthouse = self.job.replicas
        words = [sys.executable, "-m", "hf_edit.cli.main", "lighthouse", "--port", str(PORT)]
        beat = ["--heartbeat_seconds", str(self.job.heartbeat_seconds)]
        self.hosts.start(lighthouse, [*words, *beat], self.folder / "lighthouse.log")
        for host in range(self.job.replicas):
            self.launch(host)
        next_at, deadline = math.inf, time.time() + self.arguments.timeout
        while any(process.poll() is None for process in self.processes.values()) or self.away:
            time.sleep(0.1)
            now = time.time()
            failed = [h for h, p in self.processes.items() if p.poll() not in (None, 0) and h not in self.away]
            if failed or now > deadline:
                why = f"replicas {failed} failed" if failed else f"not ended within {self.arguments.timeout:g} s"
                tails = "\n".join(path.read_text(errors="replace")[-2000:] for path in self.folder.glob("host-*.log"))
                print(f"{why}: {tails}", file=sys.stderr)
                return why
            for host in [host for host, (_, until) in self.away.items() if now >= until]:
                self.bring_back(host)
            training = [host for host in range(self.job.replicas) if self.trains(host)]
            if len(training) < 2:
                next_at = max(next_at, now + 1.0) if next_at < math.inf else next_at
            elif next_at == math.inf:
                next_at = now + self.chance.expovariate(1 / self.arguments.gap_seconds)
            elif now >= next_at and len(self.faults) < self.most:
                self.harm(self.chance.choice(training))
                next_at = math.inf
        return None

    def launch(self, host: int) -> None:
        ranks = ["-m", "torch.distributed.run", f"--nproc-per-node={self.job.ranks}", "--master-port=29401"]
        words = [sys.executable, *(ranks if self.job.ranks > 1 else []), "-m", "lib.soak_worker", self.job.to_json()]
        place = f"{self.hosts.address(self.job.replicas)}:{PORT}"
        number = len(self.launched[host])
        self.launched[host].append(time.time())
        self.processes[host] = self.hosts.start(
            host, words, self.folder / f"host-{host}-{number}.log", EDIT_REPLICA=str(host), TORCHFT_LIGHTHOUSE=place
        )

    def trains(self, host: int) -> bool:
        """True if nothing has been done to it, and it has joined the others since its launch."""
        if host in self.away or self.processes[host].poll() is not None:
            return False
        launch = host, len(self.launched[host])
        if launch not in self.joined and any(
            note["what"] == "joined" and note["at"] > self.launched[host][-1] for note in self.notes(host)
        ):
            self.joined.add(launch)
        return launch in self.joined

    def harm(self, host: int) -> None:
        kind = self.chance.choice(self.arguments.kinds)
        away = self.chance.uniform(0.5, 1.5) * self.arguments.away_seconds
        self.faults.append({"kind": kind, "host": host, "at": time.time(), "until": time.time() + away})
        self.away[host] = kind, time.time() + away
        {"kill": self.hosts.kill, "stop": self.hosts.pause, "cut": self.hosts.cut}[kind](host)
        print(f"{time.time() - self.began_at:6.1f} s: {kind} host {host}", file=sys.stderr, flush=True)

    def bring_back(self, host: int) -> None:
        kind, _ = self.away.pop(host)
        {"kill": self.launch, "stop": self.hosts.resume, "cut": self.hosts.mend}[kind](host)

    def lives(self, host: int) -> Iterator[list[dict[str, Any]]]:
        """What each of its launches has noted."""
        for path in self.folder.glob(f"notes-{host}-*.jsonl"):
            lines = path.read_text(encoding="utf-8").splitlines()
            notes = [json.loads(line) for line in lines if line.endswith("}")]
            if notes:
                yield notes

    def notes(self, host: int) -> list[dict[str, Any]]:
        return sorted((note for life in self.lives(host) for note in life), key=lambda note: note["at"])


# -- reporting --------------------------------------------------------------------------------------------------------


def figures(run: Run) -> dict[str, Any]:
    hosts = range(run.job.replicas)
    notes = {host: run.notes(host) for host in hosts}
    ends = [note for host in hosts for note in notes[host] if note["what"] == "ended"]
    commits, returns, rates, lost = [], [], [], 0
    for fault in run.faults:
        later = [
            note["at"] - fault["at"] for host in hosts if host != fault["host"] for note in notes[host]
            if note["what"] == "sync" and note["at"] > fault["at"]
        ]  # fmt: skip
        if fault["kind"] == "kill" and later:
            commits.append(min(later))
    for host in hosts:
        for life in run.lives(host):
            joined = [note["at"] for note in life if note["what"] == "joined"]
            launched = max(at for at in run.launched[host] if at <= life[0]["at"])
            if joined and launched > run.launched[host][0]:
                returns.append(joined[0] - launched)
            steps = [note["at"] for note in life if note["what"] == "step"]
            if joined and len(steps) > 1:
                rates.append((len(steps), steps[-1] - joined[0] - hurt(run, host, joined[0], steps[-1])))
            lost += sum(note["taken"] - note["told"] for note in life if note["what"] == "ended")
    seconds = max((n["at"] for h in hosts for n in notes[h]), default=0.0) - min(
        (n["at"] for h in hosts for n in notes[h] if n["what"] == "joined"), default=0.0
    )
    return {
        "faults": len(run.faults),
        **{kind: sum(fault["kind"] == kind for fault in run.faults) for kind in KINDS},
        "seconds": seconds,
        "faults_an_hour": len(run.faults) / seconds * 3600 if seconds else 0.0,
        "ended": len(ends),
        "equal": len({end["params"] for end in ends}) == 1,
        "lost_steps": lost,
        "commit_after_kill_seconds": statistics.median(commits) if commits else None,
        "worst_commit_after_kill_seconds": max(commits, default=None),
        "back_seconds": statistics.median(returns) if returns else None,
        "worst_back_seconds": max(returns, default=None),
        "steps_per_up_second": sum(s for s, _ in rates) / sum(t for _, t in rates) if rates else None,
        "loss": statistics.fmean(end["loss"] for end in ends) if ends else None,
    }


def hurt(run: Run, host: int, first: float, last: float) -> float:
    """Seconds in which a launch that went on was stopped; one whose link was cut was up."""
    return sum(
        fault["until"] - fault["at"] for fault in run.faults
        if fault["host"] == host and fault["kind"] == "stop" and first <= fault["at"] and fault["until"] <= last
    )  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each run."""
    rows = []
    settings = results["settings"]
    whole = {run["seed"]: run for run in results["runs"] if not run["faults_wanted"]}
    for run in results["runs"]:
        reference = whole.get(run["seed"])
        goodput, loss = f"{run['steps_per_up_second'] or math.nan:.2f}", ""
        if reference is not None and run is not reference and run["loss"] is not None:
            goodput += f" ({run['steps_per_up_second'] / reference['steps_per_up_second']:.3f})"
            loss = f" ({run['loss'] / reference['loss'] - 1:+.2%})"
        rows.append([
            f"{settings['hosts']} x {settings['ranks']}", run["seed"],
            f"{run['faults']} ({run['kill']} kills, {run['stop']} stops, {run['cut']} cuts)" if run["faults"] else 0,
            f"{run['faults_an_hour']:.0f}", run["problem"] or ("none" if run["equal"] else "other parameters"),
            f"{run['lost_steps']:.0f}", seconds(run, "commit_after_kill_seconds"), seconds(run, "back_seconds"),
            goodput,
            "" if run["loss"] is None else f"{run['loss']:.4f}{loss}",
        ])  # fmt: skip
    heading = ["hosts x ranks", "seed", "faults", "an hour", "problem", "steps lost by who was not killed",
               "first commit after a kill, s: median (worst)", "from launch to step, s: median (worst)",
               "steps per second of who is up (share of the same without faults)",
               "validation loss (over the same without faults)"]  # fmt: skip
    return markdown_table(heading, rows)


def seconds(run: dict[str, Any], name: str) -> str:
    return "" if run[name] is None else f"{run[name]:.1f} ({run['worst_' + name]:.1f})"


if __name__ == "__main__":
    main()
