"""A-EDiT under every launcher that fits a CPU: replicas of different speed, and nobody waits for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.launching import launch_scenarios

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


@pytest.mark.parametrize("config", ["cpu_2x2.yaml", "cpu_4x1.yaml"])
def test_the_scenarios_pass(config: str, tmp_path: Path) -> None:
    launch_scenarios(config, "by_time", tmp_path, *SCENARIOS)


def test_a_checkpoint_goes_on_with_another_layout(tmp_path: Path) -> None:
    saved = "a_resumed_run_reads_on_where_each_replica_was"
    resumed = "on_another_layout_it_goes_on_from_the_global_step"
    launch_scenarios("cpu_4x1.yaml", "by_time", tmp_path, saved)
    launch_scenarios("cpu_2x2.yaml", "by_time", tmp_path, resumed)
