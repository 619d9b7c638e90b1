"""Arguments that benchmarks of learning share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_files(add: Callable[..., Any]) -> None:
    """What to learn from, and where the results go. `add`: a parser's or a group's `add_argument`."""
    add("--train_file", type=Path, help="text to train on; None: the standard library's sources")
    add("--validation_file", type=Path, help="text to evaluate on; None: some of these sources")
    add("--json", type=Path, metavar="JSONL", help="keep every finished run here; an existing file is continued")
    add("--table", type=Path, metavar="JSONL", help="print the table of this file, run nothing")


def parse_with_files(parser: argparse.ArgumentParser, quick: dict[str, Any] | None = None) -> argparse.Namespace:
    """The command line, with both files or none; `quick`: the defaults with --quick."""
    arguments = parser.parse_args()
    if (arguments.train_file is None) != (arguments.validation_file is None):
        parser.error("--train_file and --validation_file go together: text for training must not be evaluated on.")
    if quick and arguments.quick:
        parser.set_defaults(**quick)
        arguments = parser.parse_args()  # what is given holds all the same
    return arguments
