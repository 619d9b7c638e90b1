from __future__ import annotations

import doctest
import math

import pytest
import torch

import hf_edit.method.outer
import hf_edit.method.penalty
import hf_edit.method.schedule
import hf_edit.telemetry.logs
from hf_edit.method.penalty import (
    DetectorState,
    clip_factor,
    detect_anomalies,
    effective_replicas,
    norm_weights,
    relative_weights,
    share_weights,
    square_norm,
)

RULES = dict(threshold=3.0, alpha=0.02, warmup_syncs=10, max_consecutive=3)


@pytest.mark.parametrize(
    "module",
    [hf_edit.method.penalty, hf_edit.method.outer, hf_edit.method.schedule, hf_edit.telemetry.logs],
    ids=lambda m: m.__name__,
)
def test_doctests(module: object) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def feed(state: DetectorState, norms: list[float], **rules: object) -> tuple[list[bool], list[bool], DetectorState]:
    anomalous, restarted, state = detect_anomalies(
        state, torch.tensor([norms], dtype=torch.float64), **{**RULES, **rules}
    )
    return anomalous[0].tolist(), restarted[0].tolist(), state


def warmed_up(replicas: int = 1, norms: tuple[float, ...] = (1.0, 1.2)) -> DetectorState:
    state = DetectorState.zeros(1, replicas)
    for i in range(10):
        anomalous, _, state = feed(state, [norms[i % len(norms)]] * replicas)
        assert anomalous == [False] * replicas
    return state


def test_the_first_norms_are_a_plain_mean_and_variance() -> None:
    state = DetectorState.zeros(1, 1)
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0]
    for value in values:
        _, _, state = feed(state, [value])
    assert float(state.mean) == pytest.approx(sum(values) / len(values))
    assert float(state.variance) == pytest.approx(float(torch.tensor(values).var(correction=0)))
    assert int(state.count) == len(values)


def test_later_norms_are_weighed_with_alpha() -> None:
    state = warmed_up()
    state.count.fill_(1000)
    mean, variance = float(state.mean), float(state.variance)
    _, _, after = feed(state, [1.3])
    d = 1.3 - mean
    assert float(after.mean) == pytest.approx(mean + 0.02 * d)
    assert float(after.variance) == pytest.approx(0.98 * (variance + 0.02 * d * d))


def test_no_norm_is_a_spike_before_the_detector_has_seen_enough() -> None:
    state = DetectorState.zeros(1, 1)
    for i in range(9):
        _, _, state = feed(state, [1.0 + 0.1 * (i % 2)])
    assert feed(state, [50.0])[0] == [False]
    assert feed(warmed_up(), [50.0])[0] == [True]


def test_a_spike_feeds_no_statistics_and_touches_no_other_replica() -> None:
    state = warmed_up(replicas=2)
    anomalous, restarted, after = feed(state, [50.0, 1.1])
    assert anomalous == [True, False]
    assert restarted == [False, False]
    assert float(after.mean[0, 0]) == float(state.mean[0, 0])
    assert int(after.count[0, 0]) == 10
    assert int(after.count[0, 1]) == 11


def test_a_small_norm_is_no_anomaly() -> None:
    assert feed(warmed_up(), [1e-9])[0] == [False]


def test_a_constant_norm_has_z_zero() -> None:
    state = warmed_up(norms=(1.0,))
    assert float(state.variance) == 0.0
    assert feed(state, [2.0])[0] == [False]


@pytest.mark.parametrize("norm", [math.nan, math.inf])
@pytest.mark.parametrize("threshold", [3.0, None])
def test_non_finite_is_always_left_out_and_harms_no_statistics(norm: float, threshold: float | None) -> None:
    state = DetectorState.zeros(1, 2)
    anomalous, _, after = feed(state, [norm, 1.0], threshold=threshold)
    assert anomalous == [True, False]
    assert int(after.count[0, 0]) == 0
    assert float(after.mean[0, 0]) == 0.0
    for _ in range(5):
        anomalous, restarted, after = feed(after, [norm, 1.0], threshold=threshold)
        assert (anomalous, restarted) == ([True, False], [False, False]), "a broken replica is no new normal"


def test_without_threshold_no_finite_norm_is_left_out() -> None:
    assert feed(warmed_up(), [1e6], threshold=None)[0] == [False]


def test_what_stays_anomalous_is_the_new_normal() -> None:
    state = warmed_up()
    seen = []
    for _ in range(5):
        anomalous, restarted, state = feed(state, [50.0])
        seen.append((anomalous[0], restarted[0]))
    assert seen == [(True, False), (True, False), (True, True), (False, False), (False, False)]
    assert float(state.mean) == 50.0
    assert int(state.count) == 2


def test_a_streak_is_broken_by_a_norm_that_passes() -> None:
    state = warmed_up()
    for norm in (50.0, 50.0, 1.1, 50.0, 50.0):
        _, restarted, state = feed(state, [norm])
        assert restarted == [False]
    assert int(state.streak) == 2


def test_norm_weights_are_the_softmax_of_minus_the_norms() -> None:
    norms = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    passed = torch.tensor([[True, True, True]])
    raw = [math.exp(-g / 2.0) for g in (1.0, 2.0, 4.0)]
    assert norm_weights(norms, passed, 2.0)[0].tolist() == pytest.approx([r / sum(raw) for r in raw])


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.5])
def test_who_is_left_out_weighs_exactly_nothing(bad: float) -> None:
    norms = torch.tensor([[bad, 1.0, 1.0]], dtype=torch.float64)
    passed = torch.tensor([[False, True, True]])
    assert norm_weights(norms, passed, 1.0).tolist() == [[0.0, 0.5, 0.5]]
    assert share_weights(torch.tensor([7.0, 1.0, 3.0]), passed).tolist() == [[0.0, 0.25, 0.75]]


def test_nobody_left_weighs_nothing() -> None:
    norms = torch.full((1, 2), math.nan, dtype=torch.float64)
    nobody = torch.tensor([[False, False]])
    assert norm_weights(norms, nobody, 1.0).tolist() == [[0.0, 0.0]]
    assert share_weights(torch.ones(2), nobody).tolist() == [[0.0, 0.0]]


def test_replicas_that_did_no_step_share_equally() -> None:
    assert share_weights(torch.zeros(2), torch.tensor([[True, True]])).tolist() == [[0.5, 0.5]]


def test_the_norm_of_many_equal_numbers() -> None:
    """A plain fp32 sum on a CPU loses 2 % of it."""
    for size in (1 << 24, (1 << 24) + 100, 100):
        assert float(square_norm(torch.full((size,), 0.1))) == pytest.approx(0.01 * size, rel=1e-4)
    assert float(square_norm(torch.zeros(0))) == 0.0


def test_clip_factor() -> None:
    assert float(clip_factor(torch.tensor(20.0), 10.0)) == pytest.approx(10.0 / 20.000001)
    assert float(clip_factor(torch.tensor(9.9), 10.0)) == 1.0
    assert float(clip_factor(torch.tensor(1e9), None)) == 1.0
    assert float(clip_factor(torch.tensor(1e9), math.inf)) == 1.0


def test_effective_replicas() -> None:
    weights = torch.tensor([[0.25] * 4, [1.0, 0.0, 0.0, 0.0]])
    assert effective_replicas(weights).tolist() == [4.0, 1.0]


def test_relative_weights_do_not_know_the_scale() -> None:
    norms = torch.tensor([[1.0, 1.1, 3.0, 50.0]], dtype=torch.float64)
    passed = torch.tensor([[True, True, True, False]])
    weights = relative_weights(norms, passed, 1.0)
    assert torch.allclose(relative_weights(1000 * norms, passed, 1.0), weights)
    assert weights[0, 3] == 0
    assert weights[0, 0] > weights[0, 1] > 2 * weights[0, 2] > 0
    assert torch.allclose(weights.sum(), torch.ones((), dtype=torch.float64))
    assert effective_replicas(norm_weights(40 * norms[:, :2], passed[:, :2], 1.0)) < 1.1, "raw norms pick one"
    assert effective_replicas(relative_weights(40 * norms[:, :2], passed[:, :2], 1.0)) > 1.9
