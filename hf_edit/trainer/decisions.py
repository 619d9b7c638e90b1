"""What needs equal replicas (evaluation, saving, stopping): asked for by callbacks, done by all ranks together.

The Trainer sees no flag that has not been decided (`hf_edit.method.conductor` says how that is done).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from hf_edit.config import EDiTConfig
from hf_edit.method.conductor import Conductor, Move, Point
from hf_edit.method.plan import CALLED
from hf_edit.sync.engine import Engine
from hf_edit.telemetry.logs import EDiTStats
from hf_edit.trainer.base import TrainerToBe
from hf_edit.trainer.progress import FLAGS, FollowProgress, GlobalSteps


class JointJITCheckpoint(JITCheckpointCallback):
    """transformers' (5.24) saves on SIGTERM, on the rank that got it, at once; here it is decided with the others."""

    @property
    def requested(self) -> bool:
        return self.jit_manager is not None and self.jit_manager.is_checkpoint_requested

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is saved here, nor in the events below."""

    on_pre_optimizer_step = on_step_end = on_epoch_end = on_step_begin

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_end(*args, **kwargs)
        if self.jit_manager is not None:
            self.jit_manager.is_checkpoint_requested = False


class TrainerDecisions(TrainerToBe):
    """The part of `EDiTMixin` that carries out what the conductor says."""

    edit_config: EDiTConfig
    edit_stats: EDiTStats
    _engine: Engine | None
    _conductor: Conductor
    _steps: GlobalSteps
    lr_scheduler: Any
    _jit: JointJITCheckpoint | None = None
    _carrying_out: frozenset[str] = frozenset()  # what all ranks do now

    def _save_together_on_sigterm(self) -> None:
        """To be called once the Trainer has its callbacks."""
        alone = self.pop_callback(JITCheckpointCallback)
        if alone is not None:
            alone.on_train_end(self.args, self.state, self.control)  # gives the signal back
            if self.edit_config.elastic:
                self._say_once(
                    "enable_jit_checkpoint has no effect with elastic: the others train on, with what they know of a "
                    "replica that ends."
                )
                return
            self._jit = JointJITCheckpoint()
            self._jit.set_trainer(self)
            self.add_callback(self._jit)

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, trial: Any, epoch: float, ignore_keys_for_eval: Any,
        start_time: float, learning_rate: float | None = None,
    ) -> None:  # fmt: skip
        # Private in transformers 5.24, called behind every step and epoch; tests/launch fails when it moves.
        carry_out = partial(
            super()._maybe_log_save_evaluate, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time,
            learning_rate=learning_rate,
        )  # fmt: skip
        if self._engine is None:
            return carry_out()
        stepped = self._steps.take_new()
        self._log_step(tr_loss, grad_norm, start_time, learning_rate, stepped)
        decided = False
        for what in self._decide_together(stepped):
            self._log_syncs()
            self._collect_requests()  # of callbacks that saw the sync's log
            self._show(what)
            self.control.should_log = False  # is done; the Trainer would gather the loss over all ranks
            began_at = time.monotonic()
            carry_out()
            if self._engine is not None:
                self._engine.sync.interval.rested_seconds += time.monotonic() - began_at
            self._collect_requests()
            self._show(frozenset())
            decided = True
        self._log_syncs()
        self._collect_requests()
        if decided and self._engine is not None:
            self._engine.schedule.rest_timer()
        elif not decided:
            self.control.should_log = False
            carry_out()
        self.control.should_training_stop = self._conductor.stopping
        self.control.should_epoch_stop = self._conductor.cutting

    def _collect_requests(self) -> None:
        """What callbacks have asked for since the last time; flags are taken back until they are decided."""
        asked = {request for request, flag in FLAGS.items() if getattr(self.control, flag)}
        self._conductor.request(asked - self._carrying_out)
        self._show(self._carrying_out - {"evaluate"})  # the Trainer evaluates before all else

    def _show(self, decided: frozenset[str]) -> None:
        """The Trainer's flags say what has been decided."""
        self._carrying_out = decided
        for request, flag in FLAGS.items():
            setattr(self.control, flag, request in decided)

    def _decide_together(self, stepped: bool) -> Iterator[frozenset[str]]:
        """Counts the step, and yields what all ranks now do, at the same step."""
        engine, conductor, steps = self._engine, self._conductor, self._steps
        assert engine is not None
        self._collect_requests()
        urgent = self._must_save_now()
        warm_up = stepped and steps.warm_up

        def here() -> Point:
            return Point(
                epoch_ended=not stepped,
                warm_up=warm_up,
                lockstep=steps.lockstep and self._jit is None,  # one that must save now comes to its own syncs
                equal=engine.replicas_equal,
                pending=engine.sync.pending,
                last=self.state.global_step >= self.state.max_steps or conductor.stopping or steps.out_of_data,
                out_of_data=steps.out_of_data,
                urgent=urgent,
            )

        conductor.arrive(here())
        if urgent:
            conductor.request({"save", "stop"})
        self._count_step()
        while (move := conductor.next(here())).name != "go on":
            if move.name == "act":
                if not steps.by_time:  # one whose data ended goes with the others: one step, one checkpoint's name
                    self.state.global_step += round(engine.progress.behind)
                yield move.what
            else:
                self._receive(self._converse(move), by_progress=move.name in ("drain", "leave"))
        if conductor.requests:
            self._say_what_moves()

    def _converse(self, move: Move) -> set[str] | None:
        engine, requests = self._engine, self._conductor.requests
        assert engine is not None
        if move.name == "agree":
            return engine.agree(requests)
        if move.name == "drain":
            return engine.drain()
        if move.name == "leave":
            return engine.leave(requests)
        # Of replicas that come and go, one may have joined behind the sync at which this was decided.
        return engine.flush(requests, leaving=move.leaving or self.edit_config.elastic)

    def _receive(self, requests: set[str] | None, by_progress: bool = False) -> None:
        """What any rank asked for, and with A-EDiT what falls due by the steps that they reported."""
        if requests is not None and by_progress and self._steps.by_time:
            assert self._engine is not None
            requests = requests | self._steps.agree(self.args, self.state, self._engine.progress)
            if isinstance(self.lr_scheduler, FollowProgress):
                self.lr_scheduler.go_to(self.state.global_step)
        self._conductor.receive(requests)

    def _count_step(self) -> None:
        """Tells the engine of a step that it does not know of yet; it may sync behind it."""
        assert self._engine is not None
        if not self._steps.uncounted:
            return
        self._steps.uncounted = False
        steps = self._steps
        skipped = self.accelerator.optimizer_step_was_skipped or steps.empty or steps.dropped
        stats = self.edit_stats
        if self._engine.warming_up:
            stats.warmup_bytes += stats.gradient_bytes
        else:
            stats.inner_steps += not skipped
            stats.hsdp_bytes += stats.gradient_bytes
        self._receive(self._engine.step(self._conductor.requests, skipped), by_progress=True)

    def _must_save_now(self) -> bool:
        """True if the machine of any rank of this replica is to be taken away."""
        if self._jit is None or self._engine is None:
            return False
        count = torch.tensor(float(self._jit.requested), device=self.args.device)
        return float(self._engine.peers.inside.sum(count)) > 0

    def _say_what_moves(self) -> None:
        hint = " Make eval_steps and save_steps multiples of sync_interval to keep them where they are."
        if self._steps.by_time:
            hint = ""
        elif self.edit_config.overlap == "delayed":
            hint = f" A delayed one is applied delay_steps={self.edit_config.delay_steps} steps after it begins."
        what = ", ".join(sorted(self._conductor.requests))
        self._say_once(f"what falls between two syncs ({what}) moves to the next sync.{hint}")

    # -- called by the user, or by the Trainer when it carries out -----------------------------------------------------

    def _make_replicas_equal(self, what: str) -> None:
        engine = self._engine
        if engine is None:
            return
        if self._steps.uncounted:  # called by a callback, before the step was counted
            self._collect_requests()
            self._count_step()
        if self._steps.by_time and not engine.replicas_equal:
            raise RuntimeError(
                f"{what} was called between two syncs. With sync_seconds replicas take different numbers of steps, so "
                "none can know at which of them the others call it. In a callback set control.should_evaluate or "
                "control.should_save instead; it is done at the next sync, on all ranks."
            )
        if not engine.replicas_equal:
            self._say_once(f"{what} was called between two syncs and brings the next one forward.")
            self._receive(engine.flush(self._conductor.requests | {CALLED}))
