"""One training of the network benchmarks: what is asked of its ranks, and which of its steps are measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

NEVER = 10**9  # inner steps: longer than any run
PRESETS = {name: name for name in ("post-local-sgd", "diloco", "streaming-diloco", "co2")}
OVERLAPS = {
    "post-local-sgd": "none",
    "diloco": "none",
    "edit-none": "none",
    "edit-forward": "forward",
    "edit-delayed": "delayed",
    "a-edit": "forward",
    "a-edit-delayed": "delayed",
    "co2": "delayed",
    "streaming-diloco": "delayed",
    "edit-auto": "delayed",
    "edit-balance": "delayed",
    "edit-forward-int8": "forward",
    "edit-forward-int4": "forward",
    "edit-delayed-int8": "delayed",
    "edit-delayed-int4": "delayed",
}
METHODS = ("hsdp", *OVERLAPS)  # what is compared with "never", the bound: no sync at all
COMPRESSIONS = {name: name.rpartition("-")[2] for name in OVERLAPS if name.endswith(("-int8", "-int4"))}
COMPRESSIONS["streaming-diloco"] = "int4"
# Until the settings, or the shares, have found themselves. The last was an idea, of which results are kept.
SETTLING_SYNCS = {"edit-auto": 6, "edit-balance": 5, "edit-balance-whole": 5}
FRAGMENTS = {"streaming-diloco": 4}
TIMED = ("a-edit", "a-edit-delayed")  # whose sync is triggered by time
TUNED_FIGURES = ("sync_interval", "delay_steps", "bytes_per_parameter")  # of the settings in force, with tune
SYNC_FIGURES = ("sync_seconds", "exposed_seconds", "wait_seconds", "sync_bytes")


@dataclass(frozen=True)
class Job:
    """What every rank of one training gets.

    Args:
        method: one of `METHODS`, or "never".
        replica_steps: for each replica, the steps it takes (with a timed sync: the mean over the replicas).
        first_step: the end of this step begins the measured window of a method without a timed sync.
        measured_steps: length of that window; 0: up to each replica's last step (for "never").
        tau: inner steps between syncs.
        sync_seconds: seconds between the syncs of a timed method.
        delay_steps: inner steps until a delayed sync is applied.
        batch_size, sequence_length: of one rank in one step.
        ranks_per_replica: S.
        report: file for the figures; `report` + ".started" appears when training begins.
        units_in_flight: EDiTConfig's; None: its default.
    """

    method: str
    replica_steps: tuple[int, ...]
    first_step: int
    measured_steps: int
    tau: int
    sync_seconds: float
    delay_steps: int
    batch_size: int
    sequence_length: int
    ranks_per_replica: int
    report: str
    units_in_flight: int | None = None

    @property
    def num_replicas(self) -> int:
        return len(self.replica_steps)

    @property
    def tokens_per_step(self) -> int:
        """Of one replica."""
        return self.batch_size * self.sequence_length * self.ranks_per_replica

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        values = json.loads(text)
        return cls(**{**values, "replica_steps": tuple(values["replica_steps"])})


def phase_steps(method: str, delay_steps: int) -> int:
    """Inner steps from the one that makes a sync due to the one after which it has been applied.

    >>> [phase_steps(method, 4) for method in ("edit-none", "edit-forward", "edit-delayed")]
    [0, 1, 4]
    """
    return {"none": 0, "forward": 1, "delayed": delay_steps}[OVERLAPS[method]]


def window(method: str, tau: int, delay_steps: int, least_steps: int) -> tuple[int, int]:
    """The first step and the length of the window of a method that syncs every `tau` inner steps.

    The length is a whole number of intervals of at least `least_steps`. The window begins when a sync that became due
    before it would have been applied, so as many syncs begin in it as end in it. A short interval's first sync, with
    its one-time costs, lies before it; with a long one the window begins inside the first interval.

    >>> window("edit-forward", tau=8, delay_steps=4, least_steps=20)
    (16, 24)
    >>> window("edit-delayed", tau=128, delay_steps=64, least_steps=20)
    (66, 128)
    """
    first = max(8, phase_steps(method, delay_steps) + 2) + SETTLING_SYNCS.get(method, 0) * tau
    if tau <= 32:
        first += tau
    return first, tau * -(-least_steps // tau)


def edit_settings(job: Job) -> dict[str, Any]:
    """The `EDiTConfig` fields of `job`'s method."""
    settings: dict[str, Any] = {"num_replicas": job.num_replicas}
    if job.method == "never":
        return {**settings, "sync_interval": NEVER}
    settings["overlap"] = OVERLAPS[job.method]
    settings["compression"] = COMPRESSIONS.get(job.method, "none")
    if job.method == "edit-auto":
        settings["tune"] = "auto"
    settings["balance"] = job.method == "edit-balance"
    if job.units_in_flight is not None:
        settings["units_in_flight"] = job.units_in_flight
    if settings["overlap"] == "delayed":
        settings["delay_steps"] = max(1, job.delay_steps // FRAGMENTS.get(job.method, 1))
    if job.method in TIMED:
        return {**settings, "sync_seconds": job.sync_seconds}
    return {**settings, "sync_interval": job.tau}


def combine(ranks: Sequence[dict[str, Any]], job: Job) -> dict[str, Any]:
    """The replicas' figures, from those of their ranks in order.

    Returns:
        `tokens_per_second` of all replicas, `bytes_per_token` that crossed between them, and `replicas`: for each its
        window, its rate, its rows of a step, its processor seconds, what it sent, and of the syncs in the window, one
        after the other, seconds and bytes (means over its ranks; bytes summed).
    """
    size = job.ranks_per_replica
    replicas = []
    for replica in range(job.num_replicas):
        members = ranks[replica * size : (replica + 1) * size]
        first = members[0]
        tokens = job.tokens_per_step * first["window_steps"]
        replicas.append(
            {
                **{name: first[name] for name in ("inner_steps", "window_steps", "window_seconds", "bytes_sent")},
                "inner_steps_per_second": first["window_steps"] / first["window_seconds"],
                "rows_per_step": sum(member["rows"] for member in members) / first["window_steps"],
                "tokens_per_second": tokens / first["window_seconds"],
                "cpu_seconds_per_step": sum(member["cpu_seconds"] for member in members) / first["window_steps"],
                "syncs": _columns([_mean_of(records) for records in zip(*(m["syncs"] for m in members), strict=True)]),
            }
        )
    steps = sum(replica["window_steps"] for replica in replicas)
    return {
        "tokens_per_second": sum(replica["tokens_per_second"] for replica in replicas),
        "bytes_per_token": sum(replica["bytes_sent"] for replica in replicas) / (job.tokens_per_step * steps),
        "replicas": replicas,
    }


def _mean_of(records: Sequence[dict[str, float]]) -> dict[str, float]:
    totals = {name: sum(record[name] for record in records) for name in records[0]}
    return {name: total if name.endswith("_bytes") else total / len(records) for name, total in totals.items()}


def _columns(syncs: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [sync[name] for sync in syncs] for name in (syncs[0] if syncs else SYNC_FIGURES)}
