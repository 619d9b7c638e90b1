"""The process groups of replicas and sync groups, and the one interface to the other replicas."""

from __future__ import annotations

import atexit
import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hf_edit.peers.layout import Layout, ring_bytes

# A long pipe is filled by several all-reduces at a time (gloo runs two), so a large tensor goes in pieces of this size.
PIECE_BYTES = 8 << 20


class Pending(Protocol):
    """A collective under way."""

    def wait(self) -> None: ...


class Peers(Protocol):
    """The other replicas, as an outer sync sees them. Every rank talks to the ranks of its own sync group.

    Tensors are the device's, or for a delayed sync in host memory. A fault-tolerant engine can stand behind these three
    methods. All replicas call them in the same order.
    """

    num_replicas: int
    replica: int
    bytes_sent: int  # by this rank so far, as the algorithms' payload

    def gather(self, vector: Tensor) -> Callable[[], Tensor]:
        """Starts gathering `vector` [K]; the result waits for it and returns [R, K], equal on all replicas."""
        ...

    def all_reduce(self, tensors: Sequence[Tensor]) -> Pending:
        """Starts summing each tensor over the replicas, in place and in the background."""
        ...

    def commit(self, sync: int) -> bool:
        """True if every replica can carry out sync number `sync`, and then all of them do."""
        ...


class ProcessGroupPeers:
    """`Peers` over a torch process group: the members are fixed, and one that is missing ends the training.

    Args:
        layout: where this rank is.
        timeout_seconds: longest wait without progress.

    All ranks of the world construct it together.
    """

    def __init__(self, layout: Layout, timeout_seconds: float) -> None:
        self.layout = layout
        self.num_replicas = layout.num_replicas
        self.replica = layout.replica
        self.timeout = timedelta(seconds=timeout_seconds)
        self.replica_group = _own_group([layout.replica_ranks(i) for i in range(layout.num_replicas)], self.timeout)
        self.sync_group = _own_group([layout.sync_ranks(i) for i in range(layout.replica_size)], self.timeout)
        self._arrivals = 0
        self.bytes_sent = 0
        self._host_replica_group, self._host_sync_group = self.replica_group, self.sync_group
        _leave_cleanly_at_exit()

    def gather(self, vector: Tensor) -> Callable[[], Tensor]:
        self._arrivals += 1
        rows = [torch.empty_like(vector) for _ in range(self.num_replicas)]
        with self._blame():
            self._announce(self._arrivals)
            work = dist.all_gather(rows, vector, group=self._sync_group_for(vector), async_op=True)
        self.bytes_sent += vector.nbytes * (self.num_replicas - 1)

        def result() -> Tensor:
            with self._blame():
                if vector.is_cuda:  # NCCL's wait() only orders streams; the host must notice the time limit itself
                    self._watch(work)
                work.wait()
            return torch.stack(rows)

        return result

    def all_reduce(self, tensors: Sequence[Tensor]) -> Pending:
        self.bytes_sent += ring_bytes(sum(t.nbytes for t in tensors), self.num_replicas)
        pieces = [piece for t in tensors for piece in t.view(-1).split(max(1, PIECE_BYTES // t.element_size()))]
        with self._blame():
            works = [dist.all_reduce(piece, group=self._sync_group_for(piece), async_op=True) for piece in pieces]
        return _Works(works, self)

    def commit(self, sync: int) -> bool:
        # The gather of this sync has ended, so every replica has come; in a fixed group none can leave and the
        # others go on: a failure from here on raises on all of them.
        return self._arrivals > 0

    def broadcast(self, tensor: Tensor) -> None:
        """Replica 0's `tensor` to all replicas, in place."""
        with self._blame():
            dist.broadcast(tensor, src=self.layout.sync_ranks(self.layout.shard)[0], group=self.sync_group)

    def broadcast_to_all(self, tensor: Tensor) -> None:
        """`tensor` of replica 0's first rank to every rank, in place."""
        self.broadcast(tensor)
        if self.layout.replica_size > 1:
            dist.broadcast(tensor, src=self.layout.replica_ranks(self.replica)[0], group=self.replica_group)

    def average(self, tensor: Tensor) -> None:
        """The mean of `tensor` over the replicas, in place."""
        tensor.div_(self.num_replicas)  # first, so that the sum of fp16 gradients cannot overflow
        if tensor.is_cuda:  # FSDP2 (torch 2.13) gives the memory free before a hook's work on its own stream is done
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
        with self._blame():
            dist.all_reduce(tensor, group=self.sync_group)

    def sum_in_replica(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over this replica's ranks, in place; no other replica takes part."""
        if self.layout.replica_size > 1:
            dist.all_reduce(tensor, group=self.replica_group)
        return tensor

    def lead(self, decision: bool) -> bool:
        """The `decision` of this replica's first rank, on all of its ranks; it travels in host memory."""
        if self.layout.replica_size == 1:
            return decision
        bit = torch.tensor([decision], dtype=torch.uint8)
        dist.broadcast(bit, src=self.layout.replica_ranks(self.replica)[0], group=self._host_replica_group)
        return bool(bit.item())

    def make_host_groups(self) -> None:
        """What `lead`, and tensors in host memory, need. All ranks call it together, before the first of these."""
        if self._host_sync_group is not self.sync_group:  # they are there
            return
        layout = self.layout
        self._host_replica_group = self._with_host(self.replica_group, layout.replica_ranks, layout.num_replicas)
        self._host_sync_group = self._with_host(self.sync_group, layout.sync_ranks, layout.replica_size)

    def _with_host(
        self, group: dist.ProcessGroup, ranks: Callable[[int], list[int]], num_groups: int
    ) -> dist.ProcessGroup:
        if "cpu:" in dist.get_backend_config(group):
            return group
        return _own_group([ranks(i) for i in range(num_groups)], self.timeout, backend="gloo")

    def _sync_group_for(self, tensor: Tensor) -> dist.ProcessGroup:
        return self._host_sync_group if tensor.device.type == "cpu" else self.sync_group

    def gather_in_replica(self, tensor: Tensor) -> Tensor:
        """`tensor` of each rank of this replica, one after the other along dim 0."""
        tensor = tensor.detach().contiguous()  # as NCCL wants it
        parts = [torch.empty_like(tensor) for _ in range(self.layout.replica_size)]
        if self.layout.replica_size > 1:
            dist.all_gather(parts, tensor, group=self.replica_group)
        else:
            parts = [tensor]
        return torch.stack(parts) if tensor.ndim == 0 else torch.cat(parts)

    def gather_objects_in_replica(self, value: Any) -> list[Any]:
        """`value`, which can be pickled, of each rank of this replica."""
        values = [value] * self.layout.replica_size
        if self.layout.replica_size > 1:
            dist.all_gather_object(values, value, group=self.replica_group)
        return values

    def _watch(self, work: Any) -> None:
        deadline = time.monotonic() + self.timeout.total_seconds()
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise RuntimeError("timed out")
            time.sleep(5e-5)

    def wait_for_arrivals(self, seconds: float) -> None:
        """Waits until all of this sync group have come to the exchange that this rank has come to; at most `seconds`,
        after which that exchange's own limit begins. Asks the rendezvous store, and none of them."""
        store, deadline = _default_store(), time.monotonic() + seconds
        self._announce(self._arrivals + 1)
        others = [rank for rank in self.layout.sync_ranks(self.layout.shard) if rank != self.layout.rank]
        while store is not None and others and time.monotonic() < deadline:
            others = [rank for rank in others if _arrivals_of(store, rank) <= self._arrivals]
            time.sleep(0.1 if others else 0.0)

    # -- who is missing ---------------------------------------------------------------------------------------------

    def _announce(self, arrivals: int) -> None:
        if (store := _default_store()) is not None:
            store.set(_arrival_key(self.layout.rank), str(arrivals))

    def _blame(self) -> _Blame:
        return _Blame(self)

    def _missing_replicas(self) -> list[int]:
        store = _default_store()
        if store is None:
            return []
        arrived = [
            _arrivals_of(store, rank) >= self._arrivals for rank in range(self.num_replicas * self.layout.replica_size)
        ]
        return [i for i in range(self.num_replicas) if not all(arrived[rank] for rank in self.layout.replica_ranks(i))]


class _Blame:
    """Turns the failure of a collective into a RuntimeError that names the replicas which did not come."""

    def __init__(self, peers: ProcessGroupPeers) -> None:
        self._peers = peers

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, RuntimeError):
            return
        waited = time.monotonic() - self._started
        try:
            missing = self._peers._missing_replicas()
        except RuntimeError:
            who = "the process that keeps the rendezvous (rank 0) cannot be reached either"
        else:
            who = f"replicas {missing} did not come to it" if missing else "which one broke it off is not known"
        raise RuntimeError(
            f"An exchange between the replicas failed on replica {self._peers.replica} after {waited:.1f} s: {who}. "
            f"The limit is sync_timeout_seconds={self._peers.timeout.total_seconds():g}. "
            f"Start again from the last saved model once all hosts are back. Cause: {error}"
        ) from error


@dataclass
class _Works:
    works: list[Any]
    peers: ProcessGroupPeers

    def wait(self) -> None:
        with self.peers._blame():
            for work in self.works:
                work.wait()


def _own_group(all_ranks: list[list[int]], timeout: timedelta, backend: str | None = None) -> dist.ProcessGroup:
    """This rank's group among `all_ranks`. A group of its own keeps syncs apart from everybody else's collectives."""
    mine, _ = dist.new_subgroups_by_enumeration(all_ranks, timeout=timeout, backend=backend)
    if mine is None:
        raise RuntimeError(f"rank {dist.get_rank()} is in none of the groups {all_ranks}")
    return mine


@functools.cache
def _leave_cleanly_at_exit() -> None:
    atexit.register(_leave)


def _leave() -> None:
    """Gives gloo's threads the time to let go of what they hold, before Python finalizes.

    A gloo thread (torch 2.13) lets go of a collective's tensors after it has reported the end; if Python is already
    finalizing by then, it aborts the process ("terminate called without an active exception"), in 14 of 25 exits right
    after an all-reduce, and torchrun reports a failed run. Ending the groups ends only the threads of those that
    nothing else holds, as DDP and device meshes do, and a processor that others use can keep a thread waiting for
    100 ms and more. After an uncaught exception nothing is tidied, since that would wait for peers which wait for us.
    """
    if getattr(sys, "last_value", None) is not None:
        return
    if dist.is_initialized():  # else the script has ended the groups itself
        dist.destroy_process_group()
    time.sleep(0.3)


def _arrival_key(rank: int) -> str:
    return f"hf_edit/arrivals/{rank}"


def _arrivals_of(store: Any, rank: int) -> int:
    """The exchanges that `rank` has come to."""
    return int(store.get(_arrival_key(rank))) if store.check([_arrival_key(rank)]) else 0


def _default_store() -> Any:
    # Private in torch 2.13: the rendezvous store is the only channel left when a group is dead, and torch has no
    # public way to it. tests/dist/test_faults.py fails when it moves.
    try:
        return dist.distributed_c10d._get_default_store()
    except (ValueError, AssertionError):
        return None
