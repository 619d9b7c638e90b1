"""Small networks, data and the ways to run them that the multi-rank tests share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_edit.config import EDiTConfig
from hf_edit.method.plan import SyncRecord
from hf_edit.peers.group import ProcessGroupPeers
from hf_edit.peers.layout import Layout
from hf_edit.sync.engine import Engine
from hf_edit.sync.overlap import at_once

FEATURES = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(FEATURES, 2 * FEATURES)
        self.down = nn.Linear(2 * FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Named and cut as a Hugging Face model is: input embeddings, blocks, final norm with head."""

    _no_split_modules = ("Block",)
    base_model_prefix = ""

    def __init__(self, num_blocks: int = 2, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Linear(FEATURES, FEATURES)
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.norm = nn.LayerNorm(FEATURES)
        self.head = nn.Linear(FEATURES, 3)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.randn(param.shape, generator=generator) * 0.3)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


UNITS = ["embed", "blocks.0", "blocks.1", "norm+head"]


def batch(step: int, rank: int, size: int = 4) -> tuple[Tensor, Tensor]:
    """Inputs [size, FEATURES] and targets [size, 3] that `rank` sees in `step`; rank 1 now and then has wild ones."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(size, FEATURES, generator=generator)
    wild = 30.0 if rank == 1 and step % 5 == 4 else 1.0
    return x, wild * torch.sin(x[:, :3] * 2)


def shard(net: Net, layout: Layout) -> nn.Module:
    """`net` as Accelerate prepares it: FSDP2 over the replica, or DDP for replicas of one rank."""
    if layout.replica_size == 1:
        return DistributedDataParallel(net, broadcast_buffers=False, find_unused_parameters=True)
    mesh = init_device_mesh(
        "cpu", (layout.num_replicas, layout.replica_size), mesh_dim_names=("dp_replicate", "dp_shard")
    )["dp_shard"]
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net.embed, mesh=mesh)
    fully_shard([net.norm, net.head], mesh=mesh, reshard_after_forward=False)
    return fully_shard(net, mesh=mesh)


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, as a copy."""
    if isinstance(tensor, DTensor) and tensor.is_cuda:  # gloo (torch 2.11) dies where full_tensor() gathers on CUDA
        axis = next(axis for axis, placement in enumerate(tensor.placements) if placement.is_shard())
        group = tensor.device_mesh.get_group(axis)
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, tensor.to_local().detach().cpu(), group=group)
        return torch.cat(parts).to(tensor.device)
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def state_on_host(accelerator: Any, model: nn.Module) -> dict[str, Tensor]:
    """A copy of the whole model, with one rank's names."""
    if isinstance(model, FSDPModule) and next(model.parameters()).is_cuda:
        return {name: full(param).cpu() for name, param in model.named_parameters()}
    state = accelerator.get_state_dict(model)
    return {name.removeprefix("module."): value.detach().cpu().clone() for name, value in state.items()}


@dataclass
class Run:
    """What one rank saw: parameters by name, losses, records of the syncs."""

    params: dict[str, Tensor]
    losses: list[float] = field(default_factory=list)
    records: list[SyncRecord] = field(default_factory=list)
    engine: Any = None


def make_optimizer(kind: str, params: Any) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(params, lr=0.05)
    if kind == "momentum":
        return torch.optim.SGD(params, lr=0.02, momentum=0.9)
    if kind == "rmsprop":
        return torch.optim.RMSprop(params)
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.01, fused=True)  # or DTensor is asked for each operation


def train(
    rank: int,
    num_replicas: int,
    config: EDiTConfig,
    steps: int,
    *,
    optimizer: str = "adamw",
    accumulation: int = 1,
    data_rank: Any = None,
    before_step: Any = None,
    seed: int = 0,
    net: Any = None,
    timeout_seconds: float = 30.0,
    runner: Any = at_once,
    **engine_settings: Any,
) -> Run:
    """Trains on this rank as the Trainer does, and ends with equal replicas.

    Args:
        data_rank: maps (layout, step) to the rank whose data is taken; default: this one's.
        before_step: called with (step, engine, model, optimizer) before each optimizer step's forward pass.
    """
    layout = Layout.split(dist.get_world_size(), num_replicas, rank)
    model = shard(net() if net else Net(seed=seed), layout)
    inner = make_optimizer(optimizer, model.parameters())
    # A threaded process group knows its ranks by their threads, so a delayed sync cannot have one of its own.
    engine = Engine(model, inner, config, ProcessGroupPeers(layout, timeout_seconds), runner=runner, **engine_settings)
    run = Run({}, engine=engine)
    for step in range(steps):
        if before_step is not None:
            before_step(step, engine, model, inner)
        source = rank if data_rank is None else data_rank(layout, step)
        total = 0.0
        for x, y in zip(*(t.chunk(accumulation) for t in batch(step, source)), strict=True):
            loss = nn.functional.mse_loss(model(x), y) / accumulation
            loss.backward()
            total += loss.item()
        engine.counts.tally(loss=total / layout.replica_size, tokens=4.0)
        engine.before_optimizer_step()
        inner.step()
        inner.zero_grad()
        engine.step()
        run.losses.append(total)
    engine.flush()
    run.records = engine.sync.take_records()
    run.params = {name.removeprefix("module."): full(param) for name, param in model.named_parameters()}
    return run
