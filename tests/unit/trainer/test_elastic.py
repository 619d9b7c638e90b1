"""What a launch that is one replica must know, before anything is started."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import EarlyStoppingCallback, TrainerState

from hf_edit.config import EDiTConfig
from hf_edit.peers.launch import lighthouse_of_this_launch, replica_of_this_launch
from hf_edit.peers.layout import Layout
from hf_edit.telemetry.logs import GlobalCount
from hf_edit.trainer.accelerate_hook import PlacedAccelerator, plan_layout
from hf_edit.trainer.checkpoints import EDiTCheckpointMark
from hf_edit.trainer.elastic import TrainerElastic
from hf_edit.trainer.progress import GlobalSteps

CONFIG = EDiTConfig(elastic=True, num_replicas=3, overlap="none")


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("EDIT_REPLICA", "1")
    monkeypatch.setenv("TORCHFT_LIGHTHOUSE", "10.0.0.9:29510")
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    return monkeypatch


def arguments(world_size: int = 1, process_index: int = 0, **more: Any) -> Any:
    values = {"deepspeed": None, "fsdp_plugin_args": None, "parallelism_config": None, **more}
    return SimpleNamespace(world_size=world_size, process_index=process_index, **values)


def test_its_ranks_stand_among_those_of_all(launch: pytest.MonkeyPatch) -> None:
    assert plan_layout(arguments(), CONFIG) == Layout(3, 1, 1)
    launch.setenv("WORLD_SIZE", "2")
    layout = plan_layout(arguments(2, 1, fsdp_plugin_args={"fsdp_version": 2}), CONFIG)
    assert layout == Layout(3, 2, 3)
    assert layout.alone == Layout(1, 2, 1)


@pytest.mark.parametrize("given", [None, "", "3", "-1", "one"])
def test_a_replica_must_know_its_number(launch: pytest.MonkeyPatch, given: str | None) -> None:
    launch.delenv("EDIT_REPLICA")
    if given is not None:
        launch.setenv("EDIT_REPLICA", given)
    with pytest.raises(ValueError, match=r"EDIT_REPLICA=.*Set EDIT_REPLICA to one of 0 ... 2"):
        replica_of_this_launch(3)


@pytest.mark.parametrize("given", [None, "", "10.0.0.9", "http://10.0.0.9"])
def test_a_replica_must_know_the_lighthouse(launch: pytest.MonkeyPatch, given: str | None) -> None:
    launch.delenv("TORCHFT_LIGHTHOUSE")
    if given is not None:
        launch.setenv("TORCHFT_LIGHTHOUSE", given)
    with pytest.raises(ValueError, match="TORCHFT_LIGHTHOUSE=host:port in each launch"):
        lighthouse_of_this_launch()


def test_several_ranks_need_fsdp(launch: pytest.MonkeyPatch) -> None:
    launch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="this launch has 2 processes: it is one replica, whose ranks need FSDP2"):
        plan_layout(arguments(2), CONFIG)


def test_without_torchft_it_says_what_to_install(launch: pytest.MonkeyPatch) -> None:
    import sys

    launch.setitem(sys.modules, "torchft.coordination", None)
    with pytest.raises(ValueError, match=r"Install hf_edit\[elastic\]"):
        plan_layout(arguments(), CONFIG)


def test_a_loader_is_prepared_for_the_ranks_of_all(launch: pytest.MonkeyPatch) -> None:
    accelerator = PlacedAccelerator(cpu=True)
    assert (accelerator.num_processes, accelerator.process_index) == (1, 0)
    with accelerator.among_all(Layout(3, 2, 4)):
        assert (accelerator.num_processes, accelerator.process_index) == (6, 4)
    assert (accelerator.num_processes, accelerator.process_index) == (1, 0)


class Alone(TrainerElastic):
    """What of a Trainer tells a replica that lacks a sync, or is told."""

    def __init__(self, scheduler: Any = ReduceLROnPlateau) -> None:
        self.state, self._steps = TrainerState(), GlobalSteps()
        self._input_tokens, self._flos = GlobalCount(2), GlobalCount(2)
        self.stopper = EarlyStoppingCallback(early_stopping_patience=3)
        self.callback_handler = SimpleNamespace(callbacks=[EDiTCheckpointMark(), self.stopper])
        self.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=1.0)
        self.lr_scheduler = scheduler(self.optimizer)

    def hear(self, other: Alone) -> None:
        self._be_told(json.loads(json.dumps(other._tell())))


def test_who_was_away_hears_what_the_others_evaluated() -> None:
    """Counters and a scheduler that go by evaluations are as if it had been at all of them."""
    source, away = Alone(), Alone()
    for loss in (3.0, *[4.0] * 12):
        source.lr_scheduler.step(metrics=loss)
    source.stopper.early_stopping_patience_counter = 2
    source.state.best_metric, source.state.best_global_step, source._steps.agreed = 3.0, 40, 160
    away.hear(source)
    assert away.stopper.early_stopping_patience_counter == 2
    assert (away.state.best_metric, away.state.best_global_step, away._steps.agreed) == (3.0, 40, 160)
    assert away.optimizer.param_groups[0]["lr"] == source.optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    for one in (source, away):
        for _ in range(11):
            one.lr_scheduler.step(metrics=4.0)
    assert away.optimizer.param_groups[0]["lr"] == source.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_a_scheduler_that_follows_the_progress_is_not_sent() -> None:
    source, away = (Alone(lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step))) for _ in range(2))
    source.lr_scheduler.step()
    away.hear(source)
    assert away.lr_scheduler.last_epoch == 0
    assert away.optimizer.param_groups[0]["lr"] == 1.0


class EveryWorldsFirst:
    def is_world_process_zero(self) -> bool:
        return True


class Launched(TrainerElastic, EveryWorldsFirst):
    def __init__(self, replica: int, save_on_each_node: bool) -> None:
        self.edit_config, self.edit_layout = CONFIG, Layout(3, 1, replica)
        self.args, self._peers = SimpleNamespace(save_on_each_node=save_on_each_node), None
        self._first_replica = 1


@pytest.mark.parametrize("own_disks", [False, True])
def test_one_replica_pushes_whoever_writes(own_disks: bool) -> None:
    launches = [Launched(replica, own_disks) for replica in range(3)]
    assert [launch.is_world_process_zero() for launch in launches] == [False, True, False]
    assert [launch._writes_files() for launch in launches] == [own_disks, True, own_disks]
