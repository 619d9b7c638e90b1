"""What was decided about an outer sync, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_edit.penalty import effective_replicas


@dataclass
class SyncPlan:
    """What all ranks have decided, from the same exchanged numbers, about a sync. Host tensors; U units, R replicas.

    `norms`, `weights` [U, R] float64; `anomalous`, `restarted` [U, R] bool. `unchanged` [U] bool: nobody has anything
    to add; `rolled_back` [U] bool: because of anomalies. `tallies` maps each tally's name to its sum over the ranks of
    each replica, [R] float64.
    """

    norms: Tensor
    weights: Tensor
    anomalous: Tensor
    restarted: Tensor
    unchanged: Tensor
    rolled_back: Tensor
    tallies: dict[str, Tensor]


@dataclass
class SyncRecord:
    """What happened in one sync, in host numbers. Times in seconds, bytes as sent by this rank."""

    sync: int
    plan: SyncPlan
    unit_names: list[str]
    sync_seconds: float
    exposed_seconds: float
    wait_seconds: float
    sync_bytes: int
    interval_seconds: float
    pseudo_grad_norm: float
    clipped_units: int

    @property
    def anomalous_replicas(self) -> int:
        """Replicas that were left out of at least one unit."""
        return int(self.plan.anomalous.any(dim=0).sum())

    @property
    def rollbacks(self) -> int:
        """Units that went back to the last anchor."""
        return int(self.plan.rolled_back.sum())

    @property
    def effective_replicas(self) -> float:
        return float(effective_replicas(self.plan.weights).mean())
