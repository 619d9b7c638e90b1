"""Parameters of 16 bits: what an fp32 anchor loses where a replica takes it is no progress of anybody's."""

from __future__ import annotations

from typing import Any

import pytest
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
from hf_edit.sync.overlap import at_once
from tests.dist.nets import full
from tests.dist.threads import run_ranks


class Slope(nn.Module):
    """Weights in [1, 2) whose gradient is `slope`; `mixed` adds fp32 ones to the same unit."""

    def __init__(self, dtype: torch.dtype, mixed: bool) -> None:
        super().__init__()
        values = 1 + torch.rand(256, generator=torch.Generator().manual_seed(0)) * 0.8
        self.p = nn.Parameter(values.to(dtype))
        self.q = nn.Parameter(values[:64].clone()) if mixed else None

    def forward(self, slope: float) -> Tensor:
        loss = (self.p.float() * slope).sum()
        return loss if self.q is None else loss + (self.q * slope).sum()


def ulp_of(dtype: torch.dtype) -> float:
    """Of weights in [1, 2); for fp32, in which the anchor is too, a step of which it can hold the half."""
    return max(torch.finfo(dtype).eps, 2.0**-10)


def moved(
    rank: int, shape: tuple[int, int], config: EDiTConfig, dtype: torch.dtype, rest_from: int, mixed: bool
) -> tuple[dict[str, float], list[float]]:
    """Mean movement of each parameter in ulps of `dtype`, and the norms of the averages; replica 0 alone moves, by one
    ulp a step until step `rest_from`."""
    layout = Layout.split(dist.get_world_size(), shape[0], rank)
    net: Any = Slope(dtype, mixed)
    start = {name: p.detach().float().clone() for name, p in net.named_parameters()}
    if layout.replica_size == 1:
        model: nn.Module = DistributedDataParallel(net, broadcast_buffers=False)
    else:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp_replicate", "dp_shard"))["dp_shard"]
        model = fully_shard(net, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = Engine(model, optimizer, config, ProcessGroupPeers(layout, 30.0), runner=at_once)
    ulp = ulp_of(dtype)
    for step in range(40):
        model(-ulp if layout.replica == 0 and step < rest_from else 0.0).backward()
        engine.before_optimizer_step()
        optimizer.step()
        optimizer.zero_grad()
        engine.step()
    engine.flush()
    ends = {name.removeprefix("module."): full(p).float() for name, p in model.named_parameters()}
    norms = [record.pseudo_grad_norm for record in engine.sync.take_records()]
    return {name: float((ends[name] - start[name]).mean() / ulp) for name in ends}, norms


def moves(shape: tuple[int, int], config: EDiTConfig, dtype: torch.dtype, rest_from: int, mixed: bool = False) -> Any:
    return run_ranks(shape[0] * shape[1], lambda rank: moved(rank, shape, config, dtype, rest_from, mixed))


def average(overlap: str, **settings: Any) -> EDiTConfig:
    return EDiTConfig.preset("post-local-sgd", sync_interval=1, overlap=overlap, delay_steps=1, **settings)


@pytest.mark.parametrize("overlap", ["none", "forward", "delayed"])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("shape", [(2, 1), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_an_ulp_a_sync_adds_up(overlap: str, offload: bool, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """40 intervals of one ulp on one of two replicas are 20 ulps; the norms are all of one ulp's half."""
    config = average(overlap, offload_outer_state=offload)
    for distance, norms in moves(shape, config, dtype, rest_from=99):
        assert distance["p"] == pytest.approx(20.0, abs=1.0)
        expected = 0.5 * ulp_of(dtype) * 256**0.5
        assert norms == pytest.approx([expected] * len(norms), rel=0.05)


@pytest.mark.parametrize("overlap", ["none", "forward", "delayed"])
@pytest.mark.parametrize("shape", [(2, 1), (2, 2)])
def test_who_learnt_nothing_has_nothing_to_say(overlap: str, shape: tuple[int, int]) -> None:
    for distance, norms in moves(shape, average(overlap), torch.bfloat16, rest_from=5):
        assert distance["p"] == pytest.approx(2.5, abs=0.5)
        assert norms[6:] == [0.0] * len(norms[6:])


@pytest.mark.parametrize("overlap", ["none", "forward", "delayed"])
def test_parameters_of_two_kinds_in_one_unit(overlap: str) -> None:
    for distance, _ in moves((2, 1), average(overlap), torch.bfloat16, rest_from=99, mixed=True):
        assert distance["p"] == pytest.approx(20.0, abs=1.0)
        assert distance["q"] == pytest.approx(20.0, abs=0.01)
