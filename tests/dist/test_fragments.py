"""Fragments: parts of the units, one after the other; that it agrees with the simulation is in test_equivalence.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_edit.config import EDiTConfig
from tests.dist.nets import UNITS, Run, train
from tests.dist.test_by_time import Replica
from tests.dist.test_equivalence import FULL, assert_same, runs
from tests.dist.threads import run_ranks

PARTS = dataclasses.replace(FULL, sync_interval=4, fragments=2)


@pytest.mark.parametrize("shape", [(2, 1), (2, 2)])
@pytest.mark.parametrize("overlap", ["none", "forward"])
def test_a_sync_is_of_one_part_and_a_flush_of_all(shape: tuple[int, int], overlap: str) -> None:
    """And only then are the replicas equal: in every bit."""
    equal: dict[int, list[tuple[int, list[Tensor]]]] = {}

    def look(step: int, engine: Any, model: Any, optimizer: Any) -> None:
        if step == 7:
            engine.flush()
        if engine.replicas_equal and step >= 2:
            parts = [part.clone() for unit in engine.units for part in unit.parts()]
            equal.setdefault(engine.peers.layout.rank, []).append((step, parts))

    done = runs(*shape, dataclasses.replace(PARTS, overlap=overlap), 11, before_step=look)
    names = [record.unit_names for record in done[0].records]
    first, second = [name for name in UNITS if name in names[0]], [name for name in UNITS if name not in names[0]]
    # Warm-up until step 2; a part before steps 4, 6, 9 and 11; all before step 7 and at the end.
    assert names == [first, second, UNITS, second, first, UNITS]
    assert [record.sync for record in done[0].records] == [1, 2, 3, 4, 5, 6]
    assert done[0].engine.sync.unit_syncs.sum() == 2 + 2 + 4 + 2 + 2 + 2, "at the end the first has nothing new"
    for rank in equal:
        assert [step for step, _ in equal[rank]] == [2, 7]
        for (_, mine), (_, theirs) in zip(equal[rank], equal[rank % shape[1]], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    for run in done:
        assert_same(run.params, done[0].params)


def test_a_unit_without_a_step_since_its_last_sync_is_left_alone() -> None:
    """A flush right behind a sync of the first part: no outer step, no norm for its detector, nothing sent of it."""

    def look(step: int, engine: Any, model: Any, optimizer: Any) -> None:
        if step == 2:  # behind the first sync
            before = [engine.sync.states[unit].anchor.clone() for unit in (0, 1)]
            counts = engine.sync.detectors.count.clone()
            engine.flush()
            plan = engine.sync.take_records()[-1].plan
            assert plan.unchanged.tolist() == [True, True, False, False]
            assert not plan.rolled_back.any()
            assert all(torch.equal(engine.sync.states[unit].anchor, before[unit]) for unit in (0, 1))
            assert (engine.sync.detectors.count - counts).tolist() == [[0, 0]] * 2 + [[1, 1]] * 2

    config = EDiTConfig(sync_interval=4, fragments=2, overlap="none", outer_warmup_syncs=0)
    run = runs(2, 1, config, 3, before_step=look)[0]
    assert run.engine.fragments.of_sync(0, 1, whole=False).indices == [0, 1]


def test_bytes_come_in_parts() -> None:
    """The largest sync of three sends 1.2 / 3 of all at most; what all send together is the same."""
    whole = runs(2, 1, EDiTConfig(sync_interval=6), 12)[0]
    parts = runs(2, 1, EDiTConfig(sync_interval=6, fragments=2), 12)[0]
    exchange = 8 * 40  # norms and tallies, at most
    assert len(whole.records) == 2
    assert len(parts.records) == 5, "twice two, and all at the end"
    largest = max(record.sync_bytes for record in parts.records[:-1])
    assert largest < 1.2 / 2 * whole.records[0].sync_bytes + exchange
    assert sum(record.sync_bytes for record in parts.records[:2]) < whole.records[0].sync_bytes + 2 * exchange


def test_who_took_no_step_since_the_last_sync_still_tells_what_it_learnt_before() -> None:
    """Replica 1 rests from its third step on: the part that it has not told of is not taken for nothing."""

    def body(rank: int) -> list[list[float]]:
        run = train(rank, 2, EDiTConfig(sync_interval=4, fragments=2, weighting="steps"), 2)
        engine = run.engine
        assert engine.sync.sync_count == 2, "one of a part, one of all at the end"
        for _ in range(2):  # both learn for two steps, and sync the first part
            engine.schedule.advance()
        engine._sync((), whole=False)
        if rank == 0:
            for _ in range(2):
                engine.schedule.advance()
        engine._sync((), whole=False)
        weights = engine.sync.take_records()[-1].plan.weights
        return weights.tolist()

    assert run_ranks(2, body) == [[[4 / 6, 2 / 6]] * 2] * 2


@pytest.mark.parametrize("overlap", [dict(overlap="none"), dict(overlap="delayed", delay_steps=1)])
def test_a_barrier_ends_with_all_parts(overlap: dict[str, Any]) -> None:
    """Replicas that take different numbers of steps. Who has none since a part's last sync weighs nothing in it, so
    each of the steps of both moves a part by a half, or by the whole."""

    def body(rank: int) -> tuple[list[float], bool]:
        replica = Replica(rank, 2, 1.0 + rank, 1.0, sync_seconds=6.0, fragments=3, weighting="uniform", **overlap)
        for _ in range(7 if rank == 0 else 4):
            replica.step()
        replica.engine.barrier()
        return [param.item() for param in replica.model.parameters()], replica.engine.replicas_equal

    (one, equal), other = run_ranks(2, body)
    assert (one, equal) == other
    assert equal
    assert all(-7.0 <= value <= -5.5 for value in one)


def test_more_fragments_than_units_are_refused() -> None:
    def body(rank: int) -> Run:
        return train(rank, 2, EDiTConfig(sync_interval=5, fragments=5), 1)

    with pytest.raises(ValueError, match="fragments=5, but the model has 4 units"):
        run_ranks(2, body)
