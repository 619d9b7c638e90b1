"""What is refused before a training, and what is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)
from transformers.training_args import OptimizerNames

from hf_edit import EDiTConfig, EDiTMixin
from hf_edit.peers.layout import Layout
from hf_edit.sync.units import wrapping_groups
from hf_edit.trainer.checks import (
    check_batches,
    check_loop,
    check_wrapping,
    never_due,
    optimizer_problem,
    passed_over,
    wrapping_problem,
)

TINY = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
LAYOUT = Layout(2, 2, 0)


# -- optimizers -------------------------------------------------------------------------------------------------------

# Every value of TrainingArguments.optim: trained with replicas of one rank and of two (torch 2.13, transformers 5.24).
ALWAYS, NOT_SHARDED, NEVER = "always", "replicas of one rank", "never"
TRANSFORMERS = "not here"  # transformers itself refuses it in any distributed training, or it needs an accelerator
OPTIMIZERS = {
    "adamw_torch": ALWAYS, "adamw_torch_fused": ALWAYS, "adamw_torch_4bit": ALWAYS, "adamw_torch_8bit": ALWAYS,
    "sgd": ALWAYS, "adagrad": ALWAYS, "rmsprop": ALWAYS, "galore_adamw": ALWAYS, "lomo": ALWAYS, "grokadamw": ALWAYS,
    "stable_adamw": ALWAYS,
    "adafactor": NOT_SHARDED, "ademamix": NOT_SHARDED, "adamw_bnb_8bit": NOT_SHARDED, "adamw_8bit": NOT_SHARDED,
    "ademamix_8bit": NOT_SHARDED, "lion_8bit": NOT_SHARDED, "lion_32bit": NOT_SHARDED,
    "paged_adamw_32bit": NOT_SHARDED, "paged_adamw_8bit": NOT_SHARDED, "paged_ademamix_32bit": NOT_SHARDED,
    "paged_ademamix_8bit": NOT_SHARDED, "paged_lion_32bit": NOT_SHARDED, "paged_lion_8bit": NOT_SHARDED,
    "rmsprop_bnb": NOT_SHARDED, "rmsprop_bnb_8bit": NOT_SHARDED, "rmsprop_bnb_32bit": NOT_SHARDED,
    "galore_adamw_8bit": NOT_SHARDED, "galore_adafactor": NOT_SHARDED, "apollo_adamw": NOT_SHARDED,
    "schedule_free_radam": NEVER, "schedule_free_adamw": NEVER, "schedule_free_sgd": NEVER,
    "adamw_torch_xla": TRANSFORMERS, "adamw_torch_npu_fused": TRANSFORMERS, "adamw_anyprecision": TRANSFORMERS,
    "galore_adamw_layerwise": TRANSFORMERS, "galore_adamw_8bit_layerwise": TRANSFORMERS,
    "galore_adafactor_layerwise": TRANSFORMERS, "apollo_adamw_layerwise": TRANSFORMERS, "adalomo": TRANSFORMERS,
}  # fmt: skip


def verdict(optimizer: Any) -> str:
    if optimizer_problem(optimizer, sharded=False, warms_up=False) is not None:
        return NEVER
    return NOT_SHARDED if optimizer_problem(optimizer, sharded=True, warms_up=False) is not None else ALWAYS


def test_every_optimizer_is_decided_on() -> None:
    # Values that a later transformers brings are to be tried, and to be written down here.
    assert {optimizer.value for optimizer in OptimizerNames} <= set(OPTIMIZERS)


def test_the_optimizers_that_can_be_had_here() -> None:
    had = {}
    for name, expected in OPTIMIZERS.items():
        targets = dict(optim_target_modules="all-linear") if name.startswith(("galore", "apollo")) else {}
        args = TrainingArguments(output_dir="unused", optim=name, use_cpu=True, report_to="none", **targets)
        if expected == TRANSFORMERS:
            continue
        try:
            kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, nn.Sequential(nn.Linear(2, 2)))
        except (ImportError, ValueError):
            continue  # a package that is not installed
        kwargs.pop("params", None), kwargs.pop("optimizer_dict", None)
        had[name] = verdict(kind(kwargs.pop("model", [nn.Parameter(torch.zeros(2, 2))]), **kwargs))
    assert had == {name: OPTIMIZERS[name] for name in had}
    assert {"adamw_torch", "adafactor", "sgd", "schedule_free_adamw"} <= set(had)


def of_module(module: str) -> Any:
    kind = type("Some", (torch.optim.SGD,), {"__module__": module})
    return kind([nn.Parameter(torch.zeros(1))], lr=0.1)


@pytest.mark.parametrize(
    ("module", "sharded", "warms_up", "promise"),
    [
        ("torch.optim.adamw", True, True, None),
        ("torchao.optim.adam", True, True, None),
        ("bitsandbytes.optim.adamw", False, True, None),
        ("bitsandbytes.optim.adamw", True, False, "cannot step parameters that FSDP2 has sharded"),
        ("galore_torch.adamw", True, False, None),
        ("galore_torch.adamw8bit", True, False, "replicas of one rank"),
        ("lomo_optim.lomo", False, False, None),
        ("lomo_optim.lomo", False, True, "Set warmup_steps=0"),
    ],
)
def test_optimizers_of_other_packages(module: str, sharded: bool, warms_up: bool, promise: str | None) -> None:
    problem = optimizer_problem(of_module(module), sharded, warms_up)
    assert problem is None if promise is None else promise in str(problem)


# -- models -----------------------------------------------------------------------------------------------------------


class Block(nn.Linear):
    pass


class Net(nn.Module):
    """Embeddings and head may be shared; a block may hold the embeddings."""

    _no_split_modules = ("Block", "Holder")

    def __init__(self, tie: str = "", hold: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 4)
        if hold:
            self.holder = Holder(self.embed)
            del self.embed
        self.block = Block(4, 4, bias=False)
        self.other = nn.Embedding(4, 4)
        self.head = nn.Linear(4, 4, bias=False)
        if tie:
            self.get_submodule(tie).weight = self.get_input_embeddings().weight

    def forward(self, tokens: Tensor) -> Tensor:
        embed = self.holder if hasattr(self, "holder") else self.embed
        return self.head(self.block(embed(tokens)) + self.other(tokens))

    def get_input_embeddings(self) -> nn.Module:
        return self.holder.embed if hasattr(self, "holder") else self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head


class Holder(nn.Module):
    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens)


def groups(net: Net) -> list[list[nn.Module]]:
    return wrapping_groups(net, lambda module: type(module).__name__ in net._no_split_modules)


@pytest.mark.parametrize(
    ("net", "promise"),
    [
        (Net(), None),
        (Net(tie="head"), None),  # one group
        (Net(tie="other"), "embed.weight and other.weight are one parameter in two of FSDP2's groups"),
        (Net(tie="block"), "block.weight and embed.weight are one parameter"),
        (Net(hold=True), "holder.embed lies inside holder (Holder), which is wrapped before it"),
    ],
)
def test_what_fsdp2_cannot_group(net: Net, promise: str | None) -> None:
    problem = wrapping_problem(net, groups(net))
    assert problem is None if promise is None else promise in str(problem)


def plugin(*classes: str) -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=list(classes) or None
    )


def refusal(model: nn.Module, *classes: str) -> str:
    with pytest.raises(ValueError, match="replicas of one rank \\(num_replicas=4\\)") as error:
        check_wrapping(model, plugin(*classes), LAYOUT)
    return str(error.value)


def test_the_way_out_is_another_class_where_there_is_one() -> None:
    bert = BertForSequenceClassification(BertConfig(**TINY))
    text = refusal(bert)
    assert "bert.embeddings.word_embeddings lies inside bert.embeddings (BertEmbeddings)" in text
    assert "leave out BertEmbeddings: fsdp_transformer_layer_cls_to_wrap: BertLayer" in text
    check_wrapping(bert, plugin("BertLayer"), LAYOUT)


def test_shared_embeddings_have_no_other_class() -> None:
    text = refusal(
        T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    )
    assert "shared.weight and encoder.embed_tokens.weight are one parameter" in text
    assert "leave out" not in text


def test_models_without_token_embeddings() -> None:
    speech = Wav2Vec2Config(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, conv_dim=(8,),
        conv_stride=(5,), conv_kernel=(10,), num_feat_extract_layers=1, num_conv_pos_embeddings=2,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    assert "Wav2Vec2ForCTC.get_input_embeddings() raises" in refusal(Wav2Vec2ForCTC(speech))


def test_what_is_learnt_of_prompts_cannot_be_saved_from_shards() -> None:
    peft = pytest.importorskip("peft")
    llama = LlamaForCausalLM(LlamaConfig(**TINY))
    check_wrapping(llama, plugin(), LAYOUT)
    prompts = peft.get_peft_model(llama, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert "Take LoRA" in refusal(prompts)


# -- trainings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "first", "last", "says"),
    [
        (dict(sync_interval=8), 0, 8, None),
        (dict(sync_interval=8), 0, 7, "takes 7 inner steps, fewer than sync_interval=8"),
        (dict(sync_interval=8), 4, 11, "takes 7 inner steps"),
        (dict(sync_interval=8, warmup_steps=4), 0, 11, "takes 7 inner steps"),
        (dict(sync_interval=8, warmup_steps=40), 0, 12, "takes 0 inner steps"),
        (dict(sync_seconds=60.0), 0, 1, None),
    ],
)
def test_a_training_shorter_than_the_interval(config: Any, first: int, last: int, says: str | None) -> None:
    warning = never_due(EDiTConfig(**config), first, last)
    assert warning is None if says is None else says in str(warning)


def test_the_mixin_comes_first() -> None:
    with pytest.raises(TypeError, match=r"Put it first: class Wrong\(EDiTMixin, TheirTrainer\)"):
        type("Wrong", (Trainer, EDiTMixin), {})
    type("Right", (EDiTMixin, Trainer), {})


def test_the_class_that_passes_over_is_named() -> None:
    class Theirs:
        def training_step(self) -> None: ...

    class Mine(Theirs):
        pass

    text = str(passed_over(Mine(), "training_step"))
    assert text.startswith("Theirs.training_step() does not call super().training_step()")
    assert "class Mine(EDiTMixin, Theirs)" in text


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (dict(on_loss_spike="skip"), "on_loss_spike='skip' is EDiTTrainer's; .* you see the loss"),
        (dict(balance=True), "balance=True is EDiTTrainer's; .* the data are yours to deal out"),
        (dict(sync_interval_end=2), "sync_interval_end=2 is EDiTTrainer's; .* the number of steps is not known"),
    ],
)
def test_what_a_loop_of_ones_own_cannot_have(settings: dict[str, Any], text: str) -> None:
    check_loop(EDiTConfig())
    with pytest.raises(ValueError, match=text):
        check_loop(EDiTConfig(**settings))


@pytest.mark.parametrize(
    ("settings", "layout", "elastic", "text"),
    [
        (dict(auto_find_batch_size=True), Layout(2, 2, 0), False, "auto_find_batch_size=True with replicas of 2 ranks"),
        (dict(auto_find_batch_size=True), Layout(2, 2, 0), True, "num_replicas=4 for replicas of one rank"),
        (dict(auto_find_batch_size=True), Layout(4, 1, 0), False, None),
        (dict(auto_find_batch_size=True), Layout(1, 2, 0), False, None),
        (dict(train_sampling_strategy="batch_rebalance"), Layout(2, 1, 0), True, "every replica would read the same"),
        (dict(train_sampling_strategy="batch_rebalance"), Layout(2, 1, 0), False, None),
    ],
)
def test_ways_to_make_batches(settings: dict[str, Any], layout: Layout, elastic: bool, text: str | None) -> None:
    args = TrainingArguments(use_cpu=True, **settings)
    if text is None:
        check_batches(args, layout, elastic)
        return
    with pytest.raises(ValueError, match=text):
        check_batches(args, layout, elastic)
