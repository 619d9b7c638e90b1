"""What all ranks decide about a sync, each for itself, from the same exchanged numbers, and what came of it. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_edit.config import EDiTConfig
from hf_edit.method.penalty import (
    DetectorState,
    detect_anomalies,
    effective_replicas,
    norm_weights,
    relative_weights,
    share_weights,
    z_score,
)

# Tallies of those whom a call between two syncs, or the schedule, has brought to a sync; who leaves has neither.
CALLED, DUE = "called", "due"


@dataclass
class SyncPlan:
    """The decisions about one sync. Host tensors; U units, R replicas.

    `norms`, `z`, `weights` [U, R] float64; `anomalous`, `restarted` [U, R] bool. `unchanged` [U] bool: nobody has
    anything to add; `rolled_back` [U] bool: because of anomalies. `tallies` maps each tally's name to its sum over the
    ranks of each replica, [R] float64.
    """

    norms: Tensor
    z: Tensor
    weights: Tensor
    anomalous: Tensor
    restarted: Tensor
    unchanged: Tensor
    rolled_back: Tensor
    tallies: dict[str, Tensor]
    idle: Tensor  # [U, R] or [R] bool: the replica took no step since the unit's last sync

    @property
    def learning_rate(self) -> float:
        """The inner one, mean over the steps that the replicas tell of; 0 if nobody does."""
        steps = float(self.tallies["inner_steps"].sum())
        told = self.tallies.get("learning_rate")
        return 0.0 if told is None or steps == 0 else float(told.sum()) / steps

    def sound_of(self, members: Sequence[int]) -> int | None:
        """The first of `members` that passed in every unit, one that did a step before an idle one; None: there is
        none. Who does not take part has nothing to give."""
        passed = (~self.anomalous.any(dim=0)).tolist()
        steps = self.tallies["inner_steps"].tolist()
        sound = [member for member in members if passed[member]]
        return next((member for member in sound if steps[member] > 0), sound[0] if sound else None)


def make_plan(
    table: Tensor, tally_names: Sequence[str], detectors: DetectorState, config: EDiTConfig,
    fragments: Sequence[int] = (), missed: Tensor | None = None,
) -> tuple[SyncPlan, DetectorState]:  # fmt: skip
    """The plan of a sync, and the detectors after it (EDiT, Algorithm 2: eliminate and weigh).

    Args:
        table: [R, U + T] float64 on the host; for each replica the squared norm of each unit, then its tallies.
        tally_names: T names, "inner_steps" among them; "rows", and the "share" of a batch that stands for them where
            nobody has read any, where they are dealt out by speed. A replica that did no step is idle: it has nothing
            to say, and its norm of 0 would weigh most.
        fragments: of each unit, where there are several; "fragment_steps_I" is a tally then, the steps since the last
            sync of fragment I.
        missed: [R] syncs that each replica lacks; None: none does. What it has learnt at an anchor that the others have
            left weighs 1 / (1 + missed) as much as it would (the polynomial weights of FedAsync, arXiv 1903.03934;
            examples/benchmarks/stale.py).

    Raises:
        RuntimeError: some replicas came to this sync by a call, and others by their schedule.
    """
    num_units = table.shape[1] - len(tally_names)
    norms = table[:, :num_units].sqrt().T
    tallies = dict(zip(tally_names, table[:, num_units:].T, strict=True))
    _check_calls(tallies)
    steps = tallies["inner_steps"]
    if fragments:
        steps = torch.stack([tallies[f"fragment_steps_{fragment}"] for fragment in fragments])
    idle = steps == 0
    anomalous, restarted, after = detect_anomalies(
        detectors,
        norms,
        threshold=config.anomaly_threshold,
        alpha=config.ema_alpha,
        warmup_syncs=config.ema_warmup_syncs,
        max_consecutive=config.max_consecutive_anomalies,
        idle=idle,
    )
    passed = ~(anomalous | idle)
    weights = _weights(norms, steps, passed, config)
    if "rows" in tallies:  # dealt out by speed: a replica's progress counts as much as it has read
        weights = _scaled(weights, tallies["rows"] if float(tallies["rows"].sum()) > 0 else tallies["share"])
    if missed is not None:
        weights = _scaled(weights, 1.0 / (1.0 + missed))
    unchanged = ~passed.any(dim=1)
    rolled_back = unchanged & anomalous.any(dim=1)
    z = z_score(norms, detectors.mean, detectors.variance)
    return SyncPlan(norms, z, weights, anomalous, restarted, unchanged, rolled_back, tallies, idle), after


def _check_calls(tallies: dict[str, Tensor]) -> None:
    if CALLED in tallies and float(tallies[CALLED].sum()) > 0 and float(tallies[DUE].sum()) > 0:
        raise RuntimeError(
            "evaluate(), predict() or save_model() was called between two syncs on ranks of replicas "
            f"{tallies[CALLED].nonzero().flatten().tolist()} alone, where others had come to their next sync. Call it "
            "on all ranks at the same step, also where one alone writes; or set control.should_evaluate or "
            "control.should_save, which all then do together."
        )


def _weights(norms: Tensor, steps: Tensor, passed: Tensor, config: EDiTConfig) -> Tensor:
    """[U, R], by the norms and the steps of those that have `passed`."""
    if config.weighting == "norm":
        return norm_weights(norms, passed, config.softmax_temperature)
    if config.weighting == "relative":
        return relative_weights(norms, passed, config.softmax_temperature)
    return share_weights(steps if config.weighting == "steps" else torch.ones_like(steps), passed)


def _scaled(weights: Tensor, factors: Tensor) -> Tensor:
    """[U, R] `weights` times the replicas' `factors` [R], of sum 1 again where they are not all 0."""
    weights = weights * factors
    return weights / weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


@dataclass
class SyncRecord:
    """What happened in one sync, in host numbers. Times in seconds, bytes as sent by this rank.

    What each replica has measured of the sync before this one, and told at this one, is in the plan's tallies.
    """

    sync: int
    plan: SyncPlan
    units: list[int]  # that took part, of all of them; the plan's rows
    unit_names: list[str]  # theirs
    num_units: int  # of all
    sync_seconds: float
    exposed_seconds: float
    wait_seconds: float
    sync_bytes: int
    interval_seconds: float
    pseudo_grad_norm: float
    pseudo_grad_cosines: list[float]  # of each unit's average with its last one; NaN where there was none
    clip_factors: list[float]  # of each unit, 1 where nothing was clipped
    settings: dict[str, float] = field(default_factory=dict)  # that find themselves: as they were in this sync
    note: str = ""  # why others hold from the next sync on

    @property
    def pseudo_grad_cosine(self) -> float:
        """Mean over the units that have one; NaN if none has."""
        known = [cosine for cosine in self.pseudo_grad_cosines if not math.isnan(cosine)]
        return sum(known) / len(known) if known else math.nan

    @property
    def clipped_units(self) -> int:
        return sum(factor < 1 for factor in self.clip_factors)

    @property
    def slowest_replica(self) -> int:
        """The one that trained longest before it came to this sync."""
        return int(self.plan.tallies["training_seconds"].argmax())

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
        """Mean over the units that anybody had to tell of."""
        told = ~self.plan.idle.expand(self.plan.norms.shape).all(dim=1)
        return float(effective_replicas(self.plan.weights)[told].mean()) if bool(told.any()) else 0.0
