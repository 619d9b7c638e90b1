#!/usr/bin/env python
"""Tunes a language model on instructions: TRL's SFTTrainer with EDiTMixin in front.

    accelerate launch --config_file accelerate_configs/cpu_2x2.yaml examples/sft.py

Without --model it starts from edit_pretrain, where examples/pretrain.py has left its Llama, or else from a small Llama
that knows nothing; without --dataset or --train_file it learns sums that it makes up. So it needs no download.
--lora trains adapters only. TRL and peft: `pip install -e ".[examples,trl,peft]"`. Copy common.py along with this file.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field
from typing import Any

import datasets
from common import PRETRAINED, parse, require_columns, resume_from, starting_model, summarise, train_seconds, waited
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hf_edit import EDiTConfig, EDiTMixin


class EDiTSFTTrainer(EDiTMixin, SFTTrainer):
    """TRL's trainer, whose replicas train alone between outer syncs."""


@dataclass
class ScriptArguments:
    """What to tune, and on what."""

    _argument_group_name = "Model and data"

    model: str | None = field(
        default=None,
        metadata={
            "help": f"A model's name on the Hub, or its folder. Unset: {PRETRAINED} if it exists, else a new one."
        },
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Name of a dataset on the Hub with the columns instruction, input and output."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of --dataset."})
    train_file: str | None = field(default=None, metadata={"help": "A .jsonl file with instruction, input, output."})
    eval_examples: int = field(default=256, metadata={"help": "Examples held out for evaluation."})
    lora: bool = field(default=False, metadata={"help": "Train LoRA adapters (peft) instead of the whole model."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapters."})


# What differs from SFTConfig's and EDiTConfig's own defaults: a run of minutes on two CPU cores.
DEFAULTS: dict[str, Any] = dict(
    output_dir="edit_sft",
    max_steps=160,
    per_device_train_batch_size=8,
    per_device_eval_batch_size=16,
    learning_rate=3e-3,
    lr_scheduler_type="cosine",
    warmup_steps=8,
    logging_steps=8,
    eval_on_start=True,  # with FSDP2 the model is not sharded before train(), so evaluate() cannot come first
    save_strategy="no",
    bf16=False,
    gradient_checkpointing=False,
    max_length=256,
    seed=0,
    sync_interval=16,
)


def main() -> None:
    script, edit_config, args = parse((ScriptArguments, EDiTConfig, SFTConfig), DEFAULTS, __doc__)
    with args.main_process_first(desc="preparing the data"):  # the others then read what it has written
        examples = load_examples(script).train_test_split(script.eval_examples, seed=0)
        texts = (row["prompt"] + row["completion"] for row in examples["train"])
        name = script.model or starting_model(args, texts, split_digits=True)
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    adapters = LoraConfig(
        r=script.lora_rank, lora_alpha=2 * script.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    trainer = EDiTSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(name),
        args=args,
        train_dataset=examples["train"],
        eval_dataset=examples["test"],
        processing_class=tokenizer,
        peft_config=adapters if script.lora else None,
        edit_config=edit_config,
    )
    trainer.train(resume_from(args))
    trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        report(trainer)


def load_examples(script: ScriptArguments) -> datasets.Dataset:
    """Prompts and completions, which is what SFTTrainer takes; the loss is that of the completions alone."""
    if script.dataset:
        rows = datasets.load_dataset(script.dataset, split=script.dataset_split)
    elif script.train_file:
        rows = datasets.load_dataset("json", data_files=script.train_file, split="train")
    else:
        rows = datasets.Dataset.from_list(sums(4096))

    columns = ["instruction", "output"]
    require_columns(rows, columns, f"Rename yours: {' and '.join(columns)} are needed, input may be there.")

    def write(row: dict[str, str]) -> dict[str, str]:
        given = f"\n{row['input']}" if row.get("input") else ""
        return {
            "prompt": f"### Instruction:\n{row['instruction']}{given}\n\n### Response:\n",
            "completion": row["output"],
        }

    return rows.map(write, remove_columns=rows.column_names, desc="Writing prompts")


def sums(count: int) -> list[dict[str, str]]:
    """Made-up additions and comparisons."""
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        a, b = draw.randrange(20), draw.randrange(20)
        question, answer = draw.choice([
            (f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."),
            (f"Which is larger, {a} or {b}?", f"{max(a, b)} is not smaller than {min(a, b)}."),
        ])  # fmt: skip
        rows.append({"instruction": question, "input": "", "output": answer})
    return rows


def report(trainer: EDiTSFTTrainer) -> None:
    """Prints the summary and leaves it as summary.json."""
    history, stats = trainer.state.log_history, trainer.edit_stats
    evaluations = [entry for entry in history if "eval_loss" in entry]
    seconds = train_seconds(history)
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    before, after = evaluations[0], evaluations[-1]
    summary = {
        "layout": str(trainer.edit_layout),
        "trained_parameters": trained,
        "eval_loss_before": before["eval_loss"],
        "eval_loss_after": after["eval_loss"],
        "waited_share": stats.exposed_seconds / seconds,
        **asdict(stats),
    }
    rows = [
        ("layout", f"{trainer.edit_layout} ({trainer.accelerator.distributed_type.value})"),
        ("parameters trained", f"{trained:,} of {sum(p.numel() for p in trainer.model.parameters()):,}"),
        ("eval loss, before", f"{before['eval_loss']:.3f}"),
        ("eval loss, after", f"{after['eval_loss']:.3f}"),
        (
            "right tokens",
            f"{before['eval_mean_token_accuracy']:.1%} before, {after['eval_mean_token_accuracy']:.1%} after",
        ),
        ("inner steps / syncs", f"{stats.inner_steps} / {stats.syncs}"),
        waited(stats.exposed_seconds, seconds),
        ("saved in", trainer.args.output_dir),
    ]
    summarise(trainer.args.output_dir, summary, rows)


if __name__ == "__main__":
    main()
