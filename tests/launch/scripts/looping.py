"""Run by every rank of a launch: hand-written loops with `EDiT`. Arguments as for scenarios.py."""

from __future__ import annotations

import dataclasses
import re
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import default_data_collator

from hf_edit import EDiT, EDiTConfig
from hf_edit.method.tuning import Tuned
from hf_edit.sync.units import local_part, named_tensors
from tests.dist.nets import state_on_host
from tests.launch.scripts.features import Blocks
from tests.launch.scripts.scenarios import BATCH, FOLDER, TOLERANCE, distance, expected, make_model, make_rows


class Loop:
    """A plain Accelerate loop with EDiT's lines in it."""

    asks = True  # for its logs

    def __init__(
        self, config: EDiTConfig, accumulation: int = 1, sgd: bool = False, make: Any = make_model, scaler: Any = None
    ) -> None:
        self.config = config
        self.accelerator = EDiT.accelerator(config, gradient_accumulation_steps=accumulation)
        self.accelerator.scaler = scaler
        model = make()
        kind = torch.optim.SGD(model.parameters(), lr=0.5) if sgd else torch.optim.AdamW(
            model.parameters(), lr=1e-2, weight_decay=0.0
        )  # fmt: skip
        loader = DataLoader(make_rows(), batch_size=BATCH, collate_fn=default_data_collator)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, kind, loader)
        self.scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer.optimizer, factor=1.0)
        self.logs: list[dict[str, float]] = []

    def train(self, edit: EDiT, batches: int, skip: int = 0) -> None:
        self.model.train()
        for number, batch in enumerate(self.loader):
            if number < skip:
                continue
            if number >= skip + batches:
                break
            with self.accelerator.accumulate(self.model):
                loss = self.model(**batch)["loss"]
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
            edit.step(loss, tokens=batch["input_ids"].numel())
            if self.asks:
                self.logs += edit.logs()

    def parameters(self) -> dict[str, Tensor]:
        return {n: local_part(p).detach().clone() for n, p in named_tensors(self.model)[0].items()}

    def whole(self) -> dict[str, Tensor]:
        return state_on_host(self.accelerator, self.model)


def a_loop_is_the_simulation() -> dict[str, Any]:
    config = EDiTConfig(sync_interval=3, warmup_steps=2, max_pseudo_grad_norm=0.3)
    loop = Loop(config)
    with EDiT(loop.accelerator, loop.model, loop.optimizer, config) as edit:
        assert edit.layout.num_replicas > 1
        assert loop.accelerator.num_processes == dist.get_world_size()
        loop.train(edit, batches=9)
    mine = loop.whole()
    if dist.get_rank() == 0:
        apart = distance(mine, expected(edit.layout, steps=9, tau=3, warmup=2, clip=0.3))
        assert apart <= TOLERANCE, apart
    # Due after steps 5 and 8, each finished in the step that follows.
    assert [entry["edit/inner_steps"] for entry in loop.logs] == [3, 3]
    assert [entry["edit/inner_steps"] for entry in edit.logs()] == [1]  # the end's
    assert edit.logs() == []
    return {}


def a_loop_accumulates() -> dict[str, Any]:
    config = EDiTConfig(sync_interval=2)
    loop = Loop(config, accumulation=2, sgd=True)
    with EDiT(loop.accelerator, loop.model, loop.optimizer, config) as edit:
        loop.train(edit, batches=10)
    mine = loop.whole()
    if dist.get_rank() == 0:
        apart = distance(mine, expected(edit.layout, steps=5, tau=2, sgd=True, accumulation=2))
        assert apart <= TOLERANCE, apart
    return {}


def a_loop_saves_and_loads() -> dict[str, Any]:
    """state_dict() moves nothing and loads back; save() and load() go on bit for bit."""
    config = EDiTConfig(sync_interval=3)
    loop, place = Loop(config), FOLDER / "loop"
    with EDiT(loop.accelerator, loop.model, loop.optimizer, config) as edit:
        loop.train(edit, batches=3)
        with pytest.raises(RuntimeError, match="A sync is under way"):
            edit.state_dict()  # the one that the next forward pass carries out
        loop.train(edit, batches=1, skip=3)
        before = loop.parameters()
        state = edit.state_dict()
        assert all(torch.equal(value, before[name]) for name, value in loop.parameters().items())
        assert state["counters"]["inner_steps"] == 1
        copy = {name: value.clone() if isinstance(value, Tensor) else dict(value) for name, value in state.items()}
        loop.train(edit, batches=2, skip=4)
        edit.flush()
        edit.load_state_dict(copy)
        again = edit.state_dict()
        assert again["counters"] == copy["counters"]
        assert all(torch.equal(local_part(again[n]), local_part(t)) for n, t in copy.items() if isinstance(t, Tensor))
        loop.train(edit, batches=4, skip=6)
        counters = edit.state_dict()["counters"]
        anchor = next(name for name in copy if name.startswith("anchor/"))
        for wrong in ("anchor/of.another.model", "residual/9/of.another.replica", anchor):
            with pytest.raises(ValueError, match=re.escape(f"of another model or method: ['{wrong}']")):
                edit.load_state_dict({**copy, wrong: torch.zeros(1)})
        assert edit.state_dict()["counters"] == counters, "what is refused has changed nothing"

    loop = Loop(config)
    with EDiT(loop.accelerator, loop.model, loop.optimizer, config) as edit:
        loop.train(edit, batches=6)
        edit.save(place, scheduler=loop.scheduler)
        loop.train(edit, batches=5, skip=6)
    end = loop.parameters()
    resumed = Loop(config)
    with EDiT(resumed.accelerator, resumed.model, resumed.optimizer, config) as edit:
        assert edit.load(place, scheduler=resumed.scheduler) == 6
        resumed.train(edit, batches=5, skip=6)
    assert all(torch.equal(value, end[name]) for name, value in resumed.parameters().items())
    (place / "edit" / "manifest.json").unlink(missing_ok=True)
    dist.barrier()
    with (
        EDiT(loop.accelerator, loop.model, loop.optimizer, config) as edit,
        pytest.raises(ValueError, match=re.escape("edit/ has no manifest")),
    ):
        edit.load(place)
    return {}


def a_loop_keeps_codes_fragments_and_settings() -> dict[str, Any]:
    """What codes have left out, which part is next and the settings that have found themselves are in state_dict();
    save() and load() go on bit for bit."""
    config = EDiTConfig(sync_interval=4, fragments=2, compression="int8", overlap="delayed", delay_steps=1, tune="auto")
    loop = Loop(config)
    with EDiT(loop.accelerator, loop.model, loop.optimizer, config) as edit:
        edit._engine.tuning._tuner.look = lambda measured, now: (now, "")  # what is measured differs from run to run
        loop.train(edit, batches=3)
        edit._engine.tuning._hold(Tuned(3, 2, "int4"))
        loop.train(edit, batches=6, skip=3)
        edit.flush()
        loop.train(edit, batches=4, skip=9)
        edit._engine.drain()
        copy = {n: t.clone() if isinstance(t, Tensor) else dict(t) for n, t in edit.state_dict().items()}
        assert copy["counters"]["fragment_steps"] != [0, 0]
        assert not copy["counters"]["whole"]
        assert any("residual" in name and local_part(t).any() for name, t in copy.items() if isinstance(t, Tensor))
    other = Loop(config)
    with EDiT(other.accelerator, other.model, other.optimizer, config) as edit:
        edit.load_state_dict(copy)
        assert edit._engine.tuning.settings == Tuned(3, 2, "int4")
        again = edit.state_dict()
        assert again["counters"] == copy["counters"]
        assert all(torch.equal(local_part(again[n]), local_part(t)) for n, t in copy.items() if isinstance(t, Tensor))
    steady = dataclasses.replace(config, tune="off")  # measured seconds are never the same
    loop, place = Loop(steady), FOLDER / "coded"
    with EDiT(loop.accelerator, loop.model, loop.optimizer, steady) as edit:
        loop.train(edit, batches=6)
        edit.save(place)
        loop.train(edit, batches=5, skip=6)
    end, resumed = loop.parameters(), Loop(steady)
    with EDiT(resumed.accelerator, resumed.model, resumed.optimizer, steady) as edit:
        assert edit.load(place) == 6
        resumed.train(edit, batches=5, skip=6)
    assert all(torch.equal(value, end[name]) for name, value in resumed.parameters().items())
    return {}


def a_loop_with_a_warm_up() -> dict[str, Any]:
    """It may end in it; and a state from after it goes into a new loop, whose warm-up is then over, too."""
    config = EDiTConfig(sync_interval=3, warmup_steps=2, inner_lr_scale=0.5)
    loop = Loop(config)
    with EDiT(loop.accelerator, loop.model, loop.optimizer, config) as edit:
        loop.train(edit, batches=1)
        early = dict(edit.state_dict())
        loop.train(edit, batches=3, skip=1)
        state = {n: t.clone() if isinstance(t, Tensor) else dict(t) for n, t in edit.state_dict().items()}
        with pytest.raises(ValueError, match="Load the state into a new EDiT"):
            edit.load_state_dict(early)
    other = Loop(config)
    with EDiT(other.accelerator, other.model, other.optimizer, config) as edit:
        with pytest.raises(ValueError, match=re.escape("of another model or method: ['anchor/of.another.model']")):
            edit.load_state_dict({**state, "anchor/of.another.model": torch.zeros(1)})
        assert edit._engine.warming_up, "what is refused has changed nothing"
        edit.load_state_dict(state)
        again = edit.state_dict()
        assert again["counters"] == state["counters"]
        assert all(torch.equal(local_part(again[n]), local_part(t)) for n, t in state.items() if isinstance(t, Tensor))
        before = other.parameters()
        other.train(edit, batches=1, skip=4)
        moved = max(float((param - before[name]).abs().max()) for name, param in other.parameters().items())
        assert moved == pytest.approx(0.5e-2, rel=1e-3), "AdamW's first step is the learning rate, here half of it"
        assert edit.logs() == []
        other.train(edit, batches=1, skip=5)
    assert [entry["edit/inner_steps"] for entry in other.logs] == [3], "of steps 3 to 5"
    for settings in ({"sync_interval": 3}, {"sync_seconds": 0.3}):
        loop = Loop(config := EDiTConfig(**settings, warmup_steps=9))
        with EDiT(loop.accelerator, loop.model, loop.optimizer, config) as edit:
            loop.train(edit, batches=2)
            edit.flush()
        assert edit.logs() == []
    return {}


def loops_by_time_save_where_each_was() -> dict[str, Any]:
    loop, place = Loop(config := EDiTConfig(sync_seconds=0.3)), FOLDER / "by_time"
    with EDiT(loop.accelerator, loop.model, loop.optimizer, config) as edit:
        own = 4 + 2 * edit.layout.replica
        loop.train(edit, batches=own)
        edit.save(place)
    mean = 4 + edit.layout.num_replicas - 1
    resumed = Loop(config)
    with EDiT(resumed.accelerator, resumed.model, resumed.optimizer, config) as edit:
        assert edit.load(place) == own
        assert edit.progress == mean
    return {"own": own}


def loops_of_different_length_end_together() -> dict[str, Any]:
    """By time and by steps, delayed or not: who has ended waits for the others."""
    told = {}
    for name, config in {
        "time": EDiTConfig(sync_seconds=0.3),
        "time, delayed": EDiTConfig(sync_seconds=0.3, overlap="delayed", delay_steps=2),
        "steps": EDiTConfig(sync_interval=3),
    }.items():
        loop = Loop(config)
        with EDiT(loop.accelerator, loop.model, loop.optimizer, config) as edit:
            loop.train(edit, batches=4 + 9 * edit.layout.replica)
            if config.sync_seconds is not None:
                edit.flush()
                assert edit.progress == 4 + 9 * (edit.layout.num_replicas - 1) / 2, edit.progress
        sums: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(sums, [p.double().sum().item() for p in loop.parameters().values()])
        size = edit.layout.replica_size
        assert all(sums[rank] == sums[rank % size] for rank in range(len(sums))), sums
        told[name] = len(loop.logs)
    return told


def a_loop_need_not_ask_for_its_logs() -> dict[str, Any]:
    """Then those of its last syncs are kept, and no more."""
    with mock.patch("hf_edit.trainer.loop.KEPT_LOGS", 20):
        loop = Loop(config := EDiTConfig(sync_interval=1, overlap="none"))
        loop.asks = False
        with EDiT(loop.accelerator, loop.model, loop.optimizer, config) as edit:
            loop.train(edit, batches=30)
            assert edit._engine is not None
            assert len(edit._engine.sync.take_records()) <= 2
            assert len(edit.logs()) == 20
            assert edit.logs() == []
    return {}


class Overflowing(Blocks):
    """On rank 1 every third loss does."""

    calls = 0

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        outputs = super().forward(input_ids, labels)
        self.calls += 1
        overflows = dist.get_rank() == 1 and self.calls % 3 == 0
        return {"loss": outputs["loss"] * (float("inf") if overflows else 1.0)}


def steps_that_fp16_skips_end_a_sync_under_way() -> dict[str, Any]:
    """On replica 1 every third step overflows; units that its forward pass did not use still wait for their sync."""
    config = EDiTConfig(sync_interval=1)
    if EDiT.accelerator(config).edit_layout.replica_size > 1:
        return {"not here": "torch's scaler has no common decision for FSDP2's shards on CPU"}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loop = Loop(config, make=Overflowing, scaler=torch.amp.GradScaler(device, 2.0))
    with EDiT(loop.accelerator, loop.model, loop.optimizer, config) as edit:
        loop.train(edit, batches=9)
    inner_steps = [entry["edit/inner_steps"] for entry in [*loop.logs, *edit.logs()]]
    sometimes = 1 - 1 / edit.layout.num_replicas
    assert inner_steps == [1, 1, sometimes] * 3, inner_steps
    sums: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(sums, [p.double().sum().item() for p in loop.parameters().values()])
    assert all(other == sums[0] for other in sums), sums
    return {}


class SelfMoving(torch.optim.SGD):
    """As schedule-free optimizers are."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


def what_the_accelerator_is_given_stays() -> dict[str, Any]:
    given = DataLoaderConfiguration(dispatch_batches=True)
    accelerator = EDiT.accelerator(EDiTConfig(), dataloader_config=given)
    assert not accelerator.dataloader_config.dispatch_batches
    assert given.dispatch_batches, "the configuration is the user's"
    return {}


def what_a_loop_refuses() -> dict[str, Any]:
    config = EDiTConfig(sync_interval=3)
    loop = Loop(config)
    with pytest.raises(ValueError, match=re.escape("EDiT.accelerator(edit_config, ...)")):
        EDiT(Accelerator(), loop.model, loop.optimizer, config)
    with pytest.raises(ValueError, match="but the Accelerator was made for"):
        EDiT(loop.accelerator, loop.model, loop.optimizer, EDiTConfig(num_replicas=3))
    with pytest.raises(ValueError, match="on_loss_spike='skip' is EDiTTrainer's"):
        EDiT(loop.accelerator, loop.model, loop.optimizer, EDiTConfig(on_loss_spike="skip"))
    with pytest.raises(ValueError, match="SelfMoving moves the parameters by its own state"):
        EDiT(loop.accelerator, loop.model, SelfMoving(loop.model.parameters()), config)
    tied = make_model()
    tied.model.layers[1].mlp.up_proj.weight = tied.model.layers[0].mlp.up_proj.weight
    if loop.accelerator.edit_layout.replica_size > 1:
        with pytest.raises(ValueError, match="one parameter in two of FSDP2's groups"):
            loop.accelerator.prepare(tied)
    with pytest.raises(ValueError, match=r"accelerator\.prepare"):
        EDiT(loop.accelerator, make_model(), loop.optimizer, config)
    return {}
