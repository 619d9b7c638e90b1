from __future__ import annotations

import torch

from hf_edit.sync.measure import HostCopy, Stopwatch


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
