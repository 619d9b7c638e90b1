"""On GPUs, or one that all ranks share: a sync's streams are ordered, and replicas agree however it is carried out."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_edit.config import EDiTConfig
from hf_edit.peers.layout import Layout
from hf_edit.peers.replica import Replica
from hf_edit.sync.overlap import Blocking, Forward
from hf_edit.sync.unit_sync import OuterSync
from hf_edit.sync.units import find_units
from tests.dist.nets import Net, batch
from tests.launch import (
    test_balance,
    test_by_time,
    test_checkpoints,
    test_decisions,
    test_features,
    test_learning,
    test_libraries,
    test_loop,
    test_trainer,
)
from tests.launch.launching import CONFIGS, accelerate_launch, torchrun

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Twin:
    """A `Conversation` with one other replica, which always is where this one is. Sums on a stream of its own, late, as
    NCCL would; with `late_cycles=None` at once on the current stream."""

    num_replicas = 2
    replica = 0
    bytes_sent = 0
    fixed = True

    def begin(self, sync: int) -> list[int]:
        return [0, 1]

    def __init__(self, late_cycles: int | None) -> None:
        self.late_cycles = late_cycles
        self.stream = torch.cuda.Stream()

    def gather(self, vector: Tensor) -> Callable[[], Tensor]:
        return lambda: torch.stack([vector, vector])

    def all_reduce(self, tensors: Sequence[Tensor]) -> Any:
        if self.late_cycles is None:
            for tensor in tensors:
                tensor.mul_(2)
            return _Done(None)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(self.late_cycles)
            for tensor in tensors:
                tensor.mul_(2)
            return _Done(self.stream.record_event())

    def commit(self, sync: int) -> bool:
        return True


class _Done:
    def __init__(self, event: Any) -> None:
        self.event = event

    def wait(self) -> None:
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)


def train_with_twin(peers: Twin, config: EDiTConfig, steps: int = 8) -> tuple[dict[str, Tensor], list[Any]]:
    model = Net(num_blocks=6).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sync = OuterSync(find_units(model), peers, Replica(Layout(1, 1, 0), 1.0), config, optimizer)
    sync.take_anchors()
    way = {"none": Blocking, "forward": Forward}[config.overlap](sync)
    for step in range(steps):
        x, y = (t.cuda() for t in batch(step, 0))
        nn.functional.mse_loss(model(x), y).backward()
        way.finish()
        optimizer.step()
        optimizer.zero_grad()
        if step % 2 == 1:
            way.begin({"inner_steps": 2.0})
            way.decide()
            assert way.carry_out()
    way.finish()
    return {name: p.detach().clone() for name, p in model.named_parameters()}, sync.take_records()


@pytest.mark.parametrize("offload", [False, True])
def test_a_late_all_reduce_on_another_stream_changes_nothing(offload: bool) -> None:
    prompt, _ = train_with_twin(Twin(None), EDiTConfig(overlap="none"))
    late, records = train_with_twin(Twin(2_000_000), EDiTConfig(overlap="forward", offload_outer_state=offload))
    assert all(torch.equal(prompt[name], late[name]) for name in prompt)
    assert all(0 < record.exposed_seconds < 10 for record in records)
    assert len(records) == 4


def test_waiting_for_the_network_is_exposed_time() -> None:
    _, prompt = train_with_twin(Twin(None), EDiTConfig(overlap="none"))
    _, late = train_with_twin(Twin(20_000_000), EDiTConfig(overlap="none"))
    assert late[-1].exposed_seconds > prompt[-1].exposed_seconds + 0.03


def need(backend: str, num_ranks: int) -> None:
    """Skips where the ranks cannot talk through `backend`: NCCL before 2.30 wants a GPU for each."""
    if backend == "nccl" and torch.cuda.device_count() < num_ranks:
        version = ctypes.c_int()  # torch.cuda.nccl.version() is that of torch's build, not of what was loaded
        ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(version))
        if version.value < 23000:
            pytest.skip(f"needs {num_ranks} GPUs, or NCCL 2.30")


SHARED_GPU = {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.parametrize("replica_size", [1, 2])
def test_two_replicas_agree_in_every_way(replica_size: int, backend: str, tmp_path: Path) -> None:
    need(backend, 2 * replica_size)
    script = Path(__file__).with_name("replicas.py")
    torchrun(2 * replica_size, script, str(tmp_path), str(replica_size), backend, **SHARED_GPU)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["world_size"] == 2 * replica_size
    assert report["devices"] == ["cuda"]
    assert len(report["differing"]) == 20
    assert set(report["differing"].values()) == {0.0}, report["differing"]


SCENARIOS = {
    "scenarios": test_trainer.SCENARIOS,
    "looping": test_loop.SCENARIOS,
    "features": test_features.SCENARIOS,
    "checkpoints": test_checkpoints.SCENARIOS,
    "libraries": test_libraries.SCENARIOS,
    "learning": test_learning.SCENARIOS,
    "balance": test_balance.SCENARIOS,
    "by_time": test_by_time.SCENARIOS,
    "decisions": test_decisions.SCENARIOS,
}
LEFT_OUT = {  # with FSDP2 and gloo: they gather a whole model, of which gloo (torch 2.11) dies on CUDA, or need one
    "saved_models_load_anywhere",
    "only_adapters_cross_and_are_saved",
    "limits_and_the_best_model",
}


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.parametrize("config", ["cpu_2x2.yaml", "cpu_4x1.yaml"])
@pytest.mark.parametrize("script", SCENARIOS)
def test_the_scenarios_pass(script: str, config: str, backend: str, tmp_path: Path) -> None:
    """Those of tests/launch, with every rank on a GPU."""
    if script == "libraries":
        pytest.importorskip("trl")
        pytest.importorskip("peft")
    need(backend, 4)
    settings = (CONFIGS / config).read_text(encoding="utf-8")
    assert settings.count("use_cpu: true") == 1
    path = tmp_path / config
    path.write_text(settings.replace("use_cpu: true", "use_cpu: false"), encoding="utf-8")
    scenarios = Path(__file__).with_name("scenarios.py")
    left_out = LEFT_OUT if config == "cpu_2x2.yaml" and backend == "gloo" else set()
    names = [name for name in SCENARIOS[script] if name not in left_out]
    output = accelerate_launch(str(path), scenarios, backend, str(tmp_path), script, *names, **SHARED_GPU)
    assert output.count("passed: ") == len(names)
