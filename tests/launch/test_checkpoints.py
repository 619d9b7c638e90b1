"""Checkpoints under the launchers: resumed runs agree bit for bit, in another layout number by number."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.launching import SCRIPTS, launch_scenarios, run, torchrun

SCENARIOS = [
    "resumed_runs_are_bit_for_bit",
    "resumed_behind_an_epochs_last_step",
    "a_checkpoint_that_is_not_whole_is_passed_over",
    "another_model_is_refused_another_method_is_told",
    "delayed_syncs_resume_bit_for_bit",
    "a_users_outer_optimizer_resumes",
    "a_bf16_model_resumes",
    "limits_and_the_best_model",
]


@pytest.mark.parametrize(
    ("config", "also"),
    [
        ("cpu_2x2.yaml", ["sharded_checkpoints"]),
        ("cpu_4x1.yaml", ["plain_trainers_checkpoints", "every_kind_of_data_resumes_in_later_epochs"]),
    ],
)
def test_the_scenarios_pass(config: str, also: list[str], tmp_path: Path) -> None:
    launch_scenarios(config, "checkpoints", tmp_path, *SCENARIOS, *also)


def test_other_numbers_of_replicas_and_shards(tmp_path: Path) -> None:
    """2x2 to 4x1, 1x4, 2x1 and back: everything is where it was, and the loss goes on falling."""
    script = SCRIPTS / "resizing.py"
    output = torchrun(4, script, str(tmp_path), "a:2:", "b:4:a", "c:2:b", "d:1:c", "e:2:d")
    output += torchrun(2, script, str(tmp_path), "f:2:a")
    output += torchrun(4, script, str(tmp_path), "g:2:f")
    assert output.count("passed: ") == 7
    assert "the checkpoint is of 2 replicas x 2 shards, this run has 4 replicas x 1 shards" in output
    assert "of replica 0 from 0, 1 from 1, 2 from 0, 3 from 1." in output


def test_what_a_kill_leaves_is_never_taken_for_whole(tmp_path: Path) -> None:
    """Twenty kills at random moments; `python -m tests.launch.scripts.killing FOLDER SEED KILLS` repeats it."""
    output = run([str(SCRIPTS / "killing.py"), str(tmp_path), "1", "20"], timeout=900, environment={})
    assert "passed: 20 kills" in output
