"""EDiT for a hand-written Accelerate loop; the Trainer stands on the same engine."""

from __future__ import annotations

import logging
from collections import deque
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from hf_edit.config import EDiTConfig
from hf_edit.peers.elastic import ElasticPeers
from hf_edit.peers.launch import make_peers
from hf_edit.peers.layout import Layout
from hf_edit.sync.engine import Engine
from hf_edit.sync.units import is_prepared
from hf_edit.telemetry.journal import NAME, Journal, description
from hf_edit.telemetry.logs import sync_logs
from hf_edit.telemetry.wandb_run import publish_settings, tell
from hf_edit.trainer.checks import check_loop, check_optimizer
from hf_edit.trainer.loop_accelerator import keep_loader_local, layout_of, make_accelerator
from hf_edit.trainer.loop_checkpoints import LoopCheckpoints

logger = logging.getLogger(__name__)

# Entries that wait for `logs()`: a loop that never asks shall not keep those of all its syncs.
KEPT_LOGS = 1000


class EDiT(LoopCheckpoints):
    """Trains replicas alone and syncs them, in a loop of your own.

        accelerator = EDiT.accelerator(edit_config)                     # in the place of Accelerator()
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        with EDiT(accelerator, model, optimizer, edit_config) as edit:
            for batch in loader:
                with accelerator.accumulate(model):
                    loss = model(**batch).loss
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                edit.step(loss)

    At the end of the `with` block all replicas are equal. Before an evaluation in between, call `flush()`. With one
    replica there is nothing to sync, and what `save` writes several can continue.

    Args:
        accelerator: made by `EDiT.accelerator`.
        model, optimizer: as `accelerator.prepare` returned them.
        edit_config: an `EDiTConfig`, a dict, a path, or None, as for `EDiTTrainer`.
        output_dir: where the first process keeps `edit_syncs.jsonl`, for `hf-edit report`; of replicas that are
            launches of their own each in `replica-I`. None: to keep none.

    Raises:
        ValueError: model or accelerator are not prepared for replicas; a setting that EDiT cannot train with.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Any, edit_config: Any = None,
        output_dir: str | Path | None = None,
    ) -> None:  # fmt: skip
        self.config = EDiTConfig.load(edit_config)
        self.layout: Layout = layout_of(accelerator, self.config)
        self._accelerator = accelerator
        self._model, self._optimizer = model, optimizer
        self._engine: Engine | None = None
        self._hook: Any = None
        self._said_dropped = False
        self._logs: deque[dict[str, float]] = deque(maxlen=KEPT_LOGS)
        self._own_steps = self._steps_of_all = 0
        self._peers: Any = None  # ProcessGroupPeers or ElasticPeers
        self._journal: Journal | None = None
        if accelerator.is_main_process:
            plain = "" if self.layout.num_replicas > 1 else ": nothing to sync"
            logger.warning("EDiT: %s%s.", self.layout, plain)
        if self.layout.num_replicas == 1:
            return
        if not is_prepared(model) and not (self.config.elastic and self.layout.replica_size == 1):
            raise ValueError(
                f"The model is a plain {type(model).__name__}. Give EDiT what accelerator.prepare(model, optimizer) "
                "returned."
            )
        check_loop(self.config)
        check_optimizer(optimizer, self.layout, self.config)
        keep_loader_local(accelerator)
        self._peers = make_peers(self.layout, self.config)
        self._join(self._start(first_step=0))
        if output_dir is not None and accelerator.is_main_process:
            place = Path(output_dir) / f"replica-{self.layout.replica}" if self.config.elastic else Path(output_dir)
            self._journal = Journal(place / NAME)
            self._begin_journal()
        publish_settings(self.config.to_dict())
        torch_optimizer = getattr(optimizer, "optimizer", optimizer)
        self._hook = torch_optimizer.register_step_pre_hook(lambda *_: self._before_optimizer_step())

    @staticmethod
    def accelerator(edit_config: Any = None, **settings: Any) -> Accelerator:
        """An `Accelerator(**settings)` whose FSDP2 shards over the replica only, or DDP for replicas of one rank.

        Every process reads its own part of the data; of a replica that is a launch of its own (elastic) every loader
        gives its part of what all replicas read. The launcher's configuration says how many processes there are, and
        whether FSDP is on.

        Raises:
            ValueError: processes, replicas and FSDP do not fit together.
        """
        return make_accelerator(EDiTConfig.load(edit_config), settings)

    def _start(self, first_step: int) -> Engine:
        self._looked_at = 0  # the sync after which it was last asked for its records by `step`
        self._engine = Engine(self._model, self._optimizer, self.config, self._peers, first_step=first_step)
        return self._engine

    def _join(self, engine: Engine) -> None:
        """Of replicas that are launches of their own, this one comes to the others' next sync."""
        if self.config.elastic:
            engine.join()
            told = engine.progress.totals
            self._own_steps = round(told[self.layout.replica]) if told else 0
            engine.schedule.go_on_at(self._own_steps)
            self._steps_of_all = round(engine.progress.value)

    def _begin_journal(self) -> None:
        if self._journal is not None and self._engine is not None:
            self._journal.begin(self._steps_of_all, **description(self.layout, self._engine))

    def _before_optimizer_step(self) -> None:
        if self._engine is not None:
            self._engine.before_optimizer_step()

    def __enter__(self) -> EDiT:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if self._engine is None:
            return
        if kind is None:
            self._engine.barrier()
        else:
            self._engine.abandon()
        if isinstance(self._peers, ElasticPeers):
            self._peers.close()  # so that the others do not wait for this replica
        if kind is None:
            self._note_steps()
            self._keep_logs()
            self._bring_part(at_last=True)
        if self._journal is not None:
            self._journal.end(self._steps_of_all, error)
        self._engine.close()
        self._hook.remove()
        self._engine = None

    def step(self, loss: Tensor | None = None, tokens: int = 0) -> None:
        """To be called after each batch. A batch that only accumulates does not count.

        Args:
            loss: this batch's, for the logs; [] of any float dtype.
            tokens: of this batch, for the logs.
        """
        if self._engine is None:
            if self._accelerator.sync_gradients and not self._accelerator.optimizer_step_was_skipped:
                self._own_steps = self._steps_of_all = self._own_steps + 1
            return
        if loss is not None:
            share = self._accelerator.gradient_accumulation_steps * self.layout.replica_size
            self._engine.counts.tally(loss=loss.detach().float() / share)
        self._engine.counts.tally(tokens=float(tokens))
        if self._accelerator.sync_gradients:
            skipped = self._accelerator.optimizer_step_was_skipped
            if skipped:  # the optimizer was not called, nor its hook
                self._engine.before_optimizer_step()
            self._engine.step(skipped=skipped)
            self._bring_part()
            if self._engine.sync.sync_count - self._looked_at >= KEPT_LOGS // 10:
                self._looked_at = self._engine.sync.sync_count
                self._keep_logs()

    def flush(self) -> None:
        """Makes the replicas equal: syncs what was learnt since the last sync. To be called on all ranks.

        With `sync_seconds` each replica comes to it in its own time, and waits for the others.
        """
        if self._engine is None:
            return
        if self._engine.by_time or self.config.elastic:
            self._engine.barrier()
        else:
            self._engine.flush()

    @property
    def own_steps(self) -> int:
        """Optimizer steps of this replica, of all its launches, that the others know of at its launch, and since: a
        replica that is launched again (elastic) goes on behind them in its data."""
        return self._own_steps if self._engine is None else self._engine.schedule.step

    @property
    def progress(self) -> float:
        """Optimizer steps of all replicas / R; between two syncs an estimate. For the learning rate of A-EDiT."""
        return float(self._steps_of_all) if self._engine is None else self._engine.progress.value

    def logs(self) -> list[dict[str, float]]:
        """The `edit/...` entries of each sync that has ended since the last call, for `accelerator.log`.

        Of more than `KEPT_LOGS` = 1,000 syncs only the last are kept.
        """
        self._keep_logs()
        found = list(self._logs)
        self._logs.clear()
        return found

    def log(self, step: int, values: dict[str, Any] | None = None) -> None:
        """`accelerator.log` of `values`, and of each sync that has ended since the last call.

        Args:
            step: the x-axis of the trackers.
        """
        for entry in [*([values] if values else []), *self.logs()]:
            self._accelerator.log(entry, step=step)
        if self._journal is not None and values:
            self._journal.log(step, values)

    def _keep_logs(self) -> None:
        """Takes what has ended from the engine; on CUDA it waits for the last one's copy to the host."""
        if self._engine is None:
            return
        records = self._engine.sync.take_records()
        if self._accelerator.is_main_process:
            for record in records:
                tell(record, round(self._engine.progress.value), self._journal)
        new = [sync_logs(record) for record in records]
        if len(self._logs) + len(new) > KEPT_LOGS and not self._said_dropped and self._accelerator.is_main_process:
            logger.warning("EDiT: nobody asks for logs(); only those of the last %d syncs are kept.", KEPT_LOGS)
            self._said_dropped = True
        self._logs += new
