"""`EDiT` in hand-written loops, under every launcher that fits a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.launching import launch_scenarios

SCENARIOS = [
    "a_loop_is_the_simulation",
    "a_loop_accumulates",
    "a_loop_saves_and_loads",
    "a_loop_keeps_codes_fragments_and_settings",
    "a_loop_with_a_warm_up",
    "loops_by_time_save_where_each_was",
    "loops_of_different_length_end_together",
    "a_loop_need_not_ask_for_its_logs",
    "steps_that_fp16_skips_end_a_sync_under_way",
    "what_the_accelerator_is_given_stays",
    "what_a_loop_refuses",
]


@pytest.mark.parametrize("config", ["cpu_2x2.yaml", "cpu_4x1.yaml"])
def test_the_scenarios_pass(config: str, tmp_path: Path) -> None:
    launch_scenarios(config, "looping", tmp_path, *SCENARIOS)
