"""A replica that goes wrong harms nobody: elimination, rollback, restart of a detector; what a failed sync says."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import pytest
import torch
from torch import nn

from hf_edit.config import EDiTConfig
from hf_edit.peers import faults
from hf_edit.peers.faults import Arrivals, default_store
from hf_edit.peers.layout import Layout
from tests.dist.nets import Run, full, train
from tests.dist.threads import run_ranks

CONFIG = EDiTConfig(sync_interval=2)


@torch.no_grad()
def spoil(model: nn.Module, value: float, only: str = "") -> None:
    """Puts `value` into this rank's part of the parameters whose names contain `only`."""
    for name, param in model.named_parameters():
        if only in name:
            part = param.to_local() if hasattr(param, "to_local") else param
            part.view(-1)[:1] = value


def spoiled_runs(
    bad_replicas: set[int], value: float, at_step: int, only: str = "", config: EDiTConfig = CONFIG,
    shape: tuple[int, int] = (3, 2), steps: int = 8, seen: Any = None,
) -> list[Run]:  # fmt: skip
    def before_step(step: int, engine: Any, model: nn.Module, optimizer: Any) -> None:
        if seen is not None:
            seen(step, engine, model, optimizer)
        if step == at_step and engine.peers.replica in bad_replicas:
            spoil(model, value, only)

    return run_ranks(shape[0] * shape[1], lambda rank: train(rank, shape[0], config, steps, before_step=before_step))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("overlap", ["none", "forward", "delayed"])
def test_a_broken_replica_weighs_nothing_and_comes_back(value: float, overlap: str) -> None:
    config = dataclasses.replace(CONFIG, overlap=overlap, delay_steps=1)
    runs = spoiled_runs({1}, value, at_step=3, config=config)
    spoiled = runs[0].records[1]
    assert spoiled.plan.anomalous[:, 1].all(), "the loss is NaN, so one step later every unit is"
    assert not spoiled.plan.anomalous[:, [0, 2]].any()
    assert torch.equal(spoiled.plan.weights[:, 1], torch.zeros(4, dtype=torch.float64))
    assert torch.allclose(spoiled.plan.weights.sum(dim=1), torch.ones(4, dtype=torch.float64))
    for run in runs:
        assert all(param.isfinite().all() for param in run.params.values())
        assert all(torch.equal(run.params[name], runs[0].params[name]) for name in run.params)
        assert math.isfinite(run.losses[-1])
    assert not runs[0].records[2].plan.anomalous.any(), "the replica trains on"
    assert runs[0].records[2].plan.norms[:, 1].min() > 0


def test_with_two_replicas_the_other_ones_weight_is_1() -> None:
    runs = spoiled_runs({0}, math.nan, at_step=3, shape=(2, 2))
    assert runs[0].records[1].plan.weights.tolist() == [[0.0, 1.0]] * 4


def test_the_healthy_replicas_move_as_if_alone() -> None:
    """After the sync all hold what replica 0 and 2 would have agreed on without replica 1's part."""
    config = dataclasses.replace(CONFIG, weighting="uniform", outer_optimizer="none", overlap="none")
    local: dict[int, list[torch.Tensor]] = {}

    def keep(step: int, engine: Any, model: nn.Module, optimizer: Any) -> None:
        if step == 1:  # one inner step is done, the second is the last before the sync
            original = engine.schedule.advance

            def advance(*args: bool) -> bool:
                local[engine.peers.layout.rank] = [full(p) for p in model.parameters()]
                return original(*args)

            engine.schedule.advance = advance

    runs = spoiled_runs({1}, math.nan, at_step=1, config=config, shape=(3, 1), steps=2, seen=keep)
    for i, param in enumerate(runs[0].params.values()):
        assert torch.allclose(param, (local[0][i] + local[2][i]) / 2, rtol=1e-5, atol=1e-7)


def test_a_broken_unit_loses_its_inner_optimizer_state_on_that_replica_only() -> None:
    config = dataclasses.replace(CONFIG, overlap="none", sync_interval=4)
    counts: dict[int, dict[str, float]] = {}

    def look(step: int, engine: Any, model: nn.Module, optimizer: Any) -> None:
        if step == 3:  # the spoiled step: its update is NaN in every unit of replica 1
            original = engine.sync.clear_inner_state

            def cleared(unit: Any) -> None:
                original(unit)
                counts.setdefault(engine.peers.layout.rank, {})[unit.name] = len(
                    [p for p in unit.params if p in optimizer.state]
                )

            engine.sync.clear_inner_state = cleared
        if step == 4:
            counts.setdefault(engine.peers.layout.rank, {})["kept"] = float(
                all(p in optimizer.state for p in model.parameters())
            )

    spoiled_runs({1}, math.nan, at_step=3, config=config, shape=(2, 2), steps=6, seen=look)
    for rank in (0, 1):
        assert counts[rank] == {"kept": 1.0}
    for rank in (2, 3):
        assert counts[rank] == {"embed": 0, "blocks.0": 0, "blocks.1": 0, "norm+head": 0, "kept": 0.0}


@pytest.mark.parametrize("overlap", ["none", "forward", "delayed"])
def test_all_broken_goes_back_to_the_anchor(overlap: str) -> None:
    config = dataclasses.replace(CONFIG, overlap=overlap, delay_steps=1)
    anchors: dict[int, list[list[torch.Tensor]]] = {}

    def keep(step: int, engine: Any, model: nn.Module, optimizer: Any) -> None:
        state = [s.anchor.clone() for s in engine.sync.states] + [
            s.tensors["momentum"].clone() for s in engine.sync.states
        ]
        anchors.setdefault(engine.peers.layout.rank, []).append(state)

    runs = spoiled_runs({0, 1}, math.nan, at_step=3, config=config, shape=(2, 2), seen=keep)
    record = runs[0].records[1]
    assert record.plan.rolled_back.all()
    assert record.plan.weights.sum() == 0
    assert record.sync_bytes < 1000, "nothing but the scalars is sent"
    for states in anchors.values():
        assert all(torch.equal(a, b) for a, b in zip(states[3], states[5], strict=True)), "anchor, momentum unchanged"
    for run in runs:
        assert all(param.isfinite().all() for param in run.params.values())
        assert math.isfinite(run.losses[-1])


def test_one_broken_unit_leaves_the_others_alone() -> None:
    """The last inner step is done when it breaks, so the NaN has not spread."""
    config = dataclasses.replace(CONFIG, overlap="none", sync_interval=2)

    def look(step: int, engine: Any, model: nn.Module, optimizer: Any) -> None:
        if step == 3 and engine.peers.replica == 1:
            original = engine.schedule.advance

            def advance(*args: bool) -> bool:
                spoil(model, math.nan, only="blocks.0")
                return original(*args)

            engine.schedule.advance = advance

    runs = spoiled_runs(set(), 0.0, at_step=-1, config=config, shape=(2, 2), steps=4, seen=look)
    assert runs[0].records[1].plan.anomalous.tolist() == [[False, False], [False, True], [False, False], [False, False]]


def test_the_z_test_leaves_out_a_finite_outlier() -> None:
    config = EDiTConfig(sync_interval=1, ema_warmup_syncs=3, overlap="none")
    runs = spoiled_runs({1}, 100.0, at_step=6, only="blocks.1.up.bias", config=config)
    record = runs[0].records[6]
    assert record.plan.anomalous.tolist()[2][1]
    assert all(float(param.abs().max()) < 50 for param in runs[0].params.values())


def test_a_failed_collective_names_the_missing_replicas() -> None:
    def body(rank: int) -> str:
        arrivals = Arrivals(Layout.split(4, 2, rank), 5.0)
        arrivals.count = 7
        if rank < 2:
            arrivals.announce(7)
        torch.distributed.barrier()
        with pytest.raises(RuntimeError) as caught, arrivals.blame():
            raise RuntimeError("Connection closed by peer")
        return str(caught.value)

    texts = run_ranks(4, body)
    start = "An exchange between the replicas failed on replica 0 after 0.0 s: replicas [1] did not come to it."
    assert texts[0].startswith(start)
    assert "sync_timeout_seconds=5" in texts[0]
    assert "Cause: Connection closed by peer" in texts[0]


def test_the_rendezvous_store_is_where_torch_keeps_it() -> None:
    """hf_edit.peers.faults reads it through a private name; this fails when that moves."""

    def body(rank: int) -> bool:
        store = default_store()
        store.set(f"here/{rank}", "yes")
        torch.distributed.barrier()
        return store.check([f"here/{1 - rank}"])

    assert run_ranks(2, body) == [True, True]


def test_a_store_that_does_not_answer_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """As over a connection that is dead, but not closed."""

    class Silent:
        def check(self, keys: list[str]) -> bool:
            time.sleep(30)
            return False

    monkeypatch.setattr(faults, "default_store", Silent)
    monkeypatch.setattr(faults, "LOOK_SECONDS", 0.2)
    arrivals, begun = Arrivals(Layout(2, 1, 0), 5.0), time.monotonic()
    with pytest.raises(RuntimeError, match=r"\(rank 0\) cannot be reached either"), arrivals.blame():
        raise RuntimeError("Connection reset by peer")
    arrivals.say_who_is_missing(31.0)
    assert time.monotonic() - begun < 5
