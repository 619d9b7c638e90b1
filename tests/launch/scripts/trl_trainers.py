"""TRL's trainers with replicas, for libraries.py.

With SGD, a sync after every step and the plain average, replicas are one big batch: every trainer must end with the
parameters of a plain one on the same data. So what its loss gathers, counts and divides by must be the replica's.
"""

from __future__ import annotations

import os
import time
from typing import Any
from unittest import mock

import accelerate.utils
import pytest
import torch
import torch.distributed as dist
import trl.trainer.grpo_trainer as grpo_module
from accelerate import PartialState
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from hf_edit import EDiTConfig, EDiTMixin
from tests.launch.scripts.features import ONE_BIG_BATCH, assert_replicas_equal
from tests.launch.scripts.scenarios import FOLDER, distance, forget_trainings, make_model, parameters

PROMPTS, ANSWER_TOKENS = 64, 4


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, one token each, and four special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = {token: number for number, token in enumerate(["<pad>", "<eos>", "<user>", "<answer>", *alphabet])}
    made = Tokenizer(models.BPE(vocab=names, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


class Scripted:
    """Answers that depend on prompt and place alone, as long as each other, in the place of sampled ones."""

    def _generate_single_turn(self, prompts: Any, *args: Any) -> Any:
        gets_text = isinstance(prompts[0], str)  # in TRL 0.29, which wants the prompts' tokens back
        prompt_ids = tokenizer()(prompts)["input_ids"] if gets_text else prompts
        places = [dist.get_rank() * len(prompt_ids) + number for number in range(len(prompt_ids))]
        answers = [
            [4 + (sum(prompt) + 7 * place * (j + 1)) % 200 for j in range(ANSWER_TOKENS)]
            for prompt, place in zip(prompt_ids, places, strict=True)
        ]
        if gets_text:
            return (prompt_ids, answers, None, {}) if isinstance(self, GRPOTrainer) else (prompt_ids, answers)
        return (answers, None) if isinstance(self, GRPOTrainer) else answers


class Cut(EDiTMixin):
    """Counts the collectives of the whole world in training steps: those that name no group."""

    crossing = 0

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        def counting(collective: Any) -> Any:
            def start(*tensors: Any, group: Any = None, **settings: Any) -> Any:
                self.crossing += group is None
                return collective(*tensors, group=group, **settings)

            return start

        names = ("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "broadcast", "barrier")
        with mock.patch.multiple(dist, **{name: counting(getattr(dist, name)) for name in names}):
            return super().training_step(*args, **kwargs)


class EDiTSFT(Cut, SFTTrainer):
    pass


class EDiTDPO(Cut, DPOTrainer):
    pass


class EDiTKTO(Cut, KTOTrainer):
    pass


class EDiTReward(Cut, RewardTrainer):
    pass


class EDiTRLOO(Cut, Scripted, RLOOTrainer):
    pass


class EDiTGRPO(Cut, Scripted, GRPOTrainer):
    pass


class EDiTSampling(Cut, GRPOTrainer):
    """Samples its answers; the replica of the last rank is slow."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        began = time.monotonic()
        loss = super().training_step(*args, **kwargs)
        if self.edit_layout.replica == self.edit_layout.num_replicas - 1:
            time.sleep(0.3 + 3 * (time.monotonic() - began))
        return loss


def rows_for(trainer: type) -> list[dict[str, Any]]:
    """Texts that are all as long as each other: a replica's mean over its tokens weighs as much as another's."""
    texts = [(f"{number:03d} plus 1 is ", f"{number + 1:03d}", f"{number + 7:03d}") for number in range(PROMPTS)]
    if issubclass(trainer, (GRPOTrainer, RLOOTrainer)):
        return [{"prompt": prompt} for prompt, _, _ in texts]
    if issubclass(trainer, SFTTrainer):
        return [{"prompt": prompt, "completion": good} for prompt, good, _ in texts]
    if issubclass(trainer, KTOTrainer):
        return [{"prompt": prompt, "completion": good, "label": n % 4 < 2} for n, (prompt, good, _) in enumerate(texts)]
    return [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt, good, bad in texts]


def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(ids[0] % 3) for ids in completion_ids]


def one_output() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer()), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_labels=1, pad_token_id=0,
        )
    )  # fmt: skip


def base_model() -> Any:
    """From a folder, where TRL finds the reference model."""
    folder = FOLDER / "base"
    with PartialState(cpu=not torch.cuda.is_available()).main_process_first():
        if not folder.exists():
            make_model(vocabulary=len(tokenizer())).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


def make(kind: type, config_kind: type, edit_config: EDiTConfig, **settings: Any) -> Any:
    generates = issubclass(kind, (GRPOTrainer, RLOOTrainer))
    if generates:  # the answers to one prompt are on all ranks of a replica
        size = 2 if os.environ.get("ACCELERATE_USE_FSDP") == "true" else 1
        settings = {
            "num_generations": 2 * size, "max_completion_length": ANSWER_TOKENS, "beta": 0.1, "shuffle_dataset": False,
            **settings,
        }  # fmt: skip
    args = config_kind(
        output_dir=str(FOLDER / "trl"), per_device_train_batch_size=2, optim="sgd", lr_scheduler_type="constant",
        report_to="none", logging_steps=1, disable_tqdm=True, save_strategy="no", bf16=False, max_grad_norm=0.0,
        gradient_checkpointing=False, **{"max_steps": 4, "learning_rate": 0.1, **settings},
    )  # fmt: skip
    return kind(
        model=one_output() if kind is EDiTReward else base_model(), args=args, processing_class=tokenizer(),
        train_dataset=Dataset.from_list(rows_for(kind)), edit_config=edit_config,
        **({"reward_funcs": reward} if generates else {}),
    )  # fmt: skip


TRAINERS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "SFT": (EDiTSFT, SFTConfig, {}),
    "DPO": (EDiTDPO, DPOConfig, {}),
    # Its KL term is a statistic of a step's whole batch, which is the replica's; this loss has none.
    "KTO": (EDiTKTO, KTOConfig, {"loss_type": "apo_zero_unpaired"}),
    "Reward": (EDiTReward, RewardConfig, {}),
    "RLOO": (EDiTRLOO, RLOOConfig, {}),
    "DAPO": (EDiTGRPO, GRPOConfig, {}),
    "DAPO, accumulating": (EDiTGRPO, GRPOConfig, {"gradient_accumulation_steps": 2, "num_iterations": 2}),
    "GRPO": (EDiTGRPO, GRPOConfig, {"loss_type": "grpo"}),
    "an entropy quantile": (EDiTGRPO, GRPOConfig, {"loss_type": "bnpo", "entropy_coef": 0.1}),
}
if not hasattr(GRPOConfig, "entropy_coef"):  # TRL 0.29
    del TRAINERS["an entropy quantile"]


def trl_trainers_agree_with_plain_ones() -> dict[str, Any]:
    found = {}
    for name, (kind, config_kind, settings) in TRAINERS.items():
        trained = []
        forget_trainings()
        for replicas in (1, None):
            trainer = make(kind, config_kind, EDiTConfig(**ONE_BIG_BATCH, num_replicas=replicas), **settings)
            begun = parameters(trainer)
            trainer.train()
            trained.append(parameters(trainer))
        assert trainer.edit_layout.num_replicas > 1
        assert trainer.crossing == 0, f"{name}: {trainer.crossing} collectives of the whole world in training steps"
        assert grpo_module.gather is accelerate.utils.gather, "a name stayed changed"
        if dist.get_rank() == 0:
            apart = distance(trained[1], trained[0])
            moved = distance(begun, trained[0])
            assert moved > 1e-5, f"{name}: nothing was trained"
            assert apart < 1e-3 * moved, f"{name}: {apart:.2e} apart, where training moved {moved:.2e}"
            found[name] = [apart, moved]
    return found


def sampling_by_time_with_a_slow_replica() -> dict[str, Any]:
    """GRPO as it is used: every rank samples, and no replica waits for another between two syncs."""
    size = 2 if os.environ.get("ACCELERATE_USE_FSDP") == "true" else 1
    with pytest.raises(ValueError, match="completions of a prompt are compared"):
        make(EDiTSampling, GRPOConfig, EDiTConfig(), num_generations=8)
    trainer = make(
        EDiTSampling, GRPOConfig, EDiTConfig(sync_seconds=2.0), max_steps=8, learning_rate=1e-3,
    )  # fmt: skip
    trainer.train()
    assert trainer.crossing == 0
    assert trainer.edit_stats.syncs >= 1
    taken = [None] * dist.get_world_size()
    dist.all_gather_object(taken, trainer.edit_stats.inner_steps)
    assert taken[0] > taken[-1], f"the slow replica was waited for: {taken}"
    assert_replicas_equal(trainer)
    return {"steps": taken[::size]}
