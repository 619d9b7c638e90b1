"""The Trainer where each replica is a launch of its own: joining the others, its part of the data, who writes files."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader
from transformers.trainer_callback import ExportableState

from hf_edit.checkpoint.late import LatePart
from hf_edit.checkpoint.manifest import checkpoints, problem, replica_part
from hf_edit.config import EDiTConfig
from hf_edit.peers.elastic import ElasticPeers
from hf_edit.peers.layout import Layout
from hf_edit.sync.engine import Engine
from hf_edit.telemetry.logs import EDiTStats, GlobalCount
from hf_edit.trainer.base import TrainerToBe
from hf_edit.trainer.position import DataPosition
from hf_edit.trainer.progress import GlobalSteps

logger = logging.getLogger(__name__)

ENDED = "edit_ended.json"  # in output_dir, by the replica that wrote the last files: the training is over
# Of the Trainer's state, what its own rules go by at an evaluation.
BEST = ("best_metric", "best_global_step", "best_model_checkpoint")


class StartAgain(Exception):
    """A replica without state finds nobody, but a checkpoint: it goes on from there."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(str(checkpoint))
        self.checkpoint = checkpoint


class TrainerElastic(TrainerToBe):
    """The part of `EDiTMixin` for replicas that come and go."""

    edit_config: EDiTConfig
    edit_layout: Layout
    edit_stats: EDiTStats
    _engine: Engine | None
    _peers: Any
    _steps: GlobalSteps
    _position: DataPosition
    _input_tokens: GlobalCount
    _flos: GlobalCount
    _told: dict[str, Any] | None = None  # by the replica that has healed this one in `_join`
    _part: LatePart | None = None  # of the last checkpoint, on the first rank of a replica that does not write it

    @property
    def _elastic(self) -> bool:
        return self.edit_config.elastic and self.edit_layout.num_replicas > 1

    # -- coming -------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not self._elastic:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        if not resume_from_checkpoint or resume_from_checkpoint is True:
            resume_from_checkpoint = None
            if (newest := self._newest_checkpoint()) is not None:
                self._say_once(f"this launch begins with {newest}; replicas that are further heal it from there.")
                resume_from_checkpoint = str(newest)
        while True:
            try:
                return super().train(resume_from_checkpoint, *args, **kwargs)
            except StartAgain as again:
                resume_from_checkpoint = str(again.checkpoint)

    def _newest_checkpoint(self) -> Path | None:
        """The newest whole one that all ranks of the replica see."""
        found = [path for path in checkpoints(Path(self.args.output_dir)) if problem(path) is None]
        seen = self._get_peers().gather_object([str(path) for path in found])
        common = [path for path in found if all(str(path) in theirs for theirs in seen)]
        return common[0] if common else None

    def _look_around_alone(self) -> None:
        """Nobody else is there: the training may have ended, or a checkpoint have been written meanwhile."""
        ended = Path(self.args.output_dir) / ENDED
        last = json.loads(ended.read_text(encoding="utf-8"))["global_step"] if ended.is_file() else -1
        if max(self._get_peers().gather_object(last)) >= self.state.max_steps:
            self._say_once(f"the training has ended ({ended}); nothing is left to do.")
            self._get_peers().close()
            sys.exit(0)
        if self._resumed is not None:
            return
        if (newest := self._newest_checkpoint()) is not None:
            raise StartAgain(newest)
        self._say_once("nobody else is there, and there is no checkpoint: waiting for the other replicas.")

    def _join(self) -> None:
        """Comes to the others' next sync; has what they have behind it, and goes where this replica was in its data."""
        engine, peers = self._engine, self._get_peers()
        assert engine is not None
        peers.on_alone = self._look_around_alone
        self._told = None
        agreed = engine.join()
        peers.on_alone = None
        if self._told is not None and engine.progress.totals:
            own = round(engine.progress.totals[self.edit_layout.replica])
            if own != self._steps.own:
                self._go_behind(own)
            engine.schedule.go_on_at(self._steps.own)
        self._receive(agreed, by_progress=True)
        self._globalstep_last_logged = self._initial_global_step = self.state.global_step
        self._steps.logged = max(self._steps.logged, self.state.global_step)
        if self._writes_files() and self.args.process_index == 0:
            (Path(self.args.output_dir) / ENDED).unlink(missing_ok=True)

    def _go_behind(self, own_steps: int) -> None:
        """The others have the first `own_steps` of this replica: it goes on behind them in its data."""
        self._steps.own = self._steps.at_log = own_steps
        if self.args.ignore_data_skip:
            return
        epoch, steps = divmod(own_steps, self._steps.steps_per_epoch)
        loader = self.callback_handler.train_dataloader
        self._position = DataPosition.behind(loader, epoch, steps * self.args.gradient_accumulation_steps)

    def _tell(self) -> dict[str, Any]:
        """What of the last sync a replica that lacks it must know."""
        return {
            "agreed": self._steps.agreed,
            "counts": [self._input_tokens.confirmed, self._flos.confirmed],
            "best": {name: getattr(self.state, name) for name in BEST},
            "callbacks": [(name, callback.state()["attributes"]) for name, callback in self._stateful_callbacks()],
            "scheduler": self._scheduler_by_metric(),
        }

    def _be_told(self, told: dict[str, Any]) -> None:
        self._told = told
        self._steps.agreed = told["agreed"]
        self._steps.logged = max(self._steps.logged, told["agreed"])  # this replica may have logged further
        self._input_tokens.confirmed, self._flos.confirmed = told["counts"]
        for name, value in told["best"].items():
            setattr(self.state, name, value)
        for (name, callback), (of, values) in zip(self._stateful_callbacks(), told["callbacks"], strict=False):
            for attribute, value in values.items() if of == name else ():
                setattr(callback, attribute, value)
        if told["scheduler"] is not None:
            self.lr_scheduler.load_state_dict(told["scheduler"]["state"])
            for group, rate in zip(self.optimizer.param_groups, told["scheduler"]["rates"], strict=True):
                group["lr"] = rate

    def _stateful_callbacks(self) -> list[tuple[str, Any]]:
        """By name, those whose counts go by what all replicas evaluate, such as EarlyStoppingCallback."""
        found = [callback for callback in self.callback_handler.callbacks if isinstance(callback, ExportableState)]
        return [(type(callback).__name__, callback) for callback in found]

    def _scheduler_by_metric(self) -> dict[str, Any] | None:
        """State and rates of a scheduler that goes by what is evaluated; others go by the global step."""
        if not isinstance(self.lr_scheduler, ReduceLROnPlateau):
            return None
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        return {"state": self.lr_scheduler.state_dict(), "rates": rates}

    # -- its part of the data -----------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """As the Trainer's; each replica reads its own part of what all of them read."""
        if not self._elastic:
            return super().get_train_dataloader()
        with self.accelerator.among_all(self.edit_layout):
            return super().get_train_dataloader()

    # -- files --------------------------------------------------------------------------------------------------------

    def _writes_files(self) -> bool:
        """True on all ranks of the replica that writes for all, or of each with a disk of its own."""
        return self._is_first() or self.args.save_on_each_node

    def _is_first(self) -> bool:
        """True on all ranks of the first of the replicas that met last."""
        if not self._elastic:
            return True
        peers = self._peers
        meeting = peers.meeting if isinstance(peers, ElasticPeers) else None
        first = self._first_replica if meeting is None else meeting.replicas[0]
        return first is None or first == self.edit_layout.replica

    _first_replica: int | None = None  # when the training has ended

    @property
    def _meeting_key(self) -> str:
        peers = self._peers
        return peers.meeting.key if isinstance(peers, ElasticPeers) and peers.meeting is not None else ""

    def _save_part(self, folder: Path) -> None:
        """What this replica alone has, for the checkpoint that another writes."""
        peers, replica = self._get_peers(), self.edit_layout.replica
        part = LatePart(folder, self._output_place() / "part", replica, self._meeting_key)
        first = self.args.process_index == 0
        if first:
            part.begin()
        peers.barrier()
        self._save_own(part.place, write_outer=False)
        self._save_rng_state(str(part.folder))
        peers.barrier()
        self._part = part if first else None

    def _place_of_random_state(self, checkpoint: str) -> str:
        """Where in `checkpoint` the Trainer's rng_state.pth of this replica is."""
        own = Path(checkpoint) / replica_part(self.edit_layout.replica)
        return str(own) if self._elastic and any(own.glob("rng_state*.pth")) else checkpoint

    def _log_syncs(self) -> None:
        before = self.edit_stats.syncs
        super()._log_syncs()
        if self._part is not None and self.edit_stats.syncs > before and self._part.bring():
            self._part = None

    def is_world_process_zero(self) -> bool:
        """As the Trainer's; of replicas that are launches of their own, one alone has it, and pushes to the Hub."""
        return super().is_world_process_zero() and self._is_first()

    def _output_place(self) -> Path:
        """Where this replica keeps what the others have, too, such as its journal."""
        place = Path(self.args.output_dir)
        return place / f"replica-{self.edit_layout.replica}" if self._elastic else place

    def _end_elastic(self) -> None:
        """The training has ended: the others need not wait for this replica."""
        if not self._elastic:
            return
        peers = self._get_peers()
        self._first_replica = None if peers.meeting is None else peers.meeting.replicas[0]
        if self._part is not None:
            self._part.bring_at_last()
            self._part = None
        if self._writes_files() and self.args.process_index == 0:
            text = json.dumps({"global_step": self.state.global_step})
            (Path(self.args.output_dir) / ENDED).write_text(text, encoding="utf-8")
        peers.close()
        self._peers = None
