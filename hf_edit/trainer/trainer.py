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
from transformers.trainer_utils import has_length

from hf_edit.config import EDiTConfig
from hf_edit.peers.group import ProcessGroupPeers
from hf_edit.peers.layout import Layout, ring_bytes
from hf_edit.sync.engine import Engine
from hf_edit.sync.units import is_prepared
from hf_edit.telemetry.logs import (
    EDiTStats,
    LossSpikeDetector,
    alert,
    go_offline_without_login,
    publish_settings,
    sync_events,
    sync_logs,
)
from hf_edit.trainer.accelerate_hook import (
    check_accelerator,
    equalise_sampler_once,
    plan_layout,
    read_everywhere,
    replica_accelerator_args,
)
from hf_edit.trainer.checkpoints import EDiTCheckpointMark, TrainerCheckpoints
from hf_edit.trainer.counts import TrainerCounts
from hf_edit.trainer.data import TrainerData
from hf_edit.trainer.decisions import TrainerDecisions
from hf_edit.trainer.progress import TrainerProgress

logger = logging.getLogger(__name__)


class EDiTMixin(TrainerCheckpoints, TrainerCounts, TrainerData, TrainerDecisions, TrainerProgress):
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
        # A stream may end on one replica before it does on another, and then nobody can count on the others' steps.
        self._data_is_sized = has_length(dataloader)
        return dataloader

    def _get_peers(self) -> ProcessGroupPeers:
        if self._peers is None:
            self._peers = ProcessGroupPeers(self.edit_layout, self.edit_config.longest_wait_seconds)
        return self._peers

    def _start_engine(self) -> None:
        if self._engine is not None:
            self._engine.abandon()  # an earlier training was broken off
        self.edit_stats = EDiTStats()
        self._postponed.clear()
        self._stopping = self._batch_size_agreed = self._left = False
        self._agreed: set[str] | None = None
        self._counted_steps = self._steps_at_log = self._epoch_began_at = self._own_steps
        self._spikes = LossSpikeDetector(self.edit_config.loss_spike_threshold)
        self._start_counts()
        self._start_position()
        self._engine = Engine(
            self.model_wrapped,
            self.optimizer,
            self.edit_config,
            self._get_peers(),
            first_step=self._resumed[1].schedule_step if self._resumed else self.state.global_step,
            on_begin=self._hand_over_counts,
            last_step=self.state.max_steps,
        )
        if self._resumed:
            self._engine.load(*self._resumed)
            self._restore_rank_state(self._resumed_host["rank"])
        self._start_progress()
        elements = sum(part.numel() for unit in self._engine.units for part in unit.parts())
        self._gradient_bytes = ring_bytes(4 * elements, self.edit_layout.num_replicas)

    def _rank_state(self) -> dict[str, Any]:
        """What this rank counts, for a checkpoint."""
        return {
            **self._counts(),
            "spikes": asdict(self._spikes),
            "own_steps": self._own_steps,
            "data": self._position_state(),
        }

    def _restore_rank_state(self, state: dict[str, Any] | None) -> None:
        if state is None:  # another layout
            return
        assert self._engine is not None
        self._engine.load_rank(state)
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
        acts = False
        if self._engine is not None:
            if self._by_time:
                self._log_by_progress()
            if self.control.should_log and self._advanced_since_log():
                self._log_replica(tr_loss, grad_norm, start_time, learning_rate)
            self.control.should_log = False
            acts = self._decide_with_the_others()
            self._log_syncs()
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=learning_rate
        )
        self._stopping = self.control.should_training_stop
        if acts and self._engine is not None:
            self._engine.schedule.rest_timer()

    def _advanced_since_log(self) -> bool:
        return self.state.global_step > self._globalstep_last_logged and self._own_steps > self._steps_at_log

    def _log_replica(self, tr_loss: Tensor, grad_norm: Any, start_time: float, learning_rate: float | None) -> None:
        """The Trainer's log entry, its loss averaged over this replica alone."""
        assert self._peers is not None
        assert self._engine is not None
        gather = self.accelerator.gather if self._engine.warming_up else self._peers.gather_in_replica
        loss = gather(tr_loss.detach()).mean().item()
        tr_loss.zero_()
        steps, self._steps_at_log = self._own_steps - self._steps_at_log, self._own_steps
        logs = {"loss": loss / steps}
        if grad_norm is not None:
            logs["grad_norm"] = grad_norm.item() if isinstance(grad_norm, Tensor) else grad_norm
        logs["learning_rate"] = self._get_learning_rate() if learning_rate is None else learning_rate
        # The Trainer will divide the total by the global steps.
        self._total_loss_scalar += logs["loss"] * (self.state.global_step - self._globalstep_last_logged)
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
            self._confirm_counts(record)
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
        if self._own_steps > self._counted_steps:  # called by a callback, before the step was counted
            self._postponed |= self._take_requests()
            self._count_step()
        if self._by_time and not engine.replicas_equal:
            raise RuntimeError(
                f"{what} was called between two syncs. With sync_seconds replicas take different numbers of steps, so "
                "none can know at which of them the others call it. In a callback set control.should_evaluate or "
                "control.should_save instead; it is done at the next sync, on all ranks."
            )
        if not engine.replicas_equal:
            self._say_once(f"{what} was called between two syncs and brings the next one forward.")
            self._agreed = (engine.flush(self._postponed) or set()) | (self._agreed or set())

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        if self._engine is not None:
            self._engine.flush()
            self._log_syncs()
            if (own_steps := self._own_steps - self._steps_at_log) > 0:  # as in _log_replica
                self._tr_loss *= (self.state.global_step - self._globalstep_last_logged) / own_steps
        self._stop_following()
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
        # One that a resumed run goes on with has had its first step.
        self.trainer._epoch_began_at = self.trainer._own_steps - bool(self.trainer._position.num_batches)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._end_epoch(stopping=control.should_training_stop)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._before_the_trainer_counts()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._postponed |= self.trainer._take_requests()  # or the Trainer would stop on this rank alone

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._postponed |= self.trainer._take_requests()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._engine.before_optimizer_step()
