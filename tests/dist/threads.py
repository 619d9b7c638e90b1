"""Ranks as threads of one process, on torch's threaded process group: about 0.1 s a test.

The only file that touches torch.testing._internal (torch 2.11 to 2.15), which needs expecttest.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

# A CUDA build on a machine without a GPU sets its device guard up at the first entry, and torch 2.11 dies of a
# segmentation fault if two threads enter first.
with FakeTensorMode():
    pass


class _Rank:
    """A thread for all tests: DTensor remembers by thread how its operations are sharded, which takes longer to find
    out than most tests. (It remembers process groups by name, that is by the order in which a test makes them.)"""

    def __init__(self) -> None:
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.idle = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def start(self, work: Callable[[], None]) -> None:
        self.idle.clear()
        self._work.put(work)

    def _run(self) -> None:
        while True:
            self._work.get()()
            self.idle.set()


_RANKS: list[_Rank] = []


def run_ranks(world_size: int, body: Callable[[int], Any], timeout: float = 60.0) -> list[Any]:
    """`body(rank)` on `world_size` ranks; their results by rank. The first failure is raised here."""
    results: list[Any] = [None] * world_size
    failures: list[BaseException] = []
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    _install_threaded_pg()
    store = dist.HashStore()

    def run(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world_size, store=store)
            assert dist.get_world_size() == world_size
            results[rank] = body(rank)
            dist.barrier()
        except BaseException as error:
            failures.append(error)
            ProcessLocalGroup.exception_handle(error)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    try:
        with on_one_core():
            _RANKS.extend(_Rank() for _ in range(len(_RANKS), world_size))
        deadline = time.monotonic() + timeout
        for rank in range(world_size):
            _RANKS[rank].start(functools.partial(run, rank))
        hanging = [rank for rank in range(world_size) if not _RANKS[rank].idle.wait(deadline - time.monotonic())]
    finally:
        ProcessLocalGroup.reset()
        _uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
    if hanging:
        _RANKS.clear()
    for error in failures:
        if not isinstance(error, SystemExit):  # how the other ranks are ended after a failure
            raise error
    if hanging:
        raise TimeoutError(f"ranks {hanging} still run after {timeout} s")
    return results


@contextlib.contextmanager
def on_one_core() -> Iterator[None]:
    """Threads that begin inside share a core. On several, they hand the interpreter's lock across at every operation,
    which takes more time than the operations."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = sorted(os.sched_getaffinity(0))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.sched_setaffinity(0, {cores[worker % len(cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
