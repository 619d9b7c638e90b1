"""Bytes between two hosts, counted where they cross: nothing in inner steps, the parameters once in a sync."""

from __future__ import annotations

import sys

import pytest

from tests.launch.launching import ROOT

sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))

from hosts import unavailable
from traffic import measure


@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
@pytest.mark.parametrize(
    ("per_host", "busy", "by_time"), [(2, True, False), (1, True, False), (2, False, False), (2, True, True)]
)
def test_inner_steps_send_nothing_and_a_sync_the_parameters_once(per_host: int, busy: bool, by_time: bool) -> None:
    figures = measure(per_host, busy, by_time)
    for host in (0, 1):
        assert abs(figures["bytes_of_20_inner_steps"][host]) < 4096, figures
        sent, needed = figures["bytes_of_one_sync"][host], figures["parameter_bytes"]
        assert 0.95 * needed < sent < 1.02 * needed + 65536, figures
