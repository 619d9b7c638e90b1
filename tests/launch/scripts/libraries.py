"""Run by every rank of a launch: PEFT, TRL and Seq2SeqTrainer with replicas. Arguments as for scenarios.py."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)
from trl import SFTConfig

from hf_edit import EDiTConfig, EDiTMixin
from hf_edit.sync.units import named_tensors
from tests.launch.scripts.features import assert_replicas_equal, losses, run
from tests.launch.scripts.scenarios import FOLDER, LENGTH, VOCABULARY, make_args, make_model, parameters
from tests.launch.scripts.trl_trainers import (  # noqa: F401
    EDiTSFT,
    sampling_by_time_with_a_slow_replica,
    tokenizer,
    trl_trainers_agree_with_plain_ones,
)

LORA = dict(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)


def with_adapters() -> Any:
    torch.manual_seed(1)
    return get_peft_model(make_model(), LoraConfig(**LORA))


def only_adapters_cross_and_are_saved() -> dict[str, Any]:
    config, saving = EDiTConfig(sync_interval=2), dict(save_strategy="steps", save_steps=4, save_total_limit=2)
    settings = dict(make=with_adapters, optim="adamw_torch", learning_rate=1e-2, output_dir=str(FOLDER / "lora"))
    trainer = run(None, config=config, max_steps=8, **settings, **saving)
    params = named_tensors(trainer.model_wrapped)[0]
    trained = {name: param for name, param in params.items() if param.requires_grad}
    assert trained, "no adapter is trained"
    assert all("lora_" in name for name in trained), list(trained)
    assert_replicas_equal(trainer)
    replicas, size = trainer.edit_layout.num_replicas, trainer.edit_layout.replica_size
    elements = sum(param.numel() for param in trained.values()) / size
    per_sync = trainer.edit_stats.sync_bytes / trainer.edit_stats.syncs
    assert per_sync < 1.5 * 4 * elements * 2 * (replicas - 1) / replicas + 2048, (per_sync, elements)
    everything = sum(param.numel() for param in params.values()) / size
    assert per_sync < everything * 4 / 2, "the base model crosses"
    whole = parameters(trainer)
    folder = FOLDER / "lora" / "checkpoint-4"
    if dist.get_rank() == 0:
        names = {path.name for path in folder.iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "edit"} <= names, names
        loaded = PeftModel.from_pretrained(make_model(), FOLDER / "lora" / "checkpoint-8")
        state = {name: value for name, value in loaded.state_dict().items() if "lora_" in name}
        for name, value in state.items():
            assert torch.equal(value, whole[name]), name
    dist.barrier()
    again = run(None, config=config, max_steps=8, resume=str(folder), **settings)
    resumed = parameters(again)
    if dist.get_rank() == 0:
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    coded = run(None, config=EDiTConfig(sync_interval=2, compression="int8"), max_steps=8, make=with_adapters,
                optim="adamw_torch", learning_rate=1e-2)  # fmt: skip
    assert_replicas_equal(coded)
    for one, other in zip(losses(coded, "loss"), losses(trainer, "loss"), strict=True):
        assert abs(one - other) < 0.01, (losses(coded, "loss"), losses(trainer, "loss"))
    return {"bytes per sync": per_sync, "adapters": elements * 4, "all": everything * 4}


class EDiTSeq2SeqTrainer(EDiTMixin, Seq2SeqTrainer):
    pass


def sft_rows(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{number} plus 1 is ", "completion": str(number + 1)} for number in range(count)]


def supervised_fine_tuning_with_trl() -> dict[str, Any]:
    """SFTTrainer, full and with LoRA, on prompts and completions."""
    found = {}
    for name, peft in (("full", None), ("lora", LoraConfig(**LORA))):
        config = SFTConfig(
            output_dir=str(FOLDER / f"sft-{name}"), max_steps=24, per_device_train_batch_size=4, learning_rate=1e-2,
            report_to="none", logging_steps=1, eval_strategy="steps", eval_steps=8, max_length=48, disable_tqdm=True,
            save_strategy="steps", save_steps=8, lr_scheduler_type="constant", packing=False, eval_on_start=True,
            gradient_checkpointing=False, bf16=False,
        )  # fmt: skip
        tokens = tokenizer()
        trainer = EDiTSFT(
            model=make_model(vocabulary=len(tokens)), args=config, train_dataset=Dataset.from_list(sft_rows(400)),
            eval_dataset=Dataset.from_list(sft_rows(32)), processing_class=tokens, peft_config=peft,
            edit_config=EDiTConfig(sync_interval=4),
        )  # fmt: skip
        trainer.train()
        assert trainer.edit_layout.num_replicas > 1
        assert trainer.edit_stats.syncs == 6
        assert trainer.crossing == 0, f"{trainer.crossing} collectives of the whole world in training steps"
        assert any("mean_token_accuracy" in entry for entry in trainer.state.log_history), "TRL's metrics are gone"
        assert_replicas_equal(trainer)
        evaluated = losses(trainer, "eval_loss")
        assert evaluated[-1] < evaluated[0] - (0.5 if peft is None else 0.0), evaluated
        found[name] = evaluated
    return found


def sequence_to_sequence() -> dict[str, Any]:
    """Seq2SeqTrainer, generating in the evaluation; FSDP2 cannot shard T5's shared embeddings, so a Llama there."""
    model = make_model()
    model.generation_config.pad_token_id = model.config.pad_token_id = 0
    if os.environ.get("ACCELERATE_USE_FSDP") != "true":
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0,
                decoder_start_token_id=0, eos_token_id=1,
            )
        )  # fmt: skip
    counting = (torch.arange(256)[:, None] + torch.arange(LENGTH)) % VOCABULARY
    rows = [{"input_ids": row, "labels": row.clone()} for row in counting]
    defaults = make_args(max_steps=24, learning_rate=1e-2, eval_strategy="steps", eval_steps=12).to_dict()
    kept = ("max_steps", "learning_rate", "eval_strategy", "eval_steps", "output_dir", "disable_tqdm", "save_strategy")
    args = Seq2SeqTrainingArguments(
        **{name: defaults[name] for name in kept}, predict_with_generate=True, generation_max_length=LENGTH + 6,
        report_to="none", per_device_train_batch_size=2,
    )  # fmt: skip

    def count(prediction: Any) -> dict[str, float]:
        return {"length": float(prediction.predictions.shape[1])}

    trainer = EDiTSeq2SeqTrainer(
        model=model, args=args, train_dataset=rows, eval_dataset=rows[:8], compute_metrics=count,
        edit_config=EDiTConfig(sync_interval=4),
    )  # fmt: skip
    trainer.train()
    assert trainer.edit_stats.syncs == 6
    assert_replicas_equal(trainer)
    assert len(losses(trainer, "eval_length")) == 2
    evaluated = losses(trainer, "eval_loss")
    assert evaluated[-1] < evaluated[0], evaluated
    return {"eval_loss": evaluated}
