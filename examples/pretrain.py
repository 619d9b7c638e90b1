#!/usr/bin/env python
"""Pretrains a Llama from scratch with EDiTTrainer.

    accelerate launch --config_file accelerate_configs/cpu_2x2.yaml examples/pretrain.py

Without --dataset or --train_file it reads the Python source files of the running interpreter's standard library, so it
needs no download. It trains a byte-level BPE tokenizer on the corpus when none is named, packs documents into blocks,
holds out documents for validation, evaluates before, during and after training, and leaves in --output_dir the model,
the tokenizer, loss.png and summary.json. Every setting is a flag: see --help. Copy common.py along with this file.
"""

from __future__ import annotations

import math
import os
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from common import (
    TextArguments,
    load_text,
    packer,
    parse,
    resume_from,
    small_llama_config,
    standard_library,
    summarise,
    train_seconds,
    train_tokenizer,
    waited,
)
from transformers import AutoTokenizer, LlamaForCausalLM, TrainingArguments, default_data_collator

from hf_edit import EDiTConfig, EDiTTrainer, muon


@dataclass
class ScriptArguments(TextArguments):
    """What to train, and on what."""

    _argument_group_name = "Model and data"

    streaming: bool = field(default=False, metadata={"help": "Stream --dataset instead of downloading it."})
    validation_documents: int = field(default=24, metadata={"help": "Documents held out for validation."})
    max_eval_blocks: int = field(default=256, metadata={"help": "Blocks of the held-out text to evaluate on."})
    tokenizer: str | None = field(default=None, metadata={"help": "A tokenizer's name or folder. Unset: train one."})
    vocab_size: int = field(default=2048, metadata={"help": "Vocabulary of a tokenizer that is trained here."})
    block_size: int = field(default=128, metadata={"help": "Tokens in a packed block."})
    hidden_size: int = field(default=128, metadata={"help": "Width of the model."})
    num_layers: int = field(default=4, metadata={"help": "Transformer blocks."})
    num_heads: int = field(default=4, metadata={"help": "Attention heads."})
    muon: bool = field(default=False, metadata={"help": "Muon for the blocks' matrices, AdamW for the rest."})


# What differs from TrainingArguments' and EDiTConfig's own defaults: a run of minutes on two CPU cores.
DEFAULTS: dict[str, Any] = dict(
    output_dir="edit_pretrain",
    max_steps=240,
    per_device_train_batch_size=8,
    per_device_eval_batch_size=16,
    learning_rate=4e-3,
    lr_scheduler_type="cosine",
    warmup_steps=16,
    weight_decay=0.1,
    logging_steps=8,
    eval_strategy="steps",
    eval_steps=80,
    eval_on_start=True,
    save_strategy="no",
    seed=0,
    sync_interval=16,
    edit_warmup_steps=16,
)


def main() -> None:
    script, edit_config, args = parse((ScriptArguments, EDiTConfig, TrainingArguments), DEFAULTS, __doc__)
    with args.main_process_first(desc="preparing the data"):  # the others then read the caches
        documents = load_documents(script)
        tokenizer = load_tokenizer(script, args, documents)
        train_blocks, eval_blocks = split_and_pack(script, args, documents, tokenizer)

    config = small_llama_config(
        len(tokenizer),
        hidden_size=script.hidden_size,
        intermediate_size=script.hidden_size * 8 // 3 // 16 * 16,
        num_hidden_layers=script.num_layers,
        num_attention_heads=script.num_heads,
        max_position_embeddings=max(script.block_size, 512),
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    trainer = EDiTTrainer(
        model=LlamaForCausalLM(config),
        args=args,
        train_dataset=train_blocks,
        eval_dataset=eval_blocks,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        compute_metrics=perplexity_of_blocks,
        preprocess_logits_for_metrics=block_losses,
        optimizer_cls_and_kwargs=muon(args) if script.muon else None,
        edit_config=edit_config,
    )
    trainer.train(resume_from(args))
    if not any("eval_loss" in e and e["step"] == trainer.state.global_step for e in trainer.state.log_history):
        trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        report(trainer, unigram_perplexity(train_blocks, eval_blocks, len(tokenizer)))


# -- data -------------------------------------------------------------------------------------------------------------


def load_documents(script: ScriptArguments) -> Any:
    """The corpus in a random order, one document a row, in a column called "text"."""
    rows = load_text(script, standard_library, streaming=script.streaming)
    return rows.filter(lambda row: bool(row["text"].strip())).shuffle(seed=0)


def load_tokenizer(script: ScriptArguments, args: TrainingArguments, documents: Any) -> Any:
    """The named tokenizer, or a byte-level BPE trained on the corpus by the first process and read by the others."""
    if script.tokenizer:
        return AutoTokenizer.from_pretrained(script.tokenizer)
    # Replicas that are launches of their own (elastic) may start at one moment, and write at one moment.
    folder = Path(args.output_dir) / (f"replica-{replica}" if (replica := os.environ.get("EDIT_REPLICA")) else "")
    if args.local_process_index == 0:
        texts = (row["text"] for row in (documents.take(5_000) if script.streaming else documents))
        train_tokenizer(texts, script.vocab_size).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def split_and_pack(script: ScriptArguments, args: TrainingArguments, documents: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Training and validation blocks of `block_size` tokens, cut from documents that end with EOS."""
    held_out, pack = script.validation_documents, packer(tokenizer, script.block_size)
    packing = dict(batched=True, batch_size=64, remove_columns=["text"])
    if isinstance(documents, datasets.IterableDataset):  # by what is in them: each process skips in its own shards
        held_out_rows = documents.filter(may_be_held_out).take(held_out)
        eval_blocks = list(held_out_rows.map(pack, **packing).take(script.max_eval_blocks))
        if not eval_blocks:
            sys.exit(
                "One document in a hundred may be held out, and the stream has none of these. Leave --streaming out."
            )
        train_rows = documents.filter(lambda row: not may_be_held_out(row))
        return train_rows.map(pack, **packing), datasets.Dataset.from_list(eval_blocks)
    if len(documents) <= held_out:
        sys.exit(
            f"The corpus has {len(documents)} documents, of which --validation_documents {held_out} are held out. Give "
            "more text, or hold out fewer."
        )
    eval_blocks = documents.select(range(held_out)).map(pack, desc="Packing validation text", **packing)
    train_blocks = documents.select(range(held_out, len(documents))).map(pack, desc="Packing training text", **packing)
    if not len(train_blocks) or not len(eval_blocks):
        sys.exit(
            f"The corpus fills {len(train_blocks)} training and {len(eval_blocks)} validation blocks of --block_size "
            f"{script.block_size} tokens; both need at least one. Give more text, or a smaller block."
        )
    return train_blocks, eval_blocks.select(range(min(len(eval_blocks), script.max_eval_blocks)))


def may_be_held_out(row: dict[str, Any]) -> bool:
    """True for one document in a hundred."""
    return zlib.crc32(row["text"].encode()) % 100 == 0


# -- evaluation -------------------------------------------------------------------------------------------------------


class Perplexity(evaluate.Metric):
    """exp of the mean negative log-likelihood of a token, from sums over blocks; needs no model and no download."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("float64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description="predictions: summed nats of each block; references: its number of predicted tokens",
            features=features,
        )

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float]:
        return {"perplexity": math.exp(min(sum(predictions) / sum(references), 700.0))}


def block_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[blocks, 2]: summed negative log-likelihood and number of predicted tokens, so that no logits are gathered."""
    nats = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
    )
    return torch.stack([nats.sum(dim=1), (labels[:, 1:] != -100).sum(dim=1).float()], dim=1)


def perplexity_of_blocks(prediction: Any) -> dict[str, float]:
    nats, counts = np.asarray(prediction.predictions, dtype=np.float64).T
    metric = Perplexity(keep_in_memory=True)
    return metric.compute(predictions=nats.tolist(), references=counts.astype(np.int64).tolist())


def unigram_perplexity(train_blocks: Any, eval_blocks: Any, vocab_size: int) -> float:
    """Perplexity of the validation text under the training text's token frequencies, each counted once more."""
    counts = np.ones(vocab_size)
    for blocks in batches(train_blocks):
        counts += np.bincount(np.concatenate(blocks), minlength=vocab_size)
    log_frequency = np.log(counts / counts.sum())
    predicted = np.concatenate([np.asarray(block[1:]) for blocks in batches(eval_blocks) for block in blocks])
    return float(np.exp(-log_frequency[predicted].mean()))


def batches(blocks: Any, most: int = 50_000) -> Iterator[list[list[int]]]:
    """The blocks' tokens, at most `most` blocks of a stream."""
    if isinstance(blocks, datasets.IterableDataset):
        blocks = blocks.take(most)
    for batch in blocks.iter(batch_size=1000):
        yield batch["input_ids"]


# -- what came of it --------------------------------------------------------------------------------------------------


def report(trainer: EDiTTrainer, unigram: float) -> None:
    """Prints the summary and leaves it as summary.json, beside loss.png."""
    history, stats, folder = trainer.state.log_history, trainer.edit_stats, Path(trainer.args.output_dir)
    perplexities = [entry["eval_perplexity"] for entry in history if "eval_perplexity" in entry]
    seconds = train_seconds(history)
    draw(history, folder / "loss.png")
    summary = {
        "layout": str(trainer.edit_layout),
        "engine": trainer.accelerator.distributed_type.value,
        "perplexity_untrained": perplexities[0] if len(perplexities) > 1 else None,
        "perplexity_unigram": unigram,
        "perplexity_trained": perplexities[-1] if perplexities else None,
        "train_seconds": seconds,
        "waited_share": stats.exposed_seconds / seconds,
        **asdict(stats),
    }
    rows = [
        ("layout", f"{trainer.edit_layout} ({trainer.accelerator.distributed_type.value})"),
        ("perplexity, untrained", show(summary["perplexity_untrained"])),
        ("perplexity, unigram model", show(unigram)),
        ("perplexity, trained", show(summary["perplexity_trained"])),
        ("inner steps / syncs", f"{stats.inner_steps} / {stats.syncs}"),
        waited(stats.exposed_seconds, seconds),
        ("sent between replicas", sent(stats)),
        ("saved in", f"{folder} (model, tokenizer, loss.png, summary.json)"),
        ("more", f"hf-edit report {folder}"),
    ]
    summarise(folder, summary, rows)


def show(perplexity: float | None) -> str:
    return "not evaluated" if perplexity is None else f"{perplexity:.1f}"


def sent(stats: Any) -> str:
    if not stats.hsdp_bytes:
        return "nothing (one replica)"
    mine, everything = stats.sync_bytes + stats.warmup_bytes, stats.hsdp_bytes + stats.warmup_bytes
    warm_up = f" ({stats.warmup_bytes / 1e6:.1f} of it in the warm-up)" if stats.warmup_bytes else ""
    return (
        f"{mine / 1e6:.1f} MB a rank{warm_up}; averaging every gradient would have sent {everything / 1e6:.1f} MB "
        f"({everything / max(mine, 1):.1f} times)"
    )


def draw(history: list[dict[str, float]], path: Path) -> None:
    """The training loss over the steps, with syncs, evaluations and loss spikes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for number, step in enumerate(e["step"] for e in history if "edit/sync_seconds" in e):
        axes.axvline(step, color="0.85", linewidth=1, label="outer sync" if number == 0 else None, zorder=0)
    losses = [(e["step"], e["loss"]) for e in history if "loss" in e]
    axes.plot(*zip(*losses, strict=True), label="training loss (replica 0)", linewidth=1.5)
    evals = [(e["step"], e["eval_loss"]) for e in history if "eval_loss" in e]
    if evals:
        axes.plot(*zip(*evals, strict=True), "o", label="validation loss (all replicas)", color="tab:green")
    spikes = [(e["step"], e["loss"]) for e in history if "edit/loss_spike" in e]
    if spikes:
        axes.plot(*zip(*spikes, strict=True), "v", label="loss spike", color="tab:red")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="EDiT pretraining")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
