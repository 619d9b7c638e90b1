"""What replicas decide together where they take different numbers of steps: the Trainer's loop done by hand.

Every rank ends in a barrier and every evaluation is one, so that a rank which decides otherwise hangs, and the timeout
of `run_ranks` tells.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import DefaultFlowCallback, TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy

from hf_edit.method.conductor import Conductor
from hf_edit.telemetry.logs import EDiTStats
from hf_edit.trainer.decisions import TrainerDecisions
from hf_edit.trainer.progress import FollowProgress, GlobalSteps, TrainerProgress
from tests.dist.test_by_time import Replica
from tests.dist.threads import run_ranks


class PlainLoop:
    """What `TrainerDecisions` and `TrainerProgress` call of the Trainer."""

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_evaluate:
            assert self._engine.replicas_equal
            dist.barrier()
            self.evaluated.append(self.state.global_step)
            self.control.should_evaluate = False


class ByHand(TrainerDecisions, TrainerProgress, PlainLoop):
    """The parts of `EDiTMixin` that decide, on a `Replica` of test_by_time.py; `rows` end its data after so many steps.

    `evaluated` are the global steps at which it evaluated.
    """

    def __init__(self, replica: Replica, rows: int | None = None, **settings: Any) -> None:
        self.replica, self.rows = replica, rows
        self.edit_config, self.edit_layout = replica.engine.config, replica.engine.peers.layout
        self._engine, self.edit_stats = replica.engine, EDiTStats()
        by_time = self.edit_config.sync_seconds is not None
        self._steps = GlobalSteps(by_time=by_time, lockstep=rows is None and not by_time, steps_per_epoch=10**6)
        self._steps.flow = DefaultFlowCallback()
        self._conductor = Conductor(by_time)
        self.accelerator = SimpleNamespace(optimizer_step_was_skipped=False)
        self.args = SimpleNamespace(
            logging_strategy="no", logging_first_step=False, save_strategy="no", eval_strategy="no", eval_delay=0
        )
        self.state = TrainerState(max_steps=1000, logging_steps=10**6, save_steps=10**6, eval_steps=10**6)
        for name, value in settings.items():
            setattr(self.state, name, value)
        if "eval_steps" in settings:
            self.args.eval_strategy = IntervalStrategy.STEPS
        scheduler = torch.optim.lr_scheduler.LambdaLR(replica.optimizer, lambda step: 1.0)
        self.lr_scheduler = FollowProgress(scheduler, self._engine.progress, self.state.max_steps)
        self.control = TrainerControl()
        self.evaluated: list[int] = []
        self._engine._last_step = self.state.max_steps if by_time else None

    def _say_once(self, text: str) -> None: ...
    def _log_syncs(self) -> None: ...
    def _log_step(self, *args: Any) -> None: ...

    def train(self) -> ByHand:
        while not self.control.should_training_stop:
            if self.rows is not None and self._steps.own == self.rows:  # an epoch without a step: the Trainer stops
                self._steps.begin_epoch()
                self.control.should_training_stop = True
                self._behind()
                dist.barrier()
                return self
            self.replica.take_step()
            self.lr_scheduler.step()
            self._before_the_trainer_counts()
            self.state.global_step += 1
            if not self._steps.by_time:
                self._steps.flow.on_step_end(self.args, self.state, self.control)
            self._behind()
        self._behind()  # the end of the epoch
        dist.barrier()
        return self

    def _behind(self) -> None:
        self._maybe_log_save_evaluate(None, None, None, None, 0.0, None, 0.0)

    def told(self) -> dict[str, Any]:
        assert self._engine.replicas_equal
        if self._steps.by_time:
            assert self.lr_scheduler.last_epoch == self.state.global_step
        return {
            "global step": self.state.global_step,
            "evaluated": self.evaluated,
            "syncs": self._engine.sync.sync_count,
            "value": self.replica.value,
        }


def train_both(step_seconds: Any, rows: Any = (None, None), replica: Any = None, **settings: Any) -> Any:
    """Both replicas' own steps, and what they tell, which is the same."""

    def body(rank: int) -> Any:
        own = Replica(rank, 2, step_seconds=step_seconds[rank], gradient=1.0, weighting="uniform", **(replica or {}))
        hand = ByHand(own, rows[rank], **settings).train()
        return hand._steps.own, hand.told()

    (first, told), (second, also) = run_ranks(2, body, timeout=10.0)
    assert told == also
    return (first, second), told


@pytest.mark.parametrize("slowness", [1.0, 1.3, 2.0, 3.7])
@pytest.mark.parametrize("delay_steps", [0, 1, 5])
@pytest.mark.parametrize("fragments", [1, 3])
def test_replicas_of_any_speed_evaluate_and_end_at_the_same_steps(
    slowness: float, delay_steps: int, fragments: int
) -> None:
    """With slowness 2 and a delay of 5 steps the slow replica ends each sync before, when the next one is due."""
    overlap = {"overlap": "delayed", "delay_steps": delay_steps} if delay_steps else {"overlap": "none"}
    settings = {"sync_seconds": 6.0 * fragments, "fragments": fragments, **overlap}
    own, told = train_both((1.0, slowness), replica=settings, max_steps=60, eval_steps=10)
    assert told["global step"] == 60
    assert told["evaluated"][-1] == 60
    assert len(told["evaluated"]) >= 3, told
    mean = sum(own) / 2
    # A sync that ends early has fewer steps than delay_steps behind it, on the slow replica.
    assert 60 - delay_steps / 2 <= mean <= 62 + delay_steps, (own, told)
    if slowness > 1:
        assert own[0] > own[1]


@pytest.mark.parametrize(("delay_steps", "syncs"), [(0, 1), (4, 2), (8, 2)])
def test_equal_replicas_end_by_time_at_max_steps_exactly(delay_steps: int, syncs: int) -> None:
    """A delayed sync begins delay_steps before the end and is applied there; what was learnt meanwhile is synced."""
    overlap = {"overlap": "delayed", "delay_steps": delay_steps} if delay_steps else {"overlap": "none"}
    own, told = train_both((1.0, 1.0), replica={"sync_seconds": 1000.0, **overlap}, max_steps=20)
    assert own == (20, 20)
    assert told == {"global step": 20, "evaluated": [], "syncs": syncs, "value": -20.0}


@pytest.mark.parametrize(
    ("overlap", "max_steps", "rows", "syncs", "value"),
    [
        ("none", 20, (None, 17), 2, -18.5),  # replica 0's last step is the sync that tells it of replica 1's end
        ("none", 25, (None, 17), 2, -18.5),
        ("none", 1000, (14, 17), 2, -15.5),
        ("none", 1000, (10, 10), 2, -10.0),  # the data end at a sync
        ("delayed", 1000, (12, 9), 2, -11.5),  # replica 0's end, with a sync pending that says "stop" already
        ("delayed", 1000, (16, 9), 2, -13.5),
        ("delayed", 1000, (12, 12), 3, -12.0),
        ("delayed", 1000, (10, 10), 3, -10.0),
        ("delayed", 20, (None, 17), 3, -18.5),
        ("delayed", 24, (None, 12), 3, -20.0),
        ("delayed", 20, (None, None), 3, -20.0),
    ],
)
def test_data_that_run_out_by_steps_end_all(overlap: str, max_steps: int, rows: Any, syncs: int, value: float) -> None:
    """A sync every 10 steps, a delay of 4. At each the replicas' mean, but one without a step since has no weight."""
    replica = {"sync_interval": 10, "overlap": overlap, "delay_steps": 4}
    rows = [10**6 if own is None else own for own in rows]  # a stream, so that nobody knows of the others' ends
    own, told = train_both((1.0, 1.0), rows, replica, max_steps=max_steps)
    assert own[1] == min(rows[1], max_steps)
    assert told == {"global step": max(own), "evaluated": [], "syncs": syncs, "value": value}


@pytest.mark.parametrize("delay_steps", [0, 5])
@pytest.mark.parametrize("rows", [(10**6, 9), (10**6, 31), (33, 31), (12, 9), (4, 3)])
@pytest.mark.parametrize("slowness", [1.0, 2.0])
def test_data_that_run_out_by_time_end_all(delay_steps: int, rows: Any, slowness: float) -> None:
    """An evaluation that is due by what the replicas tell each other is done by the one whose data have ended, too."""
    overlap = {"overlap": "delayed", "delay_steps": delay_steps} if delay_steps else {"overlap": "none"}
    own, told = train_both((1.0, slowness), rows, {"sync_seconds": 6.0, **overlap}, eval_steps=7)
    assert own[1] <= rows[1]
    assert own[0] < 10**6
    assert bool(told["evaluated"]) == (told["global step"] >= 7)
