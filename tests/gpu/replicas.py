"""Run by every rank of a torchrun, all on one GPU through gloo: two replicas trained in all ways, compared by bits.

Arguments: the folder for results, and the ranks in a replica.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_edit.config import EDiTConfig
from hf_edit.peers.group import ProcessGroupPeers
from hf_edit.peers.layout import Layout
from hf_edit.sync.engine import Engine
from tests.dist.nets import Net, batch, full


def prepare(layout: Layout) -> nn.Module:
    net = Net(num_blocks=4).cuda()
    if layout.replica_size == 1:
        return DistributedDataParallel(net, device_ids=[0], broadcast_buffers=False)
    mesh = init_device_mesh("cuda", (2, layout.replica_size), mesh_dim_names=("dp_replicate", "dp_shard"))["dp_shard"]
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net.embed, mesh=mesh)
    fully_shard([net.norm, net.head], mesh=mesh, reshard_after_forward=False)
    return fully_shard(net, mesh=mesh)


def train(layout: Layout, **settings: object) -> dict[str, Tensor]:
    model = prepare(layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    config = EDiTConfig(sync_interval=3, warmup_steps=2, **settings)
    engine = Engine(model, optimizer, config, ProcessGroupPeers(layout, 60.0))
    for step in range(10):
        x, y = (t.cuda() for t in batch(step, dist.get_rank()))
        nn.functional.mse_loss(model(x), y).backward()
        engine.before_optimizer_step()
        optimizer.step()
        optimizer.zero_grad()
        engine.step()
    engine.flush()
    assert len(engine.sync.take_records()) == 3
    return {name: full(param) for name, param in model.named_parameters()}


def main() -> None:
    folder, replica_size = Path(sys.argv[1]), int(sys.argv[2])
    torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:gloo")
    layout = Layout.split(dist.get_world_size(), 2, dist.get_rank())
    assert layout.replica_size == replica_size
    blocking = train(layout, overlap="none")
    others = {"forward": train(layout), "offload": train(layout, offload_outer_state=True)}
    delayed = train(layout, overlap="delayed", delay_steps=2)
    again = train(layout, overlap="delayed", delay_steps=2, offload_outer_state=True)
    pairs = {**{way: (params, blocking) for way, params in others.items()}, "delayed": (again, delayed)}
    differing = {
        way: max(float((one[name] - two[name]).abs().max()) for name in two) for way, (one, two) in pairs.items()
    }
    if dist.get_rank() == 0:
        told = {
            "world_size": dist.get_world_size(),
            "devices": sorted({param.device.type for param in blocking.values()}),
            "differing": differing,
        }
        (folder / "told.json").write_text(json.dumps(told), encoding="utf-8")
    dist.barrier()


if __name__ == "__main__":
    main()
