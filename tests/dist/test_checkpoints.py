"""What a rank saves is what the same rank gets back, whatever shapes its shards and its optimizers' state have."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import hf_edit.checkpoint.state as checkpoint
from hf_edit.checkpoint.manifest import Manifest, problem, seal, start
from hf_edit.checkpoint.outer import outer_tensors
from hf_edit.config import EDiTConfig
from hf_edit.peers.group import ProcessGroupPeers
from hf_edit.peers.layout import Layout
from hf_edit.sync.engine import Engine
from hf_edit.sync.overlap import at_once
from hf_edit.sync.units import local_part
from tests.dist.nets import FEATURES, Net, batch, shard
from tests.dist.threads import run_ranks


class ScaledNorm(nn.LayerNorm):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.scale = nn.Parameter(torch.tensor([0.9]))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class SmallParts(Net):
    """Over two ranks the head's bias [2] is cut into two parts of one element, and `scale` [1] into one and none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = ScaledNorm(FEATURES)
        self.head = nn.Linear(FEATURES, 2)
        with torch.no_grad():
            self.head.weight.fill_(0.1)
            self.head.bias.zero_()


class Odd(torch.optim.Optimizer):
    """Momentum on this rank's part, beside state of every shape that one can meet, telling of its rank there."""

    replica_size = 2

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "calls": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["calls"] += 1
            for param in group["params"]:
                if param.grad is None:
                    continue
                part, grad, state = local_part(param), local_part(param.grad), self.state[param]
                rank = dist.get_rank() % self.replica_size
                if not state:
                    state["part"] = torch.zeros_like(part)
                    state["step"] = torch.zeros(())
                    state["count"] = torch.zeros(1, dtype=torch.int64)
                    state["own"] = torch.tensor(float(rank))
                    state["own_one"] = torch.tensor([float(rank)])
                    state["fine"] = torch.full((3,), 1.0 + 2.0**-20, dtype=torch.float64)
                    state["rows"] = torch.zeros(part.shape[:1])
                    state["note"] = rank
                state["part"].mul_(0.5).add_(grad)
                state["step"] += 1
                state["count"] += 1
                state["rows"] += grad.flatten(1).sum(1) if grad.dim() > 1 else grad
                part.sub_(state["part"], alpha=group["lr"])


def momentum(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.7, momentum=0.9)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": momentum,
    "adam": lambda params: torch.optim.Adam(params, lr=1e-2),
    "nadam": lambda params: torch.optim.NAdam(params, lr=1e-2),  # a product [] of another name than "step"
    "odd": Odd,
}


class Trained:
    """This rank's part of a training of `SmallParts`, or of what is loaded into a new one."""

    clock: Callable[[], float] = staticmethod(time.monotonic)

    def __init__(
        self, replicas: int, inner: str = "sgd", outer: Any = "nesterov", bf16: bool = False, **settings: Any
    ) -> None:
        outer = OPTIMIZERS.get(outer, outer)
        self.config = EDiTConfig(outer_optimizer=outer, **{"overlap": "none", "sync_interval": 1, **settings})
        self.layout = Layout.split(dist.get_world_size(), replicas, dist.get_rank())
        net = SmallParts()
        self.model = shard(net.bfloat16() if bf16 else net, self.layout)
        self.optimizer = OPTIMIZERS[inner](self.model.parameters())
        self.peers = ProcessGroupPeers(self.layout, 60.0)
        self.engine = self.new_engine(0)

    def new_engine(self, first_step: int) -> Engine:
        settings = dict(runner=at_once, first_step=first_step, clock=self.clock)
        return Engine(self.model, self.optimizer, self.config, self.peers, **settings)

    @property
    def training(self) -> checkpoint.Training:
        return checkpoint.Training(self.layout, self.model, self.optimizer, self.peers.inside.group, self.engine)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            x, y = batch(step, dist.get_rank())
            x = x.to(next(self.model.parameters()).dtype)
            out = self.model(x).float()
            nn.functional.mse_loss(out, y[:, :2] * torch.tensor([1.0, 5.0])).backward()
            self.engine.before_optimizer_step()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.engine.step()

    def save(self, folder: Path, step: int = 3) -> None:
        if dist.get_rank() == 0:
            start(folder)
        dist.barrier()
        host = {"rank": {}, "stateful": {}}
        checkpoint.save(folder, self.training, step, host, write_outer=self.layout.replica == 0)
        dist.barrier()
        if dist.get_rank() == 0:
            seal(folder, checkpoint.describe(self.training, step, self.config))
        dist.barrier()

    @classmethod
    def saved(cls, folder: Path, replicas: int, *settings: Any, **more: Any) -> Trained:
        """After three steps, and so in `folder`."""
        trained = cls(replicas, *settings, **more)
        trained.train(0, 3)
        trained.engine.flush()
        trained.save(folder)
        return trained

    def load(self, folder: Path) -> None:
        manifest = Manifest.read(folder)
        checkpoint.load_model(folder, self.model, self.peers.inside.group)
        checkpoint.load_inner(folder, manifest, self.training)
        self.engine = self.new_engine(manifest.schedule_step)
        checkpoint.load_outer(folder, manifest, self.training)

    def state(self) -> dict[str, Any]:
        """Everything of this rank by name."""
        found: dict[str, Any] = {f"param/{name}": param for name, param in self.model.named_parameters()}
        for number, entries in enumerate(self.optimizer.state.values()):
            found |= {f"inner/{number}/{key}": value for key, value in entries.items()}
        for index, outer in enumerate(self.engine.sync.states):
            if outer.optimizer is not None:
                for number, entries in enumerate(outer.optimizer.state.values()):
                    found |= {f"outer/{index}/{number}/{key}": value for key, value in entries.items()}
        found |= outer_tensors(self.engine.sync, self.training.ranks)
        return {n: local_part(v).detach().clone() if isinstance(v, Tensor) else v for n, v in found.items()}


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        return type(a) is type(b) and a == b

    return [
        name for name in {**one, **other} if name not in one or name not in other or not same(one[name], other[name])
    ]


@pytest.mark.parametrize(
    ("inner", "outer", "bf16", "replica_size"),
    [
        ("sgd", "sgd", False, 2),
        ("sgd", "odd", False, 2),
        ("odd", "adam", False, 2),
        ("adam", "odd", True, 2),
        ("odd", "nesterov", True, 2),
        ("nadam", "nadam", True, 2),
        ("odd", "odd", False, 1),
        ("nadam", "nesterov", True, 1),
    ],
)
def test_every_rank_gets_its_own_state_back(
    inner: str, outer: str, bf16: bool, replica_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes on with it bit for bit."""

    monkeypatch.setattr(Odd, "replica_size", replica_size)

    def body(rank: int) -> tuple[list[str], list[str]]:
        one = Trained.saved(tmp_path / "saved", 2, inner, outer, bf16)
        other = Trained(2, inner, outer, bf16)
        other.load(tmp_path / "saved")
        at_once = differing(one.state(), other.state())
        one.train(3, 5)
        other.train(3, 5)
        return at_once, differing(one.state(), other.state())

    assert run_ranks(2 * replica_size, body) == [([], [])] * (2 * replica_size)


@pytest.mark.parametrize(
    "settings", [dict(overlap="none"), dict(overlap="delayed", delay_steps=1), dict(sync_interval=2, fragments=2)]
)
@pytest.mark.parametrize("replica_size", [1, 2])
def test_what_compressed_syncs_left_out_comes_back(replica_size: int, settings: Any, tmp_path: Path) -> None:
    """And the training goes on bit for bit; with more replicas each residual counts once."""

    def body(rank: int) -> Any:
        one = Trained.saved(tmp_path / "saved", 2, compression="int4", weighting="uniform", **settings)
        other = Trained(2, compression="int4", weighting="uniform", **settings)
        other.load(tmp_path / "saved")
        at_once = differing(one.state(), other.state())
        assert all(residual.any() for residual in other.engine.sync.reduction.residuals)
        one.train(3, 5)
        other.train(3, 5)
        return at_once, differing(one.state(), other.state())

    assert run_ranks(2 * replica_size, body) == [([], [])] * (2 * replica_size)

    def more(rank: int) -> list[bool]:
        resized = Trained(4, compression="int4", weighting="uniform", **settings)
        resized.load(tmp_path / "saved")
        return [bool(residual.any()) for residual in resized.engine.sync.reduction.residuals]

    assert run_ranks(4, more) == [[True] * 4, [True] * 4, [False] * 4, [False] * 4]

    def fewer(rank: int) -> list[Tensor]:  # one process that is both, and without codes: the next sync sends it
        alone = Trained(2, **{**settings, "weighting": "uniform"})
        alone.load(tmp_path / "saved")
        return [residual.clone() for residual in alone.engine.sync.reduction.residuals]

    assert all(residual.any() for rank in run_ranks(2, fewer) for residual in rank)


def test_another_number_of_ranks_takes_what_does_not_depend_on_it(tmp_path: Path, caplog: Any) -> None:
    """2 x 2 to 4 x 1 and back: whole parameters' state; one with anything of a rank's own starts anew as a whole."""

    def saving(rank: int) -> Any:
        one = Trained.saved(tmp_path / "saved", 2, "adam", "adam")
        Trained.saved(tmp_path / "odd", 2, "odd", "odd")
        names = dict(one.model.named_parameters())
        return {n: one.optimizer.state[p]["exp_avg"].full_tensor() for n, p in names.items()}

    def resuming(rank: int) -> Any:
        other = Trained(4, "adam", "adam")
        other.load(tmp_path / "saved")
        found = {n.removeprefix("module."): other.optimizer.state[p] for n, p in other.model.named_parameters()}
        assert all(float(entries["step"]) == 3 for entries in found.values())
        steps = [float(e["step"]) for s in other.engine.sync.states for e in s.optimizer.state.values()]
        assert steps
        assert set(steps) == {3.0}
        other.train(3, 4)
        odd = Trained(4, "odd", "odd")
        odd.load(tmp_path / "odd")
        assert not any(odd.optimizer.state.values())
        assert [group["calls"] for group in odd.optimizer.param_groups] == [3]
        odd.train(3, 4)
        return {name: entries["exp_avg"] for name, entries in found.items()}

    saved = run_ranks(4, saving)[0]
    resumed = run_ranks(4, resuming)[0]
    assert set(saved) == set(resumed)
    assert "of use to replicas of the saved number of ranks alone" in caplog.text


def test_another_outer_rule_is_told_and_takes_what_it_knows(tmp_path: Path, caplog: Any) -> None:
    def body(rank: int) -> None:
        Trained.saved(tmp_path / "saved", 2, "sgd", "nesterov")
        user = Trained(2, "sgd", "sgd-of-the-user")
        user.load(tmp_path / "saved")
        assert not any(s.optimizer.state for s in user.engine.sync.states)
        user.train(3, 4)
        user.save(tmp_path / "users")
        adam = Trained(2, "sgd", "adam")
        adam.load(tmp_path / "users")  # another class, whose state SGD's is not
        adam.train(4, 5)
        none = Trained(2, "sgd", "none")
        none.load(tmp_path / "users")
        none.train(4, 5)

    OPTIMIZERS["sgd-of-the-user"] = momentum
    try:
        run_ranks(2, body)
    finally:
        del OPTIMIZERS["sgd-of-the-user"]
    texts = sorted({r.getMessage() for r in caplog.records if "outer state" in r.getMessage()})
    assert len(texts) == 3, texts
    assert "['momentum'] of a built-in rule, this run's is its own of SGD" in " ".join(texts)


def test_a_rule_with_tensors_of_other_names_is_saved_by_them(tmp_path: Path) -> None:
    """What a new rule of method/outer.py keeps is saved without a line for it here."""

    def body(rank: int) -> list[str]:
        one, other = Trained(1, "sgd", "nesterov"), Trained(1, "sgd", "nesterov")
        for trained in (one, other):
            for state in trained.engine.sync.states:
                state.tensors["second"] = torch.zeros_like(state.anchor)
        one.train(0, 2)
        for number, state in enumerate(one.engine.sync.states):
            state.tensors["second"] += number + rank
        one.save(tmp_path / "saved", 2)
        manifest = Manifest.read(tmp_path / "saved")
        checkpoint.load_model(tmp_path / "saved", other.model, other.peers.inside.group)
        checkpoint.load_inner(tmp_path / "saved", manifest, other.training)
        checkpoint.load_outer(tmp_path / "saved", manifest, other.training)
        assert any(name.endswith("/second") for name in one.state())
        return differing(one.state(), other.state())

    assert run_ranks(2, body) == [[], []]


def test_one_replica_saves_what_several_continue(tmp_path: Path) -> None:
    """And back: parameters, buffers and the inner optimizer."""

    def saving(rank: int) -> dict[str, Tensor]:
        one = Trained(1, "adam")
        one.train(0, 3)
        one.engine = None  # type: ignore[assignment]  # as with one replica
        one.save(tmp_path / "one")
        return {name: param.full_tensor().detach() for name, param in one.model.named_parameters()}

    def growing(rank: int) -> dict[str, Tensor]:
        two = Trained(2, "adam")
        two.load(tmp_path / "one")
        found = {name.removeprefix("module."): param.detach().clone() for name, param in two.model.named_parameters()}
        assert all(float(entries["step"]) == 3 for entries in two.optimizer.state.values())
        assert two.engine.schedule.step == 3
        two.train(3, 5)
        two.save(tmp_path / "two", 5)
        return found

    def shrinking(rank: int) -> None:
        one = Trained(1, "adam")
        one.engine = None  # type: ignore[assignment]
        manifest = Manifest.read(tmp_path / "two")
        checkpoint.load_model(tmp_path / "two", one.model, one.peers.inside.group)
        checkpoint.load_inner(tmp_path / "two", manifest, one.training)
        assert all(float(entries["step"]) == 5 for entries in one.optimizer.state.values())

    saved, grown = run_ranks(2, saving)[0], run_ranks(2, growing)
    assert problem(tmp_path / "one", trainer=False) is None
    assert all(torch.equal(saved[name], params[name]) for params in grown for name in saved)
    run_ranks(2, shrinking)


def test_ranks_of_different_steps_are_not_sealed(tmp_path: Path) -> None:
    def body(rank: int) -> str:
        one = Trained(2)
        one.train(0, 3)
        if rank == 0:
            start(tmp_path / "saved")
        dist.barrier()
        host = {"rank": {}, "stateful": {}}
        checkpoint.save(tmp_path / "saved", one.training, 3 + rank, host, write_outer=rank == 0)
        dist.barrier()
        if rank:
            return ""
        with pytest.raises(RuntimeError) as caught:
            seal(tmp_path / "saved", checkpoint.describe(one.training, 3, one.config))
        return str(caught.value)

    assert "edit/replica-1/host-0.pt is of step 4, not 3" in run_ranks(2, body)[0]
    assert problem(tmp_path / "saved", trainer=False) == "edit/ has no manifest, so it was not written to its end"


class Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_a_malicious_index_is_refused_and_not_run(tmp_path: Path) -> None:
    """By `problem`, and by each of the loads, which DCP's own reader would unpickle."""
    trace, folder = tmp_path / "ran", tmp_path / "saved"

    def body(rank: int) -> None:
        one = Trained(2)
        one.train(0, 1)
        one.save(folder, 1)
        if rank == 0:
            for index in folder.rglob(".metadata"):
                index.write_bytes(pickle.dumps(Malicious(f"touch {trace}")))
        dist.barrier()
        for load in (
            lambda: checkpoint.load_model(folder, one.model, one.peers.inside.group),
            lambda: checkpoint.load_inner(folder, Manifest.read(folder), one.training),
            lambda: checkpoint.load_outer(folder, Manifest.read(folder), one.training),
        ):
            with pytest.raises(ValueError, match=r"is refused: it names \w+\.system, which torch"):
                load()
            dist.barrier()

    run_ranks(2, body)
    assert "bytes were written" in str(problem(folder, trainer=False))
    assert not trace.exists()
