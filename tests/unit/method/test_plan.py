"""Whom the buffers follow."""

from __future__ import annotations

import pytest
import torch

from hf_edit.config import EDiTConfig
from hf_edit.method.penalty import DetectorState
from hf_edit.method.plan import make_plan


@pytest.mark.parametrize(
    ("norms", "steps", "members", "sound"),
    [
        ([1.0, 1.0, 1.0], [4, 4, 4], [0, 1, 2], 0),
        ([torch.inf, 1.0, 1.0], [4, 4, 4], [0, 1, 2], 1),
        ([0.0, 1.0, 1.0], [0, 4, 4], [0, 1, 2], 1),  # one that did a step before an idle one
        ([0.0, 0.0, 0.0], [0, 0, 0], [0, 1, 2], 0),
        ([0.0, 0.0, 0.0], [0, 0, 0], [1, 2], 1),  # replica 0 is away, and its row only looks idle
        ([0.0, torch.inf, 1.0], [0, 4, 4], [1, 2], 2),
        ([0.0, torch.inf, 0.0], [0, 4, 0], [1], None),
    ],
)
def test_the_sound_replica_is_one_that_takes_part(
    norms: list[float], steps: list[int], members: list[int], sound: int | None
) -> None:
    table = torch.tensor([[norm**2, count] for norm, count in zip(norms, steps, strict=True)], dtype=torch.float64)
    plan, _ = make_plan(table, ["inner_steps"], DetectorState.zeros(1, 3), EDiTConfig())
    assert plan.sound_of(members) == sound
