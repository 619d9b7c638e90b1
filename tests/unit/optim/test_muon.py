from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_edit.optim.muon import MuonAdamW, matrices, param_groups
from tests.dist.nets import Net


def tiny_llama(tied: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def with_grads(model: nn.Module, step: int) -> nn.Module:
    generator = torch.Generator().manual_seed(step)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_muon_is_for_the_matrices_of_the_blocks(tied: bool) -> None:
    chosen = matrices(tiny_llama(tied))
    assert chosen == {
        f"model.layers.0.{name}.weight"
        for name in (
            *(f"self_attn.{kind}_proj" for kind in "qkvo"),
            *(f"mlp.{kind}_proj" for kind in ("gate", "up", "down")),
        )
    }


def test_weight_decay_is_for_what_has_more_than_one_axis() -> None:
    model = Net()
    groups = param_groups(model, 0.1)
    assert [(group["muon"], group["weight_decay"]) for group in groups] == [(True, 0.1), (False, 0.1), (False, 0.0)]
    assert [len(group["params"]) for group in groups] == [4, 2, 8]  # blocks; embed and head; biases and norm
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_a_step_is_that_of_torchs_muon_and_torchs_adamw() -> None:
    ours, theirs = Net(), Net()
    mine = MuonAdamW(param_groups(ours, 0.1), lr=0.01, muon_lr=0.02, betas=(0.9, 0.95))
    groups = param_groups(theirs, 0.1)
    muon = torch.optim.Muon(
        groups[0]["params"], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW([{k: v for k, v in g.items() if k != "muon"} for g in groups[1:]], 0.01, (0.9, 0.95))
    for step in range(4):
        with_grads(ours, step)
        with_grads(theirs, step)
        for optimizer in (mine, muon, adamw):
            optimizer.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_it_goes_on_from_a_copy(how: str) -> None:
    model = Net()
    optimizer = MuonAdamW(param_groups(model, 0.1), lr=0.01)
    with_grads(model, 0)
    optimizer.step()
    other: Any = copy.deepcopy(model)
    if how == "state_dict":
        again = MuonAdamW(param_groups(other, 0.3), lr=0.5)
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        copied = {"deepcopy": copy.deepcopy, "pickle": lambda both: pickle.loads(pickle.dumps(both))}[how]
        other, again = copied((model, optimizer))
    for each, stepper in ((model, optimizer), (other, again)):
        with_grads(each, 1)
        stepper.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_without_gradients_nothing_moves() -> None:
    model = with_grads(Net(), 0)
    before = copy.deepcopy(model)
    for name, param in model.named_parameters():
        if name in matrices(model):
            param.grad = None
    MuonAdamW(param_groups(model, 0.1), lr=0.01).step()
    moved = {
        name
        for (name, one), two in zip(model.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(one, two)
    }
    assert moved == {name for name, _ in model.named_parameters()} - matrices(model)


def test_a_model_without_matrices_is_refused() -> None:
    with pytest.raises(ValueError, match="has none to train but embeddings"):
        param_groups(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)), 0.0)


def test_other_shapes_are_refused() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(2, 2, 2))], "muon": True, "weight_decay": 0.0}]
    with pytest.raises(ValueError, match="only supports 2D"):
        MuonAdamW(groups)
