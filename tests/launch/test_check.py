"""`hf-edit check --measure` under a launcher, as a user starts it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hf_edit import EDiTConfig
from tests.launch.launching import launcher, run

TINY = dict(
    model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=64, hidden_size=16, intermediate_size=32,
    num_hidden_layers=2, num_attention_heads=2,
)  # fmt: skip


def measured(config: str, *words: str) -> str:
    command = [*launcher(config), "-m", "hf_edit.cli.check", "--measure", "--minutes", "0.01", *words]
    return run(command, 600, {"ACCELERATE_USE_CPU": "true", "EDIT_CONFIG": None})


def numbers_of(pattern: str, output: str) -> list[float]:
    found = re.findall(pattern, output)
    assert len(found) == 1, f"{pattern} is there once: the first rank prints alone\n{output}"
    return [float(number) for number in (found[0] if isinstance(found[0], tuple) else found)]


def check_output(output: str, layout: str, num_replicas: int) -> None:
    assert output.count(f"layout       {layout} on 1 machine, cpu") == 1
    assert numbers_of(r"link +([\d.e+]+) [GM]bit/s a replica", output)[0] > 0
    assert numbers_of(r"round trip ([\d.e-]+) ms", output)[0] > 0
    (speeds,) = re.findall(r"speeds +of the replicas' hosts: (.*)", output)
    assert len(speeds.split(", ")) == num_replicas
    assert "all on this machine: no network's rate" in output


def test_shards_and_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
    path = tmp_path / "edit.yaml"
    output = measured("cpu_2x2.yaml", "--model", str(tmp_path), "--tokens", "16", "--output", str(path))
    check_output(output, "2 replicas x 2 shards", 2)
    assert numbers_of(r"step +([\d.e-]+) s, spread", output)[0] > 0
    config = EDiTConfig.load(path)
    assert config.sync_interval >= 1
    assert path.read_text(encoding="utf-8") in output


def test_single_ranks_and_a_given_step(tmp_path: Path) -> None:
    path = tmp_path / "edit.yaml"
    words = ["--parameters", "350m", "--step_seconds", "2", "--output", str(path)]
    check_output(measured("cpu_4x1.yaml", *words), "4 replicas x 1 shards", 4)
    assert EDiTConfig.load(path).sync_interval >= 1
    written = path.read_bytes()
    with pytest.raises(AssertionError, match=re.escape(f"refused: {path} exists already")):
        measured("cpu_4x1.yaml", *words)
    assert path.read_bytes() == written
