"""The examples and the README's blocks, run as they stand."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.launch.launching import ROOT, accelerate_launch

PRETRAIN = ROOT / "examples" / "pretrain.py"


def readme_block(mark: str) -> list[str]:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- {mark} -->\n```bash\n(.*?)```", readme, re.DOTALL)
    assert found, f"README.md has no block after <!-- {mark} -->"
    return found[1].strip().splitlines()


def test_the_main_job_as_the_readme_has_it(tmp_path: Path) -> None:
    words = shlex.split(readme_block("main job")[-1])
    assert words[:3] == ["accelerate", "launch", "--config_file"]
    assert words[4:] == ["examples/pretrain.py"]
    output = accelerate_launch(Path(words[3]).name, ROOT / words[4], "--output_dir", str(tmp_path), fresh=True)
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


def write_corpus(path: Path) -> list[str]:
    """The documents, in a column called "body" where there are columns."""
    documents = [f"Document {i} says {' '.join(str(i * j) for j in range(200))}." for i in range(40)]
    if path.suffix == ".txt":
        path.write_text("\n\n".join(documents), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"body": text}) for text in documents), encoding="utf-8")
    else:
        import datasets

        datasets.Dataset.from_dict({"body": documents}).to_parquet(path)
    return documents


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_files_are_read(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    from common import TextArguments, language_reference, load_text

    path = tmp_path / f"corpus{suffix}"
    documents = write_corpus(path)
    script = TextArguments(train_file=str(path), text_column="text" if suffix == ".txt" else "body")
    assert [text.strip() for text in load_text(script, language_reference)["text"]] == documents


def test_a_stream_holds_out_what_no_process_trains_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    import datasets
    from pretrain import may_be_held_out, split_and_pack

    texts = [f"doc{number:04}" for number in range(1000)]  # with what ends it, a block each
    stream = datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset(num_shards=4)
    script = SimpleNamespace(validation_documents=5, block_size=8, max_eval_blocks=64)
    train, held_out = split_and_pack(script, None, stream, None)

    def documents(blocks: Any) -> list[str]:
        return [bytes(block["input_ids"][:-1]).decode() for block in blocks]

    trained = documents(row for rank in (0, 1) for row in train.shard(2, rank))
    assert len(documents(held_out)) == 5
    assert not set(documents(held_out)) & set(trained)
    assert sorted(trained) == [text for text in texts if not may_be_held_out({"text": text})]
    assert len(trained) > 970


def test_pretrain_reads_a_file_and_reports(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    write_corpus(path)
    output = accelerate_launch(
        "cpu_4x1.yaml", PRETRAIN, "--train_file", str(path), "--text_column", "body", *small(tmp_path / "out"),
        "--report_to", "wandb", WANDB_DIR=str(tmp_path), WANDB_MODE=None,
    )  # fmt: skip
    assert output.count("No W&B login was found: logging offline") == 1
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb")), "W&B got nothing"
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["inner_steps"] == 5
    assert summary["syncs"] == 3
    assert "perplexity, trained" in output


def test_wrong_data_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    from common import TextArguments, language_reference, load_text, require_columns

    for flags, text in (
        ({"train_file": "corpus.csv"}, "--train_file corpus.csv: the name must end in .txt, .jsonl, .json, .parquet"),
        ({"text_column": "body"}, r"columns \['text'\], but not \['body'\]. Name the one that holds the text with"),
    ):
        with pytest.raises(SystemExit, match=text):
            load_text(TextArguments(**flags), language_reference)
    with pytest.raises(SystemExit, match=r"not \['label'\]. Rename yours"):
        require_columns(language_reference(), ["text", "label"], "Rename yours.")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--sync_intreval=4"], "--sync_intreval is no flag of this script. Did you mean --sync_interval?"),
        (["--sync_interval=4", "corpus.txt"], "corpus.txt is no flag of this script. --help shows them all."),
        (["--sync_interval", "0"], "sync_interval=0: a whole number of at least 1 is needed"),
    ],
)
def test_a_wrong_flag_is_refused_by_one_process(words: list[str], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *words])
    from common import TextArguments, parse

    from hf_edit import EDiTConfig

    for rank in "01":
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as refused:
            parse((TextArguments, EDiTConfig), {}, "An example.")
        assert (text in str(refused.value)) == (rank == "0")
        assert refused.value.code != 0


# -- the other examples, small ----------------------------------------------------------------------------------------


def example(name: str, config: str, folder: Path, *arguments: str, **environment: str | None) -> tuple[str, dict]:
    """Runs examples/NAME.py; its output and summary.json."""
    output = accelerate_launch(
        config, ROOT / "examples" / f"{name}.py", "--output_dir", str(folder), *arguments, **environment
    )
    return output, json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def copied(folder: Path, source: str) -> Path:
    """A script beside common.py, as one has it who copies an example."""
    shutil.copy(ROOT / "examples" / "common.py", folder)
    script = folder / "script.py"
    script.write_text(source, encoding="utf-8")
    return script


def plain_finetune() -> str:
    """examples/finetune.py with its two lines of EDiT put back to the Trainer's."""
    source = (ROOT / "examples" / "finetune.py").read_text(encoding="utf-8")
    code = source.split("from __future__", 1)[1]
    for line, before in (
        ("\nfrom hf_edit import EDiTTrainer\n", "\nfrom transformers import Trainer\n"),
        ("    trainer = EDiTTrainer(\n", "    trainer = Trainer(\n"),
    ):
        assert code.count(line) == 1
        code = code.replace(line, before)
    assert "EDiT" not in code.replace('"edit/', "")
    return '"""Plain."""\n\nfrom __future__' + code


def plain_loop() -> str:
    """examples/accelerate_loop.py without its lines of EDiT, and with the lines that stood in the others' place."""
    lines = (ROOT / "examples" / "accelerate_loop.py").read_text(encoding="utf-8").splitlines()
    code = lines[lines.index("from __future__ import annotations") :]
    added = [line for line in code if line.endswith("# EDiT")]
    assert 1 <= len(added) <= 5
    plain = []
    for line in code:
        indent = line[: len(line) - len(line.lstrip())]
        if line in added:
            if line.lstrip().startswith("with "):
                plain.append(f"{indent}if True:")
        elif "# EDiT, was: " in line:
            plain.append(indent + line.split("# EDiT, was: ")[1])
        else:
            plain.append(line)
    assert not [line for line in plain if re.search(r"EDiT|\bedit\b(?!/)", line)]
    return "\n".join(['"""Plain."""', "", *plain])


SHORT = ["--disable_tqdm", "true", "--logging_steps", "8"]


def test_finetune_syncs_as_edit_config_says(tmp_path: Path) -> None:
    settings = tmp_path / "edit.yaml"
    settings.write_text("sync_interval: 8\nouter_lr: 1.0\nouter_momentum: 0.0\n", encoding="utf-8")
    _, summary = example(
        "finetune", "cpu_2x2.yaml", tmp_path / "out", "--max_steps", "24", "--warmup_steps", "2",
        "--max_eval_blocks", "32", "--block_size", "64", *SHORT, EDIT_CONFIG=str(settings),
    )  # fmt: skip
    assert summary["perplexity_after"] < summary["perplexity_before"] / 1.1
    assert summary["syncs"] == 3
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_finetune_is_two_lines_away_from_a_plain_trainer(tmp_path: Path) -> None:
    # Without hf_edit nothing keeps torch 2.13 from aborting now and then at the exit (peers/group.py says why).
    script = copied(tmp_path, plain_finetune() + "\n    import time\n\n    time.sleep(1)\n")
    output = accelerate_launch(
        "cpu_4x1.yaml", script, "--output_dir", str(tmp_path / "out"), "--max_steps", "8", "--warmup_steps", "2",
        "--max_eval_blocks", "16", "--block_size", "64", *SHORT,
    )  # fmt: skip
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["perplexity_after"] < summary["perplexity_before"]
    assert summary["syncs"] == 0
    assert "EDiT:" not in output


@pytest.mark.parametrize(("config", "lora"), [("cpu_4x1.yaml", False), ("cpu_2x2.yaml", True)])
def test_sft(config: str, lora: bool, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    rows = [{"instruction": f"Say {i % 7} twice.", "input": "", "output": f"{i % 7} {i % 7}"} for i in range(200)]
    train_file = tmp_path / "train.jsonl"
    train_file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    output, summary = example(
        "sft", config, tmp_path / "out", "--train_file", str(train_file), "--eval_examples", "32", "--max_steps", "16",
        "--warmup_steps", "2", "--sync_interval", "8", "--per_device_train_batch_size", "2", *SHORT,
        *(["--lora", "true"] if lora else []),
    )  # fmt: skip
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 0.3
    assert summary["syncs"] == 2
    assert "right tokens" in output
    assert (tmp_path / "out" / ("adapter_model.safetensors" if lora else "model.safetensors")).is_file()


def test_classify_keeps_the_best(tmp_path: Path) -> None:
    rows = [{"text": f"{word} film number {i}", "label": label} for i in range(120)
            for label, word in enumerate(("dull", "fine", "great"))]  # fmt: skip
    train_file = tmp_path / "train.jsonl"
    train_file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    _, summary = example(
        "classify", "cpu_2x2.yaml", tmp_path / "out", "--train_file", str(train_file), "--max_steps", "16",
        "--warmup_steps", "2", "--sync_interval", "4", "--eval_steps", "8", "--save_steps", "8", "--vocab_size", "500",
        "--per_device_train_batch_size", "8", *SHORT,
    )  # fmt: skip
    assert summary["layout"] == "2 replicas x 2 shards"
    assert summary["accuracy_after"] > max(summary["accuracy_majority"], summary["accuracy_before"]) + 0.2
    assert summary["syncs"] == 4
    assert Path(summary["best_checkpoint"]).parent == tmp_path / "out"


LOOP = ["--max_steps", "32", "--eval_steps", "32", "--batch_size", "2", "--block_size", "64", "--eval_blocks", "32"]


def test_accelerate_loop(tmp_path: Path) -> None:
    output, summary = example("accelerate_loop", "cpu_2x2.yaml", tmp_path, *LOOP, "--warmup_steps", "2")
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 1.0
    assert summary["syncs"] == 2
    assert output.count("'edit/pseudo_grad_norm'") == 2
    assert (tmp_path / "state" / "edit" / "manifest.json").is_file()
    assert (tmp_path / "model.safetensors").is_file()


def test_accelerate_loop_is_a_plain_loop_with_a_few_lines_more(tmp_path: Path) -> None:
    script = copied(tmp_path, plain_loop())
    accelerate_launch("cpu_4x1.yaml", script, "--output_dir", str(tmp_path), *LOOP, "--warmup_steps", "2")
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 1.0
    assert summary["syncs"] == 0
