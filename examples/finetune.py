#!/usr/bin/env python
"""Fine-tunes a causal language model: an ordinary Trainer script, of which two lines are EDiT's.

    EDIT_CONFIG=examples/finetune_edit.yaml \\
        accelerate launch --config_file accelerate_configs/cpu_2x2.yaml examples/finetune.py

The two lines are the import and the constructor; with `from transformers import Trainer` and `Trainer(` in their place
it trains as it did before. What EDiT is to do stands in the file that EDIT_CONFIG names; without the variable,
EDiTConfig's defaults hold (a sync after every 128 steps).

Without --model it goes on from edit_pretrain, where examples/pretrain.py has left its Llama, or else starts from a
small Llama that knows nothing. Without --dataset or --train_file it reads Python's language reference, as `help()` has
it. So it needs no download. Copy common.py along with this file.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import Any

import datasets
from common import (
    PRETRAINED,
    TextArguments,
    language_reference,
    load_text,
    packer,
    parse,
    resume_from,
    starting_model,
    summarise,
    train_seconds,
    waited,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, default_data_collator

from hf_edit import EDiTTrainer


@dataclass
class ScriptArguments(TextArguments):
    """What to fine-tune, and on what."""

    _argument_group_name = "Model and data"

    model: str | None = field(
        default=None,
        metadata={
            "help": f"A model's name on the Hub, or its folder. Unset: {PRETRAINED} if it exists, else a new one."
        },
    )
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
    script, args = parse((ScriptArguments, TrainingArguments), DEFAULTS, __doc__)
    with args.main_process_first(desc="preparing the data"):  # the others then read what it has written
        documents = load_text(script, language_reference)
        documents = documents.train_test_split(script.validation_share, seed=0)
        name = script.model or starting_model(args, documents["train"]["text"])
        tokenizer = AutoTokenizer.from_pretrained(name)
        pack = packer(tokenizer, script.block_size)
        blocks = documents.map(pack, batched=True, remove_columns=["text"], desc="Packing")
    require_blocks(blocks, script.block_size)

    trainer = EDiTTrainer(
        model=AutoModelForCausalLM.from_pretrained(name),
        args=args,
        train_dataset=blocks["train"],
        eval_dataset=blocks["test"].take(min(script.max_eval_blocks, len(blocks["test"]))),
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    trainer.train(resume_from(args))
    trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        report(trainer, name)


def require_blocks(blocks: datasets.DatasetDict, size: int) -> None:
    if not all(len(rows) for rows in blocks.values()):
        sys.exit(f"The text fills {blocks.num_rows} blocks of --block_size {size}. Give more text, or a smaller block.")


def report(trainer: Any, started_from: str) -> None:
    """Prints the summary and leaves it as summary.json. From the log alone, which a plain Trainer has too."""
    history = trainer.state.log_history
    perplexities = [math.exp(min(entry["eval_loss"], 700.0)) for entry in history if "eval_loss" in entry]
    syncs = [entry for entry in history if "edit/sync_seconds" in entry]
    seconds, exposed = train_seconds(history), sum(entry["edit/exposed_seconds"] for entry in syncs)
    summary = {
        "perplexity_before": perplexities[0],
        "perplexity_after": perplexities[-1],
        "steps": trainer.state.global_step,
        "syncs": len(syncs),
        "sync_bytes": sum(entry["edit/sync_bytes"] for entry in syncs),
        "waited_share": exposed / seconds,
    }
    rows = [
        ("started from", started_from),
        ("perplexity, before", f"{perplexities[0]:.1f}"),
        ("perplexity, after", f"{perplexities[-1]:.1f}"),
        ("steps / syncs", f"{summary['steps']} / {summary['syncs']}"),
        waited(exposed, seconds),
        ("sent between replicas", f"{summary['sync_bytes'] / 1e6:.1f} MB a rank"),
        ("saved in", trainer.args.output_dir),
    ]
    summarise(trainer.args.output_dir, summary, rows)


if __name__ == "__main__":
    main()
