"""Replicas that take different numbers of steps, each with a clock of its own: trajectories done on paper."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_edit.config import EDiTConfig
from hf_edit.peers.group import ProcessGroupPeers
from hf_edit.peers.layout import Layout
from hf_edit.sync.engine import Engine
from hf_edit.sync.overlap import Worker, at_once
from tests.dist.threads import run_ranks

PLAIN = dict(outer_optimizer="none", anomaly_threshold=None, max_pseudo_grad_norm=None, warmup_steps=0)


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([0.0]))


class Cell(Scalar):
    """A block, and so a unit."""


class Scalars(Scalar):
    """Three units of a parameter each."""

    _no_split_modules = ("Cell",)

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList([Cell(), Cell()])


class Replica:
    """SGD with lr 1 and a constant gradient for each parameter, of which there is one, or with fragments three; a step
    takes `step_seconds` on its own clock."""

    def __init__(self, rank: int, world: int, step_seconds: float, gradient: float, **settings: Any) -> None:
        self.now, self.step_seconds, self.gradient = 100.0, step_seconds, gradient
        self.model = DistributedDataParallel(Scalars() if settings.get("fragments", 1) > 1 else Scalar())
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        peers = ProcessGroupPeers(Layout.split(world, world, rank), 30.0)
        config = EDiTConfig(**{**PLAIN, "overlap": "none", **settings})
        self.engine = Engine(self.model, self.optimizer, config, peers, clock=lambda: self.now, runner=self.beside)

    def beside(self, job: Any) -> Any:
        return at_once(job)

    @property
    def value(self) -> float:
        """Of the parameters, which are equal where all have been synced."""
        values = {param.item() for param in self.model.parameters()}
        assert len(values) == 1, values
        return values.pop()

    def step(self, requests: Any = ()) -> Any:
        self.take_step()
        return self.engine.step(requests)

    def take_step(self) -> None:
        self.now += self.step_seconds
        for param in self.model.parameters():
            param.grad = torch.tensor([self.gradient])
        self.engine.before_optimizer_step()
        self.optimizer.step()


@pytest.mark.parametrize(("weighting", "after"), [("steps", -7.0), ("uniform", -7.5)])
def test_a_fast_replica_takes_more_steps_between_two_syncs(weighting: str, after: float) -> None:
    """In 6 s replica 0 takes 6 steps of gradient 1, replica 1 takes 3 of gradient 3: pseudo-gradients 6 and 9, of
    which a third and two thirds are 7, the halves 7.5. The second interval is as the first."""

    def body(rank: int) -> tuple[list[float], float]:
        replica = Replica(
            rank, 2, step_seconds=1.0 + rank, gradient=1.0 + 2 * rank, sync_seconds=6.0, weighting=weighting
        )
        seen = []
        for number in range(2 * (6 if rank == 0 else 3)):
            agreed = replica.step(requests=("save",) if (rank, number) == (1, 5) else ())
            if agreed is not None:
                seen.append((replica.value, agreed))
        records = replica.engine.sync.take_records()
        assert [record.plan.tallies["inner_steps"].tolist() for record in records] == [[6.0, 3.0]] * 2
        return seen, replica.engine.progress.value

    for seen, progress in run_ranks(2, body):
        assert seen == [(after, set()), (2 * after, {"save"})], "what replica 1 wants at a sync all hear"
        assert progress == 9.0


@pytest.mark.parametrize(("overlap", "second"), [("none", 6.0), ("forward", 7.0)])
def test_the_time_that_a_sync_takes_is_not_the_interval_s(overlap: str, second: float) -> None:
    """An all-reduce of 4 s: six steps of 1 s lie between two syncs all the same. Were the 4 s of the 6, only two would;
    and only one, were the network slower still. "forward" syncs at the end of a step's gradients: one step more."""

    def body(rank: int) -> list[Any]:
        replica = Replica(rank, 2, step_seconds=1.0, gradient=1.0, sync_seconds=6.0, overlap=overlap)
        all_reduce = replica.engine.peers.all_reduce

        def slow(tensors: Any) -> Any:
            replica.now += 4.0
            return all_reduce(tensors)

        replica.engine.peers.all_reduce = slow  # type: ignore[method-assign]
        for _ in range(6 + int(second)):
            replica.step()
        replica.engine.before_optimizer_step()
        return [record.plan.tallies["inner_steps"].tolist() for record in replica.engine.sync.take_records()]

    assert run_ranks(2, body) == [[[6.0, 6.0], [second, second]]] * 2


@pytest.mark.parametrize("overlap", ["none", "forward", "delayed"])
def test_a_sync_that_is_given_up_is_as_if_it_had_not_begun(overlap: str) -> None:
    """The next one tells of the 6 steps before it, too, and comes 6 s later: the timer runs again from there."""

    def body(rank: int) -> list[Any]:
        replica = Replica(rank, 2, step_seconds=1.0, gradient=1.0, sync_seconds=6.0, overlap=overlap, delay_steps=1)
        engine = replica.engine
        for _ in range(6):
            replica.step()
        if overlap == "none":
            engine._rounds.begin((), engine._rounds.when_due, whole=False)  # another one, behind that of step 6
        pending = engine.sync.pending
        engine.forget_sync()
        value = engine.progress.value
        for _ in range(6):
            replica.step()
        engine.flush()
        records = engine.sync.take_records()
        return [pending, value, [record.plan.tallies["inner_steps"].tolist() for record in records]]

    told = [[6.0, 6.0], [6.0, 6.0]] if overlap == "none" else [[12.0, 12.0]]
    assert run_ranks(2, body) == [[True, 6.0, told]] * 2


def test_a_delayed_sync_by_time() -> None:
    """As above with uniform weights, applied two own steps later: the anchor goes to -7.5, and each replica to where it
    was heading from there: -7.5 - 2 and -7.5 - 6. Those steps count into the next interval."""

    def body(rank: int) -> list[Any]:
        replica = Replica(
            rank, 2, step_seconds=1.0 + rank, gradient=1.0 + 2 * rank, sync_seconds=6.0, weighting="uniform",
            overlap="delayed", delay_steps=2,
        )  # fmt: skip
        seen: list[Any] = []
        for _ in range(8 if rank == 0 else 5):
            if replica.step() is not None:
                seen.append(replica.value)
        # The timer runs from the moment that both had come: at 106 s; now it is 108 s here, 110 s there.
        assert replica.engine.schedule._timed_from == 106.0
        replica.engine.barrier()
        return [*seen, replica.value, replica.engine.sync.take_records()[-1].plan.tallies["inner_steps"].tolist()]

    # At the end the pseudo-gradients since -7.5 are 2 and 6, their mean 4.
    assert run_ranks(2, body) == [[-9.5, -11.5, [2.0, 2.0]], [-13.5, -11.5, [2.0, 2.0]]]


def test_a_delayed_sync_ends_when_the_next_one_is_due() -> None:
    """As above, but the delay of five steps is longer than replica 1's interval of three: it applies the first sync
    then, at -7.5 - 9, and replica 0 at -7.5 - 5. The second one's pseudo-gradients are again 6 and 9."""

    def body(rank: int) -> list[Any]:
        replica = Replica(
            rank, 2, step_seconds=1.0 + rank, gradient=1.0 + 2 * rank, sync_seconds=6.0, weighting="uniform",
            overlap="delayed", delay_steps=5,
        )  # fmt: skip
        seen: list[Any] = [(n, replica.value) for n in range(12 if rank == 0 else 6) if replica.step() is not None]
        assert replica.engine.sync.pending
        assert replica.now == 112.0
        replica.engine.barrier()
        return [*seen, replica.value, replica.engine.sync.take_records()[-1].plan.tallies["inner_steps"].tolist()]

    assert run_ranks(2, body) == [[(10, -12.5), -15.0, [6.0, 3.0]], [(5, -16.5), -15.0, [6.0, 3.0]]]


@pytest.mark.parametrize("overlap", ["none", "delayed"])
def test_who_has_ended_waits_for_the_others_and_weighs_nothing(overlap: str) -> None:
    """Replica 1 ends after the first sync; replica 0 goes on for two more, which are its own alone, and ends, too."""

    def body(rank: int) -> list[float]:
        replica = Replica(
            rank, 2, step_seconds=1.0, gradient=1.0, sync_interval=3, weighting="norm", overlap=overlap, delay_steps=1
        )
        for _ in range(3 if rank == 1 else 10):
            replica.step()
        replica.engine.barrier()
        return [replica.value, *[r.plan.weights[0, 0].item() for r in replica.engine.sync.take_records()]]

    for value, *weights in run_ranks(2, body):
        assert value == -10.0
        assert weights == [0.5, 1.0, 1.0, 1.0]


def test_the_end_of_all_steps_makes_a_sync_due() -> None:
    """The timer would not run out before 1000 s; ten steps of all replicas are the end, ten own ones the estimate."""

    def body(rank: int) -> list[Any]:
        replica = Replica(rank, 2, step_seconds=1.0, gradient=1.0, sync_seconds=1000.0)
        replica.engine._last_step = 10
        return [replica.step() is not None for _ in range(10)]

    assert run_ranks(2, body) == [[False] * 9 + [True]] * 2


def test_a_job_that_fails_on_its_thread_fails_where_it_is_waited_for() -> None:
    def job() -> None:
        raise ValueError("the network is gone")

    with pytest.raises(ValueError, match="the network is gone"):
        Worker()(job)()
    assert at_once(lambda: 7)() == 7
    worker = Worker()
    assert [worker(threading.get_ident)() == threading.get_ident() for _ in range(2)] == [False, False]
    assert worker(threading.get_ident)() == worker(threading.get_ident)(), "one thread for all of them"


def test_a_sync_whose_thread_fails_before_the_exchange_fails_where_its_plan_is_awaited(monkeypatch: Any) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(ProcessGroupPeers, "begin", fail)

    def body(rank: int) -> None:
        replica = Replica(rank, 2, step_seconds=1.0, gradient=1.0, sync_interval=2, overlap="delayed", delay_steps=1)
        replica.engine._rounds.when_due._runner = Worker()
        replica.step()
        replica.step()
        with pytest.raises(RuntimeError, match="the device is gone"):
            replica.step()

    run_ranks(2, body, timeout=10.0)
