"""The monitor of losses, on paper."""

from __future__ import annotations

import math

import pytest

from hf_edit.method.spikes import WARMUP_STEPS, LossMonitor, Place


def at(step: int) -> Place:
    return Place(step, epoch=step // 10, batch=step % 10)


def warm(threshold: float = 6.0, max_consecutive: int = 3) -> LossMonitor:
    monitor = LossMonitor(threshold, max_consecutive)
    for step in range(40):
        assert monitor.update(2.0 + 0.1 * (step % 2), at(step)) == 0
    return monitor


def test_a_spike_is_sized_and_feeds_no_statistics() -> None:
    monitor = warm()
    assert monitor.mean == pytest.approx(2.05, abs=0.01)
    assert math.sqrt(monitor.variance) == pytest.approx(0.05, rel=0.1)
    before = monitor.mean, monitor.variance
    assert monitor.update(4.0, at(40)) == pytest.approx((4.0 - before[0]) / math.sqrt(before[1]))
    assert (monitor.mean, monitor.variance) == before
    assert monitor.update(2.05, at(41)) == 0
    assert monitor.streak == 0


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_a_spike_from_the_first_step(loss: float) -> None:
    monitor = LossMonitor(6.0, 3)
    assert monitor.update(loss, at(0)) == math.inf
    assert (monitor.count, monitor.spikes) == (0, 1)


def test_the_first_losses_are_no_spikes() -> None:
    monitor = LossMonitor(6.0, 3)
    assert [monitor.update(loss, at(0)) for loss in (10.0, 9.0, 50.0)] == [0, 0, 0]


def test_a_change_for_good_is_the_new_normal() -> None:
    monitor = warm(max_consecutive=3)
    assert all(monitor.update(9.0, at(step)) for step in (40, 41, 42))
    assert [monitor.update(9.0, at(step)) for step in range(43, 43 + WARMUP_STEPS)] == [0] * WARMUP_STEPS
    assert monitor.mean == pytest.approx(9.0)


def test_numbers_that_are_not_finite_are_no_new_normal() -> None:
    monitor = warm(max_consecutive=2)
    assert [monitor.update(math.nan, at(step)) for step in range(5)] == [math.inf] * 5
    assert monitor.streak == 5
    assert monitor.update(2.0, at(5)) == 0


def test_the_largest_is_told_once() -> None:
    monitor = warm()
    for step, loss in ((51, 4.0), (52, 2.0), (53, 6.0), (54, 5.0)):
        monitor.update(loss, at(step))
    told = monitor.take()
    assert told["spikes"] == 3
    assert (told["spike_loss"], told["spike_step"], told["spike_epoch"], told["spike_batch"]) == (6.0, 53, 5, 3)
    assert set(monitor.take().values()) == {0}


def test_a_restored_one_goes_on() -> None:
    one, other = warm(), LossMonitor(6.0, 3)
    one.update(5.0, at(40))
    other.restore(one.state())
    assert one == other
