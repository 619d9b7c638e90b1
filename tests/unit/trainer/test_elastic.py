"""What a launch that is one replica must know, before anything is started."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hf_edit.config import EDiTConfig
from hf_edit.peers.elastic import lighthouse_of_this_launch, replica_of_this_launch
from hf_edit.peers.layout import Layout
from hf_edit.trainer.accelerate_hook import PlacedAccelerator, plan_layout

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
