#!/usr/bin/env python
"""Fine-tunes a causal language model: an ordinary Trainer script, of which two lines are EDiT's.

    EDIT_CONFIG=examples/finetune_edit.yaml \\
        accelerate launch --config_file accelerate_configs/cpu_2x2.yaml examples/finetune.py

The two lines are the import and the constructor; with `from transformers import Trainer` and `Trainer(` in their place
it trains as it did before. What EDiT is to do stands in the file that EDIT_CONFIG names; without the variable, the
paper's settings hold (a sync after every 128 steps).

Without --model it goes on from edit_pretrain, where examples/pretrain.py has left its Llama, or else starts from a
small Llama that knows nothing. Without --dataset or --train_file it reads Python's language reference, as `help()` has
it. So it needs no download.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

if not torch.accelerator.is_available():  # Accelerate must be told, or each process trains alone
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_edit import EDiTTrainer

PRETRAINED = Path("edit_pretrain")
EOS = "<|endoftext|>"


@dataclass
class ScriptArguments:
    """What to fine-tune, and on what."""

    _argument_group_name = "Model and data"

    model: str | None = field(
        default=None,
        metadata={
            "help": f"A model's name on the Hub, or its folder. Unset: {PRETRAINED} if it exists, else a new one."
        },
    )
    dataset: str | None = field(default=None, metadata={"help": "Name of a dataset on the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of --dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of --dataset."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    train_file: str | None = field(default=None, metadata={"help": "A .txt, .jsonl or .parquet file to train on."})
    validation_share: float = field(default=0.1, metadata={"help": "Share of the documents held out for validation."})
    max_eval_blocks: int = field(default=256, metadata={"help": "Blocks of the held-out text to evaluate on."})
    block_size: int = field(default=128, metadata={"help": "Tokens in a packed block."})


# What differs from TrainingArguments' own defaults: a run of minutes on two CPU cores.
DEFAULTS: dict[str, Any] = dict(
    output_dir="edit_finetune",
    max_steps=192,
    per_device_train_batch_size=4,
    per_device_eval_batch_size=16,
    learning_rate=2e-3,
    lr_scheduler_type="cosine",
    warmup_steps=16,
    logging_steps=16,
    eval_on_start=True,
    save_strategy="no",
    seed=0,
)


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, TrainingArguments), description=__doc__.split("\n\n")[0])
    parser.set_defaults(**DEFAULTS)
    script, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    with args.main_process_first(desc="preparing the data"):  # the others then read what it has written
        documents = load_documents(script).train_test_split(script.validation_share, seed=0)
        name = script.model or starting_model(args, documents["train"]["text"])
        tokenizer = AutoTokenizer.from_pretrained(name)
        blocks = pack(documents, tokenizer, script.block_size)

    trainer = EDiTTrainer(
        model=AutoModelForCausalLM.from_pretrained(name),
        args=args,
        train_dataset=blocks["train"],
        eval_dataset=blocks["test"].take(min(script.max_eval_blocks, len(blocks["test"]))),
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        summarise(trainer, name)


def load_documents(script: ScriptArguments) -> datasets.Dataset:
    """The text, one document a row, in a column called "text"."""
    if script.dataset:
        rows = datasets.load_dataset(script.dataset, script.dataset_config, split=script.dataset_split)
    elif script.train_file:
        kind = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}[Path(script.train_file).suffix]
        options = {"sample_by": "paragraph"} if kind == "text" else {}
        rows = datasets.load_dataset(kind, data_files=script.train_file, split="train", **options)
    else:
        rows = datasets.Dataset.from_dict({"text": [topics[name] for name in sorted(topics)]})
    return rows.select_columns([script.text_column]).rename_columns({script.text_column: "text"})


def starting_model(args: TrainingArguments, texts: Any) -> str:
    """The folder of what examples/pretrain.py has trained, or of a small Llama that has seen nothing yet."""
    if (PRETRAINED / "config.json").is_file():
        return str(PRETRAINED)
    folder = Path(args.output_dir) / "untrained"
    if args.local_process_index == 0:
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        bpe.train_from_iterator(
            texts,
            trainers.BpeTrainer(vocab_size=2048, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False),
        )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, bos_token=EOS)
        tokenizer.save_pretrained(folder)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=336, num_hidden_layers=4,
            num_attention_heads=4, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def pack(documents: datasets.DatasetDict, tokenizer: Any, size: int) -> datasets.DatasetDict:
    """Blocks of `size` tokens, cut from documents that end with EOS."""

    def cut(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = tokenizer(rows["text"], add_special_tokens=False, verbose=False)["input_ids"]
        tokens = [token for document in encoded for token in [*document, tokenizer.eos_token_id]]
        blocks = [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]
        return {"input_ids": blocks, "labels": [list(block) for block in blocks]}

    return documents.map(cut, batched=True, remove_columns=["text"], desc="Packing")


def summarise(trainer: Any, started_from: str) -> None:
    """Prints the summary and leaves it as summary.json. From the log alone, which a plain Trainer has too."""
    history = trainer.state.log_history
    perplexities = [math.exp(min(entry["eval_loss"], 700.0)) for entry in history if "eval_loss" in entry]
    syncs = [entry for entry in history if "edit/sync_seconds" in entry]
    seconds = next(entry["train_runtime"] for entry in history if "train_runtime" in entry)
    summary = {
        "perplexity_before": perplexities[0],
        "perplexity_after": perplexities[-1],
        "steps": trainer.state.global_step,
        "syncs": len(syncs),
        "sync_bytes": sum(entry["edit/sync_bytes"] for entry in syncs),
        "waited_share": sum(entry["edit/exposed_seconds"] for entry in syncs) / seconds,
    }
    (Path(trainer.args.output_dir) / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    rows = [
        ("started from", started_from),
        ("perplexity, before", f"{perplexities[0]:.1f}"),
        ("perplexity, after", f"{perplexities[-1]:.1f}"),
        ("steps / syncs", f"{summary['steps']} / {summary['syncs']}"),
        ("waited for syncs", f"{summary['waited_share']:.1%} of {seconds:.0f} s"),
        ("sent between replicas", f"{summary['sync_bytes'] / 1e6:.1f} MB a rank"),
        ("saved in", trainer.args.output_dir),
    ]
    print("\n" + "\n".join(f"{name:<27}{value}" for name, value in rows), flush=True)


if __name__ == "__main__":
    main()
