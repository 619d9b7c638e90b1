"""EDiTTrainer under every launcher that fits a CPU: one launch a configuration, several scenarios in each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.launching import CONFIGS, SCRIPTS, launch_scenarios, torchrun

SCENARIOS = [
    "simulation_adamw",
    "gradients_are_clipped_in_the_replica",
    "simulation_sgd_accumulating",
    "tokens_are_averaged_over_the_replica",
    "a_users_trainer_keeps_its_loss_and_its_scale",
    "a_stream_is_read_by_every_process_itself",
    "an_unseeded_sampler_is_made_equal_once",
    "warmup_is_the_plain_trainer",
    "overlap_and_offload_change_no_bit",
    "simulation_delayed",
    "delayed_syncs_do_not_depend_on_timing",
    "logs",
    "a_forgotten_training_leaves_no_mesh",
    "units_are_cut_alike",
    "saved_models_load_anywhere",
    "training_twice_and_called_in_between",
]
UNITS = {
    "tied=False": ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm+lm_head"],
    "tied=True": ["model.embed_tokens+model.norm+lm_head", "model.layers.0", "model.layers.1"],
}
KEYS = {
    "edit/sync_seconds", "edit/exposed_seconds", "edit/wait_seconds", "edit/sync_bytes", "edit/inner_steps",
    "edit/pseudo_grad_norm", "edit/clipped_units", "edit/anomalous_replicas", "edit/rollbacks",
    "edit/effective_replicas", "edit/replica_loss_mean", "edit/replica_loss_spread", "edit/tokens_per_second",
}  # fmt: skip


@pytest.mark.parametrize("config", ["cpu_2x2.yaml", "cpu_4x1.yaml"])
def test_the_scenarios_pass(config: str, tmp_path: Path) -> None:
    results, output = launch_scenarios(config, "scenarios", tmp_path, *SCENARIOS)
    assert set(results["logs"]["keys"]) >= KEYS
    assert results["logs"]["inner_steps"] == [4, 4, 1]
    assert {cut: list(units) for cut, units in results["units_are_cut_alike"].items()} == UNITS
    layout = {"cpu_2x2.yaml": "2 replicas x 2 shards", "cpu_4x1.yaml": "4 replicas x 1 shards"}[config]
    assert f"EDiT: {layout}." in output
    moves = "what falls between two syncs (evaluate) moves to the next sync."
    assert output.count(f"{moves} Make eval_steps and save_steps multiples of sync_interval") == 1
    assert output.count(f"{moves} A delayed one is applied delay_steps=3 steps after it begins") == 3, "once a training"


def test_fsdp_from_training_arguments(tmp_path: Path) -> None:
    """The same without an Accelerate config file: FSDP2 asked for in TrainingArguments, replicas in EDiTConfig."""
    output = torchrun(4, SCRIPTS / "from_arguments.py", str(tmp_path))
    assert "passed: 2x2 and 4x1" in output


def test_every_configuration_is_read() -> None:
    import yaml

    for path in sorted(CONFIGS.glob("*.yaml")):
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        sizes = settings.get("parallelism_config")
        if sizes:
            product = sizes["parallelism_config_dp_replicate_size"] * sizes["parallelism_config_dp_shard_size"]
            assert product == settings["num_processes"], path.name
            assert settings["fsdp_config"]["fsdp_version"] == 2
        assert path.name in (CONFIGS / "README.md").read_text(encoding="utf-8")
