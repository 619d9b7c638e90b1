"""Makes an EDiTTrainer and trains a step, or says why it was refused. Argument: the output folder."""

from __future__ import annotations

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from hf_edit import EDiTTrainer


def main() -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
    args = TrainingArguments(output_dir=sys.argv[1], report_to="none", max_steps=1, save_strategy="no")
    try:
        trainer = EDiTTrainer(model=LlamaForCausalLM(config), args=args, train_dataset=rows)
    except ValueError as error:
        print(f"refused: {error}")
        return
    trainer.train()
    ours = [c for c in trainer.callback_handler.callbacks if type(c).__module__.startswith("hf_edit")]
    print(f"callbacks of hf_edit: {ours}")


if __name__ == "__main__":
    main()
