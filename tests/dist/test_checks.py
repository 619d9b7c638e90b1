"""What is said of FSDP2's groups before they are made, against what torch says when they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_edit.trainer.checks import wrapping_problem
from tests.dist.threads import run_ranks
from tests.unit.trainer.test_checks import Net, groups


@pytest.mark.parametrize(
    "make",
    [
        Net,
        lambda: Net(tie="head"),
        lambda: Net(tie="other"),
        lambda: Net(tie="block"),
        lambda: Net(hold=True),
        lambda: Net(tie="head", hold=True),
        lambda: Net(tie="other", hold=True),
    ],
)
def test_torch_refuses_what_we_refuse(make: Callable[[], Net]) -> None:
    def body(rank: int) -> tuple[bool, str | None]:
        net = make()
        found, mesh = groups(net), init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
        problem = wrapping_problem(net, found)
        try:
            for group in found:
                fully_shard(group if len(group) > 1 else group[0], mesh=mesh)
            net(torch.zeros(1, dtype=torch.long))
        except (RuntimeError, ValueError):
            return True, problem
        return False, problem

    for refused, problem in run_ranks(2, body):
        assert problem is not None or not refused
        if torch.__version__ >= (2, 13):  # 2.11 lets parameters that two groups share pass, and we do not
            assert refused == (problem is not None), problem
