"""What the benchmarks share: processes, statistics, tables, plots, and the model that they train."""

from __future__ import annotations

import math
import os
import signal
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]
NUM_PARAMETERS = 8_401_152  # of build_llama(): 4 x 8,401,152 = 33.6 MB of fp32, what a sync averages
VOCABULARY_SIZE = 4096


# -- processes --------------------------------------------------------------------------------------------------------


def worker_environment(**more: str) -> dict[str, str]:
    """This process's environment, in which `python -m lib.NAME` finds the benchmarks' workers, one thread each."""
    paths = [str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **more}


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


def share_text(share: float, digits: int = 3) -> str:
    """A share of a bound that nothing can exceed; a measured one above 1 is the noise of its runs, and says so.

    >>> share_text(0.5), share_text(1.0184, digits=2)
    ('0.500', '1.02 (noise)')
    """
    return f"{share:.{digits}f}" + (" (noise)" if round(share, digits) > 1 else "")


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
