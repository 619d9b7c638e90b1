"""PEFT, TRL and Seq2SeqTrainer with replicas, under every launcher that fits a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.launching import launch_scenarios

SCENARIOS = [
    "only_adapters_cross_and_are_saved",
    "supervised_fine_tuning_with_trl",
    "sequence_to_sequence",
    "trl_trainers_agree_with_plain_ones",
    "sampling_by_time_with_a_slow_replica",
]


@pytest.mark.parametrize("config", ["cpu_2x2.yaml", "cpu_4x1.yaml"])
def test_the_scenarios_pass(config: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    launch_scenarios(config, "libraries", tmp_path, *SCENARIOS)
