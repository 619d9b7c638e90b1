from __future__ import annotations

import math

import torch

from hf_edit.sync.measure import HostCopy, Interval, Stopwatch


def test_a_lap_is_the_time_inside_the_blocks() -> None:
    now = 0.0
    watch = Stopwatch(torch.device("cpu"), lambda: now)
    with watch:
        now = 2.0
    now = 10.0
    with watch:
        now = 11.0
        first = watch.lap()  # a sync ends inside a block
        now = 11.5
    assert first() == 3.0
    assert watch.lap()() == 0.5
    assert watch.lap()() == 0.0


def test_a_copy_on_the_host_is_the_tensor() -> None:
    assert HostCopy(torch.tensor([1.0, 2.0], dtype=torch.float64)).read() == [1.0, 2.0]


def test_computing_is_what_is_left_of_an_interval() -> None:
    interval = Interval(10.0, exposed=lambda: 2.0, wait_seconds=0.5, network=lambda: 1.5)
    interval.rested_seconds += 3.0
    assert interval.tallies(20.0) == {
        "training_seconds": 5.0,
        "before_exposed_seconds": 2.0,
        "before_wait_seconds": 0.5,
        "before_network_seconds": 1.5,
    }


def test_before_the_first_sync_nothing_was_waited_for() -> None:
    told = Interval(10.0).tallies(14.0)
    assert told.pop("training_seconds") == 4.0
    assert all(map(math.isnan, told.values()))
