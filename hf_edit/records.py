"""What came of an outer sync."""

from __future__ import annotations

from dataclasses import dataclass

from hf_edit.penalty import effective_replicas
from hf_edit.plan import SyncPlan


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
