from __future__ import annotations

import logging
import math
import sys
import types
from typing import Any

import pytest
import torch

from hf_edit.method.plan import SyncPlan, SyncRecord
from hf_edit.telemetry.logs import EDiTStats, LossSpike, loss_spikes, sync_events, sync_logs
from hf_edit.telemetry.wandb_run import alert, go_offline_without_login

BEFORE = ("exposed", "wait", "network")


def record(norms: list[list[float]], anomalous: list[list[bool]], restarted: Any = None) -> SyncRecord:
    bad = torch.tensor(anomalous)
    weights = torch.where(bad, 0.0, 1.0).double()
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
    plan = SyncPlan(
        norms=torch.tensor(norms, dtype=torch.float64),
        z=torch.zeros(bad.shape, dtype=torch.float64),
        weights=weights,
        anomalous=bad,
        restarted=torch.tensor(restarted) if restarted else torch.zeros_like(bad),
        unchanged=bad.all(dim=1),
        rolled_back=bad.all(dim=1),
        tallies={
            "inner_steps": torch.tensor([4.0, 2.0], dtype=torch.float64),
            "loss": torch.tensor([8.0, 6.0], dtype=torch.float64),
            "tokens": torch.tensor([400.0, 200.0], dtype=torch.float64),
            "training_seconds": torch.tensor([1.0, 2.0], dtype=torch.float64),
            **{f"before_{name}_seconds": torch.tensor([0.5, math.nan], dtype=torch.float64) for name in BEFORE},
        },
        idle=torch.tensor([False, False]),
    )
    return SyncRecord(
        7, plan, [0, 1], ["embed", "block"], 2, 0.5, 0.2, 0.1, 1000, 3.0, 1.5, [0.25, math.nan], [1.0, 0.4]
    )


def test_the_logs_of_a_sync() -> None:
    logs = sync_logs(record([[1.0, 2.0], [1.0, math.nan]], [[False, False], [False, True]]))
    assert logs == {
        "edit/sync_seconds": 0.5,
        "edit/exposed_seconds": 0.2,
        "edit/wait_seconds": 0.1,
        "edit/sync_bytes": 1000,
        "edit/inner_steps": 3.0,
        "edit/pseudo_grad_norm": 1.5,
        "edit/pseudo_grad_cosine": 0.25,
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


def spiking(size: float = 7.5) -> SyncRecord:
    """Replica 1 had three spikes, and was left out of one of two units."""
    found = record([[1.0, 2.0], [1.0, 9.0]], [[False, False], [False, True]])
    told = dict(spikes=3, spike_size=size, spike_loss=5.25, spike_step=41, spike_epoch=1, spike_batch=17)
    found.plan.tallies |= {name: torch.tensor([0.0, value], dtype=torch.float64) for name, value in told.items()}
    return found


def test_loss_spikes_are_of_the_replica_that_had_them() -> None:
    assert loss_spikes(record([[1.0, 1.0]], [[False, False]])) == []
    (spike,) = loss_spikes(spiking())
    assert spike == LossSpike(1, 3, 7.5, 5.25, 41, 1, 17, 0.25, 1)
    logs = sync_logs(spiking())
    assert (logs["edit/loss_spikes"], logs["edit/loss_spike"]) == (3, 7.5)
    events = dict(sync_events(spiking()))
    assert events["EDiT: loss spike"] == (
        "Step 41 (epoch 1, batch 17) of replica 1: the loss 5.25 lies 7.5 standard deviations above its moving mean, "
        "the largest of 3 spikes since the last sync. Sync 7 gave it a weight of 0.25 and left it out of 1 of 2 units."
    )
    assert "the loss 5.25 is not finite" in dict(sync_events(spiking(math.inf)))["EDiT: loss spike"]
    stats = EDiTStats()
    stats.add(spiking())
    assert stats.loss_spikes == 3


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
