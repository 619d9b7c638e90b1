"""What the Trainer logs with several replicas: this replica's loss at its logs, and the records of syncs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import ProgressCallback

from hf_edit.config import EDiTConfig
from hf_edit.method.plan import SyncRecord
from hf_edit.peers.layout import Layout
from hf_edit.sync.engine import Engine
from hf_edit.telemetry.journal import NAME, Journal, description
from hf_edit.telemetry.logs import EDiTStats, sync_logs
from hf_edit.telemetry.wandb_run import UnitTable, tell
from hf_edit.trainer.base import TrainerToBe
from hf_edit.trainer.progress import GlobalSteps

# Of the TrainingArguments, what the journal says of a run.
ARGUMENTS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "max_steps", "num_train_epochs",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "bf16", "fp16", "seed",
)  # fmt: skip


class TrainerLogs(TrainerToBe):
    """The part of `EDiTMixin` that logs."""

    edit_config: EDiTConfig
    edit_layout: Layout
    edit_stats: EDiTStats
    _engine: Engine | None
    _steps: GlobalSteps
    _journal: Journal | None = None  # of the first rank
    _globalstep_last_logged: int

    def _start_logs(self) -> None:
        self._steps.at_log = self._steps.own
        self._unit_table = UnitTable()

    def _open_journal(self) -> None:
        """The engine is ready."""
        if self.args.process_index != 0:
            return
        assert self._engine is not None
        if self._journal is not None:
            self._journal.close()  # of a training that was broken off
        self._journal = Journal(self._output_place() / NAME)
        self._journal.begin(
            self.state.global_step,
            **description(self.edit_layout, self._engine),
            training={name: getattr(self.args, name, None) for name in ARGUMENTS},
        )

    def _note_log(self, logs: dict[str, Any]) -> None:
        """What the Trainer has logged; syncs have lines of their own."""
        entry = {name: value for name, value in logs.items() if not name.startswith("edit/")}
        if self._journal is not None and set(entry) - {"epoch", "num_input_tokens_seen"}:
            self._journal.log(self.state.global_step, entry)

    def _close_journal(self, error: BaseException | None = None) -> None:
        if self._journal is not None:
            self._journal.end(self.state.global_step, error, **asdict(self.edit_stats))
            self._journal = None
            if error is None:
                self._unit_table.publish()

    def _log_step(
        self, tr_loss: Tensor, grad_norm: Any, start_time: float, learning_rate: float | None, stepped: bool
    ) -> None:
        """The Trainer's log entry, its loss averaged over this replica alone; nothing if none is asked for.

        Where the Trainer's rules ask for it, all ranks of the replica are here. A callback can ask on one rank alone:
        then the loss is that rank's.
        """
        assert self._engine is not None
        due, asked = self._steps.log_is_due(self.args, self.state, stepped), self.control.should_log
        self.control.should_log = False
        own_steps = self._steps.own - self._steps.at_log
        sums = torch.stack([tr_loss.detach(), torch.full_like(tr_loss, own_steps)])
        if due:
            gather = self.accelerator.gather if self._steps.warm_up else self._engine.peers.inside.gather
            sums = gather(sums)
        wanted = asked or (due and self._steps.by_time)  # by time, no callback of the Trainer asks
        if wanted and own_steps > 0 and self.state.global_step > self._globalstep_last_logged:
            losses, steps = sums.view(-1, 2).mean(dim=0).tolist()
            self._log_replica(losses / steps, tr_loss, grad_norm, start_time, learning_rate)

    def _log_replica(
        self, loss: float, tr_loss: Tensor, grad_norm: Any, start_time: float, learning_rate: float | None
    ) -> None:
        tr_loss.zero_()
        self._steps.at_log = self._steps.own
        logs = {"loss": loss}
        if grad_norm is not None:
            logs["grad_norm"] = grad_norm.item() if isinstance(grad_norm, Tensor) else grad_norm
        logs["learning_rate"] = self._get_learning_rate() if learning_rate is None else learning_rate
        # The Trainer will divide the total by the global steps.
        self._total_loss_scalar += loss * (self.state.global_step - self._globalstep_last_logged)
        self._globalstep_last_logged = self.state.global_step
        self.store_flos()
        self.log(logs, start_time)

    def _log_syncs(self) -> None:
        assert self._engine is not None
        for record in self._engine.sync.take_records():
            self._confirm_counts(record)
            self._rebalance(record)
            self.edit_stats.add(record)
            if self._journal is not None:
                self._note_sync(self._journal, record)
            self.log(sync_logs(record))

    def _note_sync(self, journal: Journal, record: SyncRecord) -> None:
        """On the first rank."""
        step = self.state.global_step
        tell(record, step, journal, self.edit_config.on_loss_spike)
        self._unit_table.add(record, step)
        self._show_sync(record)

    def _show_sync(self, record: SyncRecord) -> None:
        """In the Trainer's progress bar."""
        syncs, exposed = self.edit_stats.syncs, record.exposed_seconds
        text = f"{syncs} syncs, {exposed:.2f} s exposed"
        if record.wait_seconds > 0.01:
            text += f", {record.wait_seconds:.2f} s of it for replica {record.slowest_replica}"
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.set_postfix_str(text)
            elif (tracker := getattr(callback, "training_tracker", None)) is not None:  # a notebook's
                tracker.prefix = f"[{text}] "

    def _log_the_rest(self) -> None:
        """The training has ended: syncs that were not logged, and the loss since the last log for the total."""
        self._log_syncs()
        if (own_steps := self._steps.own - self._steps.at_log) > 0:  # as in _log_replica
            self._tr_loss *= (self.state.global_step - self._globalstep_last_logged) / own_steps
