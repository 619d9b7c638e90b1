"""Buffers follow a replica that went right, and nothing is sent for those that nobody changed."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_edit.config import EDiTConfig
from hf_edit.peers.group import ProcessGroupPeers
from hf_edit.peers.layout import Layout
from hf_edit.sync.engine import Engine
from hf_edit.sync.equality import digest
from hf_edit.sync.overlap import at_once
from tests.dist.threads import run_ranks


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.norm(self.a(x)))


torch.manual_seed(0)
NET = Normed()  # one for all ranks, which as threads share a random state


def train(rank: int, bad: set[int], bad_steps: set[int], steps: int, **settings: Any) -> tuple[Any, Engine]:
    """Means and variances at the end, where replicas `bad` saw NaN in the steps `bad_steps`; a sync every 2 steps."""
    model = DistributedDataParallel(copy.deepcopy(NET), broadcast_buffers=False)
    config = EDiTConfig(sync_interval=2, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    peers = ProcessGroupPeers(Layout.split(dist.get_world_size(), dist.get_world_size(), rank), 30.0)
    engine = Engine(model, optimizer, config, peers, runner=at_once)
    for step in range(steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(10 * step + rank))
        if rank in bad and step in bad_steps:
            x = x * math.nan
        model(x).square().mean().backward()
        engine.before_optimizer_step()
        optimizer.step()
        optimizer.zero_grad()
        engine.step()
    engine.flush()
    norm = model.module.norm
    return [t.clone() for t in (norm.running_mean, norm.running_var, norm.num_batches_tracked)], engine


@pytest.mark.parametrize("overlap", ["none", "forward", "delayed"])
@pytest.mark.parametrize("bad_steps", [{2}, {3}, {4}], ids=["first of an interval", "last of one", "in the delay"])
@pytest.mark.parametrize("bad", [{0}, {1}, {0, 1}, {0, 1, 2}], ids=str)
def test_no_replica_gets_the_buffers_of_one_that_went_wrong(bad: set[int], bad_steps: set[int], overlap: str) -> None:
    runs = run_ranks(3, lambda rank: train(rank, bad, bad_steps, 8, overlap=overlap, delay_steps=1)[0])
    for run in runs:
        assert all(tensor.isfinite().all() for tensor in run), run
        assert all(torch.equal(mine, others) for mine, others in zip(run, runs[0], strict=True))


def test_whom_the_buffers_follow_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        good = run_ranks(3, lambda rank: train(rank, set(), set(), 4, overlap="none")[0])
        assert "buffers" not in caplog.text
        run_ranks(3, lambda rank: train(rank, {0}, {0, 2, 4}, 6, overlap="none")[0])
    said = [record.message for record in caplog.records if "buffers" in record.message]
    assert len(said) == 1
    assert "replica 1" in said[0]
    alone = run_ranks(3, lambda rank: train(rank, {1}, {2}, 4, overlap="none")[0])
    assert torch.equal(good[0][2], alone[0][2])


def test_with_all_wrong_the_buffers_go_back() -> None:
    before = run_ranks(2, lambda rank: train(rank, set(), set(), 2, overlap="none")[0])
    after = run_ranks(2, lambda rank: train(rank, {0, 1}, {2}, 4, overlap="none")[0])
    assert all(torch.equal(mine, others) for mine, others in zip(after[0], before[0], strict=True))


def test_buffers_that_nobody_changed_since_are_not_sent() -> None:
    def body(rank: int) -> list[float]:
        _, engine = train(rank, set(), set(), 4, overlap="none")
        changed = [float(engine._rounds._buffers.changed())]
        engine._rounds._buffers.tensors[0].add_(1.0)
        return [*changed, float(engine._rounds._buffers.changed())]

    assert run_ranks(2, body) == [[0.0, 1.0]] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("size", [5, 8])
def test_a_digest_sees_values_and_their_order(size: int, dtype: torch.dtype) -> None:
    tensor = torch.arange(size).to(dtype)
    assert torch.equal(digest(tensor), digest(tensor.clone()))
    swapped = tensor.clone()
    swapped[[0, -1]] = tensor[[-1, 0]]
    changed = tensor.clone()
    changed[1] += 1
    for other in (swapped, tensor.flip(0), changed):
        assert not torch.equal(digest(tensor), digest(other))
