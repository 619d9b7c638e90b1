"""The checkpoints of a hand-written loop: its outer state alone, and folders with all of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

import hf_edit.checkpoint.state as checkpoint
from hf_edit.checkpoint.late import LatePart
from hf_edit.checkpoint.manifest import Manifest, check_model, problem, seal, start
from hf_edit.checkpoint.outer import outer_tensors
from hf_edit.config import EDiTConfig
from hf_edit.peers.elastic import ElasticPeers
from hf_edit.peers.layout import Layout
from hf_edit.sync.engine import Engine


class LoopCheckpoints:
    """The part of `EDiT` that saves and loads; the loop, its engine and its journal are `EDiT`'s own."""

    config: EDiTConfig
    layout: Layout
    flush: Callable[[], None]
    _accelerator: Accelerator
    _model: nn.Module
    _optimizer: Any
    _engine: Engine | None
    _peers: Any
    _own_steps: int
    _steps_of_all: int
    _start: Callable[[int], Engine]
    _begin_journal: Callable[[], None]
    _part: LatePart | None = None  # of the last `save`, where another replica wrote for all

    def state_dict(self) -> dict[str, Any]:
        """Anchor, outer momentum and detectors by name, sharded like the model and sharing memory, and the counters.

        Reading it changes nothing. With torch.distributed.checkpoint it can be saved as it is and loaded in place.
        Parameters and inner optimizer are yours to save, for each replica; `save` does all of it.

        Raises:
            RuntimeError: a sync is under way, which is no part of it.
        """
        if self._engine is None:
            return {}
        if self._engine.sync.pending:
            raise RuntimeError("A sync is under way; what it brings is not in the state yet. flush() first.")
        return {
            **outer_tensors(self._engine.sync, self._training().ranks),
            "counters": checkpoint.counters(self._engine),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave, on the same layout. A sync that is under way is given up.

        Raises:
            ValueError: it is of another model or method, or of the warm-up, which this training is past.
        """
        if self._engine is None:
            return
        step, warmup_steps = int(state["counters"]["step"]), self.config.warmup_steps
        if step < warmup_steps and not self._engine.warming_up:
            raise ValueError(
                f"The state is of step {step}, in the warm-up of {warmup_steps} steps; this training is past it. Load "
                "the state into a new EDiT."
            )
        self._check_state(state)
        self._engine.forget_sync()
        self._engine.go_on_at(step)
        sync = self._engine.sync
        if sync.tuning is not None and "tuning" in state:
            sync.tuning.copy_(state["tuning"])
            self._engine.tuning.resume()
        if any(name.startswith("residual/") for name in state):
            sync.keep_residuals()
        elif sync.reduction.residuals:  # of codes that were not in use yet
            for residual in sync.reduction.residuals:
                residual.zero_()
        mine = outer_tensors(sync, self._training().ranks)
        for name, tensor in mine.items():
            if name in state:  # codes that are in use here alone have left out nothing there
                tensor.copy_(state[name])
        checkpoint.load_counters(self._engine, state["counters"])

    def _check_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError if it is not of this model, method and replica."""
        assert self._engine is not None
        own = f"residual/{self.layout.replica}/"  # which either side may be without
        sides = outer_tensors(self._engine.sync, self._training().ranks), state
        mine, given = (
            {(name, tuple(t.shape)) for name, t in side.items() if isinstance(t, Tensor) and not name.startswith(own)}
            for side in sides
        )
        if self._engine.warming_up:  # there are no anchors yet, and what belongs to them
            params = [pair for unit in self._engine.units for pair in zip(unit.names, unit.params, strict=True)]
            mine = {(f"anchor/{name}", tuple(param.shape)) for name, param in params}
            given = {(name, shape) for name, shape in given if name.startswith("anchor/")} or mine
        if wrong := mine ^ given:
            names = sorted({name for name, _ in wrong})[:8]
            raise ValueError(f"The state lacks these or has others, and is of another model or method: {names}.")

    def save(self, folder: str | Path, **stateful: Any) -> None:
        """Writes model, inner optimizer and outer state of all replicas, after a `flush()`. Called on all ranks.

        Args:
            folder: on a file system that all hosts share.
            stateful: more to keep for each replica, such as `scheduler=scheduler`.

        Raises:
            RuntimeError: not every rank's part is in the folder; it is no checkpoint then.
        """
        folder = Path(folder)
        self.flush()
        self._note_steps()
        replica, meeting, parts, late = self.layout.replica, "", None, None
        if isinstance(self._peers, ElasticPeers) and self._peers.meeting is not None:
            parts, meeting = [replica], self._peers.meeting.key
            if self._peers.meeting.replicas[0] != replica:  # that one writes for all
                late = LatePart(folder, folder.with_name(f"{folder.name}.part-{replica}"), replica, meeting)
        first = self._accelerator.process_index == 0
        if first:
            start(folder) if late is None else late.begin()
        self._accelerator.wait_for_everyone()
        host = {
            "rank": {"own_steps": self._own_steps},
            "stateful": {name: thing.state_dict() for name, thing in stateful.items()},
        }
        step = self._steps_of_all
        writes_outer = late is None and (self.config.elastic or replica == 0)
        place = folder if late is None else late.place
        checkpoint.save(place, self._training(), step, host, write_outer=writes_outer)
        self._accelerator.wait_for_everyone()
        if first and late is None:
            seal(folder, checkpoint.describe(self._training(), step, self.config, parts, meeting))
        elif first:
            self._part = late
            self._bring_part(at_last=self._engine is None)
        self._accelerator.wait_for_everyone()

    def _bring_part(self, at_last: bool = False) -> None:
        """This replica's part of what another has written, or is about to."""
        if self._part is None:
            return
        brought = self._part.bring_at_last() if at_last else self._part.bring()
        if brought or at_last:
            self._part = None

    def load(self, folder: str | Path, **stateful: Any) -> int:
        """Takes what `save` wrote, also by another number of replicas and shards; the optimizer steps taken until then
        by this replica (with `sync_seconds` and another layout: by all replicas / R).

        Raises:
            ValueError: the folder is not whole, of another model, or has none of what `stateful` names.
        """
        folder = Path(folder)
        if (trouble := problem(folder, trainer=False)) is not None:
            raise ValueError(f"Cannot continue from {folder}: {trouble}.")
        manifest = Manifest.read(folder)
        check_model(manifest, self._model, folder)
        host = checkpoint.read_host(folder, manifest, self.layout, self.config.elastic)
        if missing := set(stateful) - set(host["stateful"]):
            raise ValueError(f"{folder} was saved without {sorted(missing)}; it keeps {sorted(host['stateful'])}.")
        checkpoint.load_model(folder, self._model, self._training().group)
        checkpoint.load_inner(folder, manifest, self._training())
        for name, thing in stateful.items():
            thing.load_state_dict(host["stateful"][name])
        own_steps: int = manifest.step if host["rank"] is None else host["rank"]["own_steps"]
        if host["rank"] is None and host["totals"]:
            own_steps = round(host["totals"][self.layout.replica])
        self._own_steps, self._steps_of_all = own_steps, manifest.step
        if self._engine is not None:
            self._engine.abandon()  # a sync that was under way belongs to what is given up
            engine = self._start(own_steps)
            checkpoint.load_outer(folder, manifest, self._training())
            if host["rank"] is not None:
                checkpoint.load_rank(engine, host["rank"])
            elif host["totals"]:  # of replicas that come and go one has written what all have told
                engine.progress.confirmed, engine.progress.totals = float(manifest.step), list(host["totals"])
            self._begin_journal()
        return own_steps

    def _note_steps(self) -> None:
        if self._engine is not None:
            self._own_steps, self._steps_of_all = self._engine.schedule.step, round(self._engine.progress.value)

    def _training(self) -> checkpoint.Training:
        group = dist.group.WORLD if dist.is_initialized() else None
        if self.layout.num_replicas > 1:
            group = self._peers.inside.group
        return checkpoint.Training(self.layout, self._model, self._optimizer, group, self._engine, self.config.elastic)
