"""Run by both ranks of a torchrun: settings that EDiT cannot train with are refused when the trainer is made.

Argument: the folder for results; texts go to FOLDER/texts.json by name.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["ACCELERATE_USE_CPU"] = "true"

import torch
import torch.distributed as dist
from accelerate import Accelerator, ParallelismConfig
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_edit import EDiTTrainer

FOLDER = sys.argv[1]


def fsdp(**config: Any) -> dict[str, Any]:
    return dict(fsdp=True, fsdp_config={"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", **config})


def make(edit_config: dict[str, Any], model: Any = None, **settings: Any) -> EDiTTrainer:
    args = TrainingArguments(output_dir=FOLDER, report_to="none", max_steps=1, **settings)
    return EDiTTrainer(model=model or small(), args=args, train_dataset=[], edit_config=edit_config)


def small() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )


def with_variable(name: str, value: str, body: Callable[[], Any]) -> Any:
    os.environ[name] = value
    try:
        return body()
    finally:
        del os.environ[name]


def under_deepspeed() -> Any:
    args = TrainingArguments(output_dir=FOLDER, report_to="none")
    return with_variable(
        "ACCELERATE_USE_DEEPSPEED", "true", lambda: EDiTTrainer(model=small(), args=args, train_dataset=[])
    )


class LoadedInShards(LlamaForCausalLM):
    is_distributed_loading_by_transformers = True  # as after from_pretrained(distributed_config=...)


def cut_by_tensor_parallelism() -> Any:
    config = ParallelismConfig(dp_replicate_size=1, dp_shard_size=1, tp_size=2)
    return make({"num_replicas": 2}, parallelism_config=config, **fsdp())


class OwnStep(EDiTTrainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        loss = self.compute_loss(model, inputs)
        self.accelerator.backward(loss)
        return loss.detach()


class OwnLogs(EDiTTrainer):
    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None: ...


class OwnAccelerator(EDiTTrainer):
    def create_accelerator_and_postprocess(self) -> None:
        Trainer.create_accelerator_and_postprocess(self)


class SelfMoving(torch.optim.SGD):
    """As schedule-free optimizers are."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


def train(kind: Any = EDiTTrainer, **settings: Any) -> Any:
    args = TrainingArguments(output_dir=FOLDER, report_to="none", save_strategy="no", max_steps=2)
    row = torch.arange(4)
    rows = [{"input_ids": row, "labels": row}] * 64
    config = {"num_replicas": 2, "sync_interval": 1}
    return kind(model=small(), args=args, train_dataset=rows, edit_config=config, **settings).train()


def self_moving() -> Any:
    model = small()
    optimizer = SelfMoving(model.parameters(), lr=0.1)
    return train(optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)))


WRONG: dict[str, Callable[[], Any]] = {
    "fewer ranks than replicas": lambda: make({"num_replicas": 4}),
    "not divisible": lambda: make({"num_replicas": 3}),
    "interval 0": lambda: make({"sync_interval": 0}),
    "both triggers": lambda: make({"sync_interval": 4, "sync_seconds": 3.0}),
    "unknown setting": lambda: make({"tau": 4}),
    "delayed too long": lambda: make({"num_replicas": 2, "overlap": "delayed", "sync_interval": 3}),
    "FSDP1": lambda: make({"num_replicas": 2}, fsdp=True, fsdp_config={"version": 1}),
    "DeepSpeed": under_deepspeed,
    "loaded in shards": lambda: make({"num_replicas": 2}, model=LoadedInShards(small().config)),
    "tensor parallelism": cut_by_tensor_parallelism,
    "own training step": lambda: train(OwnStep),
    "own logs": lambda: train(OwnLogs),
    "own accelerator": lambda: train(OwnAccelerator),
    "self-moving optimizer": self_moving,
    "resume": lambda: make({"num_replicas": 2}).train(resume_from_checkpoint=True),
}


def main() -> None:
    texts = {}
    for name, body in WRONG.items():
        try:
            body()
        except (ValueError, RuntimeError) as error:
            texts[name] = str(error)
        else:
            raise AssertionError(f"{name} was not refused")
    assert isinstance(make({"num_replicas": 2}).accelerator, Accelerator), "after all that a right one works"
    assert dist.get_world_size() == 2
    if dist.get_rank() == 0:
        (Path(FOLDER) / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    dist.destroy_process_group()  # nothing was trained, so nobody else does it


if __name__ == "__main__":
    main()
