"""One outer sync (EDiT, Algorithm 2): exchange norms, average pseudo-gradients, step the anchor, write it back.

A sync is begun after an inner step, and there are three ways to carry it out. At once (overlap="none"). Unit by unit in
the next forward pass (overlap="forward"): while a unit computes, the all-reduce of the next one is under way, on the
process group's own threads (gloo) or stream (NCCL). Or beside the steps that follow (overlap="delayed"): the parameters
go on from where they are, and at the end take the difference between the new anchor and where they were.

But for the all-reduces, and what runs beside the steps in host memory (background.py), everything is on the current
stream, so no further ordering is needed but that of a unit's all-gather after the write to its shards.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from hf_edit.config import EDiTConfig
from hf_edit.method.outer import OuterRule, OuterState, apply_outer_step, new_state
from hf_edit.method.penalty import DetectorState, clip_factor, square_norm, weighed
from hf_edit.method.plan import SyncPlan, SyncRecord, make_plan
from hf_edit.peers.group import Peers, Pending
from hf_edit.sync.background import BackgroundReduction, Runner, Scratch, in_thread
from hf_edit.sync.measure import HostCopy, Stopwatch
from hf_edit.sync.units import Unit

logger = logging.getLogger(__name__)


@dataclass
class _Running:
    """A sync under way."""

    begun_at: float
    gathered: Callable[[], Tensor]
    tally_names: list[str]
    bytes_before: int
    in_background: bool  # runs beside the training; known before `beside`, whose thread looks at it, is there
    plan: SyncPlan | None = None
    detectors: DetectorState | None = None  # after this sync
    beside: BackgroundReduction | None = None
    launched: int = 0  # units whose all-reduce has been started; always in the units' order
    works: dict[int, tuple[Tensor, Pending] | None] = field(default_factory=dict)
    applied: set[int] = field(default_factory=set)
    square_norms: dict[int, Tensor] = field(default_factory=dict)  # of the averages, over the replica where clipped
    factors: dict[int, Tensor] = field(default_factory=dict)
    wait_seconds: float = 0.0


class OuterSync:
    """The outer syncs of one model.

    Args:
        units: what is synchronised together, equal on all replicas.
        peers: the other replicas.
        sum_in_replica: sums a tensor over this replica's ranks, in place, and returns it.
        config: the method's settings.
        optimizer: the inner optimizer; its state of a unit is cleared where the unit went non-finite.
        clock: monotonic seconds.
        runner: what runs a delayed sync beside the training.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        peers: Peers,
        sum_in_replica: Callable[[Tensor], Tensor],
        config: EDiTConfig,
        optimizer: Any = None,
        clock: Callable[[], float] = time.monotonic,
        runner: Runner[Any] = in_thread,
    ) -> None:
        self.units = list(units)
        self.peers = peers
        self.config = config
        self.sync_count = 0
        self.states: list[OuterState] = []
        self.detectors = DetectorState.zeros(len(self.units), peers.num_replicas)
        self._sum_in_replica = sum_in_replica
        self._optimizer = optimizer
        self._clock = clock
        self._runner = runner
        # When the last sync no longer kept anyone waiting: a delayed one when all had come to it, else its end.
        self.waited_until: float | None = None
        self._rule: Any = config.outer_optimizer
        if not callable(self._rule):
            self._rule = OuterRule.named(
                config.outer_optimizer, config.outer_lr, config.outer_momentum, config.outer_warmup_syncs
            )
        self._device = self.units[0].parts()[0].device
        self._running: _Running | None = None
        self._scratch = Scratch(self._device)
        self._hooks: list[RemovableHandle] = []
        self._exposed = Stopwatch(self._device, clock)
        self._last_end = clock()
        self._finished: list[Callable[[], SyncRecord]] = []

    @torch.no_grad()
    def take_anchors(self) -> None:
        """The anchor becomes the current parameters, the outer momentum zero."""
        self.states = [new_state(unit.parts(), self._rule, self.config.offload_outer_state) for unit in self.units]
        self._last_end = self._clock()

    @property
    def pending(self) -> bool:
        """True while a sync is under way."""
        return self._running is not None

    @torch.no_grad()
    def begin(self, tallies: dict[str, Tensor | float], *, beside: bool = False) -> None:
        """Starts a sync: sends this replica's norms and tallies.

        Args:
            tallies: scalars to sum over this replica's ranks and to share with all replicas, by name.
            beside: all of it runs beside the training. Else the parameters must not change until `finish`.
        """
        if self._running is not None:
            raise RuntimeError("A sync is under way already; finish() it before the next one begins.")
        with self._exposed:
            bytes_before = self.peers.bytes_sent
            begun_at = self._clock()
            self.sync_count += 1
            self.waited_until = None
            deltas, norms = [], []
            on_host = beside and self._device.type == "cpu"
            for unit, state in self._pairs():
                delta = self._pseudo_gradient(unit, state, self._scratch.take if on_host else torch.empty_like)
                norms.append(square_norm(delta))
                if beside:
                    deltas.append(self._scratch.to_host(delta))
                del delta  # before the next one is made
            scalars = [self._scalar(value) for value in tallies.values()]
            packed = self._sum_in_replica(torch.stack([*norms, *scalars]))
            told = self._scratch.to_host(packed) if beside else packed
            gathered = (lambda: self.peers.gather(told)()) if beside else self.peers.gather(told)
            run = self._running = _Running(begun_at, gathered, list(tallies), bytes_before, in_background=beside)
            if beside:
                decide = partial(self._plan, run)
                run.beside = BackgroundReduction(
                    decide, deltas, self.peers, self._device, self._scratch, self.config.units_in_flight, self._runner
                )

    def decide(self) -> SyncPlan:
        """Waits until all replicas have come to the sync under way; what they decided."""
        if self._running is None:
            raise RuntimeError("No sync is under way; begin() one first.")
        with self._exposed:
            return self._await_plan(self._running)

    def apply_in_forward(self) -> None:
        """The sync under way will be carried out unit by unit in the next forward pass; its first units start now."""
        plan = self.decide()
        if self._running is not None:
            with self._exposed:
                self._launch(self._running, plan, self.config.units_in_flight)
        for index, unit in enumerate(self.units):
            for module in unit.modules:
                hook = partial(self._before_forward, index)
                # Before FSDP2's own hook, which gathers the shards.
                self._hooks.append(module.register_forward_pre_hook(hook, prepend=True))

    def finish(self, *, went_on: bool = False) -> None:
        """Carries out what is left of the sync under way; nothing if there is none.

        Args:
            went_on: the parameters have changed since `begin`, and keep what they have learnt.
        """
        run = self._running
        if run is None:
            return
        if run.beside is not None:
            plan = self.decide()
            with self._exposed:
                self._apply_beside(run, run.beside, plan, went_on)
            return
        with self._exposed:
            for index in range(len(self.units)):
                self._apply(index)

    def abandon(self) -> None:
        """Forgets the sync under way and takes its hooks from the model."""
        run, self._running = self._running, None
        if run is not None and run.beside is not None:
            try:
                run.beside.wait()  # or it would go on talking to the others while the next training does
            except RuntimeError as error:
                logger.warning("EDiT: the sync that was given up had failed: %s", error)
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def take_records(self) -> list[SyncRecord]:
        """The records of the syncs that ended since the last call. On CUDA it waits for their last copy to the host."""
        finished, self._finished = self._finished, []
        return [record() for record in finished]

    # -- one unit -----------------------------------------------------------------------------------------------------

    def _before_forward(self, index: int, module: torch.nn.Module, args: Any) -> None:
        if self._running is None or index in self._running.applied:
            return
        with self._exposed:
            # All before it too: a rank that does not use a unit in this step must not change the collectives' order.
            for earlier in range(index + 1):
                self._apply(earlier)
            self.units[index].start_gathering()

    @torch.no_grad()
    def _apply(self, index: int) -> None:
        run = self._running
        if run is None or index in run.applied:
            return
        plan = self._await_plan(run)
        self._launch(run, plan, index + self.config.units_in_flight)
        state = self.states[index]
        flying = run.works.pop(index)
        if flying is None:
            anchor = state.anchor.to(self._device, non_blocking=True)
        else:
            gradient, work = flying
            work.wait()
            gradient = self._clip(index, gradient, run)
            anchor = apply_outer_step(state, gradient, self._rule_now())
        self._write(index, plan, anchor)
        run.applied.add(index)
        if len(run.applied) == len(self.units):
            self._end(run, plan)

    def _write(self, index: int, plan: SyncPlan, anchor: Tensor, correction: Tensor | None = None) -> None:
        """A unit takes the anchor, or adds the correction unless it is broken."""
        unit, state = self.units[index], self.states[index]
        broken = not plan.norms[index, self.peers.replica].isfinite()
        unit.reshard()
        for part, value, change in zip(
            unit.parts(), state.views(anchor), state.views(anchor if correction is None else correction), strict=True
        ):
            if correction is None or broken:
                part.copy_(value)
            else:
                part.add_(change)
        if broken:
            self._clear_inner_state(unit)

    @torch.no_grad()
    def _apply_beside(self, run: _Running, beside: BackgroundReduction, plan: SyncPlan, went_on: bool) -> None:
        averages = beside.wait()
        if beside.square_norms:
            squares = torch.stack(beside.square_norms)
            replica_squares = self._sum_in_replica(self._to_device(squares))
            reduced = [index for index, average in enumerate(averages) if average is not None]
            run.square_norms = dict(zip(reduced, replica_squares.unbind(), strict=True))
        for index in range(len(self.units)):
            self._correct(index, run, plan, beside.deltas.pop(0), averages.pop(0), went_on)
        self._end(run, plan)

    def _correct(
        self, index: int, run: _Running, plan: SyncPlan, delta: Tensor, average: Tensor | None, went_on: bool
    ) -> None:
        """Ends a delayed sync for one unit, whose pseudo-gradient was `delta`, here and on the `average` over all."""
        state = self.states[index]
        correction = delta.to(self._device, non_blocking=True)
        correction.sub_(state.anchor.to(self._device, non_blocking=True))  # minus where the parameters were
        if average is None:
            anchor = state.anchor.to(self._device, non_blocking=True)
        else:
            gradient = average.to(self._device, non_blocking=True)
            if self.config.max_pseudo_grad_norm is not None:
                factor = clip_factor(run.square_norms[index].sqrt(), self.config.max_pseudo_grad_norm)
                run.factors[index] = factor
                gradient.mul_(factor)
            anchor = apply_outer_step(state, gradient, self._rule_now())
        self._write(index, plan, anchor, correction.add_(anchor) if went_on else None)
        for used in (delta, average):
            if used is not None:
                self._scratch.give(used)

    @torch.no_grad()
    def _launch(self, run: _Running, plan: SyncPlan, end: int) -> None:
        """Starts the all-reduces of the units before `end` that have not been started."""
        while run.launched < min(end, len(self.units)):
            index, run.launched = run.launched, run.launched + 1
            if plan.unchanged[index]:
                run.works[index] = None
                continue
            gradient = self._pseudo_gradient(self.units[index], self.states[index])
            weighed(gradient, float(plan.weights[index, self.peers.replica]))
            run.works[index] = gradient, self.peers.all_reduce([gradient])

    def _rule_now(self) -> Any:
        return self._rule.at(self.sync_count - 1) if isinstance(self._rule, OuterRule) else self._rule

    def _clip(self, index: int, gradient: Tensor, run: _Running) -> Tensor:
        square = run.square_norms[index] = square_norm(gradient)
        if self.config.max_pseudo_grad_norm is None:
            return gradient
        run.factors[index] = clip_factor(self._sum_in_replica(square).sqrt(), self.config.max_pseudo_grad_norm)
        return gradient.mul_(run.factors[index])

    def _pseudo_gradient(
        self, unit: Unit, state: OuterState, new_like: Callable[[Tensor], Tensor] = torch.empty_like
    ) -> Tensor:
        """Anchor minus parameters, flat fp32 [n], in a buffer of its own."""
        anchor = state.anchor.to(self._device, non_blocking=True)
        flat = new_like(anchor) if anchor is state.anchor else anchor
        for view, before, part in zip(state.views(flat), state.views(anchor), unit.parts(), strict=True):
            torch.sub(before, part, out=view)
        return flat

    def _scalar(self, value: Tensor | float) -> Tensor:
        """On the device, [] float64, without waiting for it."""
        if isinstance(value, Tensor):
            return value.to(self._device, torch.float64)
        return torch.full((), value, dtype=torch.float64, device=self._device)

    def _to_device(self, host: Tensor) -> Tensor:
        """A host tensor on the device, without waiting for it."""
        return host.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else host

    def _clear_inner_state(self, unit: Unit) -> None:
        if self._optimizer is not None:
            for param in unit.params:
                self._optimizer.state.pop(param, None)

    # -- all units ----------------------------------------------------------------------------------------------------

    def _pairs(self) -> list[tuple[Unit, OuterState]]:
        return list(zip(self.units, self.states, strict=True))

    def _await_plan(self, run: _Running) -> SyncPlan:
        waited_from = self._clock()
        plan = self._plan(run) if run.beside is None else run.beside.plan()
        run.wait_seconds += self._clock() - waited_from
        return plan

    def _plan(self, run: _Running) -> SyncPlan:
        if run.plan is not None:
            return run.plan
        table = run.gathered().cpu()  # the one time that the host reads the device in a sync
        if run.in_background:
            self.waited_until = self._clock()
        if not self.peers.commit(self.sync_count):
            raise RuntimeError(f"Outer sync {self.sync_count} was not agreed on by all replicas.")
        run.plan, run.detectors = make_plan(table, run.tally_names, self.detectors, self.config)
        return run.plan

    def _end(self, run: _Running, plan: SyncPlan) -> None:
        if run.detectors is not None:
            self.detectors = run.detectors
        self._running = None
        self._remove_hooks()
        now = self._clock()
        if not run.in_background:
            self.waited_until = now
        squares = torch.stack(list(run.square_norms.values())) if run.square_norms else torch.zeros(0)
        if not run.factors and run.square_norms and run.beside is None:
            squares = self._sum_in_replica(squares)
        clipped = torch.stack(list(run.factors.values())).lt(1.0).sum() if run.factors else squares.new_zeros(())
        outcome = HostCopy(torch.stack([squares.sum().double(), clipped.double()]))
        exposed = self._exposed.lap()
        interval_seconds, self._last_end = now - self._last_end, now
        sync, sync_bytes = self.sync_count, self.peers.bytes_sent - run.bytes_before

        def record() -> SyncRecord:
            square_norm, num_clipped = outcome.read()
            return SyncRecord(
                sync=sync,
                plan=plan,
                unit_names=[unit.name for unit in self.units],
                sync_seconds=now - run.begun_at,
                exposed_seconds=exposed(),
                wait_seconds=run.wait_seconds,
                sync_bytes=sync_bytes,
                interval_seconds=interval_seconds,
                pseudo_grad_norm=square_norm**0.5,
                clipped_units=int(num_clipped),
            )

        if float(plan.tallies["inner_steps"].sum()) > 0:  # else it was a meeting, with nothing to tell of
            self._finished.append(record)
