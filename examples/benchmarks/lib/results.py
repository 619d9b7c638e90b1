"""Where a figure comes from, and the files that keep it.

results/NAME.jsonl holds one JSON object a line. The first is the head: `settings` that all runs of the file have in
common, and `invocations`, the commands that made them, with commit, machine and versions. Every other line is one run:
what was run, its final figures, and `made`, by which invocation, when and from which commit (as far as that was noted:
the oldest runs say less). Bad runs stay. Floats have seven significant digits, seconds are seconds, bytes are bytes.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]
RESULTS = BENCHMARKS / "results"
SIGNIFICANT_DIGITS = 7


def provenance() -> dict[str, Any]:
    """What it takes to repeat a measurement: the command, the commit, the machine, the versions, the time.

    Files that lie elsewhere are named without their folders. The commit ends in "-modified" where the code that ran is
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
        "time": _now(),
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=BENCHMARKS, capture_output=True, text=True).stdout.strip()

    # What a benchmark writes into results/ is no code.
    modified = git("status", "--porcelain", "--", ":/hf_edit", ":/examples", f":!{RESULTS.name}")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-modified" if modified else "")


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


# -- files ------------------------------------------------------------------------------------------------------------


def read_results(path: Path) -> dict[str, Any]:
    """The head's entries, and the `runs`.

    Raises:
        SystemExit: there is no such file, or it is of another kind.
    """
    if not path.exists():
        sys.exit(f"{path}: no such file; a benchmark's --json makes one.")
    try:
        head, *runs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {"settings": head["settings"], **head, "runs": runs}
    except (ValueError, KeyError, TypeError):
        sys.exit(f"{path} is no file of results: it has to hold one JSON object a line, the first with `settings`.")


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Writes them so that whoever interrupts it leaves the old file or the new one, never a part."""
    head = {name: value for name, value in results.items() if name != "runs"}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    lines = [json.dumps(_rounded(line), separators=(",", ":")) for line in (head, *results["runs"])]
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    part.replace(path)


def _rounded(value: Any) -> Any:
    """
    >>> _rounded({"loss": [1.23456789, 100]})
    {'loss': [1.234568, 100]}
    """
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def open_results(path: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """The results in `path` to go on with, or new ones; this invocation is noted in them.

    Raises:
        SystemExit: the file's runs were made with other `settings`.
    """
    settings = json.loads(json.dumps(settings))  # as they come back from a file
    if path is None or not path.exists():
        return {"settings": settings, "invocations": [provenance()], "runs": []}
    results = read_results(path)
    if results["settings"] != settings:
        sys.exit(f"{path} holds runs with {results['settings']}, not {settings}. Give --json another name.")
    results["invocations"].append(provenance())
    return results


def add_run(results: dict[str, Any], run: dict[str, Any], path: Path | None) -> None:
    """Appends a finished run with its origin, and keeps all in `path` if there is one."""
    made = {"invocation": len(results["invocations"]) - 1, "commit": _commit(), "time": _now()}
    results["runs"].append({**run, "made": made})
    if path:
        write_results(path, results)
