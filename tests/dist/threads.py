"""Ranks as threads of one process, on torch's threaded process group: about 0.1 s a test.

The only file that touches torch.testing._internal (torch 2.11 to 2.15), which needs expecttest.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
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

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)]
    try:
        with on_one_core():
            for thread in threads:
                thread.start()
        for thread in threads:
            thread.join(timeout)
        hanging = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
    finally:
        ProcessLocalGroup.reset()
        _uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
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
