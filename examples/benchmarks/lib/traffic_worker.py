"""One rank of traffic.py: trains a Llama on random tokens, once for each job. Arguments: folder, jobs.

A job is its steps, EDiTConfig's settings, and whether to be busy. The first rank of each host writes FOLDER/HOST.json.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["ACCELERATE_USE_CPU"] = "true"

import torch
from lib.hosts import sent_from_here
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from hf_edit import EDiTTrainer, muon

SIZES = dict(vocab_size=2048, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4)


class Count(TrainerCallback):
    """`sent` by this host up to each of its steps' ends, and the training's."""

    def __init__(self) -> None:
        self.sent: list[int] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.sent.append(sent_from_here())

    on_train_end = on_step_end


def main() -> None:
    folder = sys.argv[1]
    reports = [train(*job) for job in json.loads(sys.argv[2])]
    if os.environ["LOCAL_RANK"] == "0":
        Path(folder, os.environ["GROUP_RANK"] + ".json").write_text(json.dumps(reports), encoding="utf-8")


def train(steps: int, settings: dict[str, Any], busy: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    parameter_bytes = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    tokens = torch.randint(0, SIZES["vocab_size"], (512, 16), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    args = TrainingArguments(
        output_dir=os.path.join(tempfile.gettempdir(), "hf_edit-traffic-" + os.environ["MASTER_PORT"]),  # of all ranks
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        fsdp=int(os.environ["LOCAL_WORLD_SIZE"]) > 1,
        fsdp_config={"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
        logging_steps=1 if busy else 1000,
        include_num_input_tokens_seen="all" if busy else "no",
        eval_strategy="steps" if busy else "no",
        eval_steps=1000,  # falls to the sync that ends every run
        save_strategy="steps" if busy else "no",
        save_steps=1000,
        save_only_model=True,  # the hosts share no disk
        report_to="none",
        disable_tqdm=True,
    )
    config = {"num_replicas": 2, **settings}
    count = Count()
    trainer = EDiTTrainer(
        model=model, args=args, train_dataset=rows, eval_dataset=rows[:8], edit_config=config, callbacks=[count],
        optimizer_cls_and_kwargs=muon(args) if busy else None,
    )  # fmt: skip
    trainer.train()
    return {
        "world_size": trainer.accelerator.num_processes,
        "num_replicas": trainer.edit_layout.num_replicas,
        "parameter_bytes": parameter_bytes,
        "syncs": trainer.edit_stats.syncs,
        "sent": count.sent,
    }


if __name__ == "__main__":
    main()
