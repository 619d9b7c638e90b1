"""One rank of traffic.py: trains a Llama on random tokens. Arguments: report, size, steps, trigger, busy."""

from __future__ import annotations

import json
import os
import sys
import tempfile

os.environ["ACCELERATE_USE_CPU"] = "true"

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from hf_edit import EDiTTrainer

SIZES = {
    "small": dict(vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2),
    "large": dict(vocab_size=2048, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4),
}


def main() -> None:
    path, size = sys.argv[1:3]
    steps, trigger, busy = map(json.loads, sys.argv[3:])
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES[size]))
    parameter_bytes = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    tokens = torch.randint(0, SIZES[size]["vocab_size"], (512, 16), generator=torch.Generator().manual_seed(1))
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
    config = {"num_replicas": 2, **trigger}
    trainer = EDiTTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows[:8], edit_config=config)
    trainer.train()
    if trainer.is_world_process_zero():
        report = {
            "world_size": trainer.accelerator.num_processes,
            "num_replicas": trainer.edit_layout.num_replicas,
            "parameter_bytes": parameter_bytes,
            "syncs": trainer.edit_stats.syncs,
        }
        with open(path, "w", encoding="utf-8") as file:
            json.dump(report, file)


if __name__ == "__main__":
    main()
