#!/usr/bin/env python
"""Trains a language model with EDiT in a loop of one's own, on Accelerate.

    accelerate launch --config_file accelerate_configs/cpu_2x2.yaml examples/accelerate_loop.py

A line that ends in `# EDiT` is all that EDiT adds to the loop; one that ends in `# EDiT, was: ...` stood otherwise
before. `edit.load(folder, scheduler=scheduler)` goes on from what `edit.save` wrote.

Without --model it trains a small Llama that reads bytes, without --dataset or --train_file on Python's language
reference, as `help()` has it. So it needs no download. Copy common.py along with this file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import datasets
import torch
from common import TextArguments, language_reference, load_text, packer, parse, small_llama_config, summarise, waited
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    default_data_collator,
    get_scheduler,
)

from hf_edit import EDiT, EDiTConfig  # EDiT, was: from accelerate import Accelerator


@dataclass
class ScriptArguments(TextArguments):
    """What to train, on what, and how."""

    _argument_group_name = "Model, data and training"

    model: str | None = field(default=None, metadata={"help": "A model's name on the Hub, or its folder."})
    block_size: int = field(default=128, metadata={"help": "Tokens (bytes without --model) in a block."})
    eval_blocks: int = field(default=128, metadata={"help": "Blocks held out for evaluation."})
    output_dir: str = field(default="edit_accelerate_loop", metadata={"help": "Where model and state are left."})
    max_steps: int = field(default=128, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=4, metadata={"help": "Blocks in a process's batch."})
    gradient_accumulation_steps: int = field(default=2, metadata={"help": "Batches in an optimizer step."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate."})
    warmup_steps: int = field(default=16, metadata={"help": "Steps over which the learning rate rises."})
    eval_steps: int = field(default=64, metadata={"help": "Steps between two evaluations."})
    logging_steps: int = field(default=16, metadata={"help": "Steps between two log entries."})
    report_to: str | None = field(default=None, metadata={"help": "A tracker of Accelerate, such as wandb."})
    seed: int = field(default=0, metadata={"help": "Seed of the model and the order of the data."})


def main() -> None:
    (script,) = parse((ScriptArguments,), {}, __doc__)
    settings = dict(gradient_accumulation_steps=script.gradient_accumulation_steps, log_with=script.report_to)
    edit_config = EDiTConfig(sync_interval=16)  # EDiT
    accelerator = EDiT.accelerator(edit_config, **settings)  # EDiT, was: accelerator = Accelerator(**settings)
    accelerator.init_trackers("accelerate_loop", config=vars(script))
    model, optimizer, scheduler, train_loader, eval_loader = prepare(accelerator, script)
    history: list[dict[str, float]] = []
    record(accelerator, history, 0, {"eval_loss": evaluate(accelerator, model, eval_loader)})
    step, begun = 0, perf_counter()
    with EDiT(accelerator, model, optimizer, edit_config) as edit:  # EDiT
        for batch in endless(train_loader):
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            edit.step(loss, tokens=batch["input_ids"].numel())  # EDiT
            if not accelerator.sync_gradients:
                continue
            step += 1
            if step % script.logging_steps == 0:
                record(accelerator, history, step, {"loss": loss.item(), "learning_rate": scheduler.get_last_lr()[0]})
            if step % script.eval_steps == 0 or step == script.max_steps:
                edit.flush()  # EDiT
                record(accelerator, history, step, {"eval_loss": evaluate(accelerator, model, eval_loader)})
            record(accelerator, history, step, *edit.logs())  # EDiT
            if step == script.max_steps:
                break
        seconds, folder = perf_counter() - begun, Path(script.output_dir)
        edit.save(folder / "state", scheduler=scheduler)  # EDiT, was: accelerator.save_state(folder / "state")

    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(folder, state_dict=weights)
        report(history, step, seconds, folder)
    accelerator.end_training()


def prepare(accelerator: Any, script: ScriptArguments) -> tuple[Any, ...]:
    """Model, optimizer, scheduler and the loaders for training and evaluation, as Accelerate wants them."""
    with accelerator.local_main_process_first():  # the others then read the caches
        model, tokenizer = model_and_tokenizer(script)
        blocks = load_blocks(script, tokenizer)

    optimizer = torch.optim.AdamW(model.parameters(), lr=script.learning_rate, weight_decay=0.1)
    # Accelerate steps a prepared scheduler once for every process.
    steps = [count * accelerator.num_processes for count in (script.warmup_steps, script.max_steps)]
    scheduler = get_scheduler("cosine", optimizer, *steps)
    loading = dict(batch_size=script.batch_size, collate_fn=default_data_collator)
    return accelerator.prepare(
        model,
        optimizer,
        scheduler,
        DataLoader(blocks["train"], shuffle=True, drop_last=True, **loading),
        DataLoader(blocks["test"], **loading),
    )


def model_and_tokenizer(script: ScriptArguments) -> tuple[Any, Any]:
    """The named ones, or a small Llama that reads bytes and so needs no tokenizer."""
    if script.model:
        return AutoModelForCausalLM.from_pretrained(script.model), AutoTokenizer.from_pretrained(script.model)
    return LlamaForCausalLM(small_llama_config(256)), None


def load_blocks(script: ScriptArguments, tokenizer: Any) -> datasets.DatasetDict:
    """Blocks of `block_size` tokens, cut from documents that end with EOS or a zero byte; the last are for test."""
    rows = load_text(script, language_reference)
    pack = packer(tokenizer, script.block_size)
    blocks = rows.map(pack, batched=True, remove_columns=rows.column_names, desc="Packing")
    return blocks.train_test_split(min(script.eval_blocks, len(blocks) // 10), shuffle=False)


def endless(loader: Any) -> Iterator[Any]:
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        yield from loader


@torch.no_grad()
def evaluate(accelerator: Any, model: Any, loader: Any) -> float:
    """Mean loss of the held-out blocks, in nats per token, over all processes."""
    model.eval()
    losses = []
    for batch in loader:
        losses.append(accelerator.gather_for_metrics(model(**batch).loss.repeat(len(batch["input_ids"]))))
    model.train()
    return torch.cat(losses).mean().item()


def record(accelerator: Any, history: list[dict[str, float]], step: int, *entries: dict[str, float]) -> None:
    for entry in entries:
        history.append(entry)
        accelerator.log(entry, step=step)
        accelerator.print({"step": step, **{name: round(value, 5) for name, value in entry.items()}})


def report(history: list[dict[str, float]], steps: int, seconds: float, folder: Path) -> None:
    """Prints the summary and leaves it as summary.json."""
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    syncs = [entry for entry in history if "edit/sync_seconds" in entry]
    exposed = sum(entry["edit/exposed_seconds"] for entry in syncs)
    summary = {
        "eval_loss_before": losses[0],
        "eval_loss_after": losses[-1],
        "steps": steps,
        "syncs": len(syncs),
        "sync_bytes": sum(entry["edit/sync_bytes"] for entry in syncs),
        "waited_share": exposed / seconds,
    }
    rows = [
        ("eval loss, before", f"{losses[0]:.3f}"),
        ("eval loss, after", f"{losses[-1]:.3f}"),
        ("steps / syncs", f"{steps} / {len(syncs)}"),
        waited(exposed, seconds),
        ("sent between replicas", f"{summary['sync_bytes'] / 1e6:.1f} MB a rank"),
        ("saved in", f"{folder} (model, state, summary.json)"),
    ]
    summarise(folder, summary, rows)


if __name__ == "__main__":
    main()
