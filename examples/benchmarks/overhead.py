#!/usr/bin/env python
"""What EDiTTrainer adds to a step: with one replica against the plain Trainer, and in an inner step of two replicas.

    python examples/benchmarks/overhead.py --json overhead.jsonl

Pairs of trainings of the same Llama on the same data, in alternating order. One replica: a process with EDiTTrainer
against one with Trainer. Two replicas of one rank: both ranks of an EDiT run between two syncs, against two plain
trainings that know nothing of each other, at the same time on the same cores. A training's figure is the first
quintile of its steps' durations, since whatever else the machine does only lengthens steps; what is reported is the
median of the pairs' ratios. Telemetry is too little for such pairs: there, two replicas sync every 16 steps, and the
seconds inside its calls (the loss of each step, the journal's lines) are compared with those of all else.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lib.bench import markdown_table
from lib.results import add_run, open_results

os.environ.setdefault("ACCELERATE_USE_CPU", "true")

WARM_UP_STEPS = 5
COMPARISONS = {
    "one_replica": "one replica, a step",
    "inner_step_of_two_replicas": "two replicas, an inner step",
    "telemetry": "two replicas with telemetry, over the same without",
}
TELEMETRY = ("_add_to_step_loss", "_watch_loss", "_spike_tallies", "_note_sync", "_note_log")  # methods of EDiTTrainer


def step_seconds(kind: str, steps: int) -> float:
    """The duration of a step of one training in this process, the quickest fifth's longest; for the kind "telemetry"
    that of all steps over what it is without telemetry's calls."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from hf_edit import EDiTTrainer

    class Clock(TrainerCallback):
        ticks: list[float] = []  # noqa: RUF012  # one a class, and the class is made anew for every training

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ticks.append(time.perf_counter())

    inside = 0.0

    def timed(name: str) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            begun = time.perf_counter()
            try:
                return getattr(EDiTTrainer, name)(self, *args, **kwargs)
            finally:
                inside += time.perf_counter() - begun

        return call

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=2048, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
    )
    tokens = torch.randint(0, 2048, (256, 64), generator=torch.Generator().manual_seed(1))
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(), max_steps=steps + WARM_UP_STEPS, per_device_train_batch_size=4,
        logging_steps=5, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    classes = {
        "plain": Trainer,
        "edit": EDiTTrainer,
        "telemetry": type("Timed", (EDiTTrainer,), {name: timed(name) for name in TELEMETRY}),
    }
    tau = 16 if kind == "telemetry" else 100_000
    settings: dict[str, Any] = {} if kind == "plain" else {"edit_config": {"sync_interval": tau}}
    trainer = classes[kind](model=model, args=args, train_dataset=rows, callbacks=[Clock], **settings)
    trainer.train()
    if kind == "telemetry":
        all_seconds = Clock.ticks[-1] - Clock.ticks[0]
        return all_seconds / (all_seconds - inside)
    ticks = Clock.ticks[WARM_UP_STEPS - 1 :]
    return statistics.quantiles((after - before for before, after in itertools.pairwise(ticks)), n=5)[0]


def one_replica(kind: str, steps: int) -> float:
    return _in_processes([[sys.executable, __file__, "--worker", kind, "--steps", str(steps)]])


def two_replicas(kind: str, steps: int) -> float:
    worker = [__file__, "--worker", kind, "--steps", str(steps)]
    if kind == "plain":
        return _in_processes([[sys.executable, *worker]] * 2)
    return _in_processes(
        [[sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *worker]]
    )


def telemetry(pairs: int, steps: int) -> dict[str, Any]:
    ratios = [two_replicas("telemetry", steps) for _ in range(pairs)]
    return {"ratio": statistics.median(ratios), "ratios": ratios}


def _in_processes(commands: list[list[str]]) -> float:
    """Runs them at the same time; the mean of the step times that their processes print."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    running = [
        subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for c in commands
    ]
    found = []
    for process in running:
        output, errors = process.communicate(timeout=600)
        if process.returncode:
            sys.exit(f"overhead.py: a training failed:\n{errors[-4000:]}")
        found += [float(line.split()[1]) for line in output.splitlines() if line.startswith("step_seconds ")]
    return statistics.mean(found)


def compare(measure: Any, pairs: int, steps: int) -> dict[str, Any]:
    plain, edit = [], []
    for number in range(pairs):
        for kind in ("plain", "edit") if number % 2 == 0 else ("edit", "plain"):
            (plain if kind == "plain" else edit).append(measure(kind, steps))
        print(f"pair {number}: plain {plain[-1]:.4f} s, EDiT {edit[-1]:.4f} s, {edit[-1] / plain[-1]:.4f}", flush=True)
    ratios = [mine / other for mine, other in zip(edit, plain, strict=True)]
    return {"ratio": statistics.median(ratios), "ratios": ratios, "plain_seconds": plain, "edit_seconds": edit}


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each comparison, of its newest run."""
    rows = []
    for name, label in COMPARISONS.items():
        for run in [run for run in results["runs"] if run["comparison"] == name][-1:]:
            low, high = min(run["ratios"]), max(run["ratios"])
            rows.append([label, f"{run['ratio']:.3f}", f"{low:.3f} to {high:.3f}", len(run["ratios"])])
    return markdown_table(["step time, EDiTTrainer's over the plain Trainer's", "median", "range", "pairs"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=9, help="pairs of trainings for each comparison (9)")
    parser.add_argument("--steps", type=int, default=150, help="steps of a training (150)")
    parser.add_argument("--comparisons", nargs="+", choices=COMPARISONS, default=list(COMPARISONS), metavar="NAME",
                        help=f"of {', '.join(COMPARISONS)} (all)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="JSONL", help="add the figures to this file")
    parser.add_argument("--worker", choices=["plain", "edit", "telemetry"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(f"step_seconds {step_seconds(arguments.worker, arguments.steps)}", flush=True)
        return
    results = open_results(arguments.json, {"pairs": arguments.pairs, "steps": arguments.steps})
    for name in arguments.comparisons:
        if name == "telemetry":
            figures = telemetry(arguments.pairs, arguments.steps)
        else:
            measure = one_replica if name == "one_replica" else two_replicas
            figures = compare(measure, arguments.pairs, arguments.steps)
        add_run(results, {"comparison": name, **figures}, arguments.json)
    print("\n" + table(results))


if __name__ == "__main__":
    main()
