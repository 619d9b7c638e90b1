"""Limits of the processor time of a group of processes, through Linux control groups (version 1 or 2)."""

from __future__ import annotations

import os
import time
from pathlib import Path

PERIOD_MICROSECONDS = 20_000  # short against an inner step, so that a limited host is slow, not jerky
REMOVAL_SECONDS = 5.0


def controller() -> Path | None:
    """Where this machine's control groups for processor time are made, or None."""
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        _, folder, kind, options = line.split()[:4]
        if kind == "cgroup" and "cpu" in options.split(","):
            return Path(folder)
        if kind == "cgroup2" and "cpu" in (Path(folder) / "cgroup.controllers").read_text(encoding="utf-8").split():
            return Path(folder)
    return None


class CpuQuota:
    """A control group of its own; `close` removes it once its processes have ended.

    Args:
        name: of the group; a new folder.
        cores: processor seconds per second that all its processes may use together; None: no limit.

    Raises:
        RuntimeError: no control groups for processor time are mounted.
    """

    def __init__(self, name: str, cores: float | None = None) -> None:
        root = controller()
        if root is None:
            raise RuntimeError("no control group with the `cpu` controller is mounted, so hosts cannot be slowed")
        self._version_2 = (root / "cgroup.controllers").exists()
        if self._version_2:
            (root / "cgroup.subtree_control").write_text("+cpu", encoding="utf-8")
        self.folder = root / name
        self.folder.mkdir()
        self.set(cores)

    def set(self, cores: float | None) -> None:
        """Changes the limit, also of running processes."""
        quota = None if cores is None else round(cores * PERIOD_MICROSECONDS)
        if self._version_2:
            self._write("cpu.max", f"{'max' if quota is None else quota} {PERIOD_MICROSECONDS}")
        else:
            self._write("cpu.cfs_period_us", str(PERIOD_MICROSECONDS))
            self._write("cpu.cfs_quota_us", str(-1 if quota is None else quota))

    def enter(self) -> None:
        """Puts the calling process, and what it will start, under the limit."""
        self._write("cgroup.procs", str(os.getpid()))

    def close(self) -> None:
        deadline = time.monotonic() + REMOVAL_SECONDS
        while self._in_use() and time.monotonic() < deadline:
            time.sleep(0.05)
        self.folder.rmdir()

    def _in_use(self) -> bool:
        return bool((self.folder / "cgroup.procs").read_text(encoding="utf-8").strip())

    def _write(self, file: str, text: str) -> None:
        (self.folder / file).write_text(text, encoding="utf-8")
