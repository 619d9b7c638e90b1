"""One outer sync (EDiT, Algorithm 2), phase by phase: exchange norms, weigh, reduce, commit, clip, step, write.

What happens stands here once, and of one unit in outer_values.py; when it happens is the business of overlap.py. Until
`apply` nothing of anchors, outer state, detectors and parameters has changed, so one that fails, or is not committed,
is only forgotten.

But for the all-reduces, and what a delayed sync does in host memory, everything is on the current stream, so no further
ordering is needed but that of a unit's all-gather after the write to its shards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import hf_edit.sync.unit_values as unit_values
from hf_edit.config import EDiTConfig
from hf_edit.method.penalty import square_norm
from hf_edit.method.plan import SyncPlan, SyncRecord, make_plan
from hf_edit.peers.group import Conversation
from hf_edit.peers.replica import Replica
from hf_edit.sync.fragments import Part
from hf_edit.sync.healing import Healing
from hf_edit.sync.lengths import Lengths
from hf_edit.sync.measure import Interval, Scratch, Stopwatch, phase
from hf_edit.sync.moments import Moments
from hf_edit.sync.outer_values import OuterValues
from hf_edit.sync.reduction import Reduction
from hf_edit.sync.running import Running
from hf_edit.sync.units import Unit


class OuterSync(OuterValues):
    """The outer syncs of one model.

    Args:
        units: what is synchronised together, equal on all replicas.
        peers: the other replicas.
        replica: this one's ranks.
        config: the method's settings.
        optimizer: the inner optimizer; its state of a unit is cleared where the unit went non-finite. None: there is
            no state, and none to be averaged.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        peers: Conversation,
        replica: Replica,
        config: EDiTConfig,
        optimizer: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(units, peers, config, optimizer)
        self.peers = peers
        self.running: Running | None = None
        self.healing: Healing | None = None  # of replicas that come and go
        self.exposed = Stopwatch(self.device, clock)
        # When the last sync no longer kept anyone waiting: a delayed one when all had come to it, else its end.
        self.waited_until: float | None = None
        self.replica = replica
        self.clock = clock
        self._scratch = Scratch(self.device)
        self._lengths = Lengths(config, replica, self.device)
        self._moments = Moments(self.units, optimizer, config.sync_moments, config.sync_moments_every)
        self._last_end = clock()
        self.interval = Interval(clock())
        self._finished: list[Callable[[], SyncRecord]] = []

    def take_anchors(self) -> None:
        super().take_anchors()
        self._last_end = self.clock()
        self.interval = Interval(self._last_end)
        if self.healing is not None:
            self.healing.measure()

    @property
    def pending(self) -> bool:
        """True while a sync is under way."""
        return self.running is not None

    @property
    def members(self) -> list[int]:
        """The replicas that take part in the sync under way; [] while that is not known."""
        return self.running.members if self.running is not None else []

    def take_records(self) -> list[SyncRecord]:
        """The records of the syncs that ended since the last call. On CUDA it waits for their last copy to the host."""
        finished, self._finished = self._finished, []
        return [record() for record in finished]

    # -- the phases ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    @phase("exchange")
    def begin(self, tallies: dict[str, Tensor | float], in_host: bool = False, part: Part | None = None) -> Running:
        """Starts a sync: sends this replica's norms and tallies, or has them ready to be sent by `await_plan`.

        Args:
            part: the units that take part, equal on all replicas; None: all.
            tallies: scalars to sum over this replica's ranks and to share with all replicas, by name.
            in_host: all goes through host memory, while the parameters go on changing; nothing is sent yet.
        """
        if self.running is not None:
            raise RuntimeError("A sync is under way already; finish it before the next one begins.")
        number, begun_at, bytes_before = self.sync_count + 1, self.clock(), self.peers.bytes_sent
        members = [] if in_host else self.peers.begin(number)
        part = part or Part(list(range(len(self.units))))
        deltas, moments, norms = [], [], []
        reuses = in_host and self.device.type == "cpu"
        for index in part.indices:
            new_like = self._scratch.take if reuses else torch.empty_like
            delta = unit_values.read(self.units[index], self.states[index], self.device, new_like)
            norms.append(square_norm(delta))
            if in_host:
                deltas.append(self._scratch.to_host(delta))
                moments.append(self._read_moments(index, self._scratch))
            del delta  # before the next one is made
        packed = self.replica.sum(torch.stack([*norms, *(self.scalar(value) for value in tallies.values())]))
        sent = self._scratch.to_host(packed) if in_host else packed
        gathered = _later if in_host else self.peers.gather(sent)
        self.waited_until = None
        run = self.running = Running(
            number, part.indices, part.fragments, begun_at, members, gathered, list(tallies), bytes_before, deltas,
            moments=moments, sent=sent,
        )  # fmt: skip
        if in_host:
            run.gathered = lambda: self.peers.gather(run.sent)()
        return run

    @phase("await_plan")
    def await_plan(self, run: Running) -> SyncPlan:
        """Waits until all members have come; what they decided."""
        if run.plan is None:
            if not run.members:
                run.members = self.peers.begin(run.number)
            if self.healing is not None:
                self.healing.meet(run)
            rows = run.gathered().cpu()  # the one time that the host reads the device in a sync
            if self.healing is not None:
                rows = self.healing.check(run, rows)
            table = rows.new_zeros(self.peers.num_replicas, rows.shape[1])  # who does not take part did no step
            table[run.members] = rows
            before = (self.detectors if run.healed is None else run.healed.detectors).of(run.units)
            run.plan, run.detectors = make_plan(table, run.tally_names, before, self.config, run.fragments, run.missed)
            run.network = Stopwatch(table.device if run.deltas else self.device, self.clock)
            run.network.start()
            if run.deltas:
                self.waited_until = self.clock()
        return run.plan

    @torch.no_grad()
    @phase("reduce")
    def launch(self, run: Running, end: int) -> None:
        """Starts the sums of the units before place `end` that have not been started; none where nothing changes."""
        while run.launched < min(end, len(run.units)):
            place, run.launched = run.launched, run.launched + 1
            if run.decided.unchanged[place]:
                continue
            weight, index = float(run.decided.weights[place, self.peers.replica]), run.units[place]
            scratch = self._scratch if run.deltas else None  # the deltas of a delayed sync are needed again
            if run.deltas:
                delta = run.deltas[place]
            else:
                delta = unit_values.read(self.units[index], self.states[index], self.device)
            run.flying[place] = self.reduction.start(index, delta, weight, run.members, scratch)
            if (moments := run.moments[place] if run.deltas else self._read_moments(index)) is not None:
                run.moments_flying[place] = Reduction(self.peers).start(index, moments, weight, run.members, scratch)

    @torch.no_grad()
    @phase("await_average")
    def land(self, run: Running, place: int) -> None:
        """Waits until a unit is reduced; on CUDA the current stream does."""
        in_flight = self.config.units_in_flight
        self.launch(run, place + in_flight + self.reduction.stages - 1)
        for later in range(place, place + in_flight):
            if later in run.flying:
                run.flying[later].advance()
        if place in run.flying:
            run.averages[place] = average = run.flying[place].wait()
            self._lengths.measure(run, place, average)
        if place in run.moments_flying:
            run.mean_moments[place] = run.moments_flying.pop(place).wait()
        if place == len(run.units) - 1 and run.network is not None:
            run.network.stop()

    def reduce(self, run: Running) -> bool:
        """Reduces all units, and commits: True if the sync is to be applied, on all members."""
        self.await_plan(run)
        for place in range(len(run.units)):
            self.land(run, place)
        return self.peers.commit(run.number)

    @torch.no_grad()
    def apply(self, run: Running, end: int, steps: int = 0) -> None:
        """Clips, steps and writes the units before place `end` that have not been; the last one ends the sync.

        Args:
            steps: that the replica has taken since `begin`; it keeps what it has learnt in them.
        """
        places = range(run.applied, end)
        self._lengths.decide(run, [place for place in places if place in run.averages])
        for place in places:
            self._apply(run, place, steps)
            run.applied += 1
        if run.applied == len(run.units) and self.running is run:
            self._end(run)

    @torch.no_grad()
    def go_back(self, clear: bool) -> None:
        """The replica gives up what it has learnt since the last sync, or since the delayed one under way has begun,
        which it tells the others at that one.

        Args:
            clear: the inner optimizer's state goes, too.
        """
        run = self.running
        if run is not None and not run.deltas:
            raise RuntimeError("A sync is under way that is not carried out yet; finish it first.")
        for index in range(len(self.units)):
            told = run.deltas[run.units.index(index)] if run is not None and index in run.units else None
            self.take_back(index, told, clear)

    def forget(self) -> None:
        """The sync under way is given up; all is as it was before it began."""
        if self.healing is not None and self.running is not None:
            self.healing.forget(self.running)
        self.running = None

    # -- one unit -----------------------------------------------------------------------------------------------------

    def _apply(self, run: Running, place: int, steps: int) -> None:
        index = run.units[place]
        unit, state, average = self.units[index], self.states[index], run.averages.pop(place, None)
        if place in run.flying:
            run.flying.pop(place).keep()
        correction = None
        if steps:  # becomes the new anchor minus where the parameters were, both as the replica is given them
            correction = self.here(run.deltas[place])
            if place in run.bases:
                correction.sub_(self.here(run.bases[place]))
            else:
                unit_values.add_given(unit, state, correction, state.anchor, -1)
        if self.healing is not None:
            self.healing.take(run, place)
        anchor = self.step(index, average, run.factors.get(place), run.decided.learning_rate)
        if correction is not None:
            unit_values.add_given(unit, state, correction, anchor, 1)
        broken = not run.decided.norms[place, self.peers.replica].isfinite()
        self.write(index, anchor, correction, broken)
        moments, before = run.mean_moments.pop(place, None), run.moments[place] if run.moments else None
        if moments is not None:
            self._moments.write(index, moments, before, steps)
        for used in (run.deltas[place], average, moments, before) if run.deltas else ():
            if used is not None:
                self._scratch.give(used)

    def _read_moments(self, index: int, scratch: Scratch | None = None) -> Tensor | None:
        """The inner optimizer's of a unit, if they are due; with `scratch` in host memory, on their way there."""
        if not (size := self._moments.due(index, int(self.unit_syncs[index]))):
            return None
        like = torch.empty(size, device="meta")
        if scratch is None or self.device.type != "cpu":
            moments = self._moments.read(index, torch.empty(size, device=self.device))
            return moments if scratch is None else scratch.to_host(moments)
        return self._moments.read(index, scratch.take(like))

    def _end(self, run: Running) -> None:
        assert run.detectors is not None
        if self.healing is not None:
            self.healing.end()
        self.detectors = self.detectors.replaced(run.units, run.detectors)
        told = ~run.decided.idle.expand(run.decided.norms.shape).all(dim=1)  # else the outer step was none
        self.count(torch.tensor(run.units)[told].tolist(), run.decided.learning_rate)
        self.sync_count, self.whole, self.running = run.number, len(run.units) == len(self.units), None
        now = self.clock()
        if not run.deltas:
            self.waited_until = now
        self._lengths.end(run)
        interval_seconds, self._last_end = now - self._last_end, now
        sync_bytes = self.peers.bytes_sent - run.bytes_before
        names = [self.units[index].name for index in run.units]
        exposed = self.exposed.lap()
        if run.network is not None:
            self.interval = Interval(run.begun_at, exposed, run.wait_seconds, run.network.lap())
        record = run.recorder(names, len(self.units), exposed, now, interval_seconds, sync_bytes, self.device)
        run.deltas.clear()  # the record keeps no memory that is used again
        if bool(told.any()):  # else nobody has anything to tell of
            self._finished.append(record)


def _later() -> Tensor:
    raise RuntimeError("The exchange has not begun.")
