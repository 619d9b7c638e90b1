"""Wrong settings are refused before any training, with a text that says what was given, what is needed, what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.launch.launching import SCRIPTS, run, torchrun

PROMISED = {
    "fewer ranks than replicas": ["num_replicas=4, but only 2 process(es) take part", "Launch at least 4 processes"],
    "not divisible": ["num_replicas=3, but only 2 process(es)"],
    "interval 0": ["sync_interval=0", "Give sync_interval=1 to sync after every step"],
    "both triggers": ["sync_interval=4 and sync_seconds=3.0 are both set", "Leave out sync_seconds"],
    "unknown setting": ["Unknown EDiTConfig settings: ['tau']", "Known:"],
    "delayed too long": ["delay_steps=4, but a sync begins every sync_interval=3", "Set delay_steps to at most"],
    "FSDP1": ["fsdp_version=1: EDiT needs FSDP2", "fsdp_version: 2"],
    "DeepSpeed": ["DeepSpeed is on", "set fsdp=True"],
    "loaded in shards": ["sharded when it was loaded (DistributedConfig)", "without distributed_config"],
    "tensor parallelism": ["tp_size=2", "Set tp_size to 1"],
    "own training step": ["OwnStep.training_step() does not call super().training_step()", "(EDiTMixin, OwnStep)"],
    "own logs": ["OwnLogs._maybe_log_save_evaluate() does not call super()"],
    "own accelerator": ["OwnAccelerator.create_accelerator_and_postprocess() does not call super()"],
    "self-moving optimizer": ["SelfMoving moves the parameters by its own state", "optim='adamw_torch'"],
    "resume": ["No valid checkpoint found in output directory"],
}


def test_the_texts(tmp_path: Path) -> None:
    torchrun(2, SCRIPTS / "refusals.py", str(tmp_path))
    texts = json.loads((tmp_path / "texts.json").read_text(encoding="utf-8"))
    assert set(texts) == set(PROMISED)
    for name, promises in PROMISED.items():
        for promise in promises:
            assert promise in texts[name], f"{name}: {texts[name]}"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="with an accelerator the processes find each other")
def test_lone_processes_are_refused(tmp_path: Path) -> None:
    """The launcher starts two processes, but nothing tells Accelerate to use the CPU: each would train alone."""
    output = torchrun(2, SCRIPTS / "alone.py", str(tmp_path), ACCELERATE_USE_CPU="false")
    assert output.count("refused: The launcher started 2 processes (WORLD_SIZE=2), but Accelerate sees 1") == 2
    assert output.count("TrainingArguments(use_cpu=True)") == 2


def test_one_process_is_a_plain_trainer_and_says_so(tmp_path: Path) -> None:
    output = run([str(SCRIPTS / "alone.py"), str(tmp_path)], 120, {"ACCELERATE_USE_CPU": "true"})
    assert output.count("EDiT: one replica, so this is a plain Trainer") == 1
    assert "callbacks of hf_edit: []" in output
