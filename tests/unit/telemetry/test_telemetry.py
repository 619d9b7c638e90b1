from __future__ import annotations

import logging
import math
import sys
import types
from typing import Any

import pytest
import torch

from hf_edit.method.plan import SyncPlan, SyncRecord
from hf_edit.telemetry.logs import (
    EDiTStats,
    LossSpikeDetector,
    alert,
    go_offline_without_login,
    sync_events,
    sync_logs,
)


def record(norms: list[list[float]], anomalous: list[list[bool]], restarted: Any = None) -> SyncRecord:
    bad = torch.tensor(anomalous)
    weights = torch.where(bad, 0.0, 1.0).double()
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
    plan = SyncPlan(
        norms=torch.tensor(norms, dtype=torch.float64),
        weights=weights,
        anomalous=bad,
        restarted=torch.tensor(restarted) if restarted else torch.zeros_like(bad),
        unchanged=bad.all(dim=1),
        rolled_back=bad.all(dim=1),
        tallies={
            "inner_steps": torch.tensor([4.0, 2.0], dtype=torch.float64),
            "loss": torch.tensor([8.0, 6.0], dtype=torch.float64),
            "tokens": torch.tensor([400.0, 200.0], dtype=torch.float64),
        },
    )
    return SyncRecord(7, plan, ["embed", "block"], 0.5, 0.2, 0.1, 1000, 3.0, 1.5, 1)


def test_the_logs_of_a_sync() -> None:
    logs = sync_logs(record([[1.0, 2.0], [1.0, math.nan]], [[False, False], [False, True]]))
    assert logs == {
        "edit/sync_seconds": 0.5,
        "edit/exposed_seconds": 0.2,
        "edit/wait_seconds": 0.1,
        "edit/sync_bytes": 1000,
        "edit/inner_steps": 3.0,
        "edit/pseudo_grad_norm": 1.5,
        "edit/clipped_units": 1,
        "edit/anomalous_replicas": 1,
        "edit/rollbacks": 0,
        "edit/effective_replicas": 1.5,
        "edit/replica_loss_mean": 2.5,
        "edit/replica_loss_spread": 1.0,
        "edit/tokens_per_second": 200.0,
    }


def test_a_replica_without_a_step_has_no_loss() -> None:
    met = record([[1.0, 2.0]], [[False, False]])
    met.plan.tallies["inner_steps"][1] = met.plan.tallies["loss"][1] = 0.0
    logs = sync_logs(met)
    assert (logs["edit/replica_loss_mean"], logs["edit/replica_loss_spread"]) == (2.0, 0.0)


def test_what_is_worth_an_alert() -> None:
    quiet = record([[1.0, 1.0], [1.0, 1.0]], [[False, False], [False, False]])
    assert sync_events(quiet) == []
    nan = math.nan
    loud = record([[1.0, nan], [9.0, nan]], [[False, True], [True, True]], restarted=[[False, False], [True, False]])
    events = dict(sync_events(loud))
    assert set(events) == {"EDiT: replica left out", "EDiT: rollback", "EDiT: detector restarted"}
    assert "replica 1 out of 2 of 2 units (2 not finite): embed, block" in events["EDiT: replica left out"]
    assert "all replicas were anomalous in 1 of 2 units" in events["EDiT: rollback"]
    assert "new normal for block of replica 0" in events["EDiT: detector restarted"]
    stats = EDiTStats()
    stats.add(loud)
    assert (stats.syncs, stats.anomalous_replicas, stats.rollbacks, stats.sync_bytes) == (1, 2, 1, 1000)


def test_loss_spikes() -> None:
    detector = LossSpikeDetector(threshold=6.0)
    for i in range(12):
        assert detector.update(2.0 + 0.1 * (i % 2)) is None
    size = detector.update(4.0)
    assert size is not None
    assert 35 < size < 45
    assert detector.update(2.05) is None, "a spike feeds no statistics"
    assert detector.update(math.nan) == math.inf


def test_early_losses_are_no_spikes() -> None:
    detector = LossSpikeDetector(threshold=6.0)
    assert [detector.update(loss) for loss in (10.0, 9.0, 50.0)] == [None, None, None]


class FakeRun:
    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.alerts: list[tuple[str, str]] = []

    def alert(self, title: str, text: str) -> None:
        if self.fails:
            raise ConnectionError("W&B is down")
        self.alerts.append((title, text))


@pytest.mark.parametrize("fails", [False, True])
def test_alerts_reach_wandb_or_say_why_not(
    fails: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = FakeRun(fails)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run=run))
    with caplog.at_level(logging.WARNING):
        alert("EDiT: rollback", "Sync 3")
    assert "EDiT: rollback. Sync 3" in caplog.text
    assert run.alerts == ([] if fails else [("EDiT: rollback", "Sync 3")])
    assert ("W&B did not take the alert: W&B is down" in caplog.text) == fails


def test_a_login_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "key")
    go_offline_without_login(["wandb"])
    monkeypatch.delenv("WANDB_API_KEY")
    go_offline_without_login(["tensorboard"])
    import os

    assert "WANDB_MODE" not in os.environ
