"""What makes replicas learn as well as together."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.launching import launch_scenarios

SCENARIOS = [
    "simulation_muon",
    "muon_of_one_replica_is_the_plain_trainers",
    "muon_resumes_bit_for_bit",
    "simulation_moments",
    "moments_resume_bit_for_bit",
]


@pytest.mark.parametrize("config", ["cpu_2x2.yaml", "cpu_4x1.yaml"])
def test_the_scenarios_pass(config: str, tmp_path: Path) -> None:
    launch_scenarios(config, "learning", tmp_path, *SCENARIOS)
