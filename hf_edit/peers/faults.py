"""What can go wrong between ranks: who is missing when a collective fails; what gloo's threads must not let go of."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hf_edit.peers.layout import Layout

logger = logging.getLogger(__name__)

KEEP_SECONDS = 10.0  # after its end, and at least until KEEP_LATER more have begun, a collective is kept
KEEP_LATER = 16
GRACE_SECONDS = 1.0  # beyond the limit, in which gloo fails by itself and says why
LOOK_SECONDS = 10.0  # for the rendezvous store to answer
SAY_AFTER_SECONDS = 30.0  # that a replica has waited for others, who they are


class Pending(Protocol):
    """A collective under way."""

    def wait(self) -> None: ...


def start(collective: Callable[..., Any], *tensors: Any, group: Any, **more: Any) -> Any:
    """Starts `collective` of torch.distributed on tensors, or lists of them; all of ours go this way.

    gloo's threads (torch 2.13) let go of a Work only after reporting its end. If Python has dropped it by then,
    and with it a tensor that Python knows, that thread takes the interpreter's locks: a process that forks in this
    moment (DataLoader workers) leaves a child that waits for ever up to Python 3.11, and one that exits is aborted. So
    gloo gets tensors of our own on the same memory, which give that memory up at the end and are kept for long after.
    """
    if _first(tensors[0]).is_cuda:
        return collective(*tensors, group=group, async_op=True, **more)
    aliases = [[_alias(one) for one in given] if isinstance(given, list) else _alias(given) for given in tensors]
    return Kept(collective(*aliases, group=group, async_op=True, **more), aliases)


def run(collective: Callable[..., Any], *tensors: Any, group: Any, **more: Any) -> None:
    """As `start`, and waits for its end; on CUDA the current stream does."""
    if _first(tensors[0]).is_cuda:
        collective(*tensors, group=group, **more)
    else:
        start(collective, *tensors, group=group, **more).wait()


def _first(given: Any) -> Tensor:
    return given[0] if isinstance(given, list) else given


def _alias(tensor: Tensor) -> Tensor:
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


class Kept:
    """A collective in host memory: `wait` as of its Work."""

    alive: ClassVar[deque[Kept]] = deque()  # of the process, as gloo's threads are
    lock = threading.Lock()  # a delayed sync has its own thread

    def __init__(self, work: Any, aliases: list[Any]) -> None:
        self.work, self._aliases = work, aliases
        self._ended_at: float | None = None
        with self.lock:
            self.alive.append(self)
            while len(self.alive) > KEEP_LATER and self.alive[0]._can_go():
                self.alive.popleft()

    def wait(self) -> None:
        self.work.wait()
        self._give_up_memory()

    def is_completed(self) -> bool:
        return bool(self.work.is_completed())

    def let_go(self) -> None:
        """Nothing of it is kept any more: what it holds keeps a connection open that others wait for the end of."""
        with self.lock:
            if self in self.alive:
                self.alive.remove(self)
        self.work, self._aliases = None, []

    def _give_up_memory(self) -> None:
        for given in self._aliases:
            for alias in given if isinstance(given, list) else [given]:
                alias.set_()
        self._ended_at = time.monotonic()

    def _can_go(self) -> bool:
        if self._ended_at is None and (self.work is None or self.work.is_completed()):  # given up without a wait
            self._give_up_memory()
        return self._ended_at is not None and time.monotonic() - self._ended_at > KEEP_SECONDS


class Arrivals:
    """The exchanges that each rank has come to, kept in the rendezvous store: what is left when a group is dead."""

    def __init__(self, layout: Layout, timeout_seconds: float) -> None:
        self.count = 0  # of this rank
        self._layout = layout
        self._timeout_seconds = timeout_seconds

    def come(self) -> None:
        """This rank comes to its next exchange."""
        self.count += 1
        self.announce(self.count)

    def announce(self, count: int) -> None:
        if (store := default_store()) is not None:
            store.set(_key(self._layout.rank), str(count))

    def wait(self, seconds: float) -> None:
        """Waits until all of this sync group have come to the exchange that this rank has come to; at most `seconds`,
        after which that exchange's own limit begins."""
        store, deadline = default_store(), time.monotonic() + seconds
        self.announce(self.count + 1)
        others = [rank for rank in self._layout.sync_ranks(self._layout.shard) if rank != self._layout.rank]
        while store is not None and others and time.monotonic() < deadline:
            others = [rank for rank in others if _reported(store, rank) <= self.count]
            time.sleep(0.1 if others else 0.0)

    def wait_for(self, work: Any) -> None:
        """Waits for an exchange under way, on the host; says from time to time which replicas have not come to it.

        Raises:
            RuntimeError: it has failed, or the limit is over, which NCCL's own wait would not see.
        """
        begun = said = time.monotonic()
        while not work.is_completed():
            now = time.monotonic()
            if now - begun > self._timeout_seconds + GRACE_SECONDS:
                raise RuntimeError("timed out")
            if now - said > SAY_AFTER_SECONDS:
                said = now
                self.say_who_is_missing(now - begun)
            time.sleep(min(5e-5 + (now - begun) / 200, 0.005))
        work.wait()

    def say_who_is_missing(self, seconds: float) -> None:
        """On one rank of this replica."""
        if self._layout.shard == 0 and (missing := self.missing_replicas()):
            logger.warning(
                "EDiT: replica %d has waited %.0f s at a sync for replicas %s; the limit is sync_timeout_seconds=%g.",
                self._layout.replica, seconds, missing, self._timeout_seconds,
            )  # fmt: skip

    def missing_replicas(self) -> list[int] | None:
        """Those with a rank that has not come to the exchange this one is at; None if that cannot be found out."""
        if (store := default_store()) is None:
            return []
        replicas = [self._layout.replica_ranks(i) for i in range(self._layout.num_replicas)]
        found: list[int] = []

        def look() -> bool:
            found.extend(
                i for i, ranks in enumerate(replicas) if any(_reported(store, rank) < self.count for rank in ranks)
            )
            return True

        return found if within(LOOK_SECONDS, look) else None

    @contextlib.contextmanager
    def blame(self) -> Iterator[None]:
        """Turns the failure of a collective inside into a RuntimeError that names the replicas which did not come."""
        started = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            waited = time.monotonic() - started
            missing = self.missing_replicas()
            who = f"replicas {missing} did not come to it" if missing else (
                "all had come; a connection has broken, or a process has died in the middle"
            )  # fmt: skip
            if missing is None:
                who = "the process that keeps the rendezvous (rank 0) cannot be reached either"
            raise RuntimeError(
                f"An exchange between the replicas failed on replica {self._layout.replica} after {waited:.1f} s: "
                f"{who}. The limit is sync_timeout_seconds={self._timeout_seconds:g}. "
                f"Start again from the last saved model once all hosts are back. Cause: {error}"
            ) from error


def within(seconds: float, job: Callable[[], bool]) -> bool:
    """The result of `job`; False if it fails, or has none after `seconds` (on a thread, which is left behind: a
    connection that is dead, but not closed, keeps its reader for ever)."""
    results: list[bool] = []

    def run() -> None:
        with contextlib.suppress(RuntimeError):  # torch's DistError and gloo's; False says it
            results.append(job())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(results and results[0])


def _key(rank: int) -> str:
    return f"hf_edit/arrivals/{rank}"


def _reported(store: Any, rank: int) -> int:
    return int(store.get(_key(rank))) if store.check([_key(rank)]) else 0


def default_store() -> Any:
    """The rendezvous store, or None where there is none."""
    # Private in torch 2.13: the store is the only channel left when a group is dead, and torch has no public way to
    # it. tests/dist/test_faults.py fails when it moves.
    try:
        return dist.distributed_c10d._get_default_store()
    except (ValueError, AssertionError):
        return None


@functools.cache
def leave_cleanly_at_exit() -> None:
    atexit.register(_leave)


def _leave() -> None:
    """Gives gloo's threads the time to let go of what they hold, before Python finalizes.

    `start` sees to our own collectives; those of FSDP2, DDP and the script are let go of by gloo's threads (torch
    2.13), which aborts a process that is already finalizing ("terminate called without an active exception"), in 14 of
    25 exits right after an all-reduce, and torchrun reports a failed run. Ending the groups ends only the threads of
    those that nothing else holds, as DDP and device meshes do, and a processor that others use can keep a thread
    waiting for 100 ms and more. After an uncaught exception nothing is tidied, since that would wait for peers which
    wait for us.
    """
    if getattr(sys, "last_value", None) is not None:
        return
    if dist.is_initialized():  # else the script has ended the groups itself
        dist.destroy_process_group()
    time.sleep(0.3)
