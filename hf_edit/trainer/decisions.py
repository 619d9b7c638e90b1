"""What needs equal replicas (evaluation, saving, stopping), and when: the same on all ranks, at the same point.

All ranks come to know what any of them wants where replicas meet: where a sync has begun, or with overlap="delayed"
where it is applied. Nothing is asked of other replicas between two such points.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Trainer

from hf_edit.config import EDiTConfig
from hf_edit.sync.engine import Engine
from hf_edit.telemetry.logs import EDiTStats
from hf_edit.trainer.progress import FLAGS

_TrainerToBe: Any = Trainer if TYPE_CHECKING else object  # so that the mixin knows what it will be mixed into


class TrainerDecisions(_TrainerToBe):
    """The part of `EDiTMixin` that decides together with the other ranks; steps and progress are other parts'."""

    edit_config: EDiTConfig
    edit_stats: EDiTStats
    _engine: Engine | None
    _postponed: set[str]
    _agreed: set[str] | None
    _counted_steps: int
    _step_is_empty: bool

    def _decide_with_the_others(self) -> bool:
        """Counts the step, and does what any rank wants done on equal replicas, on all of them at the same step.

        A callback may want something on one rank alone (its replica's loss differs from the others'), so what is wanted
        between two syncs rides on the next one. In warm-up all ranks see the same and want the same. True if anything
        is done.
        """
        engine = self._engine
        assert engine is not None
        self._postponed |= self._take_requests()
        warming_up = engine.warming_up
        stepped = self._count_step()
        agreed, self._agreed = self._agreed, None
        agreed = self._with_progress((agreed or set()) if warming_up else agreed)
        leaving = not agreed and self._others_may_wait()
        if leaving:
            self._left = True
            agreed = self._with_progress(engine.drain())
            if not agreed:
                agreed = self._with_progress(engine.leave(self._postponed))
        elif self._is_last() and not engine.replicas_equal:
            agreed = (engine.flush(self._postponed) or set()) | (agreed or set())
        if warming_up:
            agreed = (agreed or set()) | self._postponed
        elif agreed is None and self._epoch_ends_at_a_sync(stepped):
            agreed = engine.agree(self._postponed)
        elif agreed is None and self._stopping:
            agreed = {"stop"}  # decided before; this is the end of the epoch that was broken off
        if agreed is None:
            self._say_what_moves()
            return False
        self._postponed -= agreed
        if agreed:  # with a delayed sync, replicas are not equal where it is applied
            agreed |= engine.flush(self._postponed, leaving=leaving) or set()
            self._postponed -= agreed
            if not self._by_time:  # one whose data ended goes with the others: one step, one checkpoint's name
                self.state.global_step += round(engine.progress.behind)
        for request, flag in FLAGS.items():
            setattr(self.control, flag, request in agreed)
        return bool(agreed)

    def _with_progress(self, agreed: set[str] | None) -> set[str] | None:
        """What any rank wanted at a sync, and with A-EDiT what falls due by the steps that they told each other."""
        return agreed | self._agree_on_step() if self._by_time and agreed is not None else agreed

    def _say_what_moves(self) -> None:
        if self._postponed:
            hint = " Make eval_steps and save_steps multiples of sync_interval to keep them where they are."
            if self._by_time:
                hint = ""
            elif self.edit_config.overlap == "delayed":
                hint = f" A delayed one is applied delay_steps={self.edit_config.delay_steps} steps after it begins."
            what = ", ".join(sorted(self._postponed))
            self._say_once(f"what falls between two syncs ({what}) moves to the next sync.{hint}")

    def _epoch_ends_at_a_sync(self, stepped: bool) -> bool:
        engine = self._engine
        assert engine is not None
        return self._steps_are_equal and not stepped and (engine.replicas_equal or engine.sync.pending)

    @property
    def _steps_are_equal(self) -> bool:
        """True if all replicas are known to come to the same steps and epochs' ends."""
        return self._data_is_sized and not self._by_time

    def _others_may_wait(self) -> bool:
        """True if this replica's training ends where the others' may not, and it has not told them."""
        assert self._engine is not None
        if not self._is_last() or self._left or self._steps_are_equal or self._engine.warming_up:
            return False
        return self._ran_dry() or (not self._by_time and not self._stopping)

    def _count_step(self) -> bool:
        """Tells the engine of a step that it has not heard of; False if there is none."""
        assert self._engine is not None
        if self._own_steps == self._counted_steps:
            return False
        self._counted_steps = self._own_steps
        skipped = self.accelerator.optimizer_step_was_skipped or self._step_is_empty
        if not self._engine.warming_up:
            self.edit_stats.inner_steps += not skipped
            self.edit_stats.hsdp_bytes += self._gradient_bytes
        self._agreed = self._engine.step(self._postponed, skipped)
        return True

    def _take_requests(self) -> set[str]:
        requests = {request for request, flag in FLAGS.items() if getattr(self.control, flag)}
        for flag in FLAGS.values():
            setattr(self.control, flag, False)
        return requests

    def _is_last(self) -> bool:
        """True if no step follows."""
        return self.state.global_step >= self.state.max_steps or self._stopping or self._ran_dry()

    def _ran_dry(self) -> bool:
        """True if an epoch has ended without a step: this rank's data are used up, and the Trainer asks for the end."""
        return self._epoch_began_at == self._own_steps
