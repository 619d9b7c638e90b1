"""What reads the optimizer's state beside the training waits for a step, but not for one that was broken off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_edit.sync.healing import Healing


def broken() -> float:
    raise MemoryError


def make() -> tuple[Any, torch.optim.Optimizer]:
    param = nn.Parameter(torch.zeros(1))
    param.grad = torch.ones(1)
    optimizer = torch.optim.SGD([param], lr=1.0)
    nobody: Any = None
    return Healing(nobody, optimizer, nobody, nobody, dict), optimizer


def test_a_step_that_was_broken_off_holds_nobody_up() -> None:
    healing, optimizer = make()
    with pytest.raises(MemoryError):
        optimizer.step(broken)
    optimizer.step()  # would wait for itself
    assert not healing._stepping.locked()


def test_a_training_that_was_broken_off_in_a_step_lets_go() -> None:
    healing, optimizer = make()
    with pytest.raises(MemoryError):
        optimizer.step(broken)
    assert healing._stepping.locked()
    healing.close()
    assert not healing._stepping.locked()
    optimizer.step()
    assert not optimizer._optimizer_step_pre_hooks
