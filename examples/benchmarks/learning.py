#!/usr/bin/env python
"""What replicas learn from equal tokens, each method at its best learning rate, with AdamW and with Muon inside.

    python examples/benchmarks/learning.py --train_file train.txt --validation_file validation.txt --json learning.jsonl
    python examples/benchmarks/learning.py --table learning.jsonl --png learning.png

    python examples/benchmarks/learning.py --methods sync --optimizers adamw --learning_rates 3e-3 --seeds 0 \\
        --block 256 --save_base base --train_file train.txt --validation_file validation.txt
    python examples/benchmarks/learning.py --block 256 --base base --lora --steps 160 --warmup 0 \\
        --train_file train.jsonl --validation_file test.jsonl --json finetuning.jsonl

Trains the byte-level Llama of convergence.py, every method with every learning rate and seed, synchronous training with
either optimizer too; a method's best rate is that of the lowest mean. --json keeps each finished training. The third
command makes a model, which the fourth one fine-tunes on instructions and answers.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convergence import train
from lib.arguments import add_files, parse_with_files
from lib.bench import exit_on_signals, markdown_table, subplots
from lib.convergence_job import METHODS, Job
from lib.convergence_report import percent
from lib.results import add_run, open_results, read_results

RATES = {"adamw": [2e-3, 3e-3, 4.5e-3], "muon": [8e-3, 12e-3, 18e-3]}
EXCHANGE_STEPS = 5  # that an exchange of all gradients takes in the table: at 100 Mbit/s in slow_network.py it is 5.5
DEFAULT_METHODS = ["sync", "post-local-sgd", "edit", "edit-moments"]
SETTINGS = (
    "replicas",
    "ranks_per_replica",
    "hidden_size",
    "layers",
    "steps",
    "tau",
    "warmup",
    "batch",
    "block",
    "lora",
)
QUICK = {"steps": 48, "warmup": 16, "tau": 8, "seeds": [0], "methods": ["sync", "edit"], "optimizers": ["adamw"],
         "learning_rates": [3e-3]}  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument_group("what to run").add_argument
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD", default=DEFAULT_METHODS,
        help=f"of {', '.join(METHODS)}")  # fmt: skip
    add("--optimizers", nargs="+", choices=RATES, default=list(RATES), help="inside")
    add("--learning_rates", nargs="+", type=float, help="of every optimizer; None: three of its own, times 1.5 apart")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of model and data order")
    add("--timeout", type=float, default=1800.0, help="seconds that one training may take")
    add("--quick", action="store_true", help="one seed and a few steps, to see that it works")
    size = parser.add_argument_group("model and training").add_argument
    size("--replicas", type=int, default=4, help="R")
    size("--ranks_per_replica", type=int, default=1, help="S; from 2 on FSDP2 shards the replica")
    size("--hidden_size", type=int, default=64, help="width of the model")
    size("--layers", type=int, default=3, help="transformer blocks")
    size("--steps", type=int, default=640, help="steps of a training, the warm-up's too")
    size("--tau", type=int, default=16, help="inner steps between syncs")
    size("--warmup", type=int, default=64, help="synchronous steps first, a multiple of tau")
    size("--batch", type=int, default=8, help="sequences of one replica in a step")
    size("--block", type=int, default=64, help="bytes of a sequence")
    size("--bf16", action="store_true", help="bf16 autocast and torch.compile: for a model that is large for a CPU")
    size("--lora", action="store_true", help="train adapters of --base alone")
    size("--base", type=Path, help="folder of a model to fine-tune; None: a new one is trained")
    size("--save_base", type=Path, help="keep the model of the last training here")
    files = parser.add_argument_group("files").add_argument
    add_files(files)
    files("--png", type=Path, help="plot the losses over the learning rates here")
    arguments = parse_with_files(parser, QUICK)
    arguments.rate = None
    return arguments


def main() -> None:
    exit_on_signals()
    arguments = parse()
    results = read_results(arguments.table) if arguments.table else run_all(arguments)
    if arguments.save_base is not None and not arguments.save_base.exists():
        sys.exit(f"--save_base {arguments.save_base}: nothing was trained. Give another --json, or leave --table out.")
    print("\n" + table(results))
    if arguments.png:
        draw(results, arguments.png)


# -- running ----------------------------------------------------------------------------------------------------------


def run_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs what is not there yet; all results."""
    settings = {name: getattr(arguments, name) for name in SETTINGS} | ({"bf16": True} if arguments.bf16 else {})
    files = {name: getattr(arguments, name).name for name in ("train_file", "validation_file") if arguments.train_file}
    results = open_results(arguments.json, {**settings, **files})
    for optimizer, method, seed, rate in wanted(arguments, results):
        cell = {"optimizer": optimizer, "method": method, "learning_rate": rate, "seed": seed}
        job = make_job(arguments, **cell, save_to=arguments.save_base and str(arguments.save_base.resolve()))
        run = {**cell, **train(job, arguments)}
        run["bytes_of_a_sync"] = run.pop("sync_bytes")
        add_run(results, run, arguments.json)
        print(f"{optimizer} {method} {rate:g} seed {seed}: {run['loss']:.4f} nats a byte", flush=True)
    return results


def wanted(arguments: argparse.Namespace, results: dict[str, Any]) -> Iterator[tuple[str, str, int, float]]:
    """What is not in `results` yet. Seeds are the outermost, so that an early table compares all methods."""
    for seed, method, optimizer in itertools.product(arguments.seeds, arguments.methods, arguments.optimizers):
        for rate in arguments.learning_rates or RATES[optimizer]:
            if not runs_of(results, optimizer, method, rate, seed):
                yield optimizer, method, seed, rate


def make_job(
    arguments: argparse.Namespace, optimizer: str, method: str, learning_rate: float, seed: int,
    save_to: str | None = None,
) -> Job:  # fmt: skip
    return Job(
        method=method, scenario="clean", seed=seed, num_replicas=arguments.replicas,
        sharded=arguments.ranks_per_replica > 1, steps=arguments.steps, tau=arguments.tau, sync_seconds=None,
        warmup=arguments.warmup, batch=arguments.batch // arguments.ranks_per_replica, block=arguments.block,
        hidden_size=arguments.hidden_size, layers=arguments.layers, learning_rate=learning_rate, evaluations=1,
        validation_blocks=512, fault_first=0, fault_steps=0, fault_factor=1.0,
        train_file=arguments.train_file and str(arguments.train_file.resolve()),
        validation_file=arguments.validation_file and str(arguments.validation_file.resolve()), report="",
        optimizer=optimizer, base=arguments.base and str(arguments.base.resolve()), lora=arguments.lora,
        save_to=save_to, bf16=arguments.bf16,
    )  # fmt: skip


# -- reporting --------------------------------------------------------------------------------------------------------


def runs_of(
    results: dict[str, Any], optimizer: str, method: str, rate: float | None = None, seed: int | None = None
) -> list[dict[str, Any]]:
    given = {"optimizer": optimizer, "method": method, "learning_rate": rate, "seed": seed}
    chosen = {name: value for name, value in given.items() if value is not None}
    return [run for run in results["runs"] if chosen.items() <= run.items()]


def best_rate(results: dict[str, Any], optimizer: str, method: str) -> float:
    """That of the lowest mean, of those that have run with most seeds."""
    losses: dict[float, list[float]] = {}
    for run in runs_of(results, optimizer, method):
        losses.setdefault(run["learning_rate"], []).append(run["loss"])
    most = max(map(len, losses.values()))
    return min((rate for rate in losses if len(losses[rate]) == most), key=lambda rate: statistics.fmean(losses[rate]))


def best_runs(results: dict[str, Any], optimizer: str, method: str) -> dict[int, float]:
    """The loss of each seed at the best rate; {} without runs."""
    if not runs_of(results, optimizer, method):
        return {}
    rate = best_rate(results, optimizer, method)
    return {run["seed"]: run["loss"] for run in runs_of(results, optimizer, method, rate)}


def over(losses: dict[int, float], reference: dict[int, float]) -> float | None:
    """How much larger the losses are than the reference's, the mean of the seeds that both have; None without one."""
    ratios = [losses[seed] / reference[seed] for seed in losses if seed in reference]
    return statistics.fmean(ratios) - 1 if ratios else None


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each optimizer and method."""
    rows = []
    adamw = best_runs(results, "adamw", "sync")
    for optimizer in RATES:
        reference = best_runs(results, optimizer, "sync")
        for method in METHODS:
            if not (losses := best_runs(results, optimizer, method)):
                continue
            rates = sorted({run["learning_rate"] for run in runs_of(results, optimizer, method)})
            best = best_rate(results, optimizer, method)
            shown = ", ".join(f"**{rate:g}**" if rate == best else f"{rate:g}" for rate in rates)
            sent = exchanges(runs_of(results, optimizer, method, best)[0], results["settings"])
            steps = results["settings"]["steps"]
            rows.append([
                optimizer, method, shown, f"{statistics.fmean(losses.values()):.4f}", len(losses),
                f"{max(losses.values()) - min(losses.values()):.4f}", percent(over(losses, reference)),
                percent(over(losses, adamw)),
                f"{sent:.0f}", f"{(steps + EXCHANGE_STEPS * sent) / (steps + EXCHANGE_STEPS * steps):.2f}",
            ])  # fmt: skip
    heading = ["optimizer", "method", "learning rates (best)", "validation loss", "seeds", "spread",
               "over sync, same optimizer", "over sync, AdamW", "exchanges", "time, over sync"]  # fmt: skip
    return markdown_table(heading, rows)


def exchanges(run: dict[str, Any], settings: dict[str, Any]) -> float:
    """What a rank sends in a training, in exchanges of all gradients, as each synchronous step is one."""
    if run["method"] == "sync":
        return float(settings["steps"])
    replicas = settings["replicas"]
    gradients = 4 * run["parameters"] / settings["ranks_per_replica"] * 2 * (replicas - 1) / replicas
    return float(settings["warmup"] + run["syncs"] * run["bytes_of_a_sync"] / gradients)


def draw(results: dict[str, Any], path: Path) -> None:
    """The mean loss over the learning rate."""
    figure, axes = subplots(1, len(RATES))
    for axis, optimizer in zip(axes, RATES, strict=True):
        for method in METHODS:
            points: dict[float, list[float]] = {}
            for run in runs_of(results, optimizer, method):
                points.setdefault(run["learning_rate"], []).append(run["loss"])
            if points:
                rates = sorted(points)
                axis.plot(rates, [statistics.fmean(points[rate]) for rate in rates], marker="o", label=method)
        axis.set(title=optimizer, xlabel="learning rate", ylabel="validation loss (nats a byte)", xscale="log")
        if axis.lines:
            axis.legend(fontsize="small")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
