#!/usr/bin/env python
"""Validation loss at equal tokens, by method: when nothing goes wrong, and when something does.

    python examples/benchmarks/convergence.py --train_file train.txt --validation_file validation.txt \\
        --json convergence.jsonl --png convergence.png
    python examples/benchmarks/convergence.py --table convergence.jsonl --png convergence.png

Trains a byte-level Llama with synchronous training (the plain Trainer), Post Local SGD, DiLoCo, EDiT, EDiT with the
paper's outer optimizer and A-EDiT, from the same seeds on the same number of tokens; then with a fault in one replica
(random bytes for text, a learning rate that is too high), also for EDiT with a part of its penalty turned off. Without
text files it reads the sources of the running interpreter's standard library. Every training is a torchrun of its own;
--json keeps each finished one, and goes on where an interrupted benchmark stopped.

With --rate 100mbit --methods sync edit sync-same-time the ranks stand on two hosts (network namespaces, needs root)
with a slow network between them: what has synchronous training learnt in the time that EDiT's took?
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.arguments import add_files, parse_with_files
from lib.bench import exit_on_signals, worker_environment
from lib.convergence_job import BY_TIME, METHODS, SCENARIOS, SYNCHRONOUS, Job, applies, default_methods, fault_steps
from lib.convergence_report import draw, runs_of, tables
from lib.cost_model import bits_per_second
from lib.hosts import Hosts, share_cores, unavailable
from lib.results import add_run, open_results, read_results

WORKER = "lib.convergence_worker"
NUM_HOSTS = 2  # with --rate
LAUNCH_FLAGS = ("json", "png", "table", "methods", "scenarios", "seeds", "timeout", "sync_seconds")
QUICK = {"steps": 48, "warmup": 16, "tau": 8, "evaluations": 2, "seeds": [0], "fault_steps": 8, "validation_blocks": 64}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    _add_choices(parser)
    _add_sizes(parser)
    _add_faults(parser)
    files = parser.add_argument_group("files").add_argument
    add_files(files)
    files("--png", type=Path, help="plot validation losses here")
    arguments = parse_with_files(parser, QUICK)
    if arguments.rate and (arguments.replicas * arguments.ranks_per_replica) % NUM_HOSTS:
        parser.error(f"--rate: {NUM_HOSTS} hosts share the ranks; their number must be a multiple of it.")
    try:
        bits_per_second(arguments.rate or "unlimited")
    except ValueError as error:
        parser.error(f"--rate: {error}")
    if arguments.rate and (reason := unavailable()) is not None:
        parser.error(f"--rate: {reason}")
    if arguments.warmup % arguments.tau:
        parser.error(f"--warmup {arguments.warmup}: a multiple of --tau {arguments.tau} puts evaluations on syncs.")
    return arguments


def _add_choices(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to run")
    group.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD",
                       help=f"of {', '.join(METHODS)}; None: those that the scenario is about")  # fmt: skip
    meanings = "; ".join(f"{name}: {text}" for name, text in SCENARIOS.items())
    group.add_argument("--scenarios", nargs="+", choices=SCENARIOS, metavar="SCENARIO",
                       default=["clean", "corrupt", "spike"], help=meanings)  # fmt: skip
    group.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of model, data order and fault")
    group.add_argument("--rate", help="two hosts share the ranks, with a network of this rate, as tc writes it; "
                       "None: the ranks talk over loopback")  # fmt: skip
    group.add_argument("--timeout", type=float, default=1800.0, help="seconds that one training may take")
    group.add_argument("--quick", action="store_true", help="one seed and a few steps, to see that it works")


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and training")
    group.add_argument("--replicas", type=int, default=4, help="R")
    group.add_argument("--ranks_per_replica", type=int, default=1, help="S; from 2 on FSDP2 shards the replica")
    group.add_argument("--hidden_size", type=int, default=64, help="width of the model")
    group.add_argument("--layers", type=int, default=3, help="transformer blocks")
    group.add_argument("--steps", type=int, default=640, help="steps of a training, the warm-up's too")
    group.add_argument("--tau", type=int, default=16, help="inner steps between syncs")
    group.add_argument("--sync_seconds", type=float,
                       help="between A-EDiT's syncs; None: what tau steps took in EDiT's finished runs")  # fmt: skip
    group.add_argument("--warmup", type=int, default=64, help="synchronous steps first, a multiple of tau")
    group.add_argument("--batch", type=int, default=8, help="sequences of one replica in a step")
    group.add_argument("--block", type=int, default=64, help="bytes of a sequence")
    group.add_argument("--learning_rate", type=float, default=3e-3, help="inner one of all methods with local steps")
    group.add_argument("--sync_learning_rate", type=float, default=4e-3, help="of synchronous training")
    group.add_argument("--evaluations", type=int, default=20, help="about how often to evaluate")
    group.add_argument("--validation_blocks", type=int, default=512, help="sequences to evaluate on")


def _add_faults(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("faults")
    group.add_argument("--fault_first", type=float, default=0.6, help="share of the steps after which a fault begins")
    group.add_argument("--fault_steps", type=int, default=32, help="steps with spoilt text")
    group.add_argument("--spike_steps", type=int, default=4, help="steps with a learning rate that is too high")
    group.add_argument("--spike_factor", type=float, default=20.0, help="by which the learning rate is multiplied")


def main() -> None:
    exit_on_signals()
    arguments = parse()
    results = read_results(arguments.table) if arguments.table else run_all(arguments)
    print("\n" + tables(results))
    if arguments.png:
        draw(results, arguments.png)


def run_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs what is not there yet; all results."""
    results = open_results(arguments.json, settings_of(arguments))
    for job in jobs(arguments, results):
        run = {
            **label(job),
            "steps": job.steps,
            "sync_seconds": job.sync_seconds,
            **train(job, arguments),
        }
        add_run(results, run, arguments.json)
        print(f"{job.scenario} {job.method} seed {job.seed}: {run['loss']:.4f} nats a byte", flush=True)
    return results


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What all runs of one results file have in common; of a text file its name, not where it lies."""
    settings = {name: value for name, value in vars(arguments).items() if name not in (*LAUNCH_FLAGS, "quick")}
    if settings["rate"] is None:
        del settings["rate"]  # there was no such setting at first
    files = {name: settings[name].name for name in ("train_file", "validation_file") if settings[name]}
    return {**settings, **files}


# -- trainings --------------------------------------------------------------------------------------------------------


def jobs(arguments: argparse.Namespace, results: dict[str, Any]) -> Iterator[Job]:
    """What is not in `results` yet. Seeds are the outermost, so that an early table compares all methods."""
    for seed, scenario in itertools.product(arguments.seeds, arguments.scenarios):
        for method in arguments.methods or default_methods(scenario):
            wanted = {"method": method, "scenario": scenario, "seed": seed}
            done = any(wanted.items() <= run.items() for run in results["runs"])
            if not done and applies(scenario, method):
                yield make_job(arguments, results, **wanted)


def make_job(arguments: argparse.Namespace, results: dict[str, Any], method: str, scenario: str, seed: int) -> Job:
    at_once = scenario.startswith(("spike", "nan"))
    boundary = int(arguments.fault_first * arguments.steps) // arguments.tau * arguments.tau
    return Job(
        method=method,
        scenario=scenario,
        seed=seed,
        num_replicas=arguments.replicas,
        sharded=arguments.ranks_per_replica > 1,
        steps=same_time_steps(arguments, results) if method == "sync-same-time" else arguments.steps,
        tau=arguments.tau,
        sync_seconds=interval_seconds(arguments, results) if method in BY_TIME else None,
        warmup=arguments.warmup,
        batch=arguments.batch // arguments.ranks_per_replica,
        block=arguments.block,
        hidden_size=arguments.hidden_size,
        layers=arguments.layers,
        learning_rate=arguments.sync_learning_rate if method in SYNCHRONOUS else arguments.learning_rate,
        evaluations=arguments.evaluations,
        validation_blocks=arguments.validation_blocks,
        fault_first=boundary + (arguments.tau // 2 if at_once else 0),
        fault_steps=fault_steps(scenario, arguments.fault_steps, arguments.spike_steps),
        fault_factor=arguments.spike_factor,
        train_file=arguments.train_file and str(arguments.train_file.resolve()),
        validation_file=arguments.validation_file and str(arguments.validation_file.resolve()),
        report="",
    )


def interval_seconds(arguments: argparse.Namespace, results: dict[str, Any]) -> float:
    """Between the syncs of A-EDiT: as given, or as long as tau steps of EDiT's finished runs.

    Raises:
        SystemExit: there is no such run.
    """
    if arguments.sync_seconds:
        return float(arguments.sync_seconds)
    taken = [run["train_seconds"] / arguments.steps for run in results["runs"] if run["method"] == "edit"]
    if not taken:
        sys.exit("convergence.py: a-edit needs --sync_seconds, or a finished run of edit to take it from.")
    return round(statistics.median(taken) * arguments.tau, 3)


def same_time_steps(arguments: argparse.Namespace, results: dict[str, Any]) -> int:
    """How many steps synchronous training takes in the time of EDiT's, from the finished runs of both.

    Raises:
        SystemExit: one of them has none.
    """
    seconds = [[run["train_seconds"] for run in runs_of(results, "clean", method)] for method in ("edit", "sync")]
    if not all(seconds):
        sys.exit("convergence.py: sync-same-time needs finished runs of edit and of sync; name these methods first.")
    edit, sync = map(statistics.median, seconds)
    return math.ceil(arguments.steps * edit / sync)


def label(job: Job) -> dict[str, Any]:
    return {"scenario": job.scenario, "method": job.method, "seed": job.seed}


def train(job: Job, arguments: argparse.Namespace) -> dict[str, Any]:
    """One training of `job` in processes of its own; the figures of its first rank.

    Raises:
        SystemExit: it failed or took too long; with the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder) / "report.json", Path(folder) / "log.txt"
        job = Job(**{**vars(job), "report": str(report)})
        num_ranks = job.num_replicas * arguments.ranks_per_replica
        start = launch_on_hosts if arguments.rate else launch
        problem = start(num_ranks, job.to_json(), log, arguments)
        if problem is None and not report.exists():
            problem = "left no report"
        if problem is not None:
            tail = log.read_text(encoding="utf-8", errors="replace")[-6000:]
            sys.exit(f"{tail}\nconvergence.py: the training {label(job)} {problem}.")
        figures: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    if figures["world_size"] != num_ranks:
        sys.exit(f"convergence.py: {num_ranks} ranks were launched, but {figures['world_size']} trained together.")
    return figures


def launch(num_ranks: int, argument: str, log: Path, arguments: argparse.Namespace) -> str | None:
    """Runs the worker on `num_ranks` processes; what went wrong, or None. None of them is left running."""
    environment = worker_environment(TRANSFORMERS_VERBOSITY="error")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}",
               "-m", WORKER, argument]  # fmt: skip
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        try:
            code = process.wait(arguments.timeout)
        except subprocess.TimeoutExpired:
            return f"did not end within {arguments.timeout:g} s"
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)  # torchrun ends its workers, which are in sessions of their own
                process.wait()
    return f"ended with exit code {code}" if code else None


def launch_on_hosts(num_ranks: int, argument: str, log: Path, arguments: argparse.Namespace) -> str | None:
    """The same on two hosts with the network's rate between them."""
    with Hosts(NUM_HOSTS, arguments.rate, cores=share_cores(NUM_HOSTS)) as hosts:
        try:
            hosts.torchrun(num_ranks // NUM_HOSTS, WORKER, argument, timeout=arguments.timeout)
        except RuntimeError as error:
            log.write_text(str(error), encoding="utf-8")
            return "failed"
    return None


if __name__ == "__main__":
    main()
