"""What a trainer's step gathers, counts and divides by: the replica's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_edit.peers.group import ProcessGroupPeers
from hf_edit.peers.layout import Layout
from hf_edit.trainer.world import COLLECTIVES, ReplicaWorld
from tests.dist.threads import run_ranks


@pytest.mark.parametrize(("world_size", "num_replicas"), [(4, 2), (3, 3), (6, 2)])
def test_collectives_stay_in_the_replica(world_size: int, num_replicas: int) -> None:
    def body(rank: int) -> dict[str, Any]:
        layout = Layout.split(world_size, num_replicas, rank)
        world = ReplicaWorld(ProcessGroupPeers(layout, 30.0))
        own = torch.full((1 + layout.shard,), float(rank))
        objects = [f"of {rank}"]
        return {
            "place": (world.num_processes, world.process_index, world.is_main_process),
            "scalar": world.gather(torch.tensor(rank)).tolist(),
            "nested": world.gather({"a": [torch.tensor([rank, rank])]})["a"][0].tolist(),
            "metrics": world.gather_for_metrics(torch.tensor([rank])).tolist(),
            "objects": world.gather_object(objects),
            "object metrics": world.gather_for_metrics(objects),
            "first": world.broadcast(torch.tensor([float(rank)])).item(),
            "first object": world.broadcast_object_list(objects)[0],
            "sum": world.reduce(torch.tensor(float(rank)), "sum").item(),
            "mean": world.reduce(torch.tensor(float(rank))).item(),
            "max": world.reduce(torch.tensor(rank), "max").item(),
            "padded": world.pad_across_processes(own, pad_index=-1).tolist(),
            "waited": world.wait_for_everyone(),
        }

    for rank, found in enumerate(run_ranks(world_size, body)):
        layout = Layout.split(world_size, num_replicas, rank)
        size, ranks = layout.replica_size, layout.replica_ranks(layout.replica)
        assert found == {
            "place": (size, layout.shard, layout.shard == 0),
            "scalar": ranks,
            "nested": [member for member in ranks for _ in range(2)],
            "metrics": ranks,
            "objects": [f"of {member}" for member in ranks],
            "object metrics": [f"of {member}" for member in ranks],
            "first": float(ranks[0]),
            "first object": f"of {ranks[0]}",
            "sum": float(sum(ranks)),
            "mean": sum(ranks) / size,
            "max": ranks[-1],
            "padded": [float(rank)] * (1 + layout.shard) + [-1.0] * (size - 1 - layout.shard),
            "waited": None,
        }


def test_every_collective_of_accelerate_has_its_own() -> None:
    for name in COLLECTIVES:
        assert callable(getattr(ReplicaWorld, name)), name
