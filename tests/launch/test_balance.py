"""Replicas whose share of a batch follows their speed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.launching import launch_scenarios

SCENARIOS = [
    "the_slow_replica_takes_fewer_rows",
    "shares_change_nothing_in_the_gradient",
    "a_resumed_run_deals_the_same_rows",
    "what_cannot_be_balanced_is_refused",
]


@pytest.mark.parametrize("config", ["cpu_2x2.yaml", "cpu_4x1.yaml"])
def test_the_scenarios_pass(config: str, tmp_path: Path) -> None:
    launch_scenarios(config, "balance", tmp_path, *SCENARIOS)
