"""What the Trainer logs with several replicas: this replica's loss at its logs, and the records of syncs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer

from hf_edit.config import EDiTConfig
from hf_edit.sync.engine import Engine
from hf_edit.telemetry.logs import EDiTStats, LossSpikeDetector, alert, sync_events, sync_logs
from hf_edit.trainer.progress import GlobalSteps

_TrainerToBe: Any = Trainer if TYPE_CHECKING else object  # so that the mixin knows what it will be mixed into


class TrainerLogs(_TrainerToBe):
    """The part of `EDiTMixin` that logs."""

    edit_config: EDiTConfig
    edit_stats: EDiTStats
    _engine: Engine | None
    _steps: GlobalSteps
    _globalstep_last_logged: int

    def _start_logs(self) -> None:
        self._spikes = LossSpikeDetector(self.edit_config.loss_spike_threshold)
        self._steps.at_log = self._steps.own

    def _log_state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self._spikes)

    def _restore_logs(self, state: dict[str, Any]) -> None:
        self._spikes = LossSpikeDetector(**{**state, "threshold": self.edit_config.loss_spike_threshold})

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
        spike = self._spikes.update(loss)
        if spike is not None:
            logs["edit/loss_spike"] = spike
            self.edit_stats.loss_spikes += 1
            if self.is_world_process_zero():
                where = f"Step {self.state.global_step}: the loss {loss:.4g} lies {spike:.1f} standard deviations"
                alert("EDiT: loss spike", f"{where} above its moving mean")
        self.log(logs, start_time)

    def _log_syncs(self) -> None:
        assert self._engine is not None
        for record in self._engine.sync.take_records():
            self._confirm_counts(record)
            self.edit_stats.add(record)
            if self.is_world_process_zero():
                for title, text in sync_events(record):
                    alert(title, text)
            self.log(sync_logs(record))

    def _log_the_rest(self) -> None:
        """The training has ended: syncs that were not logged, and the loss since the last log for the total."""
        self._log_syncs()
        if (own_steps := self._steps.own - self._steps.at_log) > 0:  # as in _log_replica
            self._tr_loss *= (self.state.global_step - self._globalstep_last_logged) / own_steps
