"""Records of syncs and loss spikes, and what of them goes to the logs.

Everything goes through `Trainer.log`, so to whatever `report_to` names; W&B also gets alerts.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_edit.method.penalty import ema_update, z_score
from hf_edit.method.plan import SyncRecord

logger = logging.getLogger(__name__)


@dataclass
class EDiTStats:
    """Totals of one call of `train()`, on this rank.

    `exposed_seconds` is the time that training waited for syncs, `sync_bytes` what this rank sent to other replicas,
    `gradient_bytes` what it would send to average the gradients once, `hsdp_bytes` what it would have sent had every
    inner step done so, as FSDP over all ranks (HSDP) does.
    """

    inner_steps: int = 0
    syncs: int = 0
    exposed_seconds: float = 0.0
    sync_bytes: int = 0
    gradient_bytes: int = 0
    hsdp_bytes: int = 0
    anomalous_replicas: int = 0
    rollbacks: int = 0
    loss_spikes: int = 0

    def add(self, record: SyncRecord) -> None:
        self.syncs += 1
        self.exposed_seconds += record.exposed_seconds
        self.sync_bytes += record.sync_bytes
        self.anomalous_replicas += record.anomalous_replicas
        self.rollbacks += record.rollbacks


@dataclass
class GlobalCount:
    """A count over all replicas: exact after every sync, in between this replica's own times R.

    >>> count = GlobalCount(num_replicas=2)
    >>> count.add(10.0)     # this replica's; the other's 14 are not known here
    >>> count.value
    20.0
    >>> count.hand_over()   # a sync begins
    >>> count.add(1.0)
    >>> count.confirm(24.0)  # it has ended
    >>> count.value
    26.0
    """

    num_replicas: int
    confirmed: float = 0.0
    own: float = 0.0
    handed_over: float = 0.0

    @property
    def value(self) -> float:
        return self.confirmed + (self.handed_over + self.own) * self.num_replicas

    def add(self, amount: float) -> None:
        """This replica counted `amount` more."""
        self.own += amount

    def hand_over(self) -> None:
        """A sync begins, which will tell what all replicas counted up to now."""
        self.handed_over, self.own = self.handed_over + self.own, 0.0

    def confirm(self, amount: float) -> None:
        """All replicas together counted `amount` between the last two syncs' beginnings."""
        self.confirmed += amount
        self.handed_over = 0.0


@dataclass
class LossSpikeDetector:
    """Says when a logged loss lies far above its moving mean.

    Args:
        threshold: standard deviations that count as a spike.
        alpha: weight of the newest loss in the moving mean and variance.
        warmup: losses to see first.
    """

    threshold: float
    alpha: float = 0.05
    warmup: int = 10
    count: int = 0
    _mean: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    _variance: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def update(self, loss: float) -> float | None:
        """Takes the next loss; its size in standard deviations if it is a spike, else None. inf if not finite."""
        if not math.isfinite(loss):
            return math.inf
        value = torch.tensor(loss, dtype=torch.float64)
        size = float(z_score(value, self._mean, self._variance))
        if self.count >= self.warmup and size > self.threshold:
            return size
        self._mean, self._variance = ema_update(self._mean, self._variance, torch.tensor(self.count), value, self.alpha)
        self.count += 1
        return None


def sync_logs(record: SyncRecord) -> dict[str, float]:
    """The log entries of one sync."""
    plan = record.plan
    steps = plan.tallies["inner_steps"]
    losses = plan.tallies["loss"] / steps  # NaN for a replica that has taken none
    finite = losses[losses.isfinite()]
    spread = float(finite.max() - finite.min()) if len(finite) else math.nan
    return {
        "edit/sync_seconds": record.sync_seconds,
        "edit/exposed_seconds": record.exposed_seconds,
        "edit/wait_seconds": record.wait_seconds,
        "edit/sync_bytes": record.sync_bytes,
        "edit/inner_steps": float(steps.mean()),
        "edit/pseudo_grad_norm": record.pseudo_grad_norm,
        "edit/clipped_units": record.clipped_units,
        "edit/anomalous_replicas": record.anomalous_replicas,
        "edit/rollbacks": record.rollbacks,
        "edit/effective_replicas": record.effective_replicas,
        "edit/replica_loss_mean": float(finite.mean()) if len(finite) else math.nan,
        "edit/replica_loss_spread": spread,
        "edit/tokens_per_second": float(plan.tallies["tokens"].sum()) / max(record.interval_seconds, 1e-9),
    }


def sync_events(record: SyncRecord) -> list[tuple[str, str]]:
    """What somebody should know of one sync, as (title, text)."""
    plan = record.plan
    events = []
    for replica in plan.anomalous.any(dim=0).nonzero().flatten().tolist():
        units = [name for name, bad in zip(record.unit_names, plan.anomalous[:, replica].tolist(), strict=True) if bad]
        broken = int((~plan.norms[:, replica].isfinite()).sum())
        events.append((
            "EDiT: replica left out",
            f"Sync {record.sync} left replica {replica} out of {len(units)} of {len(record.unit_names)} units "
            f"({broken} not finite): {_some(units)}",
        ))  # fmt: skip
    if plan.rolled_back.any():
        units = [name for name, back in zip(record.unit_names, plan.rolled_back.tolist(), strict=True) if back]
        events.append((
            "EDiT: rollback",
            f"Sync {record.sync}: all replicas were anomalous in {len(units)} of {len(record.unit_names)} units, which "
            f"went back to the last anchor: {_some(units)}",
        ))  # fmt: skip
    if plan.restarted.any():
        pairs = [f"{record.unit_names[u]} of replica {r}" for u, r in plan.restarted.nonzero().tolist()]
        events.append((
            "EDiT: detector restarted",
            f"Sync {record.sync}: norms stayed anomalous and are the new normal for {_some(pairs)}",
        ))  # fmt: skip
    return events


def alert(title: str, text: str) -> None:
    """Warns in the log, and in W&B if a run is active."""
    logger.warning("%s. %s", title, text)
    _tell_wandb("alert", lambda run: run.alert(title=title, text=text))


def publish_settings(settings: dict[str, Any]) -> None:
    """Puts EDiT's settings beside the Trainer's in the active W&B run's config."""
    _tell_wandb("configuration", lambda run: run.config.update({"edit": settings}, allow_val_change=True))


def _tell_wandb(what: str, tell: Callable[[Any], object]) -> None:
    run = getattr(sys.modules.get("wandb"), "run", None)
    if run is None:
        return
    try:
        tell(run)
    except Exception as error:  # whatever W&B raises when it is down: that is said, and training goes on
        logger.warning("W&B did not take the %s: %s", what, error)


def go_offline_without_login(report_to: list[str]) -> None:
    """Sets WANDB_MODE=offline if W&B is to be used but nobody is logged in, and says so.

    Without it W&B asks for a key, or ends the training where nobody can answer.
    """
    if "wandb" not in report_to or os.environ.get("WANDB_MODE") or os.environ.get("WANDB_API_KEY"):
        return
    try:
        import wandb
    except ImportError:
        return  # the Trainer's own error names the missing package
    if wandb.run is not None:
        return  # the user started a run, however they did
    try:
        logged_in = wandb.login(prompt=False, verify=False)
    except TypeError:  # an older wandb, which cannot look without asking
        logged_in = wandb.api.api_key is not None
    if not logged_in:
        os.environ["WANDB_MODE"] = "offline"
        wandb.teardown()  # looking has read the environment; the next run shall read it anew
        logger.warning("No W&B login was found: logging offline. `wandb login`, or `wandb sync` the run afterwards.")


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
