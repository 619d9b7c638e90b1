"""Outer and per-replica state of a training, in and out of `checkpoint-N/edit/`.

    edit/outer/          anchor, outer rule's state, detectors, buffers: equal on all replicas, written by one of them
    edit/replica-I/      replica I's inner optimizer and what compressed syncs left out, sharded over its ranks
    edit/replica-I/host-J.pt   what rank J of it keeps on the host, and the step that it is of
    edit/manifest.json   what the run was, and every file of the checkpoint with its size; written last, atomically

Of replicas that come and go one writes for all, and waits for nobody; the others' parts come later (`late.py`).

Tensors are stored by parameter name as whole (DTensor) tensors, so another number of ranks in a replica reshards them;
every rank writes its own shard from where it lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hf_edit.checkpoint.outer as outer
from hf_edit.checkpoint.manifest import EDIT_FOLDER, Manifest, host_part, replica_part, trained_parameters
from hf_edit.checkpoint.storage import read, saved_tensors, sync_to_disk, write
from hf_edit.checkpoint.tensors import Owners, ReplicaRanks, pack, templates, unpack
from hf_edit.config import EDiTConfig
from hf_edit.peers.layout import Layout
from hf_edit.sync.counts import TALLIES
from hf_edit.sync.engine import Engine
from hf_edit.sync.units import named_tensors


@dataclass(frozen=True)
class Training:
    """What a checkpoint is of, as this rank sees it.

    `group` is the process group of its replica, None for a process alone. With one replica there is no `engine`.
    """

    layout: Layout
    model: nn.Module
    optimizer: Any
    group: Any
    engine: Engine | None = None
    elastic: bool = False

    @property
    def ranks(self) -> ReplicaRanks:
        return ReplicaRanks(self.layout, self.group)


# -- out ---------------------------------------------------------------------------------------------------------------


def save(folder: Path, training: Training, step: int, host: dict[str, Any], *, write_outer: bool) -> None:
    """Writes this rank's part of `folder`/edit, which `manifest.start` has made; called by all ranks of all replicas.

    Args:
        host: what this rank keeps beside (numbers, strings, lists, dicts, tensors): "rank" is its own alone, "stateful"
            holds state by name, such as that of the scheduler.
        write_outer: True on the ranks of the replica that writes what all have in common.

    Raises:
        RuntimeError: the replicas are not equal.
    """
    engine, layout = training.engine, training.layout
    if engine is not None and not engine.replicas_equal:
        raise RuntimeError("A checkpoint is of equal replicas; call flush() first.")
    shared, outer_rest = ({}, {}) if engine is None else outer.pack_outer(engine.sync, training.ranks)
    if write_outer:
        shared = {**_model_tensors(training.model, engine), **shared}
        write(shared, folder / EDIT_FOLDER / "outer", training.group)
    rank = dict(host["rank"])
    if engine is not None:
        rank["tallies"] = {name: float(value) for name, value in engine.counts.tallies.items()}
        rank["progress"] = asdict(engine.progress)
    tensors, rest = pack(training.optimizer, _owners(training.optimizer, training.model), training.ranks)
    if engine is not None:
        tensors |= outer.residual_tensors(engine.sync)
    write(tensors, folder / replica_part(layout.replica), training.group)
    part = folder / host_part(layout.replica, layout.shard)
    torch.save({"step": step, "optimizer": rest, "outer": outer_rest, "host": {**host, "rank": rank}}, part)
    sync_to_disk(part)


def describe(
    training: Training, step: int, config: EDiTConfig, parts: Sequence[int] | None = None, meeting: str = ""
) -> Manifest:
    """The manifest of `training`'s checkpoint of `step`; `parts` are the replicas in this folder, None for all."""
    engine, layout = training.engine, training.layout
    return Manifest(
        step=step,
        num_replicas=layout.num_replicas,
        replica_size=layout.replica_size,
        parts=list(range(layout.num_replicas)) if parts is None else list(parts),
        sync_count=0 if engine is None else engine.sync.sync_count,
        schedule_step=step if engine is None else engine.schedule.step,
        units=[] if engine is None else [unit.name for unit in engine.units],
        config=config.to_dict(),
        parameters=trained_parameters(training.model),
        files={},
        meeting=meeting,
    )


# -- in ----------------------------------------------------------------------------------------------------------------


def load_model(folder: Path, model: nn.Module, group: Any) -> None:
    """Parameters and buffers, in place. Frozen parameters of a PEFT model are not in a checkpoint and stay."""
    place = folder / EDIT_FOLDER / "outer"
    saved = saved_tensors(place)
    params, buffers = named_tensors(model)
    state = {
        key: tensor.detach()
        for name, tensor in {**params, **buffers}.items()
        for key in (f"model/{name}", f"anchor/{name}")
        if key in saved
    }
    read(state, place, group)


def load_inner(folder: Path, manifest: Manifest, training: Training) -> dict[str, Any]:
    """This replica's inner optimizer; returns the host values that this rank, or the one in its place, saved.

    Replica i takes the state of saved replica i mod R. The counts since the last sync are kept by their own rank only.
    """
    layout, optimizer = training.layout, training.optimizer
    rest = _read_part(folder, manifest, layout)["optimizer"]
    place = folder / replica_part(manifest.part_for(layout.replica))
    owners = _owners(optimizer, training.model)
    state, lost = templates(owners, saved_tensors(place), "", layout)
    read(state, place, training.group)
    unpack(optimizer, owners, state, "", rest, lost)
    return read_host(folder, manifest, layout, training.elastic)


def read_host(folder: Path, manifest: Manifest, layout: Layout, elastic: bool = False) -> dict[str, Any]:
    """The host values that this rank, or the one in its place, saved; "rank" is None in another layout, and "totals"
    are the steps that each replica had told of, [] if that is not known or of no use.

    Args:
        elastic: replicas come and go in this run.
    """
    host: dict[str, Any] = _read_part(folder, manifest, layout)["host"]
    same = (layout.num_replicas, layout.replica_size) == (manifest.num_replicas, manifest.replica_size)
    same = same and elastic == manifest.elastic
    progress = host["rank"].get("progress")
    host["totals"] = progress["totals"] if same and elastic and progress else []
    return host if same and manifest.part_for(layout.replica) == layout.replica else {**host, "rank": None}


def _read_part(folder: Path, manifest: Manifest, layout: Layout) -> dict[str, Any]:
    shard = layout.shard if layout.replica_size == manifest.replica_size else 0
    path = folder / host_part(manifest.part_for(layout.replica), shard)
    if not path.is_file():
        raise ValueError(
            f"{path} is not there: this host sees only a part of the checkpoint. Put output_dir on a file system that "
            "all hosts share, or resume with the replicas on the hosts that saved them."
        )
    part: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return part


def load_outer(folder: Path, manifest: Manifest, training: Training) -> None:
    """The outer state, for an engine that began with the steps taken until then, on a model that is loaded already.

    Replica i takes the residuals of the saved replicas i, i + R, ...: each of them is a part of one sum.
    """
    engine, layout = training.engine, training.layout
    if engine is None:
        return
    rest = _read_part(folder, manifest, layout)["outer"]
    outer.load_outer(folder / EDIT_FOLDER / "outer", manifest, engine.sync, rest, training.ranks)
    engine.tuning.resume(manifest.config)
    for replica in {*range(layout.replica, manifest.num_replicas, layout.num_replicas)} & {*manifest.parts}:
        outer.load_residuals(folder / replica_part(replica), engine.sync, training.ranks)


# -- counts ------------------------------------------------------------------------------------------------------------


def counters(engine: Engine) -> dict[str, Any]:
    """Where this rank is in the schedule, and its counts since the last sync."""
    schedule = engine.schedule
    return {
        **{name: float(value) for name, value in engine.counts.tallies.items()},
        "step": schedule.step,
        "inner_steps": schedule.inner_steps,
        "interval_steps": schedule.interval_steps,
        "sync_count": engine.sync.sync_count,
        "whole": engine.sync.whole,
        "fragment_steps": list(engine.fragments.steps),
        "progress": engine.progress.confirmed,
    }


def load_counters(engine: Engine, counters: dict[str, Any]) -> None:
    engine.counts.tallies = {name: counters.get(name, 0.0) for name in TALLIES}
    engine.schedule.step, engine.schedule.interval_steps = int(counters["step"]), int(counters["interval_steps"])
    engine.schedule.inner_steps = int(counters["inner_steps"])
    engine.sync.sync_count, engine.sync.whole = int(counters["sync_count"]), bool(counters["whole"])
    engine.fragments.steps = list(counters["fragment_steps"])
    engine.progress.confirmed = counters["progress"]
    engine.progress.own_steps, engine.progress.handed_over = engine.schedule.interval_steps, 0
    engine.set_interval()


def load_rank(engine: Engine, state: dict[str, Any]) -> None:
    """This rank's counts at the time of the checkpoint, as `save` has put them into `host["rank"]`."""
    engine.counts.tallies.update(state["tallies"])
    engine.progress.__dict__.update(state["progress"])
    engine.set_interval()


# -- names -------------------------------------------------------------------------------------------------------------


def _model_tensors(model: nn.Module, engine: Engine | None) -> dict[str, Tensor]:
    """What the anchors do not hold: buffers, parameters of the warm-up, and frozen ones unless PEFT keeps them."""
    params, buffers = named_tensors(model)
    anchored = {name for unit in engine.units for name in unit.names} if engine and engine.sync.states else set()
    peft = any(hasattr(module, "peft_config") for module in model.modules())
    kept = {n: p.detach() for n, p in params.items() if n not in anchored and (p.requires_grad or not peft)}
    return {f"model/{name}": tensor for name, tensor in {**kept, **buffers}.items()}


def _owners(optimizer: Any, model: nn.Module) -> Owners:
    names = {param: name for name, param in named_tensors(model)[0].items()}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [(names.get(param, f"parameter {number}"), param) for number, param in enumerate(params)]
