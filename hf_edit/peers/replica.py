"""Inside a replica: the ranks that hold one copy of the model together."""

from __future__ import annotations

import pickle
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_edit.peers.faults import run
from hf_edit.peers.layout import Layout


class Replica:
    """This rank's replica; no other replica takes part in what is said here.

    Args:
        layout: where this rank is.
        timeout_seconds: longest wait without progress.

    All ranks of the world construct it together. With replicas of one rank nothing is said at all, and without a
    process group only those can be.
    """

    def __init__(self, layout: Layout, timeout_seconds: float) -> None:
        self.layout = layout
        self.size = layout.replica_size
        self._timeout = timedelta(seconds=timeout_seconds)
        self._all_ranks = [layout.replica_ranks(i) for i in range(layout.num_replicas)]
        self.group: Any = None
        if dist.is_initialized():
            self.group = own_group(self._all_ranks, self._timeout)
        self._host_group: Any = self.group
        self._first = layout.replica_ranks(layout.replica)[0]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over the ranks, in place."""
        if self.size > 1:
            run(dist.all_reduce, tensor, group=self.group)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """`tensor` of each rank, one after the other along dim 0; of scalars, [S]."""
        own = tensor.detach().contiguous()  # as NCCL wants it
        parts = [own]
        if self.size > 1:
            parts = [torch.empty_like(own) for _ in range(self.size)]
            run(dist.all_gather, parts, own, group=self.group)
        return torch.stack(parts) if tensor.ndim == 0 else torch.cat(parts)

    def gather_object(self, value: Any) -> list[Any]:
        """`value`, which can be pickled, of each rank."""
        return gather_object(value, self.size, self.group)

    def broadcast(self, tensor: Tensor) -> None:
        """The first rank's `tensor` to all ranks, in place."""
        if self.size > 1:
            run(dist.broadcast, tensor, group=self.group, src=self._first)

    def lead(self, decision: bool) -> bool:
        """The first rank's `decision`, on all ranks; it travels in host memory."""
        if self.size == 1:
            return decision
        bit = torch.tensor([decision], dtype=torch.uint8)
        run(dist.broadcast, bit, group=self._host_group, src=self._first)
        return bool(bit.item())

    def tell(self, value: Any) -> Any:
        """The first rank's `value`, which can be pickled, on all ranks; it travels in host memory."""
        return gather_object(value, self.size, self._host_group)[0]

    def count(self, fact: bool) -> int:
        """On how many ranks it is so; asked in host memory."""
        number = torch.tensor(int(fact))
        if self.size > 1:
            run(dist.all_reduce, number, group=self._host_group)
        return int(number)

    def sum_in_host(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor`, which is in host memory, over the ranks, in place."""
        if self.size > 1:
            run(dist.all_reduce, tensor, group=self._host_group)
        return tensor

    def make_host_group(self) -> None:
        """What `lead`, `tell`, `count` and `sum_in_host` need. All ranks of the world call it together, before them."""
        if self.group is not None and self._host_group is self.group:
            self._host_group = with_host(self.group, self._all_ranks, self._timeout)


def gather_object(value: Any, size: int, group: Any) -> list[Any]:
    """`value` of every rank of `group`, of `size` ranks, in their order."""
    if size == 1:
        return [value]
    if not takes_host_tensors(group):
        everyone: list[Any] = [None] * size
        dist.all_gather_object(everyone, value, group=group)
        return everyone
    # As torch's all_gather_object, but with collectives that gloo's threads are not the last to hold (see `start`).
    own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    lengths = [torch.empty(1, dtype=torch.int64) for _ in range(size)]
    run(dist.all_gather, lengths, torch.tensor([len(own)]), group=group)
    longest = max(int(length) for length in lengths)
    rows = [torch.empty(longest, dtype=torch.uint8) for _ in range(size)]
    run(dist.all_gather, rows, torch.nn.functional.pad(own, (0, longest - len(own))), group=group)
    return [pickle.loads(row.numpy().tobytes()) for row in rows]


def own_group(all_ranks: list[list[int]], timeout: timedelta, backend: str | None = None) -> dist.ProcessGroup:
    """This rank's group among `all_ranks`. A group of its own keeps syncs apart from everybody else's collectives."""
    mine, _ = dist.new_subgroups_by_enumeration(all_ranks, timeout=timeout, backend=backend)
    if not isinstance(mine, dist.ProcessGroup):
        raise RuntimeError(f"rank {dist.get_rank()} is in none of the groups {all_ranks}")
    return mine


def takes_host_tensors(group: Any) -> bool:
    return "cpu:" in dist.get_backend_config(group)


def with_host(group: dist.ProcessGroup, all_ranks: list[list[int]], timeout: timedelta) -> dist.ProcessGroup:
    """`group` if it takes tensors in host memory, else one beside it that does."""
    if takes_host_tensors(group):
        return group
    return own_group(all_ranks, timeout, backend="gloo")
