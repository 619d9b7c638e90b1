"""Run by every rank of a torchrun: two replicas trained in all ways on GPUs, compared by bits.

Arguments: the folder for results, the ranks in a replica, and the backend of device tensors. Ranks share one GPU where
there are too few. Without a GPU it runs on the CPU, through gloo, to see that it works.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

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

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
WHAT: dict[str, dict[str, Any]] = {
    "exact": {},
    "int8": {"compression": "int8"},
    "int4": {"compression": "int4"},
    "bf16": {"compression": "bf16"},
    "moments": {"sync_moments": "both"},
}
# Of what is named first, bit for bit; a delayed sync is another training than a prompt one.
WAYS: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "prompt": (
        {"overlap": "none"},
        {"offloaded": {"overlap": "none", "offload_outer_state": True}, "forward": {"overlap": "forward"}},
    ),
    "delayed": (
        {"overlap": "delayed", "delay_steps": 2},
        {"offloaded": {"overlap": "delayed", "delay_steps": 2, "offload_outer_state": True}},
    ),
    "fragments": (
        {"overlap": "delayed", "delay_steps": 1, "fragments": 3},
        {"offloaded": {"overlap": "delayed", "delay_steps": 1, "fragments": 3, "offload_outer_state": True}},
    ),
}


def prepare(layout: Layout) -> nn.Module:
    net = Net(num_blocks=4).to(DEVICE)
    if layout.replica_size == 1:
        return DistributedDataParallel(net, broadcast_buffers=False)
    mesh = init_device_mesh(DEVICE, (2, layout.replica_size), mesh_dim_names=("dp_replicate", "dp_shard"))["dp_shard"]
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net.embed, mesh=mesh)
    fully_shard([net.norm, net.head], mesh=mesh, reshard_after_forward=False)
    return fully_shard(net, mesh=mesh)


def train(layout: Layout, **settings: Any) -> dict[str, Tensor]:
    model = prepare(layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    config = EDiTConfig(sync_interval=3, warmup_steps=2, **settings)
    engine = Engine(model, optimizer, config, ProcessGroupPeers(layout, 60.0))
    for step in range(10):
        x, y = (t.to(DEVICE) for t in batch(step, dist.get_rank()))
        nn.functional.mse_loss(model(x), y).backward()
        engine.before_optimizer_step()
        optimizer.step()
        optimizer.zero_grad()
        engine.step()
    engine.flush()
    assert len(engine.sync.take_records()) >= 3
    return {name: full(param) for name, param in model.named_parameters()}


def main() -> None:
    folder, replica_size, backend = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    if HAS_GPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group(f"cpu:gloo,cuda:{backend}" if HAS_GPU else "gloo")
    layout = Layout.split(dist.get_world_size(), 2, dist.get_rank())
    assert layout.replica_size == replica_size
    differing, devices = {}, set()
    for what, settings in WHAT.items():
        for way, (first, others) in WAYS.items():
            expected = train(layout, **settings, **first)
            for other, changed in others.items():
                params = train(layout, **settings, **changed)
                devices |= {param.device.type for param in params.values()}
                differing[f"{what}, {way}, {other}"] = max(
                    float((params[name] - expected[name]).abs().max()) for name in expected
                )
    if dist.get_rank() == 0:
        report = {"world_size": dist.get_world_size(), "devices": sorted(devices), "differing": differing}
        (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    dist.barrier()


if __name__ == "__main__":
    main()
