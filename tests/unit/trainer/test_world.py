"""Where a step's world begins and ends; what a batch without labels leaves behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import signature
from types import ModuleType, SimpleNamespace
from typing import Any

import accelerate.utils
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer
from transformers.generation.utils import GenerationMixin

from hf_edit.peers.layout import Layout
from hf_edit.trainer.world import (
    COLLECTIVES,
    ReplicaAccelerator,
    ReplicaWorld,
    check_generation,
    generators_of,
    modules_of,
    num_targets,
)

PEERS: Any = SimpleNamespace(
    layout=Layout.split(4, 2, 3),
    inside=SimpleNamespace(
        gather=lambda tensor: torch.cat([tensor.reshape(-1)] * 2), gather_object=lambda value: [value] * 2
    ),
)


def place(accelerator: Accelerator) -> tuple[int, int, bool, bool]:
    shown = accelerator.num_processes, accelerator.process_index, accelerator.is_main_process
    return *shown, accelerator.is_last_process


def ours() -> ReplicaAccelerator:
    accelerator: Any = Accelerator(cpu=True)
    ReplicaAccelerator.take_over(accelerator)
    return accelerator


def test_the_world_is_the_replica_inside_and_whole_outside_and_for_others() -> None:
    accelerator, other, alone = ours(), Accelerator(cpu=True), (1, 0, True, True)
    one = torch.tensor([1.0])
    with accelerator.in_replica(PEERS):
        with accelerator.in_replica(PEERS):
            assert place(accelerator) == (2, 1, False, True)
        assert place(accelerator) == (2, 1, False, True)
        assert accelerator.gather(one).tolist() == accelerator.gather_for_metrics(one).tolist() == [1.0, 1.0]
        assert accelerator.gather_for_metrics(["a"]) == ["a", "a"]
        assert place(other) == alone
        assert other.gather(one).tolist() == [1.0]
    assert place(accelerator) == alone
    assert accelerator.gather(one).tolist() == [1.0]
    assert accelerator.reduce(one).tolist() == accelerator.pad_across_processes(one).tolist() == [1.0]
    accelerator.wait_for_everyone()


def users_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A trainer's module, as TRL's are, in which one function has another name."""
    module: Any = ModuleType("of_a_user")
    monkeypatch.setitem(sys.modules, "of_a_user", module)
    for name in COLLECTIVES:
        setattr(module, name, getattr(accelerate.utils, name))
    module.collect, module.reduce = accelerate.utils.gather, len
    return module


def test_names_of_the_trainers_own_modules_change_for_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = users_module(monkeypatch)
    kind = type("Users", (Trainer,), {"__module__": "of_a_user", "__init__": lambda self: None})
    found, before, library = modules_of(kind()), dict(vars(module)), dict(vars(accelerate.utils))
    assert module in found
    assert not any(name.__name__.startswith(("transformers", "accelerate", "torch")) for name in found)

    def step() -> None:
        assert module.collect(torch.tensor([1.0])).tolist() == [1.0, 1.0]
        assert module.gather_object(["a"]) == ["a", "a"]
        assert module.reduce is len, "a name that is no collective"
        assert dict(vars(accelerate.utils)) == library, "accelerate itself was changed"
        raise KeyError("a step that fails")

    with pytest.raises(KeyError, match="a step that fails"), ours().in_replica(PEERS, found):
        step()
    assert dict(vars(module)) == before


def mean_of_none(logits: Tensor) -> Tensor:
    return (logits * 0).sum() / torch.zeros(())


@pytest.mark.parametrize("loss", [mean_of_none, Tensor.sum, lambda logits: logits.sum() * torch.nan])
@pytest.mark.parametrize("output", [dict, list, tuple, lambda pairs: pairs[0][1]])
def test_without_gradient_it_is_exactly_zero(loss: Callable[[Tensor], Tensor], output: Any) -> None:
    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            logits = super().forward(x)
            pairs = [("logits", logits), ("loss", mean_of_none(logits))]
            return output(pairs) if output is not list and output is not tuple else output(v for _, v in pairs)

    net, accelerator, x = Net(3, 2), ours(), torch.randn(4, 3)
    net.weight.grad = torch.ones_like(net.weight)  # of another batch of the step
    with accelerator.without_gradient(net):
        net(x)
        accelerator.backward(loss(nn.functional.linear(x, net.weight)))
    assert torch.equal(net.weight.grad, torch.ones_like(net.weight))
    assert torch.equal(net.bias.grad, torch.zeros(2))
    accelerator.backward(nn.functional.linear(x, net.weight).sum())
    assert not torch.equal(net.weight.grad, torch.ones_like(net.weight)), "it lasted"


NONE, FIRST, SOME = torch.tensor([[-100, -100]]), torch.tensor([[3, -100]]), torch.tensor([[-100, 3]])


@pytest.mark.parametrize(
    ("batch", "shifted", "expected"),
    [
        ({"labels": NONE}, True, 0),
        ({"labels": FIRST}, True, 0),  # nothing predicts the first token
        ({"labels": FIRST}, False, 1),
        ({"labels": SOME}, True, 1),
        ({"labels": NONE, "shift_labels": SOME}, True, 1),
        ({"labels": SOME, "shift_labels": NONE}, True, 0),
        ({"labels": torch.tensor([0.5])}, False, 1),  # a regression
        ({"labels": [{"boxes": 1}]}, False, None),
        ({"input_ids": SOME}, True, None),
        ([{"prompt": "a"}], True, None),
    ],
)
def test_labels_that_are_targets(batch: Any, shifted: bool, expected: int | None) -> None:
    found = num_targets(batch, shifted)
    assert (None if found is None else int(found)) == expected


GRPO = dict(
    per_device_train_batch_size=2, steps_per_generation=2, num_generations=4, num_iterations=1,
    gradient_accumulation_steps=2, use_vllm=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "warmup", "world", "text"),
    [
        ({}, 0, 4, None),
        ({"num_generations": 8}, 0, 4, "num_generations=8 .*generates 4 at a time.*multiple of 8"),
        ({"num_generations": 8}, 0, 8, None),  # replicas of two ranks
        ({"steps_per_generation": None}, 0, 4, "they would lie on two replicas"),
        ({"use_vllm": True}, 0, 4, "use_vllm=True.*Set use_vllm=False"),
        ({}, 3, 4, None),
        ({"num_iterations": 2}, 3, 4, "warmup_steps=3: .*used in 4 batches, a step takes 2"),
        ({"num_iterations": 2}, 4, 4, None),
        ({"num_generations": None}, 3, 4, None),
        ({"num_generations": 3, "use_vllm": True}, 3, 1, None),  # one replica is a plain Trainer
    ],
)
def test_what_generation_needs(changed: dict[str, Any], warmup: int, world: int, text: str | None) -> None:
    layout = Layout.split(world, min(world, 4), 0)
    arguments = SimpleNamespace(**{**GRPO, **changed})
    if text is None:
        return check_generation(arguments, layout, warmup)
    with pytest.raises(ValueError, match=text):
        check_generation(arguments, layout, warmup)


def test_generation_asks_the_ranks_of_the_replica() -> None:
    private = GenerationMixin._has_unfinished_sequences
    shown = ReplicaWorld.has_unfinished_sequences
    assert [*signature(shown).parameters] == [*signature(private).parameters], "transformers has changed it"
    left_elsewhere, asked = [1.0, 1.0, 0.0], []

    def add(mine: Tensor) -> Tensor:
        asked.append(float(mine))
        return mine + left_elsewhere[len(asked) - 1]

    peers: Any = SimpleNamespace(layout=PEERS.layout, inside=SimpleNamespace(sum=add))
    torch.manual_seed(0)
    sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=1, num_hidden_layers=1)
    model = LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0))
    prompt = torch.ones(1, 2, dtype=torch.long)
    ends = dict(eos_token_id=[*range(8)], do_sample=False, max_new_tokens=6)  # whatever comes first
    wrapped = nn.ModuleDict({"model": model})
    with ours().in_replica(peers, generators=generators_of(wrapped)):
        with ours().in_replica(peers, generators=[model]):
            pass
        answer = model.generate(prompt, **ends, synced_gpus=True)
    assert answer.shape == (1, 3), "its answer ended with one token"
    assert asked == [1.0, 0.0, 0.0], "while another rank has more to generate it takes part"
    assert "_has_unfinished_sequences" not in vars(model)
