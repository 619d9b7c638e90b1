"""Run by every rank of a launch (see serve.py): trains small Llamas with EDiTTrainer, and compares on rank 0."""

from __future__ import annotations

import functools
import gc
import os
import random
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # tests/gpu runs these, too

import torch
import torch.distributed as dist
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import _redistribute
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.utils.data import IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_edit import EDiTConfig, EDiTMixin, EDiTTrainer
from hf_edit.sync.units import find_units
from tests.dist.nets import state_on_host
from tests.dist.reference import simulate

FOLDER = Path()  # of the test
VOCABULARY, LENGTH, BATCH = 64, 12, 2
TOLERANCE = 1e-4 if torch.cuda.is_available() else 1e-5  # AdamW's first steps enlarge what a GPU rounds otherwise


def forget_trainings() -> None:
    """Ends what those before have left behind, which nobody uses any more. Each of their process groups has a thread
    that looks around 100 times a second (gloo in torch 2.13): after 25 trainings of 4 ranks they took a whole core."""
    if not dist.is_initialized():
        return
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    forget_meshes()
    gc.collect()
    dist.barrier()
    # Private in torch 2.13: all groups.
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def forget_meshes() -> None:
    """What DTensor keeps of each mesh, and with it of its groups; private in torch 2.13, and partly new."""
    _clear_sharding_prop_cache()
    if hasattr(_redistribute, "clear_redistribute_planner_cache"):
        _redistribute.clear_redistribute_planner_cache()
    for cache in _caches_of_dtensor():
        cache.cache_clear()


@functools.cache
def _caches_of_dtensor() -> list[Any]:
    gc.unfreeze()  # of serve.py: what is frozen is not among the objects
    return [
        each for each in gc.get_objects()
        if isinstance(each, functools._lru_cache_wrapper) and each.__module__.startswith("torch.distributed.tensor")
    ]  # fmt: skip


def make_model(tied: bool = False, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    )  # fmt: skip


def make_rows(num_rows: int = 256, ragged: bool = False) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(num_rows):
        tokens = torch.randint(0, VOCABULARY, (LENGTH,), generator=generator)
        labels = tokens.clone()
        if ragged:
            labels[int(torch.randint(2, LENGTH, (), generator=generator)) :] = -100
        rows.append({"input_ids": tokens, "labels": labels})
    return rows


def make_args(**settings: Any) -> TrainingArguments:
    defaults = dict(
        output_dir=str(FOLDER / "trainer"), max_steps=9, per_device_train_batch_size=BATCH, learning_rate=1e-2,
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=0.0, train_sampling_strategy="sequential",
        report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
        ddp_backend=os.environ.get("DEVICE_BACKEND"),  # tests/gpu has made the process group
    )  # fmt: skip
    return TrainingArguments(**{**defaults, **settings})


def train(
    config: EDiTConfig, tied: bool = False, ragged: bool = False, rows: Any = None, trainer: Any = EDiTTrainer,
    collator: Any = None, **settings: Any,
) -> Any:  # fmt: skip
    """A finished trainer; it must have had the launch's layout."""
    args = make_args(**settings)
    rows = rows or make_rows(ragged=ragged)
    trainer = trainer(
        model=make_model(tied), args=args, train_dataset=rows, eval_dataset=make_rows(8), data_collator=collator,
        edit_config=config,
    )  # fmt: skip
    trainer.train()
    assert dist.get_world_size() == int(os.environ["WORLD_SIZE"]) == trainer.accelerator.num_processes
    assert trainer.edit_layout.num_replicas > 1
    assert trainer._engine is None, "the Trainer's end of training has moved"
    sharded = isinstance(trainer.model, FSDPModule)
    assert sharded == (trainer.edit_layout.replica_size > 1), trainer.accelerator.distributed_type
    return trainer


def parameters(trainer: Any) -> dict[str, Tensor]:
    return state_on_host(trainer.accelerator, trainer.model)


def expected(
    layout: Any, steps: int, ragged: bool = False, accumulation: int = 1, sgd: bool = False, make_optimizer: Any = None,
    **settings: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """What the independent simulation ends with on the Trainer's data.

    Args:
        make_optimizer: of a list of parameters, in the model's order; None: SGD or AdamW.
    """
    rows, world = make_rows(ragged=ragged), layout.num_replicas * layout.replica_size

    def losses(net: nn.Module, step: int, ranks: list[int]) -> Tensor:
        picked = []
        for micro in range(accumulation):
            for rank in ranks:
                first = ((step * accumulation + micro) * world + rank) * BATCH
                picked += rows[first : first + BATCH]
        tokens, labels = (torch.stack([row[key] for row in picked]) for key in ("input_ids", "labels"))
        return net(input_ids=tokens, labels=labels).loss  # the mean over the labels of the whole replica

    def unit(name: str) -> str:
        if "layers." in name:
            return name.split("layers.")[1].split(".")[0]
        return "embed" if "embed" in name else "tail"

    def optimizer(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.5) if sgd else torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0)

    return simulate(
        make_model, unit, losses, make_optimizer or optimizer, num_replicas=layout.num_replicas,
        replica_size=layout.replica_size, steps=steps, **settings,
    )  # fmt: skip


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert {n for n in other if n in one} == set(other), set(other) ^ set(one)
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in other)


def compare(trainer: Any, tolerance: float = TOLERANCE, **settings: Any) -> dict[str, Any]:
    mine = parameters(trainer)
    if trainer.is_world_process_zero():
        apart = distance(mine, expected(trainer.edit_layout, **settings))
        assert apart <= tolerance, f"relative distance {apart:.2e}"
        return {"distance": apart}
    return {}


# -- scenarios --------------------------------------------------------------------------------------------------------


def simulation_adamw() -> dict[str, Any]:
    """The default overlap, warm-up, penalty, clipping, steps that are no multiple of tau."""
    config = EDiTConfig(sync_interval=3, warmup_steps=2, max_pseudo_grad_norm=0.3)
    trainer = train(config)
    assert trainer.edit_stats.syncs == 3
    assert trainer.edit_stats.inner_steps == 7
    return compare(trainer, steps=9, tau=3, warmup=2, clip=0.3)


def gradients_are_clipped_in_the_replica() -> dict[str, Any]:
    """The Trainer's max_grad_norm, of the replica's own gradient; in the warm-up of the averaged one."""
    settings = dict(optim="sgd", learning_rate=0.5, max_grad_norm=0.4)
    trainer = train(EDiTConfig(sync_interval=3, warmup_steps=2), **settings)
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert min(norms) > 0.4, f"nothing was clipped: {norms}"
    return compare(trainer, steps=9, tau=3, warmup=2, sgd=True, max_grad_norm=0.4)


def simulation_sgd_accumulating() -> dict[str, Any]:
    config = EDiTConfig(sync_interval=2, overlap="none")
    settings = dict(optim="sgd", learning_rate=0.5, gradient_accumulation_steps=2)
    return compare(train(config, **settings), steps=9, tau=2, sgd=True, accumulation=2)


def tokens_are_averaged_over_the_replica() -> dict[str, Any]:
    """Labels of different lengths: the loss of an inner step is the mean over the replica's tokens."""
    settings = dict(optim="sgd", learning_rate=0.5, gradient_accumulation_steps=2)
    trainer = train(EDiTConfig(sync_interval=2), ragged=True, **settings)
    return compare(trainer, steps=9, tau=2, sgd=True, ragged=True, accumulation=2)


class OwnLoss(Trainer):
    """A user's Trainer, whose loss is scaled as transformers' documentation says."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        logits = model(**inputs).logits[:, :-1].flatten(0, 1).float()
        nats = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        return nats / num_items_in_batch * self.accelerator.num_processes


class EDiTOwnLoss(EDiTMixin, OwnLoss):
    pass


def a_users_trainer_keeps_its_loss_and_its_scale() -> dict[str, Any]:
    settings = dict(optim="sgd", learning_rate=0.5)
    trainer = train(EDiTConfig(sync_interval=2), ragged=True, trainer=EDiTOwnLoss, **settings)
    return compare(trainer, steps=9, tau=2, sgd=True, ragged=True)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(make_rows())


def a_stream_is_read_by_every_process_itself() -> dict[str, Any]:
    """Accelerate would let process 0 read it and send the batches to everybody, in every step."""
    asked = {"dispatch_batches": True}  # is turned off
    trainer = train(EDiTConfig(sync_interval=4), rows=Stream(), accelerator_config=asked)
    assert not isinstance(trainer.callback_handler.train_dataloader, DataLoaderDispatcher)
    return compare(trainer, steps=9, tau=4)


def an_unseeded_sampler_is_made_equal_once() -> dict[str, Any]:
    """Accelerate would broadcast the sampler's generator in every epoch; every epoch must see every row once."""
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    rows, seen = make_rows(num_rows=4 * world), []
    numbered = [{**row, "number": torch.tensor(number)} for number, row in enumerate(rows)]

    def collator(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        seen.extend(int(row["number"]) for row in batch)
        return {key: torch.stack([row[key] for row in batch]) for key in ("input_ids", "labels")}

    settings = dict(train_sampling_strategy="random", num_train_epochs=3, max_steps=-1, remove_unused_columns=False)
    unseeded = {"use_seedable_sampler": False}
    train(EDiTConfig(sync_interval=4), rows=numbered, collator=collator, accelerator_config=unseeded, **settings)
    everyone: list[list[int]] = [[] for _ in range(world)]
    dist.all_gather_object(everyone, seen)
    for epoch in range(3):
        numbers = [n for numbers in everyone for n in numbers[4 * epoch : 4 * epoch + 4]]
        assert sorted(numbers) == list(range(4 * world)), f"epoch {epoch}: {sorted(numbers)}"
    assert everyone[0][:4] != everyone[0][4:8], "the sampler does not shuffle"
    return {}


def warmup_is_the_plain_trainer() -> dict[str, Any]:
    """Only synchronous steps, ragged labels: what Trainer does on all ranks, whose loss is the mean over all tokens."""
    settings = dict(optim="sgd", learning_rate=0.5)
    trainer = train(EDiTConfig(warmup_steps=100), ragged=True, **settings)
    mine = parameters(trainer)
    if not trainer.is_world_process_zero():
        return {}
    one_replica = type(trainer.edit_layout)(1, dist.get_world_size(), 0)
    one_step_at_a_time = dict(tau=1000, outer_lr=1.0, outer_momentum=0.0, weighting="uniform", delta=None, clip=None)
    apart = distance(mine, expected(one_replica, steps=9, sgd=True, ragged=True, **one_step_at_a_time))
    assert apart <= TOLERANCE, f"relative distance {apart:.2e}"
    return {"distance": apart}


def overlap_and_offload_change_no_bit() -> dict[str, Any]:
    config = dict(sync_interval=2, warmup_steps=1)
    first = parameters(train(EDiTConfig(**config, overlap="none")))
    for other in ({"overlap": "forward"}, {"overlap": "forward", "offload_outer_state": True}):
        again = parameters(train(EDiTConfig(**config, **other)))
        assert all(torch.equal(first[name], again[name]) for name in first), other
    return {"tensors": len(first)}


def simulation_delayed() -> dict[str, Any]:
    """On threads of their own, the last sync pending at the end."""
    config = EDiTConfig(sync_interval=3, warmup_steps=1, max_pseudo_grad_norm=0.3, overlap="delayed", delay_steps=2)
    trainer = train(config)
    assert trainer.edit_stats.syncs == 3
    return compare(trainer, steps=9, tau=3, warmup=1, clip=0.3, delay=2)


class Dawdling(EDiTTrainer):
    """Its ranks take their time, each another."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        time.sleep(random.Random(self.state.global_step * 8 + dist.get_rank()).choice((0.0, 0.03, 0.1)))
        return super().training_step(*args, **kwargs)


def delayed_syncs_do_not_depend_on_timing() -> dict[str, Any]:
    """Two runs agree bit for bit whatever the ranks' speed, also offloaded; evaluation finds equal replicas."""
    config = dict(sync_interval=3, overlap="delayed", delay_steps=3)
    settings = dict(eval_strategy="steps", eval_steps=6)
    prompt = train(EDiTConfig(**config), **settings)
    first = parameters(prompt)
    for other, trainer in (({}, Dawdling), ({"offload_outer_state": True}, EDiTTrainer)):
        again = train(EDiTConfig(**config, **other), trainer=trainer, **settings)
        mine = parameters(again)
        assert all(torch.equal(first[name], mine[name]) for name in first), other
        assert [e["eval_loss"] for e in again.state.log_history if "eval_loss" in e] == [
            e["eval_loss"] for e in prompt.state.log_history if "eval_loss" in e
        ]
    # Due at 6, where a sync begins that is applied at 9, the end.
    assert [e["step"] for e in prompt.state.log_history if "eval_loss" in e] == [9]
    return {"tensors": len(first)}


def logs() -> dict[str, Any]:
    """Every key at every sync, at the right step; counts over all replicas; evaluation moved to a sync."""
    counting = dict(include_num_input_tokens_seen="all", eval_strategy="steps", eval_steps=3, eval_on_start=True)
    trainer = train(EDiTConfig(sync_interval=4), **counting)
    history = trainer.state.log_history
    world = trainer.accelerator.num_processes
    losses = {entry["step"]: entry for entry in history if "loss" in entry}
    assert sorted(losses) == list(range(1, 10))
    assert all(losses[s]["num_input_tokens_seen"] == s * world * BATCH * LENGTH for s in losses)
    assert trainer.state.total_flos == 9 * world * trainer.floating_point_ops(
        {"input_ids": torch.zeros(BATCH, LENGTH, dtype=torch.long)}
    )
    syncs = {entry["step"]: entry for entry in history if "edit/sync_seconds" in entry}
    # Due after steps 4 and 8; evaluation, due at 3, 6 and 9, ends them at once; the rest at the end.
    assert sorted(syncs) == [4, 8, 9]
    assert [e["step"] for e in history if "eval_loss" in e] == [0, 4, 8, 9]
    return {"keys": sorted(syncs[4]), "inner_steps": [syncs[s]["edit/inner_steps"] for s in sorted(syncs)]}


def a_forgotten_training_leaves_no_mesh() -> dict[str, Any]:
    """With each would go threads of its groups, and after some tens of trainings all the machine's time."""
    train(EDiTConfig(sync_interval=5), max_grad_norm=1.0)
    before = len([each for each in gc.get_objects() if isinstance(each, DeviceMesh)])
    forget_trainings()
    gc.unfreeze()
    meshes = [each for each in gc.get_objects() if isinstance(each, DeviceMesh)]
    gc.freeze()
    assert not meshes, f"{before} before: {meshes}. What of torch keeps them? See forget_meshes()."
    return {"before": before}


def units_are_cut_alike() -> dict[str, Any]:
    """The units' names and parameters; the test compares them between FSDP2 and DDP."""
    found = {}
    for tied in (False, True):
        trainer = train(EDiTConfig(sync_interval=5), tied=tied, max_steps=1)
        found[f"tied={tied}"] = {unit.name: unit.names for unit in find_units(trainer.model)}
    return found


def saved_models_load_anywhere() -> dict[str, Any]:
    """save_model() and a checkpoint hold what all replicas agreed on; from_pretrained reads them."""
    trainer = train(EDiTConfig(sync_interval=4), tied=True, save_strategy="steps", save_steps=6, save_only_model=True)
    trainer.save_model(str(FOLDER / "saved"))
    mine = parameters(trainer)
    if trainer.is_world_process_zero():  # due at 6, moved to 8; the Trainer also saves at the end
        folders = sorted(path.name for path in (FOLDER / "trainer").glob("checkpoint-*"))
        assert folders == ["checkpoint-8", "checkpoint-9"], folders
    dist.barrier()
    loaded = LlamaForCausalLM.from_pretrained(FOLDER / "saved")
    if trainer.is_world_process_zero():
        for name, value in loaded.named_parameters():
            assert torch.equal(value.detach(), mine[name]), name
        LlamaForCausalLM.from_pretrained(FOLDER / "trainer" / "checkpoint-8")
    return {}


def training_twice_and_called_in_between() -> dict[str, Any]:
    """A callback evaluates between two syncs: the sync is brought forward, with what was just learnt. train() again."""

    class Evaluate(TrainerCallback):
        trainer: Any = None

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (3, 4):
                self.trainer.evaluate()
                sums = [
                    float(part.detach().double().sum()) for unit in find_units(kwargs["model"]) for part in unit.parts()
                ]
                everyone: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(everyone, sums)
                size = self.trainer.edit_layout.replica_size
                assert all(everyone[rank] == everyone[rank % size] for rank in range(len(everyone))), state.global_step

    callback = Evaluate()

    class WithCallback(EDiTTrainer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs, callbacks=[callback])
            callback.trainer = self

    trainer = train(EDiTConfig(sync_interval=4), trainer=WithCallback)
    # Brought forward to 3 and to 4, then 8, then the end.
    assert trainer.edit_stats.syncs == 4
    trainer.train()
    assert trainer.edit_stats.syncs == 4
    return {"steps": trainer.state.global_step}
