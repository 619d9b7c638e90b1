"""Inner steps with a learning rate that nobody else sees."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_edit.sync.inner_lr import InnerRate


def moves(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> float:
    """How far a step goes whose gradient is 1."""
    before = param.item()
    param.grad = torch.ones_like(param)
    optimizer.step()
    return before - param.item()


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_it_is_scaled_in_inner_steps_alone(as_tensor: bool, wrapped: bool) -> None:
    param = nn.Parameter(torch.tensor(0.0))
    optimizer = torch.optim.SGD([param], lr=torch.tensor(0.5) if as_tensor else 0.5)
    synchronous = True
    given = SimpleNamespace(optimizer=optimizer) if wrapped else optimizer
    rate = optimizer.param_groups[0]["lr"]
    inner = InnerRate(given, 2.0, lambda: synchronous)
    assert moves(optimizer, param) == 0.5
    synchronous = False
    assert moves(optimizer, param) == moves(optimizer, param) == 1.0
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate == 0.5
    inner.remove()
    inner.remove()
    assert moves(optimizer, param) == 0.5


def test_a_scheduler_that_goes_by_the_last_rate_is_not_misled() -> None:
    param = nn.Parameter(torch.tensor(0.0))
    optimizer = torch.optim.SGD([param], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    InnerRate(optimizer, 3.0, lambda: False)
    for rate in (1.0, 0.5, 0.25):
        assert scheduler.get_last_lr() == [rate]
        assert moves(optimizer, param) == 3 * rate
        scheduler.step()


def test_a_step_that_is_broken_off_leaves_no_other_rate_behind() -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            raise torch.OutOfMemoryError

    optimizer = Failing([nn.Parameter(torch.tensor(0.0))], lr=0.5)
    inner = InnerRate(optimizer, 2.0, lambda: False)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 1.0, "the case is none"
    inner.remove()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_without_a_factor_there_is_no_hook() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.tensor(0.0))], lr=1.0)
    InnerRate(optimizer, 1.0, lambda: False)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
