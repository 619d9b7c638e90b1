"""What a sync holds beside the replica's own memory: anchor and momentum, and for a while the units in flight."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # private in torch 2.13; every case fails when it moves
from torch.utils._pytree import tree_leaves

from hf_edit import EDiTConfig
from hf_edit.peers.faults import Pending
from hf_edit.peers.layout import Layout
from hf_edit.peers.replica import Replica
from hf_edit.sync import lengths
from hf_edit.sync.measure import Scratch
from hf_edit.sync.overlap import Blocking, Delayed, Forward, at_once
from hf_edit.sync.unit_sync import OuterSync
from hf_edit.sync.units import Unit

UNIT_BYTES = 4 * 8 * 1024
NUM_UNITS = 6


class Alone:
    """A `Conversation` of a single replica: nothing comes from elsewhere."""

    num_replicas = 1
    replica = 0
    bytes_sent = 0
    fixed = True

    def begin(self, sync: int) -> list[int]:
        return [0]

    def gather(self, vector: Tensor) -> Callable[[], Tensor]:
        return lambda: vector[None]

    def all_reduce(self, tensors: Sequence[Tensor]) -> Pending:
        return self

    def wait(self) -> None: ...

    def commit(self, sync: int) -> bool:
        return True


class Memory(TorchDispatchMode):
    """The bytes of all tensors that were made inside the `with` block and still live, and their highest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (key := leaf.untyped_storage()._cdata) not in before | self.live.keys():
                self.live[key] = leaf.untyped_storage().nbytes()
                weakref.finalize(leaf.untyped_storage(), self.live.pop, key, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def make_sync(**settings: Any) -> tuple[OuterSync, list[torch.nn.Linear]]:
    modules = [torch.nn.Linear(128, 64, bias=False) for _ in range(NUM_UNITS)]
    units = [Unit(str(i), [m], ["weight"], list(m.parameters())) for i, m in enumerate(modules)]
    assert all(part.nbytes == UNIT_BYTES for unit in units for part in unit.parts())
    return OuterSync(units, Alone(), Replica(Layout(1, 1, 0), 1.0), EDiTConfig(**settings)), modules


@pytest.fixture(autouse=True)
def _small_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "SAMPLE", 8)  # of units that are small, too


@pytest.mark.parametrize("overlap", ["none", "forward"])
@pytest.mark.parametrize("units_in_flight", [1, 2, 4])
def test_a_sync_holds_the_units_in_flight_and_no_more(overlap: Any, units_in_flight: int) -> None:
    sync, modules = make_sync(overlap=overlap, units_in_flight=units_in_flight)
    with Memory() as memory:
        sync.take_anchors()
    assert sum(memory.live.values()) == 2 * NUM_UNITS * UNIT_BYTES, "anchor and momentum"
    before = [module.weight.detach().clone() for module in modules]
    for module in modules:
        module.weight.data.add_(0.01)
    with Memory() as memory, torch.no_grad():
        way = {"none": Blocking, "forward": Forward}[overlap](sync)
        way.begin({"inner_steps": 1.0})
        way.decide()
        assert way.carry_out()
        for module in modules:
            module(torch.zeros(1, 128))
    assert not sync.pending
    held = units_in_flight if overlap == "forward" else NUM_UNITS  # none is written before all are reduced
    small = UNIT_BYTES // 4  # norms and the like
    assert (held - 0.5) * UNIT_BYTES < memory.peak < held * UNIT_BYTES + small
    assert sum(memory.live.values()) < small, "all of it is gone"
    assert all(module.weight.sub(was).abs().max() > 1e-3 for module, was in zip(modules, before, strict=True))


def test_delayed_syncs_use_the_same_host_memory_again() -> None:
    sync, modules = make_sync(overlap="delayed", delay_steps=1)
    sync.take_anchors()
    way = Delayed(sync, at_once)
    held = []
    for _ in range(4):
        for module in modules:
            module.weight.data.add_(0.01)
        with Memory() as memory, torch.no_grad():
            way.begin({"inner_steps": 1.0})
            way.decide()
            assert way.carry_out(steps=1)
        held.append(sum(memory.live.values()) // UNIT_BYTES)
        assert memory.peak < (2 * NUM_UNITS + 1) * UNIT_BYTES
    assert held == [2 * NUM_UNITS, 0, 0, 0], "its pseudo-gradients and the averages, made once"


def test_host_memory_is_used_again_for_its_own_kind_alone() -> None:
    scratch = Scratch(torch.device("cpu"))
    given = torch.zeros(16)
    scratch.give(given)
    packed = scratch.take(torch.zeros(16, dtype=torch.float64))
    assert packed.dtype == torch.float64
    assert scratch.take(torch.zeros(8)).numel() == 8
    assert scratch.take(torch.zeros(16)) is given
    assert scratch.take(torch.zeros(16)) is not given
