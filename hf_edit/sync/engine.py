"""EDiT for one model: warm-up, inner steps, outer syncs (EDiT, Algorithm 1).

Ties schedule, units, groups and sync together. The Trainer and `EDiT` drive it with three calls:
`before_optimizer_step`, `step`, `flush`; where replicas end at different steps also by `leave` or `barrier`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn

from hf_edit.config import EDiTConfig
from hf_edit.method.schedule import GlobalProgress, SyncSchedule, interval_at
from hf_edit.peers.elastic import ElasticPeers
from hf_edit.peers.group import Peers
from hf_edit.sync.counts import Counts
from hf_edit.sync.equality import Buffers, check_agreement, make_replicas_equal
from hf_edit.sync.fragments import Fragments
from hf_edit.sync.healing import Healing
from hf_edit.sync.inner_lr import InnerRate
from hf_edit.sync.overlap import Runner, beside
from hf_edit.sync.rounds import Rounds
from hf_edit.sync.tuned import Tuning
from hf_edit.sync.unit_sync import OuterSync
from hf_edit.sync.units import find_units, is_compiled, keep_gradients_local, release, start_averaging_gradients

# A replica whose training has ended waits for that many of its own intervals until all others come to their next sync.
PATIENCE_INTERVALS = 10


class Engine:
    """The method at work on one prepared model.

    Args:
        model: as Accelerate prepared it: sharded by FSDP2 over the replica, or DDP for replicas of one rank.
        optimizer: the inner optimizer.
        config: the method's settings, equal on all ranks.
        peers: the other replicas, and this one.
        first_step: optimizer steps that were taken before, which count for the warm-up.
        on_begin: called when a sync begins and takes the tallies with it; what else this rank tells the others then,
            by names that are equal on all ranks and summed over a replica's.
        on_heal, on_healed: what else a replica that lacks a sync is told (elastic), as JSON takes it, of the last sync;
            and called with it on that one.
        last_step: global progress at which a sync is due whatever the time (A-EDiT), and the interval is
            `sync_interval_end`; None: there is no end.
        clock: monotonic seconds.
        runner: what runs a delayed sync beside the training.

    Raises:
        ValueError: configuration or model differ between the ranks.
        RuntimeError: frozen parameters differ between the replicas.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        config: EDiTConfig,
        peers: Peers,
        *,
        first_step: int = 0,
        on_begin: Callable[[], dict[str, Tensor | float]] | None = None,
        last_step: int | None = None,
        on_heal: Callable[[], dict[str, Any]] | None = None,
        on_healed: Callable[[dict[str, Any]], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        runner: Runner[bool] = beside,
    ) -> None:
        self.config = config
        self.peers = peers
        self._model = model
        self._optimizer = optimizer
        check_agreement(model, config, peers)
        self.units = find_units(model)
        self.fragments = Fragments(self.units, parts := config.fragments)
        seconds = None if config.sync_seconds is None else config.sync_seconds / parts
        self.schedule = SyncSchedule(config.sync_interval // parts, seconds, config.warmup_steps, clock, first_step)
        self.progress = GlobalProgress(peers.replica, confirmed=float(first_step))
        self.sync = OuterSync(self.units, peers, peers.inside, config, optimizer, clock)
        self.counts = Counts(self.schedule, self.progress, self.fragments, peers.inside.size)
        self.tuning = Tuning(config, parts, self.schedule, self.sync)
        self._last_step = last_step
        self.set_interval()
        if self.by_time or self._delay_steps or config.elastic:
            peers.make_host_groups()
        if not isinstance(peers, ElasticPeers):
            make_replicas_equal(model, peers)
        buffers = Buffers(model, peers)
        self._rounds = Rounds(
            config, self.sync, self.counts, self.tuning, buffers, hooks=not is_compiled(model), runner=runner,
            on_begin=on_begin, on_heal=on_heal, on_healed=on_healed,
        )  # fmt: skip
        if isinstance(peers, ElasticPeers):
            self.sync.healing = Healing(self.sync, optimizer, buffers, peers, self._rounds.progress_to_share)
        if self.schedule.warming_up:
            start_averaging_gradients(model, peers.average)
        else:
            self._end_warmup()
        self._inner_rate = InnerRate(optimizer, config.inner_lr_scale, lambda: self.warming_up)

    def _end_warmup(self) -> None:
        keep_gradients_local(self._model)
        self.sync.take_anchors()
        self.counts.end_warmup()

    @property
    def warming_up(self) -> bool:
        """True if the next optimizer step is a synchronous one."""
        return self.schedule.warming_up

    @property
    def replicas_equal(self) -> bool:
        """True if nothing was learnt since the last finished sync of all units, or in warm-up."""
        return self.schedule.interval_steps == 0 and not self.sync.pending and self.sync.whole

    def set_interval(self) -> None:
        """Where it changes on the way, from what all replicas have confirmed alone, so that they have the same."""
        end, parts = self.config.sync_interval_end, len(self.fragments)
        if end is not None and self._last_step is not None:
            line = self.config.warmup_steps, self._last_step, self.config.sync_interval, end
            self.schedule.sync_interval = max(1, interval_at(self.progress.confirmed, *line) // parts)

    @property
    def _delay_steps(self) -> int:
        return self.tuning.settings.delay_steps

    @property
    def by_time(self) -> bool:
        """True for A-EDiT, where replicas take different numbers of steps."""
        return self.config.sync_seconds is not None

    def before_optimizer_step(self) -> None:
        """Ends a sync whose units were not all used by the forward pass."""
        self._rounds.under_way.finish()

    def step(self, requests: Collection[str] = (), skipped: bool = False) -> set[str] | None:
        """One optimizer step was taken, or skipped by fp16's scaler: begins the sync if it is due.

        Args:
            requests: what this rank wants done on equal replicas; any of `REQUESTS`.

        Returns:
            What any rank wanted, the same on all of them, if all replicas have come to know it: when a sync has begun,
            or with overlap="delayed" when it was applied; else None.
        """
        was_warming_up = self.schedule.warming_up
        self._restart_timer()
        due = self.schedule.advance(skipped)
        self.progress.take_step()
        if was_warming_up:
            self.progress.hand_over()
            self.progress.confirm([1.0] * self.peers.num_replicas)
            if not self.schedule.warming_up:
                make_replicas_equal(self._model, self.peers)  # machines of different kinds may round differently
                self._end_warmup()
            return None
        if self.config.momentum_follows_lr and not skipped:
            self.counts.tally(learning_rate=float(self._optimizer.param_groups[0]["lr"]) / self.peers.inside.size)
        agreed = None
        if self._delay_steps and self.sync.pending and self.schedule.interval_steps >= self._delay_steps:
            agreed = self._complete()
            if agreed is None and self.config.elastic:  # with those that are left
                self._rounds.begin(requests, self._rounds.when_due, whole=False)
                return None
        if self._is_due(due):
            if self.sync.pending:  # by time, on a replica whose steps are long: it would keep the others waiting
                agreed = self._complete()
            if agreed is not None and len(self.fragments) > 1 and (agreed or self.by_time):
                return agreed  # what all do about it may begin with a sync of all units
            if self.config.elastic and not self._delay_steps:
                return self._sync(requests, whole=False)
            self._rounds.begin(requests, self._rounds.when_due, whole=False, due=True)
            if not self._delay_steps:
                agreed = self._complete()
        return agreed

    def _is_due(self, due: bool) -> bool:
        if not self.by_time and not self.config.elastic:
            return due
        if self._last_step is not None and not self.sync.pending:
            # A delayed sync is applied that much later, and the end is decided then.
            due = due or self.progress.value + self._delay_steps >= self._last_step
        return self.peers.inside.lead(due) if self.by_time else due

    def flush(self, requests: Collection[str] = (), leaving: bool = False) -> set[str] | None:
        """Makes the replicas equal: ends a sync under way, and syncs what was learnt since the last one.

        Other arguments and result are those of `step`; None if there was nothing to sync.

        Args:
            leaving: this replica knows by `drain` or `leave` alone what all now flush for. The others do
                so where they apply a delayed sync, and then sync what they learnt meanwhile; so this one joins them.
        """
        agreed = self.drain()
        if self.schedule.interval_steps or not self.sync.whole or (leaving and self._delay_steps):
            agreed = self._sync(requests, whole=True) | (agreed or set())
        return agreed

    def drain(self) -> set[str] | None:
        """Ends a sync under way; what any rank wanted at it if this one does not know of that yet, else None."""
        agreed = self._complete() if self._delay_steps and self.sync.pending else None
        self._rounds.under_way.finish()
        return agreed

    def leave(self, requests: Collection[str]) -> set[str]:
        """Tells the others at their next sync what this replica wants, whose training ends where theirs may go on.

        Result as of `step`. No sync may be under way.
        """
        self._wait_for_training_replicas()
        return self._sync(requests, whole=False)

    def barrier(self) -> None:
        """Makes the replicas equal, when each calls it in its own time: joins the others' syncs until all are here.

        For a loop whose replicas take different numbers of steps. One that waits here has no step to tell of, and
        weighs nothing. In the warm-up they are equal, and take their steps together.
        """
        if self.warming_up:
            return
        self.drain()
        self._rounds.all_waited = False
        while not self._rounds.all_waited:
            self._wait_for_training_replicas()
            self._sync(("barrier",), whole=False)
        if not self.sync.whole:
            self._sync((), whole=True)

    def _wait_for_training_replicas(self) -> None:
        """They may be an interval away: longer than any wait between replicas that are on their way to a sync."""
        begun_at = self.sync.clock()
        interval_steps = self.schedule.sync_interval * len(self.fragments)
        self.peers.wait_for_arrivals(PATIENCE_INTERVALS * interval_steps * self.schedule.step_seconds)
        self.sync.interval.rested_seconds += self.sync.clock() - begun_at

    def _sync(self, requests: Collection[str], whole: bool) -> set[str]:
        while True:  # until all agree to it
            self._rounds.begin(requests, self._rounds.at_once, whole)
            if (agreed := self._complete()) is not None:
                return agreed

    def join(self) -> set[str]:
        """Comes to the others' next sync with nothing to tell, and has what they have (elastic); result of `step`."""
        return self._sync((), whole=True)

    def agree(self, requests: Collection[str]) -> set[str]:
        """What any rank wants, the same on all of them; all replicas call it at the same step."""
        return set().union(*self.peers.gather_object(set(requests)))

    def go_back(self, clear: bool = False) -> None:
        """This replica gives up what it has learnt since the last sync; the steps that it took were taken.

        Args:
            clear: the inner optimizer's state goes, too.
        """
        self.sync.go_back(clear)
        self.counts.forget()

    def close(self) -> None:
        """Training has ended: DDP is left as it was found."""
        release(self._model)
        self._leave_optimizer()

    def forget_sync(self) -> None:
        """Gives up a sync under way, as if it had not begun; the training may go on."""
        if self.sync.pending:
            self._rounds.take_back()

    def abandon(self) -> None:
        """The training was broken off."""
        self._leave_optimizer()
        self.forget_sync()

    def _leave_optimizer(self) -> None:
        """Which may train on, with another engine."""
        self._inner_rate.remove()
        if self.sync.healing is not None:
            self.sync.healing.close()

    def _complete(self) -> set[str] | None:
        """Ends the sync that was begun; see `Rounds.complete`."""
        agreed = self._rounds.complete()
        if agreed is not None:
            self.set_interval()
            self._restart_timer()
        return agreed

    def _restart_timer(self) -> None:
        if self.sync.waited_until is not None:  # None: the sync under way has yet to get there
            self.schedule.restart_timer(self.sync.waited_until)

    def go_on_at(self, step: int) -> None:
        """The training goes on after its optimizer step number `step`: ends the warm-up if that lies behind."""
        was_warming_up = self.warming_up
        self.schedule.go_on_at(step)
        if was_warming_up and not self.warming_up:
            self._end_warmup()
