"""A journal as a training would write it: with a loss spike, a replica left out, a rollback and a resume."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, Any]


@dataclass
class FakeRun:
    """A training of `num_syncs` syncs whose slowest replica is the last.

    Args:
        by_time: A-EDiT: the slow replica takes fewer steps; else the others wait for it.
        resume_at: the sync after whose half the run was killed, to go on from this one; None: it ran through.
        trouble: a spike and an anomaly of replica 1 at 40 % of the run, a rollback at 60 %.
        thinned: syncs before this one have lost their tables.
    """

    num_syncs: int = 96
    num_replicas: int = 4
    num_units: int = 14
    interval: int = 16
    by_time: bool = False
    resume_at: int | None = 50
    trouble: bool = True
    thinned: int = 0
    ended: bool = True
    settings: Record = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.units = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(self.num_units - 2)), "norm+lm_head"]
        self.speed = np.linspace(1.0, 0.72, self.num_replicas)
        self.spiked, self.rolled_back = int(0.4 * self.num_syncs), int(0.6 * self.num_syncs)

    def write(self, folder: Path) -> Path:
        """The journal in `folder`, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "edit_syncs.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in self.records()), encoding="utf-8")
        return path

    def records(self) -> list[Record]:
        found = [self.run_line(0)]
        seconds = 0.0
        if self.resume_at is not None:
            for sync in range(self.resume_at + 5):
                found += self.interval_records(sync, seconds := seconds + 21.0)
            found.append(self.run_line((self.resume_at + 1) * self.interval))
            seconds = 0.0
        for sync in range(0 if self.resume_at is None else self.resume_at + 1, self.num_syncs):
            found += self.interval_records(sync, seconds := seconds + 21.0)
        if self.ended:
            found.append({"kind": "end", "step": self.num_syncs * self.interval, "seconds": seconds + 2.0})
        return found

    def run_line(self, step: int) -> Record:
        settings = {"num_replicas": self.num_replicas, "sync_interval": self.interval, "outer_lr": 0.8,
                    "outer_momentum": 0.85, "weighting": "norm", "overlap": "forward", "edit_warmup_steps": 0,
                    "sync_seconds": 20.0 if self.by_time else None, "anomaly_threshold": 3.0}  # fmt: skip
        training = {"learning_rate": 3e-4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2,
                    "max_steps": self.num_syncs * self.interval, "seed": 42 + self.seed, "bf16": True}  # fmt: skip
        versions = {"torch": "2.13.0", "transformers": "5.24.0", "accelerate": "1.15.0", "hf_edit": "0.1.0"}
        return {"kind": "run", "version": 1, "time": "2026-11-26T10:00:00+00:00", "step": step, "shards": 2,
                "replicas": self.num_replicas, "units": self.units, "unit_parameters": [7_000_000] * self.num_units,
                "gradient_bytes": 3 * 10**8, "settings": {**settings, **self.settings},
                "training": training, "versions": versions}  # fmt: skip

    def loss(self, step: float) -> float:
        return 2.4 + 8.3 * math.exp(-step / 180) + 0.06 * float(self.random.normal())

    def interval_records(self, sync: int, seconds: float) -> list[Record]:
        """The logs and the spike of an interval, and the sync that ends it."""
        found: list[Record] = []
        end = (sync + 1) * self.interval
        spiked = self.trouble and sync == self.spiked
        for step in range(end - self.interval + 4, end + 1, 4):
            loss = self.loss(step) + (4.1 if spiked and step == end - 4 else 0.0)
            found.append({"kind": "log", "step": step, "seconds": seconds, "loss": round(loss, 4),
                          "learning_rate": 3e-4, "grad_norm": 1.1})  # fmt: skip
        if spiked:
            found.append({"kind": "spike", "step": end - 4, "replica": 1, "size": 17.3, "loss": 6.9, "epoch": 0,
                          "batch": 2 * (end - 4), "count": 1, "response": "log", "sync": sync + 1, "weight": 0.02,
                          "left_out_units": 9})  # fmt: skip
        record = self.sync(sync, end, seconds)
        found.append(record)
        if record["rolled_back"]:
            found.append({"kind": "event", "step": end, "title": "EDiT: rollback", "text": f"Sync {sync + 1}: all "
                          "replicas were anomalous in 3 of 14 units, which went back to the last anchor"})  # fmt: skip
        if sync % 12 == 11:
            found.append({"kind": "log", "step": end, "seconds": seconds, "eval_loss": self.loss(end) + 0.15})
        return found

    def sync(self, sync: int, step: int, seconds: float) -> Record:
        replicas, units = self.num_replicas, self.num_units
        steps = np.round(self.interval * self.speed / self.speed.mean()) if self.by_time else [self.interval] * replicas
        training = np.full(replicas, 20.0) if self.by_time else 14.4 / self.speed
        wait = np.zeros(replicas) if self.by_time else training.max() - training
        base = np.linspace(0.5, 6.0, units)[:, None] * (0.4 + 2.0 * math.exp(-sync / 30))
        norms = base * np.exp(0.08 * self.random.normal(size=(units, replicas)))
        anomalous: list[tuple[int, int]] = []
        rolled_back = list(range(min(3, units))) if self.trouble and sync == self.rolled_back else []
        if self.trouble and sync == self.spiked:
            norms[:9, 1] *= 9.0
            anomalous = [(unit, 1) for unit in range(min(9, units))]
        if rolled_back:
            anomalous = [(unit, replica) for unit in rolled_back for replica in range(replicas)]
            norms[rolled_back] = math.nan
        weights = np.where(np.isnan(norms), 0.0, np.exp(-np.nan_to_num(norms)))
        for unit, replica in anomalous:
            weights[unit, replica] = 0.0
        sums = weights.sum(axis=1, keepdims=True)
        weights = np.divide(weights, sums, out=np.zeros_like(weights), where=sums > 0)
        exposed = wait + 0.7
        measured = {"exposed_seconds": list(exposed), "wait_seconds": list(wait), "network_seconds": [1.9] * replicas}
        record = {"kind": "sync", "sync": sync + 1, "step": step, "seconds": seconds, "sync_seconds": 3.1,
                  "exposed_seconds": float(exposed[0]), "wait_seconds": float(wait[0]), "sync_bytes": 3 * 10**8,
                  "interval_seconds": 21.0, "pseudo_grad_norm": 3.0, "clipped_units": 0,
                  "anomalous_replicas": len({replica for _, replica in anomalous}),
                  "rollbacks": len(rolled_back),
                  "effective_replicas": float(np.mean(1 / np.maximum((weights**2).sum(axis=1), 1 / replicas))),
                  "replicas": {"inner_steps": [float(s) for s in steps], "tokens": [4096.0 * s for s in steps],
                               "loss": [self.loss(step - 8) for _ in range(replicas)],
                               "training_seconds": list(training)},
                  "before": measured if sync else None, "anomalous": anomalous, "restarted": [],
                  "rolled_back": rolled_back}  # fmt: skip
        if sync >= self.thinned:
            record["norms"], record["weights"] = _rows(norms), _rows(weights)
            record["z"], record["clip"] = _rows(0 * weights), [1.0] * units
        return record


def _rows(table: Any) -> list[list[float | None]]:
    return [[round(float(x), 5) if math.isfinite(x) else None for x in row] for row in table]
