"""Muon on FSDP2's shards: as on whole matrices, and what it sends."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from hf_edit.optim.muon import MuonAdamW, param_groups
from hf_edit.peers.matrices import rows_by_rank
from tests.dist.nets import full
from tests.dist.threads import run_ranks


class Matrices(nn.Module):
    """Rows that no number of ranks divides, fewer rows than ranks, and a number of matrices that none divides."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(7, 5), (3, 11), (2, 4), (9, 9), (6, 10)]
        generator = torch.Generator().manual_seed(1)
        self.all = nn.ParameterList(torch.randn(shape, generator=generator) for shape in shapes)
        self.bias = nn.Parameter(torch.randn(13, generator=generator))


def gradients(step: int, model: nn.Module) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(param.shape, generator=generator) for param in model.parameters()]


def stepped(model: nn.Module, dtype: torch.dtype, steps: int, **settings: Any) -> MuonAdamW:
    optimizer = MuonAdamW(param_groups(model, 0.1), lr=0.02, **settings)
    for step in range(steps):
        for param, grad in zip(model.parameters(), gradients(step, model), strict=True):
            grad = grad.to(dtype)
            param.grad = (
                distribute_tensor(grad, param.device_mesh, param.placements) if hasattr(param, "device_mesh") else grad
            )
        optimizer.step()
    return optimizer


def same(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Bit for bit; bf16 but for an ulp, because a kernel rounds the last elements of a row otherwise."""
    if expected.dtype is torch.float32:
        assert torch.equal(found, expected), name
    else:
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-9, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"adjust_lr_fn": "original", "ns_steps": 3, "muon_lr": 0.05}])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_sharded_matrices_are_stepped_as_whole_ones(ranks: int, settings: dict[str, Any], dtype: torch.dtype) -> None:
    whole = Matrices().to(dtype)
    expected_state = stepped(whole, dtype, 3, **settings)

    def body(rank: int) -> None:
        model = Matrices().to(dtype)
        fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
        optimizer = stepped(model, dtype, 3, **settings)
        for (name, param), expected in zip(model.named_parameters(), whole.parameters(), strict=True):
            same(full(param), expected, name)
        buffers = zip(optimizer.param_groups[0]["params"], expected_state.param_groups[0]["params"], strict=True)
        for one, other in buffers:
            expected = expected_state.state[other]["momentum_buffer"]
            same(full(optimizer.state[one]["momentum_buffer"]), expected, "momentum")

    run_ranks(ranks, body)


def test_what_a_step_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank's rows of what others own, there and back, in bf16."""
    sent: list[int] = []
    original = dist.all_to_all_single

    def counted(received: Any, given: Any, *args: Any, input_split_sizes: Any, **more: Any) -> Any:
        rank = dist.get_rank(more["group"])
        if rank == 0:
            sent.append(sum(count for to, count in enumerate(input_split_sizes) if to != rank))
        return original(received, given, *args, input_split_sizes=input_split_sizes, **more)

    monkeypatch.setattr(dist, "all_to_all_single", counted)

    def body(rank: int) -> None:
        model = Matrices()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        stepped(model, torch.float32, 1)

    run_ranks(2, body)
    # Largest first, in rounds of two: (9, 9) and (6, 10), (7, 5) and (3, 11), (2, 4) alone. Rank 0 owns the first of
    # each and has 5, 3, 4, 2, 1 rows: it sends its rows of the second, and what it made of the others' of the first.
    there = [3 * 10, 2 * 11, 0]
    back = [4 * 9, 3 * 5, 1 * 4]
    assert sum(sent) == 2 * (sum(there) + sum(back))
    assert len(sent) == 6


@pytest.mark.parametrize("rows", range(1, 12))
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_rows_are_dealt_out_as_torch_does(rows: int, size: int) -> None:
    chunks = [len(chunk) for chunk in torch.zeros(rows, 1).chunk(size)]
    assert rows_by_rank(rows, size) == chunks + [0] * (size - len(chunks))


def test_columns_that_are_sharded_are_refused() -> None:
    def body(rank: int) -> None:
        from torch.distributed.tensor import Shard

        model = nn.Module()
        model.weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (2,)), [Shard(1)]))
        optimizer = MuonAdamW(param_groups(model, 0.0))
        model.weight.grad = copy.deepcopy(model.weight.detach())
        with pytest.raises(ValueError, match="rows over one axis of the mesh are needed"):
            optimizer.step()

    run_ranks(2, body)
