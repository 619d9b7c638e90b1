"""What the benchmarks share: where a figure comes from, files, statistics, plots, and the model that they train."""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
NUM_PARAMETERS = 8_401_152  # of build_llama(): 4 x 8,401,152 = 33.6 MB of fp32, what a sync averages
VOCABULARY_SIZE = 4096


# -- where a figure comes from ----------------------------------------------------------------------------------------


def provenance() -> dict[str, Any]:
    """What it takes to repeat a measurement: the command, the commit, the machine, the versions, the time.

    Files that lie elsewhere are told by their names alone. The commit ends in "-modified" where the code that ran is
    not the commit's.
    """
    return {
        "command": " ".join(
            Path(word).name if os.path.isabs(word) or word.startswith("..") else word for word in sys.argv
        ),
        "commit": _commit(),
        "machine": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "accelerate")},
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=HERE.parents[1], capture_output=True, text=True).stdout.strip()

    # What a benchmark writes into results/ is no code.
    modified = git("status", "--porcelain", "--", "hf_edit", "examples", ":!examples/benchmarks/results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-modified" if modified else "")


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def save_json(path: Path, content: Any) -> None:
    """Writes `content`, so that whoever interrupts it finds the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def open_results(path: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """The results in `path` to go on with, or new ones.

    Raises:
        SystemExit: the file's runs were made with other `settings`.
    """
    settings = json.loads(json.dumps(settings))  # as they come back from a file
    if path is None or not path.exists():
        return {"settings": settings, "invocations": [provenance()], "runs": []}
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if results["settings"] != settings:
        sys.exit(f"{path} holds runs with {results['settings']}, not {settings}. Give --json another name.")
    results["invocations"].append(provenance())
    return results


def exit_on_signals() -> None:
    """Makes SIGTERM and SIGHUP leave through the `with` blocks, which remove hosts and processes."""

    def leave(number: int, _: object) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)


# -- statistics -------------------------------------------------------------------------------------------------------


def ratio_of_medians(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """
    >>> ratio_of_medians([1.0, 2.0, 9.0], [4.0, 4.0, 4.0])
    0.5
    """
    return statistics.median(numerators) / statistics.median(denominators)


def pair_range(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float]:
    """The smallest and the largest ratio of two runs that belong together.

    >>> pair_range([1.0, 3.0], [2.0, 4.0])
    (0.5, 0.75)
    """
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return min(ratios), max(ratios)


def mean(values: Sequence[float]) -> float:
    """The mean; NaN of nothing."""
    return statistics.fmean(values) if values else math.nan


def markdown_table(heading: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """
    >>> print(markdown_table(["rate", "share"], [["1gbit", 0.5]]))
    | rate | share |
    |---|---|
    | 1gbit | 0.5 |
    """
    lines = [heading, *rows]
    text = ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]
    return "\n".join([text[0], "|" + "---|" * len(heading), *text[1:]])


def subplots(num_rows: int, num_columns: int) -> tuple[Any, list[Any]]:
    """A figure to be saved as PNG, and its axes in reading order; needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        num_rows, num_columns, figsize=(5.2 * num_columns, 3.8 * num_rows), squeeze=False, constrained_layout=True
    )
    return figure, [axis for row in axes for axis in row]


# -- what is trained --------------------------------------------------------------------------------------------------


def build_llama() -> Any:
    """A Llama of `NUM_PARAMETERS` parameters in fp32, equal on every rank; its head is not tied to its embeddings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=256,
            intermediate_size=684,
            num_hidden_layers=8,
            num_attention_heads=4,
            tie_word_embeddings=False,
        )
    )
    assert model.num_parameters() == NUM_PARAMETERS, model.num_parameters()
    return model


class RandomTokens:
    """A dataset of random tokens, row by row from the row's number, so that no two rows are alike and none is kept."""

    def __init__(self, sequence_length: int, num_rows: int = 1 << 18) -> None:
        self.sequence_length = sequence_length
        self.num_rows = num_rows

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        import torch

        tokens = torch.randint(
            VOCABULARY_SIZE, (self.sequence_length,), generator=torch.Generator().manual_seed(int(row))
        )
        return {"input_ids": tokens, "labels": tokens}
