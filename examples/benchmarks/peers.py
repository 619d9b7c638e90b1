#!/usr/bin/env python
"""EDiT beside its relatives on one slow link: what share of a never-syncing training's speed each keeps.

    sudo python examples/benchmarks/peers.py --torchft_python torchft-env/bin/python --json peers.jsonl --png peers.png

Trains the same Llama of 8.4 million parameters on two hosts of one core and one rank each: never synced (the bound),
with DistributedDataParallel, Accelerate's LocalSGD, torchft's DiLoCo and hf_edit. Measured are steps per second and
bytes sent over whole sync intervals after a warm-up, without the final sync. DistributedDataParallel syncs in every
step, so fewer of its steps are enough.

torchft is to have an environment of its own (pip install torchft-nightly transformers, and the same torch). Methods
that cannot run are noted with the reason. --json keeps every run as soon as it has ended, and goes on with what is
there; `--table FILE` shows such a file and runs nothing.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.bench import exit_on_signals, markdown_table, pair_range, ratio_of_medians, share_text, subplots
from lib.cost_model import bits_per_second
from lib.hosts import unavailable
from lib.peers_worker import Job
from lib.peers_worker_launch import run
from lib.results import add_run, open_results, read_results

WARM_UP_INTERVALS = 2
RUN_SECONDS = 1800.0


@dataclass(frozen=True)
class Method:
    """A row of the table, and what a worker does for it."""

    label: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)


def methods(sync_interval: int) -> dict[str, Method]:
    """All that can be asked for. Delays are in inner steps."""
    late = sync_interval - 2
    return {
        "bound": Method("never syncs (the bound)", "never"),
        "ddp": Method("torch DistributedDataParallel", "ddp"),
        "local-sgd": Method("Accelerate LocalSGD", "local_sgd"),
        "torchft": Method("torchft DiLoCo", "torchft"),
        "torchft-delay": Method(
            f"torchft DiLoCo, fragment_sync_delay={late}", "torchft", {"fragment_sync_delay": late}
        ),
        "post-local-sgd": _edit("post-local-sgd", overlap="none"),
        "diloco": _edit("diloco", overlap="none"),
        "edit-forward": _edit("edit", overlap="forward"),
        "edit-delayed-less": _edit("edit", overlap="delayed", delay_steps=sync_interval - 1),
        "edit-delayed": _edit("edit", overlap="delayed", delay_steps=sync_interval),
    }


def _edit(preset: str, **settings: Any) -> Method:
    words = ", ".join(f"{name}={value}" for name, value in settings.items())
    return Method(f"hf_edit {preset}, {words}", "edit", {"preset": preset, **settings})


def main() -> None:
    arguments = parse_arguments()
    if arguments.table:
        show(read_results(arguments.table), arguments.png)
        return
    if (reason := unavailable()) is not None:
        sys.exit(f"peers.py: {reason}")
    exit_on_signals()
    names = ("tau", "rate", "steps", "batch_size", "sequence_length")
    results = open_results(arguments.json, {name: getattr(arguments, name) for name in names})
    for repeat in range(arguments.repeats):
        # Every other repeat is in reverse order, so that changes of the machine favour no method.
        for name in arguments.methods if repeat % 2 == 0 else reversed(arguments.methods):
            if not any((run["method"], run["repeat"]) == (name, repeat) for run in finished(results)):
                measure(results, name, repeat, arguments)
    show(results, arguments.png)


def show(results: dict[str, Any], png: Path | None) -> None:
    print(table(results))
    if png is not None:
        plot(results, png)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = list(methods(8))
    parser.add_argument("--methods", nargs="+", choices=known, default=known, metavar="METHOD",
                        help=f"what to run: {', '.join(known)} (all)")  # fmt: skip
    parser.add_argument("--rate", type=_rate, default="100mbit", help="limit of each host in each direction (100mbit)")
    parser.add_argument("--tau", type=_steps(4), default=8, help="inner steps between syncs (8)")
    parser.add_argument("--repeats", type=_steps(1), default=3, help="runs of each method (3)")
    parser.add_argument("--steps", type=_steps(1), default=48,
                        help="measured steps of a run, made up to whole intervals (48)")  # fmt: skip
    parser.add_argument("--batch_size", type=_steps(1), default=4, help="sequences in a step of one host (4)")
    parser.add_argument("--sequence_length", type=_steps(2), default=144, help="tokens in a sequence (144)")
    parser.add_argument("--torchft_python", metavar="PATH", help="interpreter of an environment that has torchft")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the runs here and go on with those in it")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the shares and the bytes (needs matplotlib)")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="show this JSON file (with --png, draw it too) and run nothing"
    )
    return parser.parse_args()


def _steps(least: int) -> Any:
    def number(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: a whole number of at least {least} is needed")
        return int(text)

    return number


def _rate(text: str) -> str:
    try:
        bits_per_second(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def intervals(steps: int, tau: int, kind: str) -> tuple[int, int]:
    """Sync intervals of the warm-up and of the measurement.

    >>> intervals(48, 8, "edit"), intervals(48, 8, "ddp")
    ((2, 6), (1, 2))
    """
    whole = -(-steps // tau)
    return (1, -(-whole // 4)) if kind == "ddp" else (WARM_UP_INTERVALS, whole)


def measure(results: dict[str, Any], name: str, repeat: int, arguments: argparse.Namespace) -> None:
    """Runs a method once and keeps its figures in `results`, or the reason why it could not run."""
    method = methods(arguments.tau)[name]
    warm_up, measured = (count * arguments.tau for count in intervals(arguments.steps, arguments.tau, method.kind))
    entry = {"method": name, "repeat": repeat, "measured_steps": measured}
    begun = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder:
            sizes = (arguments.batch_size, arguments.sequence_length)
            job = Job(method.kind, folder, arguments.tau, warm_up, measured, *sizes, method.options)
            entry.update(run(job, arguments.rate, arguments.torchft_python, RUN_SECONDS))
    except RuntimeError as error:
        print(f"{name}, repeat {repeat}: not run\n{error}", file=sys.stderr, flush=True)
        entry["not run"] = reason_of(str(error))
    else:
        speed = f"{measured / max(entry['seconds']):.3f} steps/s in {time.monotonic() - begun:.0f} s of wall time"
        print(f"{name}, repeat {repeat}: {speed}", flush=True)
    results["runs"] = [old for old in results["runs"] if (old["method"], old["repeat"]) != (name, repeat)]
    add_run(results, entry, arguments.json)


def reason_of(output: str) -> str:
    """The line of a failed run's output that says why: the first error that was raised, or else the first line.

    >>> reason_of("exit codes by host: [1, 1]\\nTraceback (most recent call last):\\nValueError: delay_steps=9")
    'ValueError: delay_steps=9'
    """
    errors = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception): .*$", output, flags=re.MULTILINE)
    return errors[0] if errors else output.splitlines()[0]


def finished(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [run for run in results["runs"] if "not run" not in run]


# -- figures ----------------------------------------------------------------------------------------------------------


def figures(results: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Medians over a method's runs, or None if there is none.

    Returns:
        `steps_per_second` of the slower host; `share` of the bound with its `range` over the repeats, None without a
        bound; `sync_bytes` that a host sent per sync (the mean of both), `interval_bytes` per tau steps.
    """
    tau = results["settings"]["tau"]
    runs = {run["repeat"]: run for run in finished(results) if run["method"] == name}
    if not runs:
        return None
    speeds = {repeat: run["measured_steps"] / max(run["seconds"]) for repeat, run in runs.items()}
    bounds = {
        run["repeat"]: run["measured_steps"] / max(run["seconds"])
        for run in finished(results)
        if run["method"] == "bound"
    }
    pairs = [(speeds[repeat], bounds[repeat]) for repeat in sorted(speeds.keys() & bounds.keys())]
    step_bytes = statistics.median(statistics.mean(run["bytes_sent"]) / run["measured_steps"] for run in runs.values())
    syncs = tau if name == "ddp" else 1
    return {
        "steps_per_second": statistics.median(speeds.values()),
        "share": ratio_of_medians(*zip(*pairs, strict=True)) if pairs else None,
        "range": pair_range(*zip(*pairs, strict=True)) if pairs else None,
        "sync_bytes": step_bytes * tau / syncs,
        "interval_bytes": step_bytes * tau,
        "parameter_bytes": next(iter(runs.values()))["parameter_bytes"],
        "runs": len(runs),
    }


def table(results: dict[str, Any]) -> str:
    """The results in markdown, and a line that says how the link compares with computing."""
    tau = results["settings"]["tau"]
    heading = ["method", "share of the bound", "lowest to highest", "steps/s", "MB a host sent per sync",
               "of the fp32 parameters", f"MB per {tau} steps", "runs"]  # fmt: skip
    rows: list[list[str]] = []
    for name, method in methods(tau).items():
        found = figures(results, name)
        if found is not None:
            share = "-" if found["share"] is None else share_text(found["share"])
            spread = "-" if found["range"] is None else "{:.3f} to {:.3f}".format(*found["range"])
            sent = found["sync_bytes"]
            rows.append([method.label, share, spread, f"{found['steps_per_second']:.3f}", f"{sent / 1e6:.2f}",
                         f"{sent / found['parameter_bytes']:.3f}", f"{found['interval_bytes'] / 1e6:.2f}",
                         str(found["runs"])])  # fmt: skip
        reasons = [run["not run"] for run in results["runs"] if run["method"] == name and "not run" in run]
        if reasons:
            rows.append([method.label, f"not run: {reasons[-1]}", *[""] * 6])
    return f"{markdown_table(heading, rows)}\n\n{link_line(results)}"


def link_line(results: dict[str, Any]) -> str:
    settings = results["settings"]
    text = f"{settings['rate']} in each direction, a sync every {settings['tau']} steps of {settings['batch_size']} x "
    text += f"{settings['sequence_length']} tokens a host."
    bound = figures(results, "bound")
    if bound is None:
        return text
    traffic = bound["parameter_bytes"] * 8 / bits_per_second(settings["rate"])
    computing = settings["tau"] / bound["steps_per_second"]
    text += f" The parameters cross the link in {traffic:.2f} s at best, {traffic / computing:.2f} of the "
    return text + f"{computing:.2f} s that an interval computes."


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars by method: the share of the bound, and what a host sent in an interval against the parameters' size."""
    rows = [(method.label, figures(results, name)) for name, method in methods(results["settings"]["tau"]).items()]
    found = [(label, row) for label, row in rows if row is not None and row["share"] is not None][::-1]
    figure, (left, right) = subplots(1, 2)
    figure.set_size_inches(12.0, 1.2 + 0.4 * len(found))
    labels = [label for label, _ in found]
    shares = [row["share"] for _, row in found]
    errors = [
        [row["share"] - row["range"][0] for _, row in found],
        [row["range"][1] - row["share"] for _, row in found],
    ]
    bars = left.barh(labels, shares, xerr=errors, color=["C1" if "hf_edit" in label else "C0" for label in labels])
    left.bar_label(bars, [f"{share:.2f}" for share in shares], padding=6)
    left.set(xlabel="steps per second / those of a training that never syncs", xlim=(0, 1.2))
    sent = [row["interval_bytes"] / row["parameter_bytes"] for _, row in found]
    bars = right.barh(labels, sent, color=["C1" if "hf_edit" in label else "C0" for label in labels])
    right.bar_label(bars, [f"{size:.2f}" for size in sent], padding=6)
    right.set(xlabel="sent by a host per interval / fp32 size of the parameters", yticks=[])
    right.margins(x=0.15)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
