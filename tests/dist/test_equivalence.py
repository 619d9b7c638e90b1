"""Layouts and options that must agree, compared number by number."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from hf_edit.config import EDiTConfig
from hf_edit.method.schedule import fragments
from hf_edit.peers.group import ProcessGroupPeers
from hf_edit.peers.layout import Layout, ring_bytes
from hf_edit.sync.engine import Engine
from hf_edit.sync.overlap import Delayed, at_once
from tests.dist.nets import UNITS, Net, Run, batch, make_optimizer, shard, train
from tests.dist.reference import simulate
from tests.dist.threads import run_ranks

FULL = EDiTConfig(sync_interval=3, warmup_steps=2, max_pseudo_grad_norm=0.05, ema_warmup_syncs=1, anomaly_threshold=0.5)
PLAIN = dict(outer_momentum=0.0, weighting="uniform", anomaly_threshold=None, max_pseudo_grad_norm=None)


def runs(num_replicas: int, replica_size: int, config: EDiTConfig, steps: int = 11, **options: Any) -> list[Run]:
    world = num_replicas * replica_size
    return run_ranks(world, lambda rank: train(rank, num_replicas, config, steps, **options))


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name in one:
        if tolerance == 0.0:
            assert torch.equal(one[name], other[name]), name
        else:
            distance = (one[name] - other[name]).norm() / other[name].norm()
            assert distance <= tolerance, f"{name}: relative distance {distance:.2e}"


def mean_loss(net: nn.Module, step: int, ranks: list[int]) -> Tensor:
    pairs = [batch(step, rank) for rank in ranks]
    return sum(nn.functional.mse_loss(net(x), y) for x, y in pairs) / len(pairs)


def unit_of(name: str) -> str:
    return next(u for u in UNITS if any(name.startswith(part + ".") for part in u.split("+")))


def by_replica(layout: Any, step: int) -> int:
    """All ranks of a replica see the same data, so replicas of any size learn the same."""
    return layout.replica


@pytest.mark.parametrize("shape", [(2, 1), (2, 2), (4, 1), (1, 2)])
def test_every_step_synced_is_sgd_on_the_mean_gradient(shape: tuple[int, int]) -> None:
    config = EDiTConfig(sync_interval=1, outer_lr=1.0, **PLAIN)
    world = shape[0] * shape[1]
    net = Net()
    optimizer = make_optimizer("sgd", net.parameters())
    for step in range(5):
        sum(nn.functional.mse_loss(net(x), y) / world for x, y in (batch(step, r) for r in range(world))).backward()
        optimizer.step()
        optimizer.zero_grad()
    for run in runs(*shape, config, steps=5, optimizer="sgd"):
        assert_same(run.params, dict(net.named_parameters()), 1e-5)


@pytest.mark.parametrize("config", [FULL, EDiTConfig(sync_interval=4), EDiTConfig.preset("diloco", sync_interval=3)])
def test_identical_data_is_one_replica(config: EDiTConfig) -> None:
    def same_shard(layout: Any, step: int) -> int:
        return layout.shard

    two = runs(2, 2, config, data_rank=same_shard)
    one = runs(1, 2, config, data_rank=same_shard)
    assert_same(two[0].params, one[0].params, 1e-5)


@pytest.mark.parametrize("config", [FULL, EDiTConfig(sync_interval=4, overlap="none")])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_one_two_and_four_shards_agree(config: EDiTConfig, optimizer: str) -> None:
    ddp = runs(2, 1, config, optimizer=optimizer, data_rank=by_replica)[0].params
    for size in (2, 4):
        assert_same(runs(2, size, config, optimizer=optimizer, data_rank=by_replica)[0].params, ddp, 1e-5)


@pytest.mark.parametrize("shape", [(2, 1), (2, 2), (3, 1)])
def test_overlap_forward_and_none_agree_bit_for_bit(shape: tuple[int, int]) -> None:
    forward = runs(*shape, FULL)
    blocking = runs(*shape, dataclasses.replace(FULL, overlap="none"))
    for one, other in zip(forward, blocking, strict=True):
        assert_same(one.params, other.params)
        assert one.losses == other.losses
    assert len(forward[0].records) == len(blocking[0].records) == 3


def prefetch_next(model: Any) -> None:
    model.embed.set_modules_to_forward_prefetch([model.blocks[0]])
    model.blocks[0].set_modules_to_forward_prefetch([model.blocks[1]])
    model.blocks[1].set_modules_to_forward_prefetch([model.norm])


def prefetch_several(model: Any) -> None:
    model.embed.set_modules_to_forward_prefetch([model.blocks[0], model.blocks[1], model.norm])


def prefetch_from_the_root(model: Any) -> None:
    model.set_modules_to_forward_prefetch([model.embed, model.blocks[0]])


def prefetch_the_next_pass(model: Any) -> None:
    model.norm.set_modules_to_forward_prefetch([model.embed])


def gather_by_hand(step: int, engine: Any, model: Any, optimizer: Any) -> None:
    for module in (model.embed, model.blocks[1], model.norm):
        module.unshard(async_op=True)


def look_before_the_sync(step: int, engine: Any, model: Any, optimizer: Any) -> None:
    """A forward pass without a backward one leaves gathered copies behind."""

    @torch.no_grad()
    def look(*_: Any) -> None:
        model(batch(0, 0)[0])

    if step == 0:
        optimizer.register_step_post_hook(look)


@functools.cache
def without_gathering(overlap: Literal["none", "forward", "delayed"]) -> list[Run]:
    return runs(2, 2, dataclasses.replace(FULL, overlap=overlap, delay_steps=2))


@pytest.mark.parametrize("overlap", ["none", "forward", "delayed"])
@pytest.mark.parametrize(
    "gathering",
    [
        prefetch_next, prefetch_several, prefetch_from_the_root, prefetch_the_next_pass, gather_by_hand,
        look_before_the_sync,
    ],
)  # fmt: skip
def test_what_was_gathered_before_a_write_is_gathered_anew(gathering: Any, overlap: Any) -> None:
    """Else a forward pass, and what it learns from, would use the parameters of before the sync."""
    config = dataclasses.replace(FULL, overlap=overlap, delay_steps=2)

    def before_step(step: int, engine: Any, model: Any, optimizer: Any) -> None:
        if gathering in (gather_by_hand, look_before_the_sync):
            gathering(step, engine, model, optimizer)
        elif step == 0:
            gathering(model)

    for one, other in zip(runs(2, 2, config, before_step=before_step), without_gathering(overlap), strict=True):
        assert one.losses == other.losses
        assert_same(one.params, other.params)


@pytest.mark.parametrize("overlap", ["none", "forward", "delayed"])
def test_more_units_in_flight_change_nothing(overlap: Literal["none", "forward", "delayed"]) -> None:
    config = dataclasses.replace(FULL, overlap=overlap, delay_steps=2)
    two = runs(2, 2, config)
    for number in (1, 9):
        assert_same(runs(2, 2, dataclasses.replace(config, units_in_flight=number))[0].params, two[0].params)


@pytest.mark.parametrize("shape", [(2, 1), (2, 2)])
@pytest.mark.parametrize("outer", ["nesterov", "sgd", "callable"])
def test_offload_changes_nothing(shape: tuple[int, int], outer: str) -> None:
    optimizer = (lambda params: torch.optim.AdamW(params, lr=0.1)) if outer == "callable" else outer
    for overlap in ("forward", "delayed"):
        config = dataclasses.replace(FULL, outer_optimizer=optimizer, overlap=overlap, delay_steps=2)
        kept = runs(*shape, config)
        offloaded = runs(*shape, dataclasses.replace(config, offload_outer_state=True))
        assert_same(kept[0].params, offloaded[0].params)


@pytest.mark.parametrize("nesterov", [True, False])
def test_a_callable_outer_optimizer_is_torchs(nesterov: bool) -> None:
    def outer(params: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.8, momentum=0.85, nesterov=nesterov)

    named = dataclasses.replace(FULL, outer_optimizer="nesterov" if nesterov else "sgd", outer_warmup_syncs=0)
    own = runs(2, 2, named)
    torchs = runs(2, 2, dataclasses.replace(FULL, outer_optimizer=outer))
    assert_same(own[0].params, torchs[0].params)


@pytest.mark.parametrize("shape", [(2, 1), (2, 2)])
def test_accumulation_four_by_one_and_one_by_four_agree(shape: tuple[int, int]) -> None:
    whole = runs(*shape, FULL)
    pieces = runs(*shape, FULL, accumulation=4)
    assert_same(whole[0].params, pieces[0].params, 1e-5)


@pytest.mark.parametrize(
    ("shape", "optimizer"), [((2, 2), "adamw"), ((2, 2), "sgd"), ((4, 1), "adamw"), ((3, 1), "sgd")]
)
@pytest.mark.parametrize(
    "settings",
    [
        dict(tau=4),
        dict(tau=2, outer_warmup=0),
        dict(tau=3, warmup=3, clip=0.03),
        dict(tau=1, warmup=1, delta=0.02, ema_warmup=2, alpha=0.3, clip=None),
        dict(tau=5, weighting="uniform", delta=None, clip=None, outer_lr=0.7, outer_momentum=0.9),
        dict(tau=4, delay=1),
        dict(tau=3, delay=3, warmup=2, clip=0.03),
        dict(tau=2, delay=1, warmup=1, delta=0.02, ema_warmup=2, alpha=0.3, clip=None),
        dict(tau=4, fragments=2),
        dict(tau=8, fragments=4, clip=0.03, warmup=1),
        dict(tau=3, fragments=3, delta=0.02, ema_warmup=1, alpha=0.3),
        dict(tau=4, fragments=2, delay=2, clip=0.03),
        dict(tau=3, averaging="length", clip=0.06),
        dict(tau=2, averaging="length", clip=None, delay=1),
    ],
)
def test_agrees_with_the_simulation(shape: tuple[int, int], optimizer: str, settings: dict[str, Any]) -> None:
    steps = 11
    settings = dict(settings)
    num_parts = settings.pop("fragments", 1)
    sizes = dict.fromkeys(UNITS, 0)
    for name, param in Net().named_parameters():
        sizes[unit_of(name)] += param.numel()
    parts = [[UNITS[i] for i in part] for part in fragments(list(sizes.values()), num_parts)]
    expected = simulate(
        Net,
        unit_of,
        mean_loss,
        lambda params: make_optimizer(optimizer, params),
        num_replicas=shape[0], replica_size=shape[1], steps=steps, parts=parts, **settings,
    )  # fmt: skip
    names = dict(
        tau="sync_interval", warmup="warmup_steps", clip="max_pseudo_grad_norm", delta="anomaly_threshold",
        alpha="ema_alpha", ema_warmup="ema_warmup_syncs", delay="delay_steps",
        outer_warmup="outer_warmup_syncs",
    )  # fmt: skip
    overlap = "delayed" if "delay" in settings else "forward"
    config = EDiTConfig(
        overlap=overlap, fragments=num_parts, **{names.get(name, name): value for name, value in settings.items()}
    )
    ran = runs(*shape, config, steps, optimizer=optimizer)
    for run in ran:
        assert_same(run.params, expected, 1e-5)
    if settings.get("delta") and optimizer == "sgd":
        assert any(record.plan.anomalous.any() for record in ran[0].records), "the setting eliminates nobody"
    if settings.get("clip") == 0.03:
        assert any(record.clipped_units for record in ran[0].records), "the setting clips nothing"


@pytest.mark.parametrize("overlap", ["forward", "delayed"])
@pytest.mark.parametrize(("num_parts", "end", "first"), [(1, 2, [6, 5, 4]), (1, 12, [6, 8, 10]), (2, 4, [3, 3])])
def test_the_interval_goes_to_its_end(
    overlap: Literal["forward", "delayed"], num_parts: int, end: int, first: list[int]
) -> None:
    config = EDiTConfig(
        sync_interval=6, sync_interval_end=end, overlap=overlap, delay_steps=1, fragments=num_parts
    )  # fmt: skip
    expected: list[int] = []
    while (taken := sum(expected)) < 24:
        expected.append(min(24 - taken, round(6 + (end - 6) * taken / 24) // num_parts))
    assert expected[: len(first)] == first
    for run in runs(2, 1, config, 24, last_step=24):
        steps = [round(float(record.plan.tallies["inner_steps"][0])) for record in run.records]
        assert [count for count in steps if count] == expected


@pytest.mark.parametrize("shape", [(2, 2), (3, 1)])
@pytest.mark.parametrize("settings", [dict(), dict(delay=2), dict(num_parts=2), dict(warmup=4)])
def test_the_outer_momentum_follows_the_learning_rate(shape: tuple[int, int], settings: dict[str, int]) -> None:
    """Down, not up; the simulation agrees, and it makes a difference."""

    def lr_at(step: int) -> float:
        return 0.01 * (step + 1) if step < 6 else 0.06 * (1 - step / 25)

    def set_rate(step: int, engine: Any, model: nn.Module, optimizer: Any) -> None:
        optimizer.param_groups[0]["lr"] = lr_at(step)

    given = dict(settings)
    num_parts, delay, warmup = given.pop("num_parts", 1), given.pop("delay", 0), given.pop("warmup", 0)
    sizes = dict.fromkeys(UNITS, 0)
    for name, param in Net().named_parameters():
        sizes[unit_of(name)] += param.numel()
    parts = [[UNITS[i] for i in part] for part in fragments(list(sizes.values()), num_parts)]
    common: dict[str, Any] = dict(
        num_replicas=shape[0], replica_size=shape[1], steps=22, tau=4, outer_warmup=0, lr_at=lr_at, delay=delay,
        warmup=warmup, parts=parts,
    )  # fmt: skip
    expected, without = (
        simulate(Net, unit_of, mean_loss, lambda params: make_optimizer("sgd", params), follow_lr=follow_lr, **common)
        for follow_lr in (True, False)
    )
    config = EDiTConfig(
        sync_interval=4, overlap="delayed" if delay else "forward", delay_steps=delay or 4, outer_warmup_syncs=0,
        momentum_follows_lr=True, fragments=num_parts, warmup_steps=warmup,
    )  # fmt: skip
    for run in runs(*shape, config, 22, optimizer="sgd", before_step=set_rate):
        assert_same(run.params, expected, 1e-5)
    with pytest.raises(AssertionError, match="relative distance"):
        assert_same(expected, without, 1e-3)


@pytest.mark.parametrize("shape", [(2, 2), (3, 1)])
@pytest.mark.parametrize("settings", [dict(), dict(delay=2), dict(warmup=4), dict(follow_lr=True)])
def test_inner_steps_have_a_learning_rate_of_their_own(shape: tuple[int, int], settings: dict[str, Any]) -> None:
    """Synchronous steps do not, and nobody sees it who looks between two steps."""
    warmup, delay, follow_lr = settings.get("warmup", 0), settings.get("delay", 0), "follow_lr" in settings

    def lr_at(step: int) -> float:
        return 0.04 * (1 - step / 20)

    def set_rate(step: int, engine: Any, model: nn.Module, optimizer: Any) -> None:
        assert optimizer.param_groups[0]["lr"] == (lr_at(step - 1) if step else 0.05)
        optimizer.param_groups[0]["lr"] = lr_at(step)

    def simulated(scale: float) -> dict[str, Tensor]:
        return simulate(
            Net, unit_of, mean_loss, lambda params: make_optimizer("sgd", params), num_replicas=shape[0],
            replica_size=shape[1], steps=11, tau=3, warmup=warmup, delay=delay, follow_lr=follow_lr,
            lr_at=lambda step: lr_at(step) * (scale if step >= warmup else 1.0),
        )  # fmt: skip

    config = EDiTConfig(
        sync_interval=3, warmup_steps=warmup, overlap="delayed" if delay else "forward", delay_steps=delay or 3,
        momentum_follows_lr=follow_lr, inner_lr_scale=1.5,
    )  # fmt: skip
    for run in runs(*shape, config, 11, optimizer="sgd", before_step=set_rate):
        assert_same(run.params, simulated(1.5), 1e-5)
    with pytest.raises(AssertionError, match="relative distance"):
        assert_same(simulated(1.5), simulated(1.0), 1e-2)


@pytest.mark.parametrize("shape", [(2, 2), (3, 1)])
@pytest.mark.parametrize(
    ("optimizer", "sync_moments", "keys"),
    [
        ("adamw", "first", ("exp_avg",)),
        ("adamw", "both", ("exp_avg", "exp_avg_sq")),
        ("momentum", "both", ("momentum_buffer",)),
    ],
)
@pytest.mark.parametrize(
    "settings",
    [
        dict(tau=3),
        dict(tau=4, delay=2, every=2),
        dict(tau=2, delay=2, warmup=1),
        dict(tau=4, fragments=2, every=3),
        dict(tau=4, fragments=2, delay=1),
        dict(tau=1, warmup=1, delta=0.02, ema_warmup=2, alpha=0.3, overlap="none"),
        dict(tau=3, overlap="forward", compression="int8"),
    ],
)
def test_moments_agree_with_the_simulation(
    shape: tuple[int, int], optimizer: str, sync_moments: Literal["first", "both"], keys: tuple[str, ...],
    settings: dict[str, Any],
) -> None:  # fmt: skip
    """Also of replicas that are left out, which take the others'; codes are for pseudo-gradients alone."""
    given = dict(settings)
    num_parts, every = given.pop("fragments", 1), given.pop("every", 1)
    overlap = given.pop("overlap", "delayed" if "delay" in given else "forward")
    compression = given.pop("compression", "none")
    sizes = dict.fromkeys(UNITS, 0)
    for name, param in Net().named_parameters():
        sizes[unit_of(name)] += param.numel()
    parts = [[UNITS[i] for i in part] for part in fragments(list(sizes.values()), num_parts)]
    expected = simulate(
        Net, unit_of, mean_loss, lambda params: make_optimizer(optimizer, params), num_replicas=shape[0],
        replica_size=shape[1], steps=11, parts=parts, moments=keys, moments_every=every, **given,
    )  # fmt: skip
    names = dict(
        tau="sync_interval", warmup="warmup_steps", delta="anomaly_threshold", alpha="ema_alpha",
        ema_warmup="ema_warmup_syncs", delay="delay_steps",
    )  # fmt: skip
    config = EDiTConfig(
        overlap=overlap, fragments=num_parts, sync_moments=sync_moments, sync_moments_every=every,
        compression=compression, **{names[name]: value for name, value in given.items()},
    )  # fmt: skip
    for run in runs(*shape, config, 11, optimizer=optimizer):
        assert_same(run.params, expected, 1e-5 if compression == "none" else 2e-2)


@pytest.mark.parametrize("shape", [(2, 2), (4, 1)])
@pytest.mark.parametrize("sync_moments", ["first", "both"])
def test_what_moments_send(shape: tuple[int, int], sync_moments: Literal["first", "both"]) -> None:
    config = EDiTConfig(sync_interval=1)
    every = runs(*shape, dataclasses.replace(config, sync_moments=sync_moments), 4)[0]
    second = runs(*shape, dataclasses.replace(config, sync_moments=sync_moments, sync_moments_every=2), 4)[0]
    none = runs(*shape, config, 4)[0]
    plain = [record.sync_bytes for record in none.records]
    norms = plain[0] - ring_bytes(4 * parameters_of_a_rank(none), shape[0])
    whole = [(sent - norms) / (bare - norms) for sent, bare in zip(sent_by(every), plain, strict=True)]
    assert whole == pytest.approx([2.0 if sync_moments == "first" else 3.0] * 4, rel=1e-3)
    assert sent_by(second) == [sent_by(every)[0], plain[1]] * 2


def sent_by(run: Any) -> list[int]:
    return [record.sync_bytes for record in run.records]


def parameters_of_a_rank(run: Any) -> int:
    return sum(part.numel() for unit in run.engine.units for part in unit.parts())


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop"])
def test_moments_that_are_not_known_are_refused(optimizer: str) -> None:
    with pytest.raises(ValueError, match="sync_moments='first' averages the moments of Adam"):
        runs(2, 1, EDiTConfig(sync_interval=2, sync_moments="first"), 2, optimizer=optimizer)


@pytest.mark.parametrize("opposite", [True, False])
def test_an_average_of_nothing_in_common_stays_short(opposite: bool) -> None:
    """Two replicas that took the same way, or opposite ones: the length of the mean is kept, or there is none."""
    config = EDiTConfig(sync_interval=1, averaging="length", outer_optimizer="none", **{**PLAIN, "outer_momentum": 0.8})

    def body(rank: int) -> tuple[list[Tensor], list[Tensor]]:
        layout = Layout.split(2, 2, rank)
        model = shard(Net(), layout)
        engine = Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), config, ProcessGroupPeers(layout, 30.0))
        before = [part.clone() for unit in engine.units for part in unit.parts()]
        with torch.no_grad():
            for param in model.parameters():
                param.add_(0.25 if opposite and rank else -0.25)
        engine.step()
        engine.flush()
        engine.before_optimizer_step()
        return before, [part.clone() for unit in engine.units for part in unit.parts()]

    for before, after in run_ranks(2, body):
        for old, new in zip(before, after, strict=True):
            torch.testing.assert_close(new, old if opposite else old - 0.25)


def test_a_rank_without_a_row_of_a_unit_syncs_too() -> None:
    """More ranks than a unit's matrices have rows."""
    for run in runs(1, 12, EDiTConfig(sync_interval=2, averaging="length", sync_moments="both"), 4):
        assert len(run.records) == 2
        assert math.isfinite(run.records[1].pseudo_grad_cosine)


def test_the_cosine_of_successive_averages() -> None:
    """With the plain average, an average is the difference of two anchors; whatever the shards and the overlap."""
    config = EDiTConfig(sync_interval=2, outer_optimizer="none", overlap="none", max_pseudo_grad_norm=None)

    def train_noting(rank: int) -> tuple[Run, list[list[Tensor]]]:
        anchors: list[list[Tensor]] = []

        def note(step: int, engine: Any, model: nn.Module, optimizer: Any) -> None:
            if step % 2 == 0:
                anchors.append([state.anchor.clone() for state in engine.sync.states])

        return train(rank, 2, config, 9, before_step=note, data_rank=by_replica), anchors

    run, anchors = run_ranks(2, train_noting)[0]
    means = [[old - new for old, new in zip(*pair, strict=True)] for pair in itertools.pairwise(anchors)]
    expected = [
        [float(torch.cosine_similarity(old, new, dim=0)) for old, new in zip(*pair, strict=True)]
        for pair in itertools.pairwise(means)
    ]
    found = [record.pseudo_grad_cosines for record in run.records]
    assert all(math.isnan(cosine) for cosine in found[0]), "there was none before"
    assert found[1:4] == [pytest.approx(row, abs=1e-5) for row in expected]
    assert run.records[2].pseudo_grad_cosine == pytest.approx(sum(expected[1]) / len(expected[1]))
    for shape, overlap in (((2, 2), "forward"), ((2, 1), "forward")):
        other = runs(*shape, dataclasses.replace(config, overlap=overlap), 9, data_rank=by_replica)[0]
        assert [r.pseudo_grad_cosines for r in other.records[1:]] == [pytest.approx(row, abs=1e-4) for row in found[1:]]


@pytest.mark.parametrize("shape", [(2, 1), (2, 2)])
def test_a_delay_without_a_step_is_no_delay(shape: tuple[int, int]) -> None:
    """Ended before the next step, a delayed sync is a blocking one, bit for bit, and leaves the replicas equal."""

    def end_now(step: int, engine: Any, model: nn.Module, optimizer: Any) -> None:
        engine.flush()
        assert engine.replicas_equal

    delayed = runs(*shape, dataclasses.replace(FULL, overlap="delayed", delay_steps=3), before_step=end_now)
    blocking = runs(*shape, dataclasses.replace(FULL, overlap="none"), before_step=end_now)
    assert_same(delayed[0].params, blocking[0].params)
    assert [r.clipped_units for r in delayed[0].records] == [r.clipped_units for r in blocking[0].records]
    for one, other in zip(delayed[0].records, blocking[0].records, strict=True):
        assert one.pseudo_grad_norm == other.pseudo_grad_norm


@pytest.mark.parametrize("shape", [(2, 1), (2, 2)])
def test_a_sync_of_all_through_host_memory_is_the_same(shape: tuple[int, int]) -> None:
    """As it is with delayed syncs on CUDA, where the others may be at one of these."""
    config = dataclasses.replace(FULL, overlap="delayed", delay_steps=2, compression="int8", fragments=1)

    def flush(step: int, engine: Any, model: nn.Module, optimizer: Any) -> None:
        if step in (4, 6):
            engine.flush()

    def in_host(step: int, engine: Any, model: nn.Module, optimizer: Any) -> None:
        engine._rounds.at_once = Delayed(engine.sync, at_once)
        flush(step, engine, model, optimizer)

    usual, other = runs(*shape, config, before_step=flush), runs(*shape, config, before_step=in_host)
    assert_same(usual[0].params, other[0].params)
    assert [r.sync for r in usual[0].records] == [r.sync for r in other[0].records]


def test_all_replicas_hold_the_same_bits_after_every_sync() -> None:
    bits: dict[int, list[list[Tensor]]] = {}

    def keep(step: int, engine: Any, model: nn.Module, optimizer: Any) -> None:
        if engine.replicas_equal:
            parts = [part.clone() for unit in engine.units for part in unit.parts()]
            bits.setdefault(engine.peers.layout.rank, []).append(parts)

    config = dataclasses.replace(FULL, overlap="none")
    runs(3, 2, config, before_step=keep)
    assert len(bits) == 6
    assert len(bits[0]) == 5, "before steps 0, 1 and 2 (warm-up), 5 and 8 (syncs)"
    for first in (0, 1):
        for other in (2 + first, 4 + first):
            for mine, theirs in zip(bits[first], bits[other], strict=True):
                assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_replicas_that_start_apart_take_replica_0() -> None:
    apart = run_ranks(4, lambda rank: train(rank, 2, FULL, 5, seed=rank // 2))
    together = run_ranks(4, lambda rank: train(rank, 2, FULL, 5, seed=0))
    for one, other in zip(apart, together, strict=True):
        assert_same(one.params, other.params)


class Scalar(nn.Module):
    """One parameter p and the loss |p - x|_1 summed, so SGD moves p by lr a step towards x."""

    blocks = ()

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([0.0]))


def test_a_trajectory_done_on_paper() -> None:
    """Two replicas, one parameter, tau = 1, outer Nesterov with lr 0.5 and momentum 0.5, uniform weights, no penalty.

    Inner SGD with lr 1 on the losses p (gradient 1) and 3p (gradient 3), so each interval the pseudo-gradients are
    1 and 3, their mean g = 2. A starts at 0, the velocity v at 0.

        sync 1: v = 0.5 * 0   + 2 = 2    A = 0      - 0.5 (2 + 0.5 * 2)   = -1.5
        sync 2: v = 0.5 * 2   + 2 = 3    A = -1.5   - 0.5 (2 + 0.5 * 3)   = -3.25
        sync 3: v = 0.5 * 3   + 2 = 3.5  A = -3.25  - 0.5 (2 + 0.5 * 3.5) = -5.125
    """
    from torch.nn.parallel import DistributedDataParallel

    from hf_edit.peers.group import ProcessGroupPeers
    from hf_edit.peers.layout import Layout
    from hf_edit.sync.engine import Engine

    config = EDiTConfig(
        sync_interval=1, outer_lr=0.5, outer_momentum=0.5, weighting="uniform", anomaly_threshold=None,
        max_pseudo_grad_norm=None, overlap="none", outer_warmup_syncs=0,
    )  # fmt: skip

    def body(rank: int) -> list[float]:
        model = DistributedDataParallel(Scalar())
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        engine = Engine(model, optimizer, config, ProcessGroupPeers(Layout.split(2, 2, rank), 30.0))
        seen = []
        for _ in range(3):
            model.module.p.grad = torch.tensor([1.0 if rank == 0 else 3.0])
            optimizer.step()
            engine.step()
            seen.append(model.module.p.item())
        return seen

    assert run_ranks(2, body) == [[-1.5, -3.25, -5.125]] * 2


def test_losses_of_16_bits_add_up_exactly() -> None:
    """FSDP2 hands the loss back in bf16, whose sum of 128 losses of 3.1 would be 430."""

    def body(rank: int) -> float:
        run = train(rank, 2, EDiTConfig(sync_interval=4), 1)
        run.engine.counts.tallies["loss"] = 0.0
        for _ in range(128):
            run.engine.counts.tally(loss=torch.tensor(3.1, dtype=torch.bfloat16))
        return float(run.engine.counts.tallies["loss"])

    assert run_ranks(2, body) == [128 * 3.09375] * 2
