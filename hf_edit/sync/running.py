"""What is known of an outer sync under way, and the record of it when it has ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_edit.method.penalty import DetectorState
from hf_edit.method.plan import SyncPlan, SyncRecord
from hf_edit.sync.measure import HostCopy, Stopwatch
from hf_edit.sync.reduction import Sum


@dataclass
class Running:
    """A sync under way. `units` are the indices of those that take part; what is kept for one is by its place in that
    list. `plan` and `detectors` (after this sync) come with the exchange."""

    number: int
    units: list[int]
    fragments: list[int]  # that each of them is of; empty where there is one alone
    begun_at: float
    members: list[int]
    gathered: Callable[[], Tensor]
    tally_names: list[str]
    bytes_before: int
    deltas: list[Tensor]  # of a delayed sync, in host memory
    plan: SyncPlan | None = None
    detectors: DetectorState | None = None
    launched: int = 0  # units whose sum has been started; always in the units' order
    flying: dict[int, Sum] = field(default_factory=dict)  # sums whose outcome has not been kept yet
    averages: dict[int, Tensor] = field(default_factory=dict)  # reduced, and yet to be applied
    applied: int = 0  # units that took the anchor; always in the units' order
    moments: list[Tensor | None] = field(default_factory=list)  # of a delayed sync, in host memory, where they are due
    moments_flying: dict[int, Sum] = field(default_factory=dict)
    mean_moments: dict[int, Tensor] = field(default_factory=dict)
    samples: dict[int, Tensor] = field(default_factory=dict)  # of the averages, to compare later ones with
    # Of an average [4]: its square norm; of the samples of it and of the one before the product and the square norms.
    measured: dict[int, Tensor] = field(default_factory=dict)  # this rank's part
    lengths: dict[int, Tensor] = field(default_factory=dict)  # over the replica
    factors: dict[int, Tensor] = field(default_factory=dict)  # by which the averages are multiplied
    clips: dict[int, Tensor] = field(default_factory=dict)  # what of that clips them
    wait_seconds: float = 0.0  # that the training waited for the other replicas
    settings: dict[str, float] = field(default_factory=dict)  # of SyncRecord, as is `note`
    note: str = ""
    # Of replicas that come and go; see healing.py.
    sent: Tensor = field(default_factory=lambda: torch.empty(0))  # what the exchange tells of this one
    digest: Tensor = field(default_factory=lambda: torch.empty(0))  # of the anchors that it steps from
    healed: Any = None  # what it was sent
    missed: Tensor | None = None  # [R] int64, syncs that each lacks
    bases: dict[int, Tensor] = field(default_factory=dict)  # where units were whose change since then alone is told
    already_told: Tensor | None = None
    network: Stopwatch | None = None  # runs from when all have come until the last unit is reduced

    @property
    def decided(self) -> SyncPlan:
        """The plan, once it has been awaited."""
        assert self.plan is not None
        return self.plan

    def recorder(
        self, unit_names: list[str], num_units: int, exposed: Callable[[], float], now: float, interval_seconds: float,
        sync_bytes: int, device: torch.device,
    ) -> Callable[[], SyncRecord]:  # fmt: skip
        """What makes the record of this sync, which ended at `now`; on CUDA the call waits for a copy to the host."""
        one = torch.ones((), dtype=torch.float64, device=device)
        places = range(len(self.units))
        none = torch.zeros(4, dtype=torch.float64, device=device)
        lengths = torch.stack([self.lengths.get(place, none) for place in places])
        clips = torch.stack([self.clips[place].double() if place in self.clips else one for place in places])
        outcome = HostCopy(torch.cat([lengths.flatten(), clips]))

        def record() -> SyncRecord:
            found = torch.tensor(outcome.read(), dtype=torch.float64)
            squares, products, own, before = found[: 4 * len(places)].view(-1, 4).unbind(1)
            cosines = products / (own * before).sqrt()  # NaN where there was no average, or none before
            return SyncRecord(
                sync=self.number,
                plan=self.decided,
                units=self.units,
                unit_names=unit_names,
                num_units=num_units,
                sync_seconds=now - self.begun_at,
                exposed_seconds=exposed(),
                wait_seconds=self.wait_seconds,
                sync_bytes=sync_bytes,
                interval_seconds=interval_seconds,
                pseudo_grad_norm=float(squares.sum().sqrt()),
                pseudo_grad_cosines=cosines.tolist(),
                clip_factors=found[4 * len(places) :].tolist(),
                settings=self.settings,
                note=self.note,
            )

        return record
