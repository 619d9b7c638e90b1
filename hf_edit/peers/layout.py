"""Which ranks are a replica, and which a sync group; pure.

Ranks are laid out row by row: replica i holds the ranks i*S ... i*S + S - 1 (mesh axis `dp_shard`), a sync group the
ranks with the same position in every replica (mesh axis `dp_replicate`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """R replicas of S ranks each, and where this rank is among them."""

    num_replicas: int
    replica_size: int
    rank: int

    @classmethod
    def split(cls, world_size: int, num_replicas: int, rank: int) -> Layout:
        """The layout of `world_size` ranks in `num_replicas` replicas.

        Raises:
            ValueError: fewer ranks than replicas, or a world that they do not divide.
        """
        if num_replicas > world_size:
            raise ValueError(
                f"num_replicas={num_replicas}, but only {world_size} process(es) take part: a replica needs at least "
                f"one. Launch at least {num_replicas} processes or set num_replicas to at most {world_size}."
            )
        if world_size % num_replicas:
            fitting = [n for n in range(1, world_size + 1) if world_size % n == 0]
            raise ValueError(
                f"num_replicas={num_replicas} does not divide the {world_size} processes; all replicas must have the "
                f"same size. With {world_size} processes num_replicas can be one of {fitting}."
            )
        return cls(num_replicas, world_size // num_replicas, rank)

    @property
    def replica(self) -> int:
        """Index of this rank's replica."""
        return self.rank // self.replica_size

    @property
    def shard(self) -> int:
        """Index of this rank in its replica."""
        return self.rank % self.replica_size

    @property
    def alone(self) -> Layout:
        """This replica, as a launch of its own has it: the one in its world."""
        return Layout(1, self.replica_size, self.shard)

    def replica_ranks(self, replica: int) -> list[int]:
        return list(range(replica * self.replica_size, (replica + 1) * self.replica_size))

    def sync_ranks(self, shard: int) -> list[int]:
        return list(range(shard, self.num_replicas * self.replica_size, self.replica_size))

    def __str__(self) -> str:
        return f"{self.num_replicas} replicas x {self.replica_size} shards"


def default_num_replicas(world_size: int, *, fsdp: bool, dp_replicate_size: int | None) -> int:
    """R where the user named none: `dp_replicate_size`, else one per node; on a single node one per process, or one
    in all with FSDP.

    Raises:
        ValueError: the nodes have different numbers of processes.
    """
    if dp_replicate_size is not None and dp_replicate_size > 1:
        return dp_replicate_size
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    num_nodes = int(os.environ.get("GROUP_WORLD_SIZE", max(1, world_size // here)))  # torchrun's, on all nodes
    if num_nodes * here != world_size:
        raise ValueError(
            f"{here} of {world_size} processes are on this one of {num_nodes} machines: they have different numbers, "
            "and one replica a machine is none of equal size. Set num_replicas so that each lies on one machine."
        )
    if num_nodes > 1:
        return num_nodes
    return 1 if fsdp else world_size


def ring_bytes(num_bytes: int, num_replicas: int) -> int:
    """What one rank sends when `num_bytes` are all-reduced over a ring: each element 2 (R - 1) / R times."""
    return num_bytes * 2 * (num_replicas - 1) // num_replicas
