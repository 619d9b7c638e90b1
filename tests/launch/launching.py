"""Starts training scripts as a user would.

python -m tests.launch.launching cpu_2x2 features NAME ...    # scenarios of tests/launch/scripts/features.py
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.launch import forked

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "accelerate_configs"
SCRIPTS = ROOT / "tests" / "launch" / "scripts"
THREADS = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))  # a port may be free on one address and taken on another
        return s.getsockname()[1]


def accelerate_launch(
    config: str, script: Path, *arguments: str, timeout: float = 900.0, fresh: bool = False, **environment: str | None
) -> str:
    """`accelerate launch --config_file CONFIG SCRIPT ARGUMENTS`; its output. Fails with it on any exit code but 0.

    An environment variable that is None is unset. `fresh`: without forked.py.
    """
    return run([*launcher(config), str(script), *arguments], timeout, environment, fresh)


def launcher(config: str) -> list[str]:
    words = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(CONFIGS / config)]
    return [*words, "--main_process_port", str(free_port())]


def torchrun(
    num_processes: int, script: Path, *arguments: str, timeout: float = 900.0, **environment: str | None
) -> str:
    words = ["-m", "torch.distributed.run", f"--nproc-per-node={num_processes}", f"--master-port={free_port()}"]
    return run([*words, str(script), *arguments], timeout, environment)


def run(command: list[str], timeout: float, environment: dict[str, str | None], fresh: bool = False) -> str:
    process = start(command, subprocess.PIPE, environment, fresh)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        output = end(process)
        raise AssertionError(f"still running after {timeout} s:\n{_what_matters(output)}") from None
    assert process.returncode == 0, f"exit code {process.returncode}:\n{_what_matters(output)}"
    return output


def start(
    command: list[str], output: Any, environment: dict[str, str | None], fresh: bool = False
) -> subprocess.Popen[str]:
    merged = {**os.environ, **THREADS, **({} if fresh else imported()), **environment}
    return subprocess.Popen(
        [merged.get("PYTHON_EXEC") or sys.executable, *command],
        cwd=ROOT,
        env={name: value for name, value in merged.items() if value is not None},
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@functools.cache
def imported() -> dict[str, str]:
    """The environment in which Python is forked.py, once its server listens."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    place, program = Path(folder.name) / "socket", Path(folder.name) / "python"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{Path(forked.__file__)}" "$@"\n')
    program.chmod(0o755)
    code = f"from tests.launch.forked import run, serve\nrun(serve({str(place)!r}))"
    server = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **THREADS})
    while not place.exists():
        assert server.poll() is None, "the process that forks has ended; its own output says why"
        time.sleep(0.1)
    return {"PYTHON_EXEC": str(program), forked.SOCKET: str(place)}


def end(process: subprocess.Popen[str]) -> str:
    """Ends a launcher, which ends its ranks: they are sessions of their own, and would outlive it if it were killed."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=45)  # torchrun gives its ranks 30 s
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0]


# -- one launch for many tests -----------------------------------------------------------------------------------------


def launch_scenarios(
    config: str, script: str, folder: Path, *scenarios: str, timeout: float = 900.0, **environment: str
) -> tuple[dict[str, Any], str]:
    """Runs `scenarios` of tests/launch/scripts/SCRIPT.py under `config`: what each gave, and the output.

    In a launch that all tests of this configuration and `environment` share: to start one takes longer than most of
    them. What a library reads from its environment as it is imported has to be in `environment`.
    """
    launch = (config, *sorted(environment.items()))
    if launch not in _SHARED:
        _SHARED[launch] = SharedLaunch(config, environment)
    try:
        output = _SHARED[launch].run({"script": script, "scenarios": scenarios, "folder": str(folder)}, timeout)
    except AssertionError:
        _SHARED.pop(launch).close()
        raise
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert list(results) == list(scenarios), output
    print("\n".join(line for line in output.splitlines() if line.startswith("passed: ")))
    return results, output


class SharedLaunch:
    """See tests/launch/scripts/serve.py."""

    def __init__(self, config: str, environment: dict[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._jobs = Path(self._folder.name)
        self._log = self._jobs / "output"
        self._count = 0
        words = ["-m", "tests.launch.scripts.serve", str(self._jobs), str(os.getpid())]
        with self._log.open("w") as log:
            self._process = start([*launcher(config), *words], log, {**environment}, fresh=True)
        atexit.register(self.close)

    def run(self, job: dict[str, Any], timeout: float) -> str:
        """Its output."""
        begins, deadline = self._log.stat().st_size, time.monotonic() + timeout
        path = self._jobs / f"{self._count}.json"
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(job), encoding="utf-8")
        draft.rename(path)
        self._count += 1
        while not path.with_suffix(".done").exists():
            code = self._process.poll()
            if code is not None or time.monotonic() > deadline:
                why = f"still running after {timeout} s" if code is None else f"exit code {code}"
                raise AssertionError(f"{why}:\n{_what_matters(self._output(begins))}")
            time.sleep(0.1)
        return self._output(begins)

    def _output(self, begins: int) -> str:
        with self._log.open(encoding="utf-8", errors="replace") as log:
            log.seek(begins)
            return log.read()

    def close(self) -> None:
        atexit.unregister(self.close)
        if self._process.poll() is None:
            end(self._process)
        self._process.wait()
        self._folder.cleanup()


_SHARED: dict[tuple[Any, ...], SharedLaunch] = {}


def _what_matters(output: str) -> str:
    """The output's end, and that of what each rank raised: one is the cause, the others miss it."""
    raised: dict[str, list[str]] = {}
    for line in output.splitlines():
        if line.startswith("[rank"):
            raised.setdefault(line.partition("]")[0], []).append(line)
    return "\n".join([output[-6000:], *(line for lines in raised.values() for line in ["--", *lines[-16:]])])


if __name__ == "__main__":
    launch_scenarios(f"{sys.argv[1]}.yaml", sys.argv[2], Path(tempfile.mkdtemp()), *sys.argv[3:])
