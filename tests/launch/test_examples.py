"""The examples and the README's blocks, run as they stand."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.launch.launching import ROOT, accelerate_launch

PRETRAIN = ROOT / "examples" / "pretrain.py"


def readme_block(mark: str) -> list[str]:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- {mark} -->\n```bash\n(.*?)```", readme, re.DOTALL)
    assert found, f"README.md has no block after <!-- {mark} -->"
    return found[1].strip().splitlines()


@pytest.mark.timeout(600)
def test_the_main_job_as_the_readme_has_it(tmp_path: Path) -> None:
    words = shlex.split(readme_block("main job")[-1])
    assert words[:3] == ["accelerate", "launch", "--config_file"]
    assert words[4:] == ["examples/pretrain.py"]
    output = accelerate_launch(Path(words[3]).name, ROOT / words[4], "--output_dir", str(tmp_path), timeout=480)
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["layout"] == "2 replicas x 2 shards"
    assert summary["engine"] == "FSDP"
    assert summary["perplexity_trained"] < summary["perplexity_untrained"] / 4
    assert summary["perplexity_trained"] < summary["perplexity_unigram"]
    assert summary["syncs"] == 14
    assert summary["sync_bytes"] < summary["hsdp_bytes"] / 15
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for row in output[output.rindex("\nlayout ") :].strip().splitlines():
        assert row[:27] in readme, "the README shows another summary"
    for name in ("loss.png", "model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / name).stat().st_size > 0


def small(folder: Path) -> list[str]:
    return [
        "--output_dir", str(folder), "--max_steps", "6", "--sync_interval", "2", "--edit_warmup_steps", "1",
        "--vocab_size", "300", "--hidden_size", "32", "--num_layers", "2", "--block_size", "32",
        "--validation_documents", "2", "--max_eval_blocks", "16", "--logging_steps", "1", "--eval_steps", "4",
        "--disable_tqdm", "true",
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_pretrain_reads_files(suffix: str, tmp_path: Path) -> None:
    documents = [f"Document {i} says {' '.join(str(i * j) for j in range(200))}." for i in range(40)]
    path = tmp_path / f"corpus{suffix}"
    if suffix == ".txt":
        path.write_text("\n\n".join(documents), encoding="utf-8")
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"body": text}) for text in documents), encoding="utf-8")
    else:
        import datasets

        datasets.Dataset.from_dict({"body": documents}).to_parquet(path)
    column = [] if suffix == ".txt" else ["--text_column", "body"]
    arguments = ["--train_file", str(path), *column, *small(tmp_path / "out")]
    if suffix == ".jsonl":
        arguments += ["--report_to", "wandb"]
        output = accelerate_launch("cpu_2x2.yaml", PRETRAIN, *arguments, WANDB_DIR=str(tmp_path), WANDB_MODE=None)
        assert output.count("No W&B login was found: logging offline") == 1
        assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb")), "W&B got nothing"
    else:
        output = accelerate_launch("cpu_4x1.yaml", PRETRAIN, *arguments)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["inner_steps"] == 5
    assert summary["syncs"] == 3
    assert "perplexity, trained" in output
