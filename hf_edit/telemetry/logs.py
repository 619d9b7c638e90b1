"""What of a sync goes to the logs, and what of it somebody should know.

The logs go through `Trainer.log`, or a loop's `accelerator.log`: to whatever these report to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hf_edit.method.plan import SyncRecord


@dataclass
class EDiTStats:
    """Totals of one call of `train()`, on this rank.

    `exposed_seconds` is the time that training waited for syncs, `sync_bytes` what this rank sent to other replicas,
    `gradient_bytes` what it would send to average the gradients once, `hsdp_bytes` what it would have sent had every
    inner step done so, as FSDP over all ranks (HSDP) does, and `warmup_bytes` what the synchronous steps of the warm-up
    have sent in that way.
    """

    inner_steps: int = 0
    syncs: int = 0
    exposed_seconds: float = 0.0
    sync_bytes: int = 0
    gradient_bytes: int = 0
    hsdp_bytes: int = 0
    warmup_bytes: int = 0
    anomalous_replicas: int = 0
    rollbacks: int = 0
    loss_spikes: int = 0

    def add(self, record: SyncRecord) -> None:
        self.syncs += 1
        self.exposed_seconds += record.exposed_seconds
        self.sync_bytes += record.sync_bytes
        self.anomalous_replicas += record.anomalous_replicas
        self.rollbacks += record.rollbacks
        self.loss_spikes += sum(spike.count for spike in loss_spikes(record))


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


@dataclass(frozen=True)
class LossSpike:
    """The largest loss spike of a replica between two syncs, of `count`, and what the penalty did about it.

    `size` is in standard deviations, inf if the loss was not finite. `weight` is the replica's at the sync, the mean
    over units; `left_out_units` of them were averaged without it.
    """

    replica: int
    count: int
    size: float
    loss: float
    step: int
    epoch: int
    batch: int
    weight: float
    left_out_units: int

    def text(self) -> str:
        far = f"lies {self.size:.1f} standard deviations above its moving mean"
        if math.isinf(self.size):
            far = "is not finite"
        more = f", the largest of {self.count} spikes since the last sync" if self.count > 1 else ""
        return (
            f"Step {self.step} (epoch {self.epoch}, batch {self.batch}) of replica {self.replica}: the loss "
            f"{self.loss:.4g} {far}{more}."
        )


def loss_spikes(record: SyncRecord) -> list[LossSpike]:
    """Of each replica that had one; loops of one's own tell of none."""
    plan = record.plan
    if "spikes" not in plan.tallies:
        return []
    found = []
    for replica in plan.tallies["spikes"].nonzero().flatten().tolist():
        told = {name: float(plan.tallies[name][replica]) for name in plan.tallies if name.startswith("spike")}
        found.append(
            LossSpike(
                replica=replica,
                count=round(told["spikes"]),
                size=told["spike_size"],
                loss=told["spike_loss"],
                step=round(told["spike_step"]),
                epoch=round(told["spike_epoch"]),
                batch=round(told["spike_batch"]),
                weight=float(plan.weights[:, replica].mean()),
                left_out_units=int(plan.anomalous[:, replica].sum()),
            )
        )
    return found


def sync_logs(record: SyncRecord) -> dict[str, float]:
    """The log entries of one sync."""
    plan = record.plan
    steps = plan.tallies["inner_steps"]
    losses = plan.tallies["loss"] / steps  # NaN for a replica that has taken none
    finite = losses[losses.isfinite()]
    spread = float(finite.max() - finite.min()) if len(finite) else math.nan
    logs = {
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
    if not math.isnan(record.pseudo_grad_cosine):  # there was a sync before
        logs["edit/pseudo_grad_cosine"] = record.pseudo_grad_cosine
    logs |= {f"edit/{name}": value for name, value in record.settings.items()}
    if spikes := loss_spikes(record):
        logs |= {"edit/loss_spikes": sum(s.count for s in spikes), "edit/loss_spike": max(s.size for s in spikes)}
    return logs


def sync_events(record: SyncRecord) -> list[tuple[str, str]]:
    """What somebody should know of one sync, as (title, text)."""
    plan = record.plan
    events = []
    for spike in loss_spikes(record):
        done = f"Sync {record.sync} gave it a weight of {spike.weight:.2f}"
        if spike.left_out_units:
            done += f" and left it out of {spike.left_out_units} of {len(record.unit_names)} units"
        events.append(("EDiT: loss spike", f"{spike.text()} {done}."))
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
    if record.note:
        events.append(("EDiT: settings", f"Sync {record.sync}: {record.note}."))
    return events


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
