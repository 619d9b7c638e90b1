"""Run by every rank of a launch: replicas whose share of a batch follows their speed. Arguments as for scenarios.py."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hf_edit import EDiTConfig, EDiTTrainer
from hf_edit.trainer.balance import TrainerBalance
from tests.launch.scripts.checkpoints import assert_same_end, run
from tests.launch.scripts.features import assert_replicas_equal
from tests.launch.scripts.scenarios import BATCH, FOLDER, forget_trainings, make_args, make_model, make_rows, parameters
from tests.launch.scripts.telemetry import everywhere

SLOW = 0.02  # seconds that the last replica takes for a row beyond what it computes
BATCHES = 4 * BATCH


class Rows(list[Any]):
    """Notes which were read."""

    read: list[int]

    def __getitem__(self, index: Any) -> Any:
        self.read.append(index)
        return super().__getitem__(index)


def rows(count: int) -> Rows:
    made = Rows(make_rows(count))
    made.read = []
    return made


class Slow(EDiTTrainer):
    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        count = len(inputs["input_ids"])
        if self.edit_layout.replica == self.edit_layout.num_replicas - 1:
            time.sleep(SLOW * count)
        return super().training_step(model, inputs, *args, **kwargs)


class Scripted(EDiTTrainer):
    """The shares change as in a play: at the second and the fourth sync."""

    def _rebalance(self, record: Any) -> None:
        told = record.plan.tallies
        others = self.edit_layout.num_replicas - 1
        turns = {2: [1.0] * others + [3.0], 4: [2.0] * others + [1.0]}
        speeds = turns.get(record.sync)
        if speeds is None:
            return
        told["rows"] = torch.tensor(speeds, dtype=torch.float64)
        told["training_seconds"] = torch.ones(others + 1, dtype=torch.float64)
        assert self._balance is not None
        self._balance.speeds = []
        TrainerBalance._rebalance(self, record)


def the_slow_replica_takes_fewer_rows() -> dict[str, Any]:
    """Each row is read once in an epoch; shares come to the speeds; steps take equally long."""
    forget_trainings()
    world = int(os.environ["WORLD_SIZE"])
    data = rows(24 * BATCHES * world)
    config = EDiTConfig(sync_interval=3, balance=True, weighting="uniform")
    args = make_args(max_steps=24, per_device_train_batch_size=BATCHES, train_sampling_strategy="random")
    trainer = Slow(model=make_model(), args=args, train_dataset=data, edit_config=config)
    trainer.train()
    assert_replicas_equal(trainer)
    read = everywhere(data.read)
    assert sorted(index for part in read for index in part) == list(range(len(data))), "each row once"
    shares = trainer._balance.shares
    assert sum(shares) == BATCHES * len(shares)
    assert shares[-1] < min(shares[:-1]), shares
    assert len(read[-1]) < 0.8 * len(read[0])
    return {"shares": shares, "speeds": trainer._balance.speeds}


def shares_change_nothing_in_the_gradient() -> dict[str, Any]:
    """With a sync after every step, plain averages and SGD it is the plain Trainer's step on the whole batch, whatever
    the shares are; and with equal ones, bit for bit what it is without."""
    ended: dict[str, dict[str, Tensor]] = {}
    settings = dict(max_steps=8, per_device_train_batch_size=BATCHES, optim="sgd", learning_rate=0.1)
    plain = dict(sync_interval=1, outer_optimizer="none", weighting="uniform", anomaly_threshold=None,
                 max_pseudo_grad_norm=None)  # fmt: skip
    for name, kind, config in (
        ("plain", EDiTTrainer, EDiTConfig(num_replicas=1)),  # which is a plain Trainer
        ("uneven", Scripted, EDiTConfig(**plain, balance=True)),
        ("even", EDiTTrainer, EDiTConfig(**plain)),
        (
            "balanced",
            type("Even", (EDiTTrainer,), {"_rebalance": lambda self, record: None}),
            EDiTConfig(**plain, balance=True),
        ),
    ):
        forget_trainings()
        trainer = kind(model=make_model(), args=make_args(**settings), train_dataset=make_rows(512), edit_config=config)
        trainer.train()
        ended[name] = parameters(trainer)
        if name == "uneven":
            assert trainer._balance.shares != [BATCHES] * trainer.edit_layout.num_replicas
    if dist.get_rank() == 0:
        for name, value in ended["plain"].items():
            torch.testing.assert_close(ended["uneven"][name], value, rtol=0, atol=1e-5)
            assert torch.equal(ended["balanced"][name], ended["even"][name]), name
    return {}


def a_resumed_run_deals_the_same_rows() -> dict[str, Any]:
    """Also where the shares have changed in the epoch, or are to change behind batches that were read ahead."""
    config = EDiTConfig(sync_interval=1, warmup_steps=2, ema_warmup_syncs=1, balance=True)
    settings: dict[str, Any] = dict(config=config, trainer=Scripted, per_device_train_batch_size=BATCHES, save_steps=1)
    world = int(os.environ["WORLD_SIZE"])
    settings["data"] = make_rows(6 * BATCHES * world + 3, ragged=True)
    whole = run("balance", **settings)
    for step in (3, 4, 6, 7, 9):
        resumed = run(f"balance-{step}", str(FOLDER / "balance" / f"checkpoint-{step}"), **settings)
        assert resumed._balance.shares == whole._balance.shares
        assert_same_end(whole, resumed, step)
    return {"shares": whole._balance.shares}


def what_cannot_be_balanced_is_refused() -> dict[str, Any]:
    forget_trainings()
    for text, settings in (
        ("per_device_train_batch_size=1", dict(per_device_train_batch_size=1)),
        ("needs one with a length", dict(per_device_train_batch_size=4, accelerator_config={"split_batches": True})),
    ):
        trainer = EDiTTrainer(model=make_model(), args=make_args(**settings), train_dataset=make_rows(64),
                              edit_config=EDiTConfig(sync_interval=2, balance=True))  # fmt: skip
        with pytest.raises(ValueError, match=text):
            trainer.train()
        forget_trainings()
    return {}
