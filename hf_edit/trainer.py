"""EDiTTrainer: a `transformers.Trainer` whose replicas train alone and meet in outer syncs.

A shell without arithmetic: it turns the Trainer's hooks into the engine's calls, keeps what the Trainer exchanges in
every step inside the replica, and moves what needs equal replicas to a sync.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from hf_edit.accelerate_hook import (
    check_accelerator,
    equalise_sampler_once,
    plan_layout,
    read_everywhere,
    replica_accelerator_args,
)
from hf_edit.config import EDiTConfig
from hf_edit.engine import Engine
from hf_edit.groups import Layout, ProcessGroupPeers, ring_bytes
from hf_edit.telemetry import (
    EDiTStats,
    LossSpikeDetector,
    alert,
    go_offline_without_login,
    publish_settings,
    sync_events,
    sync_logs,
)
from hf_edit.trainer_checkpoints import EDiTCheckpointMark, TrainerCheckpoints
from hf_edit.trainer_counts import TrainerCounts
from hf_edit.units import is_prepared

logger = logging.getLogger(__name__)
_FLAGS = {  # the engine's WISHES and the Trainer's flags
    "evaluate": "should_evaluate",
    "save": "should_save",
    "stop": "should_training_stop",
    "epoch_stop": "should_epoch_stop",
}


class EDiTMixin(TrainerCheckpoints, TrainerCounts):
    """Makes any Trainer subclass train with EDiT: `class EDiTSFTTrainer(EDiTMixin, SFTTrainer)`.

    Args:
        edit_config: an `EDiTConfig`, a dict, a path to a YAML or JSON file, or None (then the file named by the
            environment variable `EDIT_CONFIG`, else the defaults). Every other argument is the Trainer's.

    Attributes:
        edit_config: the `EDiTConfig` in use.
        edit_layout: replicas and shards, and where this rank is.
        edit_stats: totals of the last call of `train()`.

    Raises:
        ValueError: a setting that EDiT cannot train with; before any training.
    """

    _globalstep_last_logged: int
    is_fsdp_enabled: bool

    def __init__(self, *args: Any, edit_config: Any = None, **kwargs: Any) -> None:
        self.edit_config = EDiTConfig.load(edit_config)
        self.edit_stats = EDiTStats()
        self._engine: Engine | None = None
        self._peers: ProcessGroupPeers | None = None
        self._postponed: set[str] = set()
        self._said: set[str] = set()
        super().__init__(*args, **kwargs)
        self._say_what_trains()
        if self.edit_layout.num_replicas > 1:
            self.add_callback(_EngineDriver(self))
            if not self.args.save_only_model:
                self.add_callback(EDiTCheckpointMark())

    def _say_what_trains(self) -> None:
        if not self.is_world_process_zero():
            return
        if self.edit_layout.num_replicas == 1:
            logger.warning("EDiT: one replica, so this is a plain Trainer. Set num_replicas to form several.")
        else:
            logger.warning("EDiT: %s.", self.edit_layout)

    def _say_once(self, text: str) -> None:
        if text not in self._said and self.is_world_process_zero():
            logger.warning("EDiT: %s", text)
        self._said.add(text)

    # -- set-up -------------------------------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        self.edit_layout: Layout = plan_layout(self.args, self.edit_config, self.model)
        if self.edit_layout.num_replicas > 1:
            self.edit_config.check_supported()
        if self.args.process_index == 0:  # the one that reports
            go_offline_without_login(self.args.report_to)
        super().create_accelerator_and_postprocess()
        check_accelerator(self.accelerator, self.edit_layout)
        if self.edit_layout.num_replicas > 1:
            read_everywhere(self.accelerator.dataloader_config)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        built = super()._build_accelerator_args(**kwargs)
        return replica_accelerator_args(built, self.args, self.edit_layout)

    def get_train_dataloader(self) -> Any:
        dataloader = super().get_train_dataloader()
        if self.edit_layout.num_replicas > 1:
            equalise_sampler_once(dataloader)
        return dataloader

    def _get_peers(self) -> ProcessGroupPeers:
        if self._peers is None:
            self._peers = ProcessGroupPeers(self.edit_layout, self.edit_config.sync_timeout_seconds)
        return self._peers

    def _start_engine(self) -> None:
        if self._engine is not None:
            self._engine.abandon()  # an earlier training was broken off
        self.edit_stats = EDiTStats()
        self._postponed.clear()
        self._stopping = self._batch_size_agreed = False
        self._agreed: set[str] | None = None
        self._last_step = self._epoch_began_at = self.state.global_step
        self._spikes = LossSpikeDetector(self.edit_config.loss_spike_threshold)
        self._start_counts()
        self._engine = Engine(
            self.model_wrapped,
            self.optimizer,
            self.edit_config,
            self._get_peers(),
            first_step=self._resumed[1].schedule_step if self._resumed else self.state.global_step,
            on_begin=self._hand_over_counts,
        )
        if self._resumed:
            self._engine.load(*self._resumed)
            self._restore_rank_state(self._resumed_host["rank"])
        elements = sum(part.numel() for unit in self._engine.units for part in unit.parts())
        self._gradient_bytes = ring_bytes(4 * elements, self.edit_layout.num_replicas)

    def _rank_state(self) -> dict[str, Any]:
        """What this rank counts, for a checkpoint."""
        return {**self._counts(), "spikes": asdict(self._spikes)}

    def _restore_rank_state(self, state: dict[str, Any] | None) -> None:
        if state is None:  # another layout
            return
        assert self._engine is not None
        self._engine.load_tallies(state["tallies"])
        self._restore_counts(state)
        self._spikes = LossSpikeDetector(**{**state["spikes"], "threshold": self.edit_config.loss_spike_threshold})

    # -- one step -----------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self._engine is None:
            return super().training_step(model, inputs, num_items_in_batch)
        main_input_name = getattr(self.model, "main_input_name", "input_ids")
        main_input = inputs.get(main_input_name) if isinstance(inputs, Mapping) else None
        tokens = main_input.numel() if isinstance(main_input, Tensor) else 0
        with contextlib.ExitStack() as stack:
            if self.args.auto_find_batch_size:
                stack.enter_context(self._same_batch_size())
            if not self._engine.warming_up:  # what a user's or TRL's compute_loss gathers, say for its metrics
                stack.enter_context(self._gather_in_replica())
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._engine.tally(loss=loss / self.edit_layout.replica_size, tokens=tokens)
        return loss

    @contextlib.contextmanager
    def _same_batch_size(self) -> Iterator[None]:
        """The first batch fits all ranks, or all raise what makes auto_find_batch_size try a smaller one."""
        assert self._engine is not None
        failure: RuntimeError | None = None
        try:
            yield
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if self._batch_size_agreed:
                raise RuntimeError(
                    f"Step {self.state.global_step + 1} ran out of memory with a batch size that fitted all ranks at "
                    "first; the other replicas train on and cannot change it now. Set a smaller "
                    "per_device_train_batch_size."
                ) from error
            failure = error
        if self._batch_size_agreed:
            return
        if self._engine.agree({"smaller_batch"} if failure else ()):
            raise failure or RuntimeError("CUDA out of memory. (On another rank: all take a smaller batch.)")
        self._batch_size_agreed = True

    # -- logs, evaluation, checkpoints, the end -----------------------------------------------------------------------

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, trial: Any, epoch: float, ignore_keys_for_eval: Any,
        start_time: float, learning_rate: float | None = None,
    ) -> None:  # fmt: skip
        if self._engine is not None:
            if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
                self._log_replica(tr_loss, grad_norm, start_time, learning_rate)
            self.control.should_log = False
            self._decide_with_the_others()
            self._log_syncs()
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=learning_rate
        )
        self._stopping = self.control.should_training_stop

    def _decide_with_the_others(self) -> None:
        """Counts the step, and does what any rank wants done on equal replicas, on all of them at the same step.

        A callback may want something on one rank alone (its replica's loss differs from the others'), so what is wanted
        between two syncs rides on the next one. In warm-up all ranks see the same and want the same.
        """
        engine = self._engine
        assert engine is not None
        self._postponed |= self._take_wishes()
        warming_up = engine.warming_up
        stepped = self._count_step()
        agreed, self._agreed = self._agreed, None
        if self._is_last() and not engine.replicas_equal:
            agreed = (engine.flush(self._postponed) or set()) | (agreed or set())
        if agreed is None and warming_up:
            agreed = set(self._postponed)
        elif agreed is None and not stepped and (engine.replicas_equal or engine.sync.pending):
            agreed = engine.agree(self._postponed)  # an epoch ends where a sync has just begun
        if agreed is None:
            if self._postponed:
                self._say_once(
                    f"what falls between two syncs ({', '.join(sorted(self._postponed))}) moves to the next sync. Make "
                    "eval_steps and save_steps multiples of sync_interval to keep them where they are."
                )
            return
        self._postponed -= agreed
        if agreed:
            engine.sync.finish()
        for wish, flag in _FLAGS.items():
            setattr(self.control, flag, wish in agreed)

    def _count_step(self) -> bool:
        """Tells the engine of a step that it has not heard of; False if there is none."""
        assert self._engine is not None
        if self.state.global_step == self._last_step:
            return False
        self._last_step = self.state.global_step
        skipped = self.accelerator.optimizer_step_was_skipped
        if not self._engine.warming_up:
            self.edit_stats.inner_steps += not skipped
            self.edit_stats.hsdp_bytes += self._gradient_bytes
        self._agreed = self._engine.step(self._postponed, skipped)
        return True

    def _take_wishes(self) -> set[str]:
        wishes = {wish for wish, flag in _FLAGS.items() if getattr(self.control, flag)}
        for flag in _FLAGS.values():
            setattr(self.control, flag, False)
        return wishes

    def _is_last(self) -> bool:
        """True if no step follows, for a reason that holds on all ranks."""
        ran_dry = self._epoch_began_at == self.state.global_step  # an epoch without a step
        return self.state.global_step >= self.state.max_steps or self._stopping or ran_dry

    def _log_replica(self, tr_loss: Tensor, grad_norm: Any, start_time: float, learning_rate: float | None) -> None:
        """The Trainer's log entry, its loss averaged over this replica alone."""
        assert self._peers is not None
        assert self._engine is not None
        gather = self.accelerator.gather if self._engine.warming_up else self._peers.gather_in_replica
        loss = gather(tr_loss.detach()).mean().item()
        tr_loss.zero_()
        steps = self.state.global_step - self._globalstep_last_logged
        logs = {"loss": loss / steps}
        if grad_norm is not None:
            logs["grad_norm"] = grad_norm.item() if isinstance(grad_norm, Tensor) else grad_norm
        logs["learning_rate"] = self._get_learning_rate() if learning_rate is None else learning_rate
        self._total_loss_scalar += loss
        self._globalstep_last_logged = self.state.global_step
        self.store_flos()
        spike = self._spikes.update(logs["loss"])
        if spike is not None:
            logs["edit/loss_spike"] = spike
            self.edit_stats.loss_spikes += 1
            if self.is_world_process_zero():
                where = (
                    f"Step {self.state.global_step}: the loss {logs['loss']:.4g} lies {spike:.1f} standard deviations"
                )
                alert("EDiT: loss spike", f"{where} above its moving mean")
        self.log(logs, start_time)

    def _log_syncs(self) -> None:
        assert self._engine is not None
        for record in self._engine.take_records():
            self._settle_counts(record)
            self.edit_stats.add(record)
            if self.is_world_process_zero():
                for title, text in sync_events(record):
                    alert(title, text)
            self.log(sync_logs(record))

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        self._make_replicas_equal("evaluate")
        with self._whole_until_trained():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        self._make_replicas_equal("predict")
        with self._whole_until_trained():
            return super().predict(*args, **kwargs)

    @contextlib.contextmanager
    def _whole_until_trained(self) -> Iterator[None]:
        """FSDP2 shards the model together with its optimizer, when training starts; before, each rank uses it whole."""
        if not self.is_fsdp_enabled or not self.accelerator.is_fsdp2 or self._engine or is_prepared(self.model):
            yield
            return
        self.model.to(self.args.device)
        self.is_fsdp_enabled = False
        try:
            yield
        finally:
            self.is_fsdp_enabled = True

    def _make_replicas_equal(self, what: str) -> None:
        engine = self._engine
        if engine is None:
            return
        if self.state.global_step > self._last_step:  # called by a callback, before the step was counted
            self._postponed |= self._take_wishes()
            self._count_step()
        if not engine.replicas_equal:
            self._say_once(f"{what} was called between two syncs and brings the next one forward.")
            self._agreed = (engine.flush(self._postponed) or set()) | (self._agreed or set())

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        if self._engine is not None:
            self._engine.flush()
            self._log_syncs()
        output = super()._finalize_training(*args, **kwargs)
        if self._engine is not None:
            self._engine.close()
        self._engine = None
        return output


class EDiTTrainer(EDiTMixin, Trainer):
    """`transformers.Trainer` with EDiT; see `EDiTMixin` for the one argument more."""


class _EngineDriver(TrainerCallback):
    """Tells the engine of the Trainer's events."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._start_engine()
        publish_settings(self.trainer.edit_config.to_dict())

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._epoch_began_at = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._postponed |= self.trainer._take_wishes()  # or the Trainer would stop on this rank alone

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._postponed |= self.trainer._take_wishes()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._engine.before_optimizer_step()
