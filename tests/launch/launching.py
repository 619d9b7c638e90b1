"""Starts training scripts as a user would."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "accelerate_configs"
SCRIPTS = ROOT / "tests" / "launch" / "scripts"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def accelerate_launch(
    config: str, script: Path, *arguments: str, timeout: float = 900.0, **environment: str | None
) -> str:
    """`accelerate launch --config_file CONFIG SCRIPT ARGUMENTS`; its output. Fails with it on any exit code but 0.

    An environment variable that is None is unset.
    """
    launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(CONFIGS / config)]
    return run([*launcher, "--main_process_port", str(free_port()), str(script), *arguments], timeout, environment)


def launch_scenarios(config: str, script: str, folder: Path, *scenarios: str) -> tuple[dict[str, Any], str]:
    """Runs `scenarios` of tests/launch/scripts/SCRIPT.py in one launch: what each gave, and the output."""
    output = accelerate_launch(config, SCRIPTS / f"{script}.py", str(folder), *scenarios)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert list(results) == list(scenarios), output
    return results, output


def torchrun(
    num_processes: int, script: Path, *arguments: str, timeout: float = 900.0, **environment: str | None
) -> str:
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={num_processes}", f"--master-port={free_port()}"]
    return run([*launcher, str(script), *arguments], timeout, environment)


def run(command: list[str], timeout: float, environment: dict[str, str | None]) -> str:
    merged = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={name: value for name, value in merged.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"still running after {timeout} s:\n{_what_matters(output)}") from None
    assert process.returncode == 0, f"exit code {process.returncode}:\n{_what_matters(output)}"
    return output


def _what_matters(output: str) -> str:
    """The output's end, and what its ranks raised at the end of all."""
    raised = [line for line in output.splitlines() if line.startswith("[rank")]
    return "\n".join([output[-8000:], "-- raised:", *(raised[-60:] or ["nothing"])])
