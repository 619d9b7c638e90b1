"""EDiTTrainer: a `transformers.Trainer` whose replicas train alone between outer syncs.

A shell without arithmetic: it turns the Trainer's hooks into the engine's calls, keeps what the Trainer exchanges in
every step inside the replica, and moves what needs equal replicas to a sync.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from transformers import Trainer, TrainerCallback

import hf_edit.checkpoint.state as checkpoint
from hf_edit.config import EDiTConfig
from hf_edit.method.conductor import Conductor
from hf_edit.peers.launch import make_peers
from hf_edit.peers.layout import Layout, ring_bytes
from hf_edit.sync.engine import Engine
from hf_edit.sync.units import is_prepared
from hf_edit.telemetry.logs import EDiTStats
from hf_edit.telemetry.wandb_run import go_offline_without_login, publish_settings
from hf_edit.trainer.accelerate_hook import (
    check_accelerator,
    equalise_sampler_once,
    plan_layout,
    prepare_anew,
    read_everywhere,
    replica_accelerator_args,
)
from hf_edit.trainer.balance import TrainerBalance
from hf_edit.trainer.checkpoints import EDiTCheckpointMark, TrainerCheckpoints
from hf_edit.trainer.checks import check_batches, check_optimizer, check_order, check_wrapping, never_due, passed_over
from hf_edit.trainer.data import TrainerData
from hf_edit.trainer.decisions import TrainerDecisions
from hf_edit.trainer.elastic import TrainerElastic
from hf_edit.trainer.logs import TrainerLogs
from hf_edit.trainer.progress import GlobalSteps, TrainerProgress
from hf_edit.trainer.spikes import TrainerSpikes
from hf_edit.trainer.step import TrainerStep
from hf_edit.trainer.world import ReplicaAccelerator, check_generation

logger = logging.getLogger(__name__)


class EDiTMixin(
    TrainerElastic,
    TrainerCheckpoints,
    TrainerStep,
    TrainerBalance,
    TrainerSpikes,
    TrainerData,
    TrainerDecisions,
    TrainerLogs,
    TrainerProgress,
):
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

    is_fsdp_enabled: bool
    model_wrapped: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_order(cls, EDiTMixin, Trainer)

    def __init__(self, *args: Any, edit_config: Any = None, **kwargs: Any) -> None:
        self.edit_config = EDiTConfig.load(edit_config)
        self.edit_stats = EDiTStats()
        self._engine: Engine | None = None
        self._peers: Any = None  # ProcessGroupPeers or ElasticPeers
        self._steps, self._conductor = GlobalSteps(), Conductor()
        self._said: set[str] = set()
        super().__init__(*args, **kwargs)
        self._say_what_trains()
        if self.edit_layout.num_replicas > 1:
            self._driver = _EngineDriver(self)
            self.add_callback(self._driver)
            self._save_together_on_sigterm()
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
        check_generation(self.args, self.edit_layout, self.edit_config.warmup_steps)
        check_batches(self.args, self.edit_layout, self._elastic)
        if self.args.process_index == 0:  # the one that reports
            go_offline_without_login(self.args.report_to)
        super().create_accelerator_and_postprocess()
        check_accelerator(self.accelerator, self.edit_layout.alone if self._elastic else self.edit_layout)
        if self.edit_layout.num_replicas > 1:
            self._dispatch_asked = read_everywhere(self.accelerator.dataloader_config)
            ReplicaAccelerator.take_over(self.accelerator)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        if not hasattr(self, "edit_layout"):
            raise passed_over(self, "create_accelerator_and_postprocess")
        built = super()._build_accelerator_args(**kwargs)
        return replica_accelerator_args(built, self.args, self.edit_layout, self._elastic)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.edit_layout.num_replicas > 1 and self.is_fsdp_enabled and not is_prepared(self.model):
            check_wrapping(self.model, self.accelerator.state.fsdp_plugin, self.edit_layout)
        try:
            return super().train(*args, **kwargs)
        except BaseException as error:
            self._close_journal(error)
            raise
        finally:
            self._end_position()

    def _keep_driver_last(self) -> None:
        self._driver.stand_last()

    def _get_peers(self) -> Any:
        if self._peers is None:
            self._peers = make_peers(self.edit_layout, self.edit_config)
        return self._peers

    def _start_engine(self) -> None:
        if self._engine is not None:
            self._engine.abandon()  # an earlier training was broken off
        check_optimizer(self.optimizer, self.edit_layout, self.edit_config)
        if not self._steps.begun:
            raise passed_over(self, "set_initial_training_values")
        if (warning := never_due(self.edit_config, self.state.global_step, self.state.max_steps)) is not None:
            self._say_once(warning)
        equalise_sampler_once(self.callback_handler.train_dataloader)
        self.edit_stats = EDiTStats()
        self._conductor = Conductor(by_time=self._steps.by_time, apart=self._elastic)
        self._start_logs()
        self._start_counts()
        self._start_spikes()
        self._start_balance()
        self._start_position()
        self._engine = Engine(
            self.model_wrapped,
            self.optimizer,
            self.edit_config,
            self._get_peers(),
            first_step=self._resumed[1].schedule_step if self._resumed else self.state.global_step,
            on_begin=self._hand_over_counts,
            last_step=self.state.max_steps,
            on_heal=self._tell,
            on_healed=self._be_told,
        )
        rank_state = self._resumed_host["rank"] if self._resumed else None  # None: of another layout
        if self._resumed:
            checkpoint.load_outer(*self._resumed, self._training())
            self._restore_rank_state(rank_state)
        if self._elastic and not (totals := self._engine.progress.totals):
            saved = self._resumed_host["totals"] if self._resumed else None
            totals += saved or [float(self._steps.own)] * self.edit_layout.num_replicas
        self._start_progress(first=rank_state is None)
        elements = sum(part.numel() for unit in self._engine.units for part in unit.parts())
        self.edit_stats.gradient_bytes = ring_bytes(4 * elements, self.edit_layout.num_replicas)
        if self._elastic:
            self._join()
        self._open_journal()

    def _rank_state(self) -> dict[str, Any]:
        """What this rank counts, for a checkpoint."""
        return {
            **self._counts(),
            "spikes": self._spike_state(),
            "own_steps": self._steps.own,
            "data": self._position_state(),
            "balance": self._balance_state(),
        }

    def _restore_rank_state(self, state: dict[str, Any] | None) -> None:
        if state is None:  # another layout
            return
        assert self._engine is not None
        checkpoint.load_rank(self._engine, state)
        self._restore_counts(state)
        self._restore_spikes(state["spikes"])
        self._restore_balance(state.get("balance"))

    # -- evaluation, the end ------------------------------------------------------------------------------------------

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, of `evaluate` and `predict`, on equal replicas."""
        self._make_replicas_equal("evaluate or predict")
        with self._whole_until_trained():
            return super().evaluation_loop(*args, **kwargs)

    @contextlib.contextmanager
    def _whole_until_trained(self) -> Iterator[None]:
        """Before the training each rank evaluates the whole model, and leaves it as it was: FSDP2 shards it together
        with its optimizer, when training starts, and a compiled one that is left here would be taken for prepared."""
        if self._engine or is_prepared(self.model_wrapped):
            yield
            return
        wrapped, fsdp = self.model_wrapped, self.is_fsdp_enabled and self.accelerator.is_fsdp2
        if fsdp:
            self.model.to(self.args.device)
            self.is_fsdp_enabled = False
        try:
            yield
        finally:
            self.is_fsdp_enabled, self.model_wrapped = self.is_fsdp_enabled or fsdp, wrapped
            prepare_anew(self.model)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        if self._engine is not None:
            self._engine.flush()
            self._log_the_rest()
            self._close_journal()
        self._stop_following()
        self._end_elastic()
        output = super()._finalize_training(*args, **kwargs)
        if self._engine is not None:
            self._engine.close()
        self._engine = None
        return output


class EDiTTrainer(EDiTMixin, Trainer):
    """`transformers.Trainer` with EDiT; see `EDiTMixin` for the one argument more."""


class _EngineDriver(TrainerCallback):
    """Tells the engine of the Trainer's events.

    It stands behind all other callbacks, so that the Trainer's loop sees none of their flags before they are decided:
    behind a micro-batch it looks at once, in the other events not before `_maybe_log_save_evaluate`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def stand_last(self) -> None:
        """To be called outside of events; callbacks may be added at any time."""
        callbacks = self.trainer.callback_handler.callbacks
        if callbacks[-1] is not self:
            callbacks.remove(self)
            callbacks.append(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._start_engine()
        publish_settings(self.trainer.edit_config.to_dict())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.trainer._note_log(logs or {})

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._begin_epoch()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._end_epoch()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer._saw_step:
            raise passed_over(self.trainer, "training_step")
        self.trainer._engine.before_optimizer_step()
        self.trainer._leave_out_empty_step()
        self.trainer._watch_loss()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._before_the_trainer_counts()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._collect_requests()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._collect_requests()  # or the Trainer would save next, on this rank alone
