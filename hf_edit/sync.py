"""One outer sync (EDiT, Algorithm 2): exchange norms, average pseudo-gradients, step the anchor, write it back.

A sync is begun after an inner step and finished at once (overlap="none") or unit by unit in the next forward pass
(overlap="forward"): while a unit computes, the all-reduce of the next one is under way, on the process group's own
threads (gloo) or stream (NCCL). Everything else runs on the current stream, so no further ordering is needed but that
of a unit's all-gather after the write to its shards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from hf_edit.config import EDiTConfig
from hf_edit.groups import Peers, Pending
from hf_edit.measure import HostCopy, Stopwatch
from hf_edit.outer import OuterRule, OuterState, apply_outer_step, new_state
from hf_edit.penalty import DetectorState, clip_factor, detect_anomalies, norm_weights, share_weights
from hf_edit.records import SyncPlan, SyncRecord
from hf_edit.units import Unit

PREFETCHED_UNITS = 1  # all-reduces under way beyond the unit that is being applied: two units' buffers in all


@dataclass
class _Running:
    """A sync under way."""

    begun_at: float
    gathered: Callable[[], Tensor]
    tally_names: list[str]
    bytes_before: int
    plan: SyncPlan | None = None
    launched: int = 0  # units whose all-reduce has been started; always in the units' order
    works: dict[int, tuple[Tensor, Pending] | None] = field(default_factory=dict)
    applied: set[int] = field(default_factory=set)
    square_norms: dict[int, Tensor] = field(default_factory=dict)
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
        clock: seconds, for the records.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        peers: Peers,
        sum_in_replica: Callable[[Tensor], Tensor],
        config: EDiTConfig,
        optimizer: Any = None,
        clock: Callable[[], float] = time.perf_counter,
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
        self._rule: Any = config.outer_optimizer
        if not callable(self._rule):
            self._rule = OuterRule.named(config.outer_optimizer, config.outer_lr, config.outer_momentum)
        self._device = self.units[0].parts()[0].device
        self._running: _Running | None = None
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
    def begin(self, tallies: dict[str, Tensor | float]) -> None:
        """Starts a sync: sends this replica's norms and tallies. The parameters must not change until `finish`.

        Args:
            tallies: scalars to sum over this replica's ranks and to share with all replicas, by name.
        """
        if self._running is not None:
            raise RuntimeError("A sync is under way already; finish() it before the next one begins.")
        with self._exposed:
            bytes_before = self.peers.bytes_sent
            begun_at = self._clock()
            self.sync_count += 1
            norms = [torch.linalg.vector_norm(self._pseudo_gradient(unit, s)) for unit, s in self._pairs()]
            scalars = [torch.as_tensor(value, dtype=torch.float64, device=self._device) for value in tallies.values()]
            vector = torch.stack([*(norm.double().square() for norm in norms), *scalars])
            gathered = self.peers.gather(self._sum_in_replica(vector))
            self._running = _Running(begun_at, gathered, list(tallies), bytes_before)

    def decide(self) -> SyncPlan:
        """Waits until all replicas have come to the sync under way; what they decided."""
        if self._running is None:
            raise RuntimeError("No sync is under way; begin() one first.")
        with self._exposed:
            return self._plan(self._running)

    def apply_in_forward(self) -> None:
        """The sync under way will be carried out unit by unit in the next forward pass."""
        for index, unit in enumerate(self.units):
            for module in unit.modules:
                hook = partial(self._before_forward, index)
                # Before FSDP2's own hook, which gathers the shards.
                self._hooks.append(module.register_forward_pre_hook(hook, prepend=True))

    def finish(self) -> None:
        """Carries out what is left of the sync under way; nothing if there is none."""
        if self._running is None:
            return
        with self._exposed:
            for index in range(len(self.units)):
                self._apply(index)

    def abandon(self) -> None:
        """Forgets the sync under way and takes its hooks from the model."""
        self._running = None
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
        plan = self._plan(run)
        while run.launched < min(index + 1 + PREFETCHED_UNITS, len(self.units)):
            run.works[run.launched] = self._launch(run.launched, plan)
            run.launched += 1
        unit, state = self.units[index], self.states[index]
        flying = run.works.pop(index)
        if flying is None:
            anchor = state.anchor.to(self._device)
        else:
            gradient, work = flying
            work.wait()
            gradient = self._clip(index, gradient, run)
            anchor = apply_outer_step(state, gradient, self._rule)
        unit.reshard()
        for part, value in zip(unit.parts(), state.views(anchor), strict=True):
            part.copy_(value)
        if not plan.norms[index, self.peers.replica].isfinite():
            self._clear_inner_state(unit)
        run.applied.add(index)
        if len(run.applied) == len(self.units):
            self._end(run, plan)

    def _launch(self, index: int, plan: SyncPlan) -> tuple[Tensor, Pending] | None:
        if plan.rolled_back[index]:
            return None
        gradient = self._pseudo_gradient(self.units[index], self.states[index])
        weight = float(plan.weights[index, self.peers.replica])
        if weight == 0.0:
            gradient.zero_()  # never multiplied: 0 * inf is NaN
        else:
            gradient.mul_(weight)
        return gradient, self.peers.all_reduce([gradient])

    def _clip(self, index: int, gradient: Tensor, run: _Running) -> Tensor:
        square_norm = torch.linalg.vector_norm(gradient).double().square()
        run.square_norms[index] = square_norm
        if self.config.max_pseudo_grad_norm is None:
            return gradient
        run.factors[index] = clip_factor(self._sum_in_replica(square_norm).sqrt(), self.config.max_pseudo_grad_norm)
        return gradient.mul_(run.factors[index])

    def _pseudo_gradient(self, unit: Unit, state: OuterState) -> Tensor:
        """Anchor minus parameters, flat fp32 [n], in a new buffer."""
        flat = state.anchor.to(self._device, non_blocking=True, copy=True)
        for view, part in zip(state.views(flat), unit.parts(), strict=True):
            view.sub_(part)
        return flat

    def _clear_inner_state(self, unit: Unit) -> None:
        if self._optimizer is not None:
            for param in unit.params:
                self._optimizer.state.pop(param, None)

    # -- all units ----------------------------------------------------------------------------------------------------

    def _pairs(self) -> list[tuple[Unit, OuterState]]:
        return list(zip(self.units, self.states, strict=True))

    def _plan(self, run: _Running) -> SyncPlan:
        if run.plan is not None:
            return run.plan
        waited_from = self._clock()
        table = run.gathered().cpu()  # the one time that the host reads the device in a sync
        run.wait_seconds = self._clock() - waited_from
        if not self.peers.commit(self.sync_count):
            raise RuntimeError(f"Outer sync {self.sync_count} was not agreed on by all replicas.")
        config = self.config
        norms = table[:, : len(self.units)].sqrt().T
        tallies = dict(zip(run.tally_names, table[:, len(self.units) :].T, strict=True))
        anomalous, restarted, self.detectors = detect_anomalies(
            self.detectors,
            norms,
            threshold=config.anomaly_threshold,
            alpha=config.ema_alpha,
            warmup_syncs=config.ema_warmup_syncs,
            max_consecutive=config.max_consecutive_anomalies,
        )
        if config.weighting == "norm":
            weights = norm_weights(norms, ~anomalous, config.softmax_temperature)
        else:
            ones = torch.ones(self.peers.num_replicas, dtype=torch.float64)
            weights = share_weights(tallies["inner_steps"] if config.weighting == "steps" else ones, ~anomalous)
        run.plan = SyncPlan(norms, weights, anomalous, restarted, anomalous.all(dim=1), tallies)
        return run.plan

    def _end(self, run: _Running, plan: SyncPlan) -> None:
        self.abandon()
        now = self._clock()
        squares = torch.stack(list(run.square_norms.values())) if run.square_norms else torch.zeros(0)
        if not run.factors and run.square_norms:
            squares = self._sum_in_replica(squares)
        clipped = torch.stack(list(run.factors.values())).lt(1.0).sum() if run.factors else torch.zeros(())
        outcome = HostCopy(torch.stack([squares.sum().double(), clipped.to(squares.device).double()]))
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

        self._finished.append(record)
