"""The one interface to the other replicas, and its implementation over process groups of fixed members."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hf_edit.peers.faults import Arrivals, Kept, Pending, leave_cleanly_at_exit, run, start
from hf_edit.peers.layout import Layout, ring_bytes
from hf_edit.peers.replica import Replica, gather_object, own_group, with_host

# A long pipe is filled by several all-reduces at a time (gloo runs two), so a large tensor goes in pieces of this size.
PIECE_BYTES = 8 << 20
# Inside a replica a rank may write files while the others wait; torch's own limit with gloo.
INSIDE_SECONDS = 1800.0


class Conversation(Protocol):
    """The other replicas in an outer sync. Every rank talks to the ranks of its own sync group.

    Its parts are `begin`, one `gather`, `all_reduce` (or `all_to_all` and `all_gather`) for each unit, `commit`. All
    members say the same in the same order. Tensors are the device's, or for a delayed sync in host memory. Whatever
    fails before `commit` has returned True, or a False, leaves the replica as it was, and what it has learnt goes into
    the next sync.
    """

    num_replicas: int
    replica: int
    bytes_sent: int  # by this rank so far, as the algorithms' payload
    fixed: bool  # a failure ends the training of all, so that a unit may be written before the next one is reduced

    def begin(self, sync: int) -> list[int]:
        """The replicas that take part in sync number `sync`, this one among them, in ascending order."""
        ...

    def gather(self, vector: Tensor) -> Callable[[], Tensor]:
        """Starts gathering `vector` [K]; the result waits for it and returns a row for each member, equal on all."""
        ...

    def all_reduce(self, tensors: Sequence[Tensor]) -> Pending:
        """Starts summing each tensor over the members, in place and in the background."""
        ...

    def all_to_all(self, received: Tensor, sent: Tensor) -> Pending:
        """Starts sending row i of `sent` [members, k] to member number i; row i of `received` comes from it."""
        ...

    def all_gather(self, received: Tensor, sent: Tensor) -> Pending:
        """Starts sending `sent` [k] to all members; row i of `received` [members, k] comes from member number i."""
        ...

    def commit(self, sync: int) -> bool:
        """True if every member can carry out sync number `sync`, and then all of them do."""
        ...


class Peers(Conversation, Protocol):
    """The other replicas, as the engine sees them; `inside` is this one. All ranks of all replicas call these together,
    but for `wait_for_arrivals`."""

    layout: Layout
    inside: Replica

    def broadcast(self, tensor: Tensor, replica: int = 0) -> None:
        """The `tensor` of `replica` to all replicas, in place; each rank has its own shard of it."""
        ...

    def broadcast_to_all(self, tensor: Tensor, replica: int = 0) -> None:
        """`tensor` of the first rank of `replica` to every rank, in place."""
        ...

    def average(self, tensor: Tensor) -> None:
        """The mean of `tensor` over the replicas, in place."""
        ...

    def gather_object(self, value: Any) -> list[Any]:
        """Every rank's `value`, by rank."""
        ...

    def barrier(self) -> None:
        """Waits until all ranks have come."""
        ...

    def make_host_groups(self) -> None:
        """What `inside.lead`, and tensors in host memory, need; to be called before the first of these."""
        ...

    def wait_for_arrivals(self, seconds: float) -> None:
        """Waits until all have come to the exchange that this rank has come to, or have left; at most `seconds`, after
        which that exchange's own limit begins. Keeps none of them from its steps."""
        ...


class ProcessGroupPeers:
    """`Peers` over torch process groups: the members are fixed, and one that is missing ends the training.

    Args:
        layout: where this rank is.
        timeout_seconds: longest wait for other replicas without progress; inside a replica it is at least
            `INSIDE_SECONDS`.

    All ranks of the world construct it together.
    """

    fixed = True

    def __init__(self, layout: Layout, timeout_seconds: float) -> None:
        self.layout = layout
        self.num_replicas = layout.num_replicas
        self.replica = layout.replica
        self.bytes_sent = 0
        self.inside = Replica(layout, max(timeout_seconds, INSIDE_SECONDS))
        self.arrivals = Arrivals(layout, timeout_seconds)
        self._timeout = timedelta(seconds=timeout_seconds)
        self._all_ranks = [layout.sync_ranks(i) for i in range(layout.replica_size)]
        self.sync_group = self._host_sync_group = own_group(self._all_ranks, self._timeout)
        leave_cleanly_at_exit()

    # -- a sync -------------------------------------------------------------------------------------------------------

    def begin(self, sync: int) -> list[int]:
        return list(range(self.num_replicas))

    def gather(self, vector: Tensor) -> Callable[[], Tensor]:
        rows = [torch.empty_like(vector) for _ in range(self.num_replicas)]
        with self.arrivals.blame():
            self.arrivals.come()
            work = start(dist.all_gather, rows, vector, group=self._sync_group_for(vector))
        self.bytes_sent += vector.nbytes * (self.num_replicas - 1)

        def result() -> Tensor:
            with self.arrivals.blame():
                self.arrivals.wait_for(work)
            return torch.stack(rows)

        return result

    def all_reduce(self, tensors: Sequence[Tensor]) -> Pending:
        self.bytes_sent += ring_bytes(sum(t.nbytes for t in tensors), self.num_replicas)
        parts = [piece for t in tensors for piece in pieces(t)]
        with self.arrivals.blame():
            works = [start(dist.all_reduce, part, group=self._sync_group_for(part)) for part in parts]
        return _Works(works, self.arrivals)

    def all_to_all(self, received: Tensor, sent: Tensor) -> Pending:
        self.bytes_sent += sent.nbytes * (self.num_replicas - 1) // self.num_replicas
        with self.arrivals.blame():
            work = start(dist.all_to_all_single, received, sent, group=self._sync_group_for(sent))
        return _Works([work], self.arrivals)

    def all_gather(self, received: Tensor, sent: Tensor) -> Pending:
        self.bytes_sent += sent.nbytes * (self.num_replicas - 1)
        with self.arrivals.blame():
            work = start(dist.all_gather, list(received), sent, group=self._sync_group_for(sent))
        return _Works([work], self.arrivals)

    def commit(self, sync: int) -> bool:
        # Every replica has come to the gather, and in a fixed group none can leave and the others go on: a failure
        # raises on all of them.
        return True

    # -- all together -------------------------------------------------------------------------------------------------

    def broadcast(self, tensor: Tensor, replica: int = 0) -> None:
        with self.arrivals.blame():
            run(dist.broadcast, tensor, group=self.sync_group, src=self.layout.sync_ranks(self.layout.shard)[replica])

    def broadcast_to_all(self, tensor: Tensor, replica: int = 0) -> None:
        self.broadcast(tensor, replica)
        self.inside.broadcast(tensor)

    def average(self, tensor: Tensor) -> None:
        tensor.div_(self.num_replicas)  # first, so that the sum of fp16 gradients cannot overflow
        if tensor.is_cuda:  # FSDP2 (torch 2.13) gives the memory free before a hook's work on its own stream is done
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
        with self.arrivals.blame():
            run(dist.all_reduce, tensor, group=self.sync_group)

    def gather_object(self, value: Any) -> list[Any]:
        return gather_object(value, dist.get_world_size(), dist.group.WORLD)

    def barrier(self) -> None:
        dist.barrier()

    def wait_for_arrivals(self, seconds: float) -> None:
        self.arrivals.wait(seconds)

    def make_host_groups(self) -> None:
        if self._host_sync_group is self.sync_group:  # else they are there
            self._host_sync_group = with_host(self.sync_group, self._all_ranks, self._timeout)
            self.inside.make_host_group()

    def _sync_group_for(self, tensor: Tensor) -> dist.ProcessGroup:
        return self._host_sync_group if tensor.device.type == "cpu" else self.sync_group


@dataclass
class _Works:
    works: list[Any]
    arrivals: Arrivals

    def wait(self) -> None:
        with self.arrivals.blame():
            for work in self.works:
                if isinstance(work, Kept):
                    work.wait()
                else:
                    # On CUDA the host waits, too. FSDP2's next collectives, queued behind a slow one, would be on
                    # NCCL's clock (which runs from when they are queued), and their limit is not ours to set.
                    self.arrivals.wait_for(work)


def pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views of `tensor`, which is contiguous: flat, and of at most `PIECE_BYTES` each."""
    return tensor.view(-1).split(max(1, PIECE_BYTES // tensor.element_size()))
