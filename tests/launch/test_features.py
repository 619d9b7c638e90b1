"""What the Trainer can do, with replicas, under every launcher that fits a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.launching import launch_scenarios

SCENARIOS = [
    "features_agree_with_the_plain_trainer",
    "what_one_rank_wants_all_do_at_the_next_sync",
    "a_batch_too_large_for_one_rank_is_made_smaller_on_all",
    "steps_that_fp16_skips_are_no_inner_steps",
    "buffers_follow_and_blocks_may_rest",
    "losses_that_are_no_numbers_are_filtered_from_the_logs",
    "predictions_are_of_equal_replicas",
    "a_subclass_may_override_without_super",
    "models_that_fsdp2_cannot_shard_are_refused",
]


@pytest.mark.parametrize("config", ["cpu_2x2.yaml", "cpu_4x1.yaml"])
def test_the_scenarios_pass(config: str, tmp_path: Path) -> None:
    results, _ = launch_scenarios(config, "features", tmp_path, *SCENARIOS)
    left_out = [name for name, result in results.items() if "not here" in result]
    assert left_out == ([] if config == "cpu_4x1.yaml" else SCENARIOS[2:5]), results
