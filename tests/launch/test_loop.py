"""`EDiT` in hand-written loops, under every launcher that fits a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch.launching import SCRIPTS, accelerate_launch

SCENARIOS = [
    "a_loop_is_the_simulation",
    "a_loop_accumulates",
    "a_loop_saves_and_loads",
    "a_loop_with_a_warm_up",
    "loops_by_time_save_where_each_was",
    "loops_of_different_length_end_together",
    "a_loop_need_not_ask_for_its_logs",
    "steps_that_fp16_skips_end_a_sync_under_way",
    "what_a_loop_refuses",
]


@pytest.mark.parametrize("config", ["cpu_2x2.yaml", "cpu_4x1.yaml"])
def test_the_scenarios_pass(config: str, tmp_path: Path) -> None:
    output = accelerate_launch(config, SCRIPTS / "looping.py", str(tmp_path), *SCENARIOS)
    assert list(json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))) == SCENARIOS, output
