"""What is known of a job, what is asked of it, and what comes of that: the simulation's numbers in and out."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hf_edit.method.compression import CODECS, bytes_per_element

BYTES_PER_ELEMENT = {kind: bytes_per_element(kind) for kind in ("none", *CODECS)}
MOMENTS = ("none", "first", "both")  # EDiTConfig's sync_moments, by their number
OVERLAPS = ("forward", "delayed", "none")  # in the order in which they are to be taken where all are equally fast
PROTOCOL_OVERHEAD = 0.05  # Ethernet, IP and TCP headers around 1448 bytes, acknowledgements
FIRST_WINDOW_BYTES = 10 * 1448  # of a TCP connection that begins, or was idle since the last sync (RFC 6928, 5681)
# What a sync costs a host without accelerators: one core's seconds for a byte that its replica sends. The median over
# the pairs of runs at tau 8 in examples/benchmarks/results, by their processors' counters and not by their speeds
# (examples/benchmarks/plan.py says it again).
CPU_SECONDS_PER_BYTE = 5.5e-9


@dataclass(frozen=True)
class Numbers:
    """What is known of a job.

    Args:
        parameters: trained parameters of the whole model.
        num_replicas: R.
        step_seconds: mean of one inner step of a replica of speed 1.
        bits_per_second: of a replica's link in each direction; inf: no limit. Its ranks share it.
        round_trip_seconds: from a replica to another and back.
        replica_size: ranks in a replica.
        step_spread: standard deviation of a step over its mean; steps are log-normal.
        speeds: of each replica; a step takes `step_seconds` / speed. Empty: all are 1.
        num_units: messages that a sync is cut into: blocks, embeddings, norm with head.
        hours_between_failures: of the whole job, on average; None: none.
        restart_seconds: from a failure to the first step after it.
        checkpoint_steps: inner steps between two checkpoints; what is learnt after the last one is lost.
        processor_seconds_per_byte: `CPU_SECONDS_PER_BYTE` over the cores of a replica that trains on processors.
        gradient_bytes: of one parameter's gradient, in synchronous training.
        moments: of the inner optimizer, that a sync averages, too; fp32, whatever the codes.
        gradients_overlap: they travel beside the backward pass. FSDP2 without accelerators waits for each instead.

    Raises:
        ValueError: a number is out of its range.
    """

    parameters: int
    num_replicas: int
    step_seconds: float
    bits_per_second: float
    round_trip_seconds: float = 0.0
    replica_size: int = 1
    step_spread: float = 0.0
    speeds: tuple[float, ...] = ()
    num_units: int = 10
    hours_between_failures: float | None = None
    restart_seconds: float = 300.0
    checkpoint_steps: int = 500
    processor_seconds_per_byte: float = 0.0
    gradient_bytes: float = 4.0
    moments: int = 0
    gradients_overlap: bool = True

    def __post_init__(self) -> None:
        for name in ("parameters", "num_replicas", "replica_size", "num_units", "checkpoint_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1 is needed.")
        for name in ("step_seconds", "bits_per_second", "hours_between_failures"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: a number above 0 is needed.")
        for name in ("round_trip_seconds", "step_spread", "restart_seconds", "processor_seconds_per_byte"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: a number of at least 0 is needed.")
        if self.speeds and (len(self.speeds) != self.num_replicas or not min(self.speeds) > 0):
            raise ValueError(f"speeds={self.speeds}: {self.num_replicas} numbers above 0, one a replica, are needed.")

    @property
    def all_speeds(self) -> tuple[float, ...]:
        return self.speeds or (1.0,) * self.num_replicas

    @property
    def uneven(self) -> bool:
        """True if replicas have to wait for one another."""
        return self.num_replicas > 1 and (self.step_spread > 0 or len(set(self.all_speeds)) > 1)

    @property
    def steps_per_second(self) -> float:
        """Mean over the replicas, when they never sync."""
        return sum(self.all_speeds) / self.num_replicas / self.step_seconds

    def sent_bytes(self, bytes_per_element: float) -> float:
        """What a replica sends in a ring all-reduce of the model."""
        return bytes_per_element * self.parameters * 2 * (self.num_replicas - 1) / self.num_replicas

    def sync_bytes(self, compression: str) -> float:
        """What a replica sends in a sync."""
        return self.sent_bytes(BYTES_PER_ELEMENT[compression] + 4 * self.moments)

    def link_seconds(self, sent_bytes: float) -> float:
        return 8 * sent_bytes * (1 + PROTOCOL_OVERHEAD) / self.bits_per_second

    @property
    def latency_seconds(self) -> float:
        """Of one all-reduce: its 2 (R - 1) messages go one after the other, half a round trip each."""
        return 2 * (self.num_replicas - 1) * self.round_trip_seconds / 2

    def ramp_seconds(self, sent_bytes: float) -> float:
        """What TCP loses at the start of a sync, with a connection a rank: its window begins small, and doubles in each
        round trip until the link is full. What is sent meanwhile takes one round trip of a full link.
        """
        if sent_bytes == 0 or self.round_trip_seconds == 0:
            return 0.0
        full = min(sent_bytes, self.bits_per_second / 8 * self.round_trip_seconds)
        rounds = math.log2(full / (FIRST_WINDOW_BYTES * self.replica_size))
        return max(0.0, rounds - 1) * self.round_trip_seconds


@dataclass(frozen=True)
class Settings:
    """EDiTConfig's, as far as they cost time."""

    sync_interval: int = 128
    sync_seconds: float | None = None  # A-EDiT
    overlap: str = "forward"
    delay_steps: int = 4
    compression: str = "none"
    units_in_flight: int = 2

    def __post_init__(self) -> None:
        if self.overlap not in OVERLAPS or self.compression not in BYTES_PER_ELEMENT:
            known = f"overlap {', '.join(OVERLAPS)}; compression {', '.join(BYTES_PER_ELEMENT)}"
            raise ValueError(f"{self}: known are {known}.")
        if min(self.sync_interval, self.delay_steps, self.units_in_flight, self.sync_seconds or 1) <= 0:
            raise ValueError(f"{self}: intervals, delay_steps and units_in_flight are at least 1.")
        if self.overlap == "delayed" and self.sync_seconds is None and self.delay_steps > self.sync_interval:
            raise ValueError(f"delay_steps={self.delay_steps}: at most sync_interval={self.sync_interval} is allowed.")

    def config_fields(self) -> dict[str, int | float | str]:
        """What of it is an EDiTConfig's, without what has no effect or is the default."""
        trigger: dict[str, int | float | str] = {"sync_interval": self.sync_interval}
        if self.sync_seconds is not None:
            trigger = {"sync_seconds": self.sync_seconds}
        found = trigger | {"overlap": self.overlap}
        if self.overlap == "delayed":
            found["delay_steps"] = self.delay_steps
        if self.compression != "none":
            found["compression"] = self.compression
        if self.units_in_flight != type(self).units_in_flight:
            found["units_in_flight"] = self.units_in_flight
        return found


@dataclass(frozen=True)
class Outcome:
    """What a setting comes to, in the mean over the replicas.

    Args:
        settings: None: synchronous training.
        share: of the steps per second that the replicas do when they never sync.
        exposed_share: the part of the time that training stands still for a sync; `wait_share` of it for replicas that
            are yet to come.
        goodput: `share`, less the time that failures cost.
        bytes_per_sync: that a replica sends.
        network_seconds: of a sync, if nothing hides it and all have come.
        longest_sync_seconds: from the first replica that comes to the last unit that lands.
        interval_seconds: from a sync to the next.
        reason: `recommend` says here why it stands where it does.
    """

    settings: Settings | None
    share: float
    exposed_share: float
    wait_share: float
    goodput: float
    bytes_per_sync: float
    bytes_per_step: float
    network_seconds: float
    longest_sync_seconds: float
    interval_seconds: float
    steps_per_sync: float
    reason: str = ""
