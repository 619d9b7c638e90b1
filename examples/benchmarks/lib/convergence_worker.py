"""One rank of convergence.py: trains a byte-level Llama, with a fault if asked to. Argument: a Job as JSON."""

from __future__ import annotations

import json
import os
import statistics
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["ACCELERATE_USE_CPU"] = "true"

import numpy as np
import torch
from lib.convergence_job import UNEVEN, Job
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from hf_edit import EDiTConfig, EDiTTrainer, muon

NUM_BYTES = 256
HELD_OUT = 10  # of the standard library's files, every tenth is for validation


def main() -> None:
    job = Job.from_json(sys.argv[1])
    torch.manual_seed(job.seed)
    preset, settings = job.edit_settings
    validation = read_rows(job, validation=True)
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(job, folder)
        trainer = FaultyTrainer(
            job=job,
            model=build_model(job),
            args=args,
            optimizer_cls_and_kwargs=muon(args) if job.optimizer == "muon" else None,
            train_dataset=read_rows(job, validation=False),
            eval_dataset=validation.spread(job.validation_blocks),
            edit_config=EDiTConfig.preset(preset, **settings) if preset else EDiTConfig(**settings),
        )
        trainer.train()
        trainer.evaluate()
        if job.save_to is not None:
            trainer.save_model(job.save_to)
    if trainer.is_world_process_zero():
        Path(job.report).write_text(json.dumps(figures(trainer, job)), encoding="utf-8")


# -- data and model ---------------------------------------------------------------------------------------------------


def read_rows(job: Job, validation: bool) -> Blocks:
    path = job.validation_file if validation else job.train_file
    if path is not None and path.endswith(".jsonl"):
        return Answers(path, job.block)
    return Blocks(read_bytes(path, validation), job.block)


def read_bytes(path: str | None, validation: bool) -> Any:
    """The file's bytes; without one those of the standard library's sources, each file on one side only."""
    if path is not None:
        return np.fromfile(path, dtype=np.uint8)
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    files = sorted(file for file in root.rglob("*.py") if not left_out & set(file.relative_to(root).parts))
    chosen = [file for number, file in enumerate(files) if (number % HELD_OUT == 0) == validation]
    return np.frombuffer(b"".join(file.read_bytes() for file in chosen), dtype=np.uint8)


class Blocks(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Text cut into blocks of `size` bytes, a byte being a token."""

    def __init__(self, text: Any, size: int) -> None:
        if len(text) < size:
            raise ValueError(f"The text has {len(text)} bytes, and --block is {size}. Give more text.")
        self.rows = text[: len(text) // size * size].reshape(-1, size)

    def spread(self, number: int) -> Blocks:
        """At most `number` of the blocks, from all over the text."""
        chosen = np.linspace(0, len(self.rows) - 1, min(number, len(self.rows))).astype(int)
        return Blocks(self.rows[chosen].reshape(-1), self.rows.shape[1])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        tokens = torch.from_numpy(self.rows[row].astype(np.int64))
        return {"input_ids": tokens, "labels": tokens}


class Answers(Blocks):
    """Instructions with answers, which alone are learnt, from a file with `instruction`, `input`, `output` a line.

    What is longer than `size` bytes is left out, what is shorter is filled up.
    """

    def __init__(self, path: str, size: int) -> None:
        made = []
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            asked = f"{row['instruction']}\n{row['input']}\n".encode()
            answer = row["output"].encode() + b"\n"
            if len(asked) + len(answer) <= size:
                filled = np.zeros((2, size), dtype=np.int64)
                filled[1] = -100
                filled[0, : len(asked) + len(answer)] = np.frombuffer(asked + answer, dtype=np.uint8)
                filled[1, len(asked) : len(asked) + len(answer)] = np.frombuffer(answer, dtype=np.uint8)
                made.append(filled)
        self.rows = np.stack(made)

    def spread(self, number: int) -> Answers:
        chosen = np.linspace(0, len(self.rows) - 1, min(number, len(self.rows))).astype(int)
        found = Answers.__new__(Answers)
        found.rows = self.rows[chosen]
        return found

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        tokens, labels = torch.from_numpy(self.rows[row])
        return {"input_ids": tokens, "labels": labels}


def build_model(job: Job) -> Any:
    if job.base is None:
        return new_model(job)
    model = LlamaForCausalLM.from_pretrained(job.base)
    if not job.lora:
        return model
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))


def new_model(job: Job) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=NUM_BYTES,
            hidden_size=job.hidden_size,
            intermediate_size=job.hidden_size * 8 // 3 // 8 * 8,
            num_hidden_layers=job.layers,
            num_attention_heads=max(job.hidden_size // 32, 1),
            max_position_embeddings=job.block,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def training_arguments(job: Job, folder: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        max_steps=job.steps,
        per_device_train_batch_size=job.batch,
        per_device_eval_batch_size=32,
        learning_rate=job.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(job.steps // 20, 1),
        weight_decay=0.1,
        adam_beta2=0.95,
        fsdp=job.sharded,
        fsdp_config={"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"} if job.sharded else None,
        include_num_input_tokens_seen="all",
        eval_strategy="steps",
        eval_steps=job.eval_steps,
        prediction_loss_only=True,
        logging_steps=job.tau,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=job.seed,
        bf16=job.bf16,
        use_cpu=not torch.accelerator.is_available(),
        torch_compile=job.bf16,
    )


# -- faults -----------------------------------------------------------------------------------------------------------


class FaultyTrainer(EDiTTrainer):
    """EDiTTrainer on text or a learning rate that goes wrong for a while, on this rank if its replica is meant."""

    def __init__(self, *args: Any, job: Job, **kwargs: Any) -> None:
        self.job = job
        super().__init__(*args, **kwargs)
        # With "sync" all ranks are one replica to the library; the fault falls on the same ranks as with the others.
        self.fault_replica = self.args.process_index * job.num_replicas // self.args.world_size
        self._noise = torch.Generator().manual_seed(1000 * job.seed + self.args.process_index)
        if job.scenario in ("spike", "spike-all"):
            self.add_callback(LearningRateSpike(self))

    @property
    def is_faulty(self) -> bool:
        return self.job.is_faulty(self.state.global_step, self.fault_replica)

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if self.is_faulty and self.job.scenario in ("corrupt", "zeros", "labels"):
            inputs = self._spoil(inputs)
        began = time.perf_counter()
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.job.method in UNEVEN and self.fault_replica == self.job.num_replicas - 1:
            time.sleep(3 * (time.perf_counter() - began))
        return loss

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        is_nan = self.job.scenario == "nan" and self.model.training and self.is_faulty
        return loss * float("nan") if is_nan else loss

    def _spoil(self, inputs: dict[str, Any]) -> dict[str, Any]:
        labels = inputs["labels"]
        if self.job.scenario == "labels":
            order = torch.randperm(labels.numel(), generator=self._noise)
            return {**inputs, "labels": labels.flatten()[order].view_as(labels)}
        if self.job.scenario == "zeros":
            return {**inputs, "input_ids": torch.zeros_like(labels), "labels": torch.zeros_like(labels)}
        noise = torch.randint(NUM_BYTES, labels.shape, generator=self._noise)
        return {**inputs, "input_ids": noise, "labels": noise}


class LearningRateSpike(TrainerCallback):
    """Multiplies the inner learning rate for the faulty steps, and for these alone."""

    def __init__(self, trainer: FaultyTrainer) -> None:
        self.trainer = trainer
        self.before: list[float] | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if not self.trainer.is_faulty:
            return
        self.before = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] *= self.trainer.job.fault_factor

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if self.before is not None:
            for group, rate in zip(optimizer.param_groups, self.before, strict=True):
                group["lr"] = rate
        self.before = None


# -- what came of it --------------------------------------------------------------------------------------------------


def figures(trainer: FaultyTrainer, job: Job) -> dict[str, Any]:
    """What this training's results say of it."""
    history, stats = trainer.state.log_history, trainer.edit_stats
    evaluations = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    syncs = [entry for entry in history if "edit/sync_seconds" in entry]
    clipped = [entry["edit/clipped_units"] / job.num_units for entry in syncs]
    return {
        "loss": evaluations[max(evaluations)],
        "evaluations": sorted(evaluations.items()),
        "tokens": trainer.state.num_input_tokens_seen,
        "inner_steps": stats.inner_steps,
        "syncs": len(syncs),
        "sync_bytes": max((entry["edit/sync_bytes"] for entry in syncs), default=0),
        "clipped_share": statistics.fmean(clipped) if syncs else None,
        "effective_replicas": statistics.fmean(e["edit/effective_replicas"] for e in syncs) if syncs else None,
        "anomalous_replicas": stats.anomalous_replicas,
        "rollbacks": stats.rollbacks,
        "loss_spikes": stats.loss_spikes,
        "parameters": sum(parameter.numel() for parameter in build_model(job).parameters() if parameter.requires_grad),
        "world_size": trainer.args.world_size,
        "train_seconds": next(entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry),
    }


if __name__ == "__main__":
    main()
