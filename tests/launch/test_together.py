"""What ranks must do together although each comes to it in its own way."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.launching import launch_scenarios

SCENARIOS = [
    "a_stream_ends_together_wherever_ranks_step_together",
    "a_stream_is_evaluated_as_by_the_plain_trainer",
    "what_all_call_at_steps_of_their_own_is_said",
    "what_one_rank_alone_calls_is_said_on_all",
    "all_resume_from_the_same",
]


@pytest.mark.parametrize("config", ["cpu_2x2.yaml", "cpu_4x1.yaml"])
def test_the_scenarios_pass(config: str, tmp_path: Path) -> None:
    launch_scenarios(config, "together", tmp_path, *SCENARIOS)
