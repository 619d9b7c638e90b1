"""The learning-rate scheduler that follows the global progress."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hf_edit.method.schedule import GlobalProgress
from hf_edit.trainer.progress import FollowProgress


def halve(step: int) -> float:
    return 0.5**step


def scheduler() -> torch.optim.lr_scheduler.LRScheduler:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, halve)
    optimizer.step()
    return scheduler


def test_it_stands_at_the_global_step() -> None:
    progress = GlobalProgress(replica=0, recent=[1.0, 3.0])  # two global steps for one of this replica
    follower = FollowProgress(scheduler(), progress, last=5)
    learning_rates = []
    for _ in range(4):
        follower.step()
        progress.take_step()
        learning_rates.append(follower.get_last_lr()[0])
    assert learning_rates == [0.5**2, 0.5**4, 0.5**5, 0.5**5]


def test_it_catches_up_with_steps_of_the_others() -> None:
    progress = GlobalProgress(replica=0)  # nothing is known of the others
    follower = FollowProgress(scheduler(), progress, last=5)
    follower.step()
    progress.take_step()
    progress.hand_over()
    progress.confirm([1.0, 5.0])  # they were faster: the global step is 3
    follower.go_to(3)
    assert follower.get_last_lr() == [0.5**3]
    follower.go_to(2)
    assert follower.get_last_lr() == [0.5**3]
    follower.go_to(9)
    assert follower.get_last_lr() == [0.5**5]


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_it_can_be_copied(clone: Callable[[Any], Any]) -> None:
    follower = FollowProgress(scheduler(), GlobalProgress(replica=0), last=5)
    follower.step()
    other = clone(follower)
    assert other.state_dict() == follower.state_dict()
    assert other.get_last_lr() == follower.get_last_lr()
    other.progress.take_step()
    other.step()
    assert other.last_epoch == 2
    with pytest.raises(AttributeError, match="nothing"):
        follower.nothing  # noqa: B018
