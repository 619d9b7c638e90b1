"""Compressed syncs: the exact sum where the codes are exact, the stated error where they are not, nothing lost."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_edit.config import EDiTConfig
from hf_edit.method.compression import CODECS, Integers
from hf_edit.peers.group import ProcessGroupPeers
from hf_edit.peers.layout import Layout
from hf_edit.sync.reduction import Reduction
from tests.dist.nets import Net
from tests.dist.test_equivalence import FULL, assert_same, runs
from tests.dist.threads import run_ranks


@dataclasses.dataclass(frozen=True)
class Exact:
    """Codes that are the numbers."""

    block: int = 3

    def num_bytes(self, numbers: int) -> int:
        return 4 * numbers

    def encode(self, values: Tensor, message: Tensor) -> None:
        message.view(torch.float32)[: len(values)].copy_(values)
        values.zero_()

    def decode(self, message: Tensor, out: Tensor, add: bool = False) -> None:
        numbers = message.view(torch.float32)[: len(out)]
        out.copy_(numbers + out if add else numbers)


@pytest.mark.parametrize("shape", [(2, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("overlap", ["none", "forward", "delayed"])
@pytest.mark.parametrize("offload", [False, True])
def test_with_exact_codes_it_is_a_plain_sync(
    shape: tuple[int, int], overlap: str, offload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CODECS, "int8", Exact())
    monkeypatch.setattr("hf_edit.sync.reduction.PIECE", 7)
    config = dataclasses.replace(FULL, overlap=overlap, offload_outer_state=offload, delay_steps=2)
    plain = runs(*shape, config)
    coded = runs(*shape, dataclasses.replace(config, compression="int8"))
    for one, other in zip(plain, coded, strict=True):
        # Two numbers have one sum; of four the order tells.
        assert_same(one.params, other.params, 0.0 if shape[0] == 2 else 1e-6)


@pytest.mark.parametrize("compression", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("shape", [(2, 1), (2, 2), (3, 1)])
def test_overlaps_agree_bit_for_bit_and_replicas_too(compression: str, shape: tuple[int, int]) -> None:
    config = dataclasses.replace(FULL, compression=compression)
    first = runs(*shape, dataclasses.replace(config, overlap="none"))
    for options in (dict(overlap="forward"), dict(overlap="forward", units_in_flight=1), dict(overlap="none",
                    units_in_flight=9), dict(overlap="none", offload_outer_state=True)):  # fmt: skip
        other = runs(*shape, dataclasses.replace(config, **options))
        assert_same(first[0].params, other[0].params)

    def end_now(step: int, engine: Any, model: Any, optimizer: Any) -> None:
        engine.flush()

    blocking = runs(*shape, dataclasses.replace(config, overlap="none"), before_step=end_now)
    delayed = runs(*shape, dataclasses.replace(config, overlap="delayed", delay_steps=3), before_step=end_now)
    assert_same(delayed[0].params, blocking[0].params)
    for run in first:
        assert_same(run.params, first[0].params)


@pytest.mark.parametrize(("compression", "share"), [("bf16", 0.002), ("int8", 0.005), ("int4", 0.1)])
@pytest.mark.parametrize("overlap", ["none", "delayed"])
def test_it_learns_what_plain_syncs_learn(
    compression: str, share: float, overlap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends at most `share` of the way elsewhere, and without error feedback several times as far."""
    plain = EDiTConfig(sync_interval=2, overlap=overlap, delay_steps=1)
    coded = dataclasses.replace(plain, compression=compression)
    start = {name: param.detach() for name, param in Net().named_parameters()}
    end = runs(2, 1, plain, 41, optimizer="sgd")[0].params
    fed_back = runs(2, 1, coded, 41, optimizer="sgd")[0].params
    monkeypatch.setattr("hf_edit.sync.reduction._CompressedSum.keep", lambda self: None)
    forgotten = runs(2, 1, coded, 41, optimizer="sgd")[0].params

    def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        return float(torch.stack([(one[name] - other[name]).norm() for name in one]).norm())

    assert apart(fed_back, end) < share * apart(end, start)
    assert apart(forgotten, end) > 3 * apart(fed_back, end)


@pytest.mark.parametrize("kind", sorted(CODECS))
@pytest.mark.parametrize("num_replicas", [2, 3, 4])
def test_nothing_of_a_sum_is_lost(kind: str, num_replicas: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been summed and what all have left over is what all have sent, in every element; one that weighs
    nothing sends nothing, whatever it holds, and keeps what it had left."""
    monkeypatch.setattr("hf_edit.sync.reduction.PIECE", 500)
    size, syncs = 1234, 6

    def body(rank: int) -> Any:
        peers = ProcessGroupPeers(Layout.split(num_replicas, num_replicas, rank), 30.0)
        reduction = Reduction(peers, CODECS[kind], [torch.zeros(size)])
        generator = torch.Generator().manual_seed(rank)
        sums, given = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        errors = []
        for sync in range(syncs):
            delta = torch.randn(size, generator=generator) * 10 ** (sync % 3)
            left_out = sync == 3 and rank == 1
            weight = 0.0 if left_out else 0.3 + 0.1 * rank
            if left_out:
                delta[5] = torch.inf
            else:
                given += weight * delta.double()
            before = reduction.residuals[0].clone()
            sum_ = reduction.start(0, delta, weight, list(range(num_replicas)), None)
            total = sum_.wait()
            assert torch.equal(reduction.residuals[0], before), "nothing changes before keep()"
            sum_.keep()
            if left_out:  # but for the chunk whose sum it has coded
                assert (reduction.residuals[0] != before).sum() <= size / num_replicas + 500
            assert total.isfinite().all()
            sums += total
            errors.append(reduction.residuals[0].abs().max().item())
        return sums, given, reduction.residuals[0].double(), errors

    found = run_ranks(num_replicas, body)
    sums, given = found[0][0], sum(one[1] for one in found)
    assert all(torch.equal(one[0], sums) for one in found)
    left = sum(one[2] for one in found)
    assert (sums + left - given).abs().max() < 1e-4
    step = {"bf16": 1 / 256, "int8": 1 / 254, "int4": 1 / 14}[kind]
    greatest = 100 * 5 * num_replicas  # five sigma of the largest scale, of the sum of all
    assert max(max(one[3]) for one in found) < 3 * step * greatest


def test_bytes_are_counted_as_sent() -> None:
    """R = 3: two of three chunks of codes go out, and the own sum to two."""

    def body(rank: int) -> list[int]:
        peers = ProcessGroupPeers(Layout.split(3, 3, rank), 30.0)
        sent = []
        for codec in (Integers(8, 256), Integers(4, 64)):
            before = peers.bytes_sent
            reduction = Reduction(peers, codec, [torch.zeros(3 * 2560)])
            reduction.start(0, torch.ones(3 * 2560), 1.0, [0, 1, 2], None).wait()
            sent.append(peers.bytes_sent - before)
        return sent

    chunks = [2560 + 4 * 10, 1280 + 4 * 40]
    assert run_ranks(3, body) == [[4 * chunk for chunk in chunks]] * 3
