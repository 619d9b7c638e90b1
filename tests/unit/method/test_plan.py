"""Whom the buffers follow; what weighs how much where replicas were away."""

from __future__ import annotations

import re

import pytest
import torch

from hf_edit.config import EDiTConfig
from hf_edit.method.penalty import DetectorState
from hf_edit.method.plan import CALLED, DUE, make_plan


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


def weights(norms: list[float], steps: list[int], missed: list[int] | None) -> list[float]:
    table = torch.tensor([[norm**2, count] for norm, count in zip(norms, steps, strict=True)], dtype=torch.float64)
    lacks = None if missed is None else torch.tensor(missed)
    plan, _ = make_plan(table, ["inner_steps"], DetectorState.zeros(1, len(norms)), EDiTConfig(), missed=lacks)
    found: list[float] = plan.weights[0].tolist()
    return found


def test_what_was_learnt_at_an_old_anchor_weighs_less() -> None:
    assert weights([1.0, 1.0, 1.0], [4, 4, 4], [0, 1, 3]) == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert weights([1.0, 2.0], [4, 4], [0, 0]) == pytest.approx(weights([1.0, 2.0], [4, 4], None))
    assert weights([0.0, 1.0], [0, 4], [0, 3]) == [0.0, 1.0], "who lacks some is all there is"
    assert weights([torch.inf, torch.inf], [4, 4], [0, 3]) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("called", "due", "callers"),
    [
        ((0, 0, 0), (2, 2, 2), None),
        ((2, 2, 2), (0, 0, 0), None),
        ((0, 2, 2), (0, 0, 0), None),  # the first one leaves
        ((0, 0, 0), (0, 2, 2), None),
        ((2, 0, 0), (0, 2, 2), [0]),
        ((0, 1, 2), (2, 0, 0), [1, 2]),
    ],
)
def test_nobody_calls_where_others_are_due(
    called: tuple[int, ...], due: tuple[int, ...], callers: list[int] | None
) -> None:
    table = torch.tensor([[1.0, 4.0, *counts] for counts in zip(called, due, strict=True)], dtype=torch.float64)
    given = table, ["inner_steps", CALLED, DUE], DetectorState.zeros(1, 3), EDiTConfig()
    if callers is None:
        make_plan(*given)
        return
    with pytest.raises(RuntimeError, match=re.escape(f"on ranks of replicas {callers} alone")):
        make_plan(*given)
