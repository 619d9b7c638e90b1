"""What callbacks ask for on one rank, and batches that one replica can learn nothing from, under the launchers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.launching import launch_scenarios

SCENARIOS = [
    "a_flag_of_one_rank_at_any_event_ends_in_one_decision",
    "sigterm_saves_one_step_with_all",
    "batches_without_labels_teach_nothing",
]


@pytest.mark.parametrize("config", ["cpu_2x2.yaml", "cpu_4x1.yaml"])
def test_the_scenarios_pass(config: str, tmp_path: Path) -> None:
    launch_scenarios(config, "decisions", tmp_path, *SCENARIOS)
