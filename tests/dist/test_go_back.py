"""A replica that gives up what it has learnt since the last sync stands where that sync has put it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_edit.config import EDiTConfig
from tests.dist.nets import train
from tests.dist.threads import run_ranks

TAU = 4


def distance_from_anchor(engine: Any) -> float:
    """Of this rank's parameters, from what it is given of its anchor: the largest of all elements."""
    pairs = [
        (part, value)
        for unit, state in zip(engine.units, engine.sync.states, strict=True)
        for part, value in zip(unit.parts(), state.views(state.anchor), strict=True)
    ]
    return max(float((part.detach() - value.to(part.dtype)).abs().max()) for part, value in pairs)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("shape", [(2, 1), (2, 2)])
@pytest.mark.parametrize(("overlap", "at"), [("none", 2 * TAU - 1), ("forward", 2 * TAU - 1), ("delayed", TAU + 1)])
def test_it_stands_at_the_anchor(overlap: str, at: int, shape: tuple[int, int], offload: bool) -> None:
    """With a delayed sync under way it goes back to what it told at its beginning, and comes to the new anchor."""
    config = EDiTConfig(sync_interval=TAU, overlap=overlap, delay_steps=2, offload_outer_state=offload)
    seen: dict[tuple[int, str], Any] = {}

    def before_step(step: int, engine: Any, model: nn.Module, optimizer: Any) -> None:
        rank = engine.peers.layout.rank
        if step == at and engine.peers.replica == 1:
            seen[rank, "before"] = distance_from_anchor(engine)
            engine.go_back(clear=shape[1] == 1)
            seen[rank, "state"] = len(optimizer.state)
            seen[rank, "gone back"] = distance_from_anchor(engine)
            optimizer.param_groups[0]["lr"] = 0.0
        if step == at + 1:
            seen[rank, "after"] = distance_from_anchor(engine)

    runs = run_ranks(shape[0] * shape[1], lambda rank: train(rank, 2, config, at + 2, before_step=before_step))
    size = shape[1]
    for rank in range(size, 2 * size):
        assert seen[rank, "before"] > 1e-3
        assert (seen[rank, "state"] == 0) == (size == 1)
        if overlap != "delayed":
            assert seen[rank, "gone back"] == 0
        assert seen[rank, "after"] < 1e-6, "of the new anchor"
    if overlap == "delayed":
        assert all(seen[rank, "after"] > 1e-3 for rank in range(size)), "the other one has learnt meanwhile"
    else:
        second = runs[0].records[1].plan
        assert second.norms[:, 1].max() == 0
        assert second.tallies["inner_steps"].tolist() == [TAU, 1], "those that it gave up are not told"
    names = runs[0].params
    assert all(torch.equal(run.params[name], runs[0].params[name]) for run in runs for name in names)


def test_a_sync_in_the_forward_pass_ends_first() -> None:
    def before_step(step: int, engine: Any, model: nn.Module, optimizer: Any) -> None:
        if step == TAU:
            with pytest.raises(RuntimeError, match="finish it first"):
                engine.go_back()

    run_ranks(2, lambda rank: train(rank, 2, EDiTConfig(sync_interval=TAU), TAU + 1, before_step=before_step))
