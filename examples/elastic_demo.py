#!/usr/bin/env python
"""Replicas that come and go: trains a Llama with some on this machine, kills them now and then, launches them again.

    python examples/elastic_demo.py

Starts a lighthouse, and examples/pretrain.py once for each replica; flags that are not its own go to that script. At
the end it prints what became of whom, and leaves elastic.png and elastic.json in --output_dir beside the model.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
REPLICA = {  # of pretrain.py; what is given on the command line wins
    "elastic": "true", "overlap": "delayed", "edit_warmup_steps": 0, "max_steps": 1200, "sync_interval": 8,
    "eval_on_start": "false", "eval_steps": 300, "save_strategy": "steps", "save_steps": 300, "save_total_limit": 2,
    "logging_steps": 8, "report_to": "none", "disable_tqdm": "true",
}  # fmt: skip


def main() -> None:
    arguments, others = parse()
    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("replica-*")):
        sys.exit(f"{folder} has replicas of an earlier run, which this one would continue. Name another --output_dir.")
    lighthouse, address = start_lighthouse(arguments.heartbeat_seconds)
    replicas = [Replica(number, arguments, others, address) for number in range(arguments.num_replicas)]
    began_at = time.time()
    try:
        for replica in replicas:
            replica.launch()
        faults = run(replicas, arguments)
    finally:
        for replica in replicas:
            replica.kill()
        lighthouse.terminate()
        lighthouse.wait()
    report(folder, replicas, faults, began_at)


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--num_replicas", type=int, default=3, help="launches of one process each")
    add("--faults", type=int, default=3, help="how often a replica is killed")
    add("--fault_seconds", type=float, default=8.0, help="from one fault to the next, once all train")
    add("--away_seconds", type=float, default=3.0, help="from a fault to the launch that takes its place")
    add("--heartbeat_seconds", type=float, default=2.0, help="a replica that is not heard of for so long is gone")
    add("--seed", type=int, default=0, help="of the faults, and of the training")
    add("--output_dir", type=Path, default=Path("edit_elastic"), help="for all of it")
    return parser.parse_known_args()


def start_lighthouse(heartbeat_seconds: float) -> tuple[subprocess.Popen[str], str]:
    """The process, and where it is."""
    words = [sys.executable, "-m", "hf_edit.cli.main", "lighthouse", "--port", "0"]
    process = subprocess.Popen(
        [*words, "--heartbeat_seconds", str(heartbeat_seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"Lighthouse on .*:(\d+);", line):
            return process, f"127.0.0.1:{found[1]}"
    sys.exit(f"the lighthouse ended with code {process.wait()}")


class Replica:
    """One of them, through all its lives. `lives` are (launched, ended) in seconds since 1970."""

    def __init__(self, number: int, arguments: argparse.Namespace, others: Sequence[str], address: str) -> None:
        self.number, self.folder = number, arguments.output_dir
        self.lives: list[list[float]] = []
        self.log = self.folder / f"replica-{number}.log"
        self.process: subprocess.Popen[bytes] | None = None
        config = HERE.parent / "accelerate_configs" / "elastic_replica.yaml"
        flags = {**REPLICA, "num_replicas": arguments.num_replicas, "heartbeat_seconds": arguments.heartbeat_seconds,
                 "seed": arguments.seed, "output_dir": self.folder}  # fmt: skip
        self._words = [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), str(HERE / "pretrain.py"),
            *(word for name, value in flags.items() for word in (f"--{name}", str(value))), *others,
        ]  # fmt: skip
        self._env = {"OMP_NUM_THREADS": "1", **os.environ, "EDIT_REPLICA": str(number), "TORCHFT_LIGHTHOUSE": address}

    def launch(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._words, env=self._env, stdout=log, stderr=log)
        self.lives.append([time.time(), 0.0])

    @property
    def ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    @property
    def trains(self) -> bool:
        """True if its present life has come to a sync."""
        return bool(self.lives) and any(
            note["kind"] == "run" and note["at"] > self.lives[-1][0] for note in self.notes()
        )

    def kill(self) -> None:
        if self.process is not None and not self.ended:
            launcher = psutil.Process(self.process.pid)
            for process in [*launcher.children(recursive=True), launcher]:
                process.kill()
            self.process.wait()
        if self.lives and not self.lives[-1][1]:
            self.lives[-1][1] = time.time()

    def notes(self) -> list[dict[str, Any]]:
        """What it has written of its syncs, each with the time `at` which it was written."""
        path = self.folder / f"replica-{self.number}" / "edit_syncs.jsonl"
        found, began_at = [], 0.0
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                note = json.loads(line)
            except ValueError:  # cut off when it was killed
                continue
            if note["kind"] == "run":
                began_at = time.mktime(time.strptime(note["time"][:19], "%Y-%m-%dT%H:%M:%S"))
            found.append({**note, "at": began_at + note.get("seconds", 0.0)})
        return found


def run(replicas: Sequence[Replica], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Kills one after the other, launches it again, and waits until all have ended; what was done."""
    chance, faults, back_at = random.Random(arguments.seed), [], dict[int, float]()
    next_at = float("inf")
    while not all(replica.ended and replica.number not in back_at for replica in replicas):
        time.sleep(0.1)
        now = time.time()
        for replica in replicas:
            if replica.ended and replica.number not in back_at and not replica.lives[-1][1]:
                replica.lives[-1][1] = now
                if code := replica.process.returncode if replica.process else 0:
                    sys.exit(f"replica {replica.number} ended with code {code}; see {replica.log}")
                next_at = float("inf")  # the training is over
        if (
            next_at == float("inf")
            and len(faults) < arguments.faults
            and all(r.trains and not r.ended for r in replicas)
        ):
            next_at = now + arguments.fault_seconds
        for number in [number for number, at in back_at.items() if now >= at]:
            del back_at[number]
            replicas[number].launch()
            print(f"replica {number} is launched again", flush=True)
        if now >= next_at:
            victim = chance.choice(replicas)
            victim.kill()
            faults.append({"replica": victim.number, "at": now})
            back_at[victim.number], next_at = now + arguments.away_seconds, float("inf")
            print(f"replica {victim.number} is killed", flush=True)
    return faults


# -- what came of it --------------------------------------------------------------------------------------------------


def report(folder: Path, replicas: Sequence[Replica], faults: Sequence[dict[str, Any]], began_at: float) -> None:
    histories = [replica.notes() for replica in replicas]
    returns = []
    for replica, history in zip(replicas, histories, strict=True):
        starts = [note["at"] for note in history if note["kind"] == "run"]
        returns += [
            min(at for at in starts if at > life[0] - 1) - life[0]
            for life in replica.lives[1:]
            if starts and max(starts) > life[0] - 1
        ]
    most = max((note["sync"] for history in histories for note in history if note["kind"] == "sync"), default=0)
    summary = {
        "seconds": time.time() - began_at,
        "faults": len(faults),
        "syncs": most,
        "back_in_step_seconds": returns,
        "steps": [taken(history, number) for number, history in enumerate(histories)],
        "loss": next((n["eval_loss"] for h in histories for n in reversed(h) if "eval_loss" in n), None),
    }
    (folder / "elastic.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    draw(replicas, histories, faults, began_at, folder / "elastic.png")
    rows = [
        ("replicas", len(replicas)), ("killed", len(faults)), ("syncs", most),
        ("steps in a sync, by replica", ", ".join(f"{steps:.0f}" for steps in summary["steps"])),
        ("from launch to step, seconds", ", ".join(f"{seconds:.0f}" for seconds in returns) or "none came back"),
        ("validation loss", "not evaluated" if summary["loss"] is None else f"{summary['loss']:.3f}"),
        ("saved in", f"{folder} (model, elastic.png, elastic.json, replica-*.log)"),
        ("more", f"hf-edit report {folder}/replica-*"),
    ]  # fmt: skip
    print()
    for name, value in rows:
        print(f"{name:34s}{value}")


def taken(history: Sequence[dict[str, Any]], number: int) -> float:
    """Inner steps of this replica that were in a sync."""
    return sum(note["replicas"]["inner_steps"][number] for note in history if note["kind"] == "sync")


def draw(
    replicas: Sequence[Replica], histories: Sequence[list[dict[str, Any]]], faults: Sequence[dict[str, Any]],
    began_at: float, path: Path,
) -> None:  # fmt: skip
    """Who trained when, with syncs and faults, and each one's loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(8, 5.5), layout="constrained")
    for replica, history in zip(replicas, histories, strict=True):
        color = f"C{replica.number}"
        for life in replica.lives:
            notes = [note["at"] for note in history if life[0] - 1 <= note["at"] <= (life[1] or time.time())]
            above.barh(
                replica.number,
                (notes[0] if notes else life[1]) - life[0],
                left=life[0] - began_at,
                height=0.5,
                color=color,
                alpha=0.3,
            )
            if notes:
                above.barh(replica.number, life[1] - notes[0], left=notes[0] - began_at, height=0.5, color=color)
        syncs = [note["at"] - began_at for note in history if note["kind"] == "sync"]
        above.plot(syncs, [replica.number] * len(syncs), "|", color="white", markersize=8)
        losses = [(note["at"] - began_at, note["loss"]) for note in history if note["kind"] == "log" and "loss" in note]
        below.plot(
            *zip(*losses, strict=True) if losses else ([], []),
            ".",
            markersize=3,
            color=color,
            label=f"replica {replica.number}",
        )
    for number, fault in enumerate(faults):
        above.plot(
            fault["at"] - began_at,
            fault["replica"],
            "x",
            color="black",
            markersize=9,
            label=None if number else "killed",
        )
    above.set(
        yticks=range(len(replicas)), ylabel="replica", title="Pale: starting, and waiting for a sync. White: syncs."
    )
    below.set(xlabel="seconds", ylabel="training loss (nats per token)")
    for axes in (above, below):
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
