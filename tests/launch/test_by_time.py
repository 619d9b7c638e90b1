"""A-EDiT under every launcher that fits a CPU: replicas of different speed, and nobody waits for ever."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch.launching import SCRIPTS, accelerate_launch

SCENARIOS = [
    "a_slow_replica_keeps_nobody",
    "nor_with_delayed_syncs",
    "epochs_are_of_all_replicas_together",
    "data_that_run_out_on_one_replica_end_all",
    "also_with_delayed_syncs_and_by_steps",
    "what_one_rank_wants_all_do",
    "a_resumed_run_reads_on_where_each_replica_was",
    "a_callback_that_evaluates_is_refused",
]


SCRIPT = SCRIPTS / "by_time.py"


@pytest.mark.parametrize("config", ["cpu_2x2.yaml", "cpu_4x1.yaml"])
def test_the_scenarios_pass(config: str, tmp_path: Path) -> None:
    output = accelerate_launch(config, SCRIPT, str(tmp_path), *SCENARIOS)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert list(results) == SCENARIOS, output


def test_a_checkpoint_goes_on_with_another_layout(tmp_path: Path) -> None:
    saved = "a_resumed_run_reads_on_where_each_replica_was"
    resumed = "on_another_layout_it_goes_on_from_the_global_step"
    accelerate_launch("cpu_4x1.yaml", SCRIPT, str(tmp_path), saved)
    output = accelerate_launch("cpu_2x2.yaml", SCRIPT, str(tmp_path), resumed)
    assert list(json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))) == [resumed], output
