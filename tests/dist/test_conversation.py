"""A sync is all or nothing: a failure before its commit, or a commit that says no, leaves the replica as it was."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_edit.config import EDiTConfig
from hf_edit.method.schedule import GlobalProgress
from hf_edit.peers.group import ProcessGroupPeers
from hf_edit.peers.layout import Layout
from hf_edit.sync.engine import Engine
from hf_edit.sync.overlap import at_once
from hf_edit.sync.units import local_part
from tests.dist.nets import Net, batch, shard
from tests.dist.threads import run_ranks

NUM_UNITS = 4


class Leaving(ProcessGroupPeers):
    """Members that can leave: from `armed` on the call number `at` of `kind` fails, or the commit says no."""

    fixed = False

    def __init__(self, layout: Layout, timeout_seconds: float) -> None:
        super().__init__(layout, timeout_seconds)
        self.fault: tuple[str, int] | None = None
        self.calls: list[str] = []

    def _call(self, kind: str) -> None:
        self.calls.append(kind)
        if self.fault == (kind, self.calls.count(kind)):
            raise RuntimeError(f"{kind} failed")

    def begin(self, sync: int) -> list[int]:
        self._call("begin")
        return super().begin(sync)

    def gather(self, vector: Tensor) -> Callable[[], Tensor]:
        self._call("gather")
        result = super().gather(vector)

        def checked() -> Tensor:
            self._call("gathered")
            return result()

        return checked

    def all_reduce(self, tensors: Sequence[Tensor]) -> Any:
        self._call("all_reduce")
        return self._checked(super().all_reduce(tensors))

    def all_to_all(self, received: Tensor, sent: Tensor) -> Any:
        self._call("all_to_all")
        return self._checked(super().all_to_all(received, sent))

    def all_gather(self, received: Tensor, sent: Tensor) -> Any:
        self._call("all_gather")
        return self._checked(super().all_gather(received, sent))

    def _checked(self, pending: Any) -> Any:
        call = self._call

        class Checked:
            def wait(self) -> None:
                call("wait")
                pending.wait()

        return Checked()

    def commit(self, sync: int) -> bool:
        self._call("commit")
        return self.fault != ("no", 0) and super().commit(sync)


def state_of(engine: Engine, model: nn.Module) -> list[Tensor]:
    sync = engine.sync
    outer = [t for state in sync.states for t in (state.anchor, *state.tensors.values())]
    outer += sync.reduction.residuals
    counts = [
        sync.sync_count,
        sync.whole,
        *sync.unit_syncs,
        *engine.fragments.steps,
        engine.schedule.inner_steps,
        engine.schedule.interval_steps,
        engine.progress.value,
    ]
    numbers = torch.tensor([float(value) for value in (*counts, *engine.counts.tallies.values())], dtype=torch.float64)
    params = [part for unit in engine.units for part in unit.parts()]
    params += [local_part(t) for state in engine._optimizer.state.values() for t in state.values()]
    return [t.detach().clone() for t in (*params, *outer, *sync.detectors.state_dict().values(), numbers)]


def train(
    rank: int, overlap: str, faults: Sequence[tuple[str, int] | None], shape: tuple[int, int], **settings: Any
) -> list[dict[str, Any]]:
    """A step and a sync (by hand, so that a failed one is not tried again at once) for each of the faults: with that it
    fails, with None it does not, and then it is tried again."""
    layout = Layout.split(shape[0] * shape[1], shape[0], rank)
    model = shard(Net(), layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    peers = Leaving(layout, 30.0)
    config = EDiTConfig(sync_interval=1000, overlap=overlap, delay_steps=1, max_pseudo_grad_norm=0.05, **settings)
    engine = Engine(model, optimizer, config, peers, runner=at_once)
    assert isinstance(engine.progress, GlobalProgress)

    def step(number: int) -> None:
        x, y = batch(number, rank)
        nn.functional.mse_loss(model(x), y).backward()
        engine.counts.tally(loss=1.0)
        engine.before_optimizer_step()
        optimizer.step()
        optimizer.zero_grad()
        engine.step()

    def sync() -> Any:
        engine._rounds.begin((), engine._rounds.when_due, whole=False)
        agreed = engine._complete()
        if agreed is not None:
            engine._rounds.under_way.finish()
        return agreed

    step(0)
    step(1)
    assert sync() is not None
    found = []
    for number, fault in enumerate(faults):
        step(2 + number)
        before = state_of(engine, model)
        peers.fault, peers.calls = fault, []
        if fault is not None and fault[0] != "no":
            with pytest.raises(RuntimeError, match=f"{fault[0]} failed"):
                sync()
        elif fault is not None:
            assert sync() is None
        assert not engine.sync.pending
        for mine, was in zip(state_of(engine, model), before, strict=True):
            assert torch.equal(mine, was), fault
        peers.fault = None
        assert sync() is not None
        told = engine.sync.take_records()[-1].plan.tallies
        params = [part.clone() for unit in engine.units for part in unit.parts()]
        params += [local_part(state["momentum_buffer"]).clone() for state in optimizer.state.values()]
        found.append({"params": params, "calls": peers.calls, "told": told})
    return found


ENDS = [("begin", 1), ("gather", 1), ("gathered", 1), ("commit", 1), ("no", 0)]


@pytest.mark.parametrize(
    ("compression", "fragments", "sync_moments"),
    [("none", 1, "none"), ("int8", 1, "none"), ("int8", 2, "none"), ("none", 2, "first"), ("int8", 1, "first")],
)
@pytest.mark.parametrize("overlap", ["none", "forward", "delayed"])
@pytest.mark.parametrize("shape", [(2, 1), (2, 2)])
def test_a_sync_that_fails_is_as_if_it_had_not_begun(
    overlap: str, shape: tuple[int, int], compression: str, fragments: int, sync_moments: str
) -> None:
    """And the next one brings what this one would have brought, in parameters and in counts."""
    world = shape[0] * shape[1]
    settings: dict[str, Any] = dict(compression=compression, fragments=fragments, sync_moments=sync_moments)
    body = functools.partial(train, overlap=overlap, shape=shape, **settings)
    calls = run_ranks(world, functools.partial(body, faults=[None]))[0][0]["calls"]
    sums = ["all_reduce"] if compression == "none" else ["all_to_all", "all_gather"]
    num_units = NUM_UNITS // fragments
    counts = dict.fromkeys(sums, num_units)
    if sync_moments != "none":
        counts["all_reduce"] = counts.get("all_reduce", 0) + num_units
    counts["wait"] = sum(counts.values())
    once = dict.fromkeys(["begin", "gather", "gathered", "commit"], 1)
    assert {kind: calls.count(kind) for kind in calls} == once | counts
    assert calls[-1] == "commit"
    faults = [*ENDS, *((kind, n + 1) for kind, count in counts.items() for n in range(count))]
    expected = run_ranks(world, functools.partial(body, faults=[None] * len(faults)))
    runs = run_ranks(world, functools.partial(body, faults=faults))
    for run, other in zip(runs, expected, strict=True):
        for fault, failed, whole in zip(faults, run, other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(failed["params"], whole["params"], strict=True)), fault
            assert failed["told"].keys() == whole["told"].keys()
            names = [name for name in failed["told"] if not name.endswith("_seconds")]
            assert all(torch.equal(failed["told"][name], whole["told"][name]) for name in names), fault


@pytest.mark.parametrize("overlap", ["none", "forward", "delayed"])
def test_who_does_not_take_part_weighs_nothing(overlap: str) -> None:
    """Replica 2 of 3 is left out: the others go on as if it had done no step, and its detector sees nothing."""

    def body(rank: int) -> Any:
        layout = Layout.split(3, 3, rank)
        model = shard(Net(), layout)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        config = EDiTConfig(sync_interval=1, overlap=overlap, delay_steps=1, weighting="uniform")
        engine = Engine(model, optimizer, config, Leaving(layout, 30.0), runner=at_once)
        peers = engine.peers
        gather = peers.gather
        peers.begin = lambda sync: [0, 1]  # type: ignore[method-assign]
        peers.gather = lambda vector: (lambda rows: lambda: rows()[:2])(gather(vector))  # type: ignore[method-assign]
        nn.functional.mse_loss(model(batch(0, rank)[0]), batch(0, rank)[1]).backward()
        optimizer.step()
        engine.step()
        engine.drain()
        plan = engine.sync.take_records()[0].plan
        return plan.weights.tolist(), engine.sync.detectors.count.tolist()

    assert run_ranks(3, body) == [([[0.5, 0.5, 0.0]] * NUM_UNITS, [[1, 1, 0]] * NUM_UNITS)] * 3
