"""What goes round at a sync: a rank's counts and wishes go in, what all counted and wish comes out."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor

from hf_edit.config import EDiTConfig
from hf_edit.method.conductor import REQUESTS
from hf_edit.method.plan import CALLED, DUE
from hf_edit.sync.counts import Counts
from hf_edit.sync.equality import Buffers
from hf_edit.sync.overlap import Blocking, Runner, ways
from hf_edit.sync.tuned import Tuning
from hf_edit.sync.unit_sync import OuterSync


class Rounds:
    """Begins syncs, and completes them or takes them back.

    Args:
        hooks: as of `ways`.
        runner, on_begin, on_heal, on_healed: as of `Engine`.
    """

    def __init__(
        self, config: EDiTConfig, sync: OuterSync, counts: Counts, tuning: Tuning, buffers: Buffers, *,
        hooks: bool, runner: Runner[bool],
        on_begin: Callable[[], dict[str, Tensor | float]] | None,
        on_heal: Callable[[], dict[str, Any]] | None,
        on_healed: Callable[[dict[str, Any]], None] | None,
    ) -> None:  # fmt: skip
        self._elastic = config.elastic
        self._sync, self._counts, self._tuning, self._buffers = sync, counts, tuning, buffers
        self._on_begin, self._on_heal, self._on_healed = on_begin, on_heal, on_healed
        self.when_due, self.at_once = ways(sync, hooks, runner)
        self.under_way: Blocking = self.at_once
        self.all_waited = False  # in the last sync, all were at a barrier

    def begin(self, requests: Collection[str], way: Blocking, whole: bool, due: bool = False) -> None:
        """Starts a sync: of all units if `whole`, else of the fragment that follows; `due` by the schedule."""
        size = self._sync.replica.size
        asked = {name: float(name in requests) for name in (*REQUESTS, "barrier", CALLED)} | {DUE: float(due)}
        measured = {name: value / size for name, value in self._sync.interval.tallies(self._sync.clock()).items()}
        more = {} if self._on_begin is None else self._on_begin()
        tallies, part = self._counts.report(self._sync.sync_count, whole)
        more |= self._tuning.tallies(delayed=way is not self.at_once)
        way.begin({**tallies, **asked, "buffers": self._buffers.changed(), **measured, **more}, part)
        self.under_way = way
        self._counts.restart(part)

    def complete(self) -> set[str] | None:
        """Waits until all replicas have come to the sync under way, and carries it out or leaves that to the next
        forward pass, which cannot begin without what is awaited here.

        Returns:
            What any rank wanted; None if they did not all agree to the sync: what it was to bring goes into the next.
        """
        try:
            plan = self.under_way.decide()
            members = self._sync.members
            run = self._sync.running
            assert run is not None
            self._tuning.look(run, plan.tallies)
            committed = self.under_way.carry_out(self._counts.schedule.interval_steps)
        except RuntimeError:
            self.take_back()
            raise
        if not committed:
            self.take_back()
            return None
        self._tuning.carried_out()
        shared = plan.tallies
        if run.healed is not None:
            self._take_progress(run.healed.more)
        steps = [round(steps) for steps in shared["interval_steps"].tolist()]
        self._counts.progress.confirm(steps, self._tuning.settings.delay_steps, some_away=self._elastic)
        if float(shared["buffers"].sum()) > 0:
            self._buffers.follow(plan.sound_of(members))
        self.all_waited = float(shared["barrier"][members].min()) > 0
        return {name for name in REQUESTS if float(shared[name].sum()) > 0}

    def progress_to_share(self) -> dict[str, Any]:
        """For a replica that lacks a sync; it has not changed since the last one."""
        return {"progress": self._counts.shared(), **({} if self._on_heal is None else self._on_heal())}

    def _take_progress(self, given: dict[str, Any]) -> None:
        """This replica was given what it lacked, as of the sync before the one under way."""
        self._counts.share(given["progress"])
        if self._on_healed is not None:
            self._on_healed(given)

    def take_back(self) -> None:
        """The sync under way has come to nothing: all is as if it had not begun."""
        self.under_way.abandon()
        self._counts.take_back(self._sync.clock())
