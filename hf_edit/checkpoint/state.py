"""Outer and per-replica state, in and out of `checkpoint-N/edit/` (torch.distributed.checkpoint, DCP).

    edit/outer/          anchor, outer momentum, detectors, buffers: equal on all replicas, written by one of them
    edit/replica-I/      replica I's inner optimizer, sharded over its ranks
    edit/replica-I/host-J.pt   what rank J of it keeps on the host: learning rates, scheduler, scaler, counts
    edit/manifest.json   what the run was, and every file of the checkpoint with its size; written last, atomically

Tensors are stored by parameter name as whole (DTensor) tensors, so another number of ranks in a replica reshards them;
every rank writes its own shard from where it lies.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from hf_edit.checkpoint.manifest import EDIT_FOLDER, Manifest
from hf_edit.method.penalty import DetectorState
from hf_edit.peers.layout import Layout
from hf_edit.sync.unit_sync import OuterSync
from hf_edit.sync.units import like_param, local_part, named_tensors

logger = logging.getLogger(__name__)

# -- out ---------------------------------------------------------------------------------------------------------------


def save_outer(folder: Path, model: nn.Module, sync: OuterSync, group: Any) -> None:
    """Writes what all replicas have in common; called by all ranks of one replica."""
    _write({**model_tensors(model, sync), **outer_tensors(sync)}, folder / EDIT_FOLDER / "outer", group)


def save_inner(
    folder: Path, layout: Layout, model: nn.Module, optimizer: Any, host: dict[str, Any], group: Any
) -> None:
    """Writes this replica's inner optimizer and `host`, this rank's values; called by all ranks of all replicas."""
    tensors, rest = pack_optimizer(optimizer, _owners(optimizer, model), layout)
    place = folder / EDIT_FOLDER / f"replica-{layout.replica}"
    _write(tensors, place, group)
    with open(place / f"host-{layout.shard}.pt", "wb") as file:
        torch.save({**host, "optimizer": rest}, file)
        file.flush()
        os.fsync(file.fileno())


# -- in ----------------------------------------------------------------------------------------------------------------


def load_model(folder: Path, model: nn.Module, group: Any) -> None:
    """Parameters and buffers, in place. Frozen parameters of a PEFT model are not in a checkpoint and stay."""
    place = folder / EDIT_FOLDER / "outer"
    saved = _saved_keys(place)
    params, buffers = named_tensors(model)
    state = {
        key: tensor.detach()
        for name, tensor in {**params, **buffers}.items()
        for key in (f"model/{name}", f"anchor/{name}")
        if key in saved
    }
    _read(state, place, group)


def load_outer(folder: Path, manifest: Manifest, sync: OuterSync, group: Any) -> None:
    """Anchor, outer momentum and detectors, in place. A checkpoint of the warm-up has no anchor, and leaves it."""
    place = folder / EDIT_FOLDER / "outer"
    saved = _saved_keys(place)
    kinds = {key.partition("/")[0] for key in saved}
    metas = {f.name: saved[f"detector/{f.name}"] for f in fields(DetectorState)}
    detectors = {name: torch.empty(meta.size, dtype=meta.properties.dtype) for name, meta in metas.items()}
    state = {key: tensor for key, tensor in outer_tensors(sync).items() if key in saved}
    state |= {f"detector/{name}": tensor for name, tensor in detectors.items()}
    of_the_user = [
        (outer.optimizer, list(zip(unit.names, unit.params, strict=True)))
        for unit, outer in zip(sync.units, sync.states, strict=False)
        if outer.optimizer is not None
    ]
    for _, owners in of_the_user:
        state |= _templates(owners, saved, "outer/", None)
    _read(state, place, group)
    for optimizer, owners in of_the_user:
        _unpack_optimizer(optimizer, owners, state, "outer/", {}, whole=False)
    if "anchor" in kinds and "momentum" not in kinds and any("momentum" in outer.tensors for outer in sync.states):
        logger.warning("EDiT: the checkpoint has no outer momentum; it starts at zero.")
    _place_detectors(sync, detectors, manifest)
    sync.sync_count = manifest.sync_count


def load_inner(
    folder: Path, manifest: Manifest, layout: Layout, model: nn.Module, optimizer: Any, group: Any
) -> dict[str, Any]:
    """This replica's inner optimizer; returns the host values that this rank, or the one in its place, saved.

    Replica i takes the state of saved replica i mod R. The counts since the last sync are kept by their own rank only.
    """
    host = read_host(folder, manifest, layout)
    place = _replica_folder(folder, manifest, layout)
    owners = _owners(optimizer, model)
    saved = _saved_keys(place)
    state = _templates(owners, saved, "", layout if layout.replica_size == manifest.replica_size else None)
    left_out = [key for key in saved if key not in state and "@" not in key]
    if left_out or (any("@" in key for key in saved) and layout.replica_size != manifest.replica_size):
        logger.warning(
            "EDiT: parts of the inner optimizer's state depend on the number of ranks in a replica and start anew."
        )
    _read(state, place, group)
    rest = host.pop("optimizer")
    _unpack_optimizer(optimizer, owners, state, "", rest, whole=True)
    return host


def read_host(folder: Path, manifest: Manifest, layout: Layout) -> dict[str, Any]:
    """The host values that this rank, or the one in its place, saved; "rank" is None in another layout."""
    place = _replica_folder(folder, manifest, layout)
    same = (layout.num_replicas, layout.replica_size) == (manifest.num_replicas, manifest.replica_size)
    shard = layout.shard if layout.replica_size == manifest.replica_size else 0
    if not place.is_dir():
        raise ValueError(
            f"{place} is not there: this host sees only a part of the checkpoint. Put output_dir on a file system that "
            "all hosts share, or resume with the replicas on the hosts that saved them."
        )
    host = torch.load(place / f"host-{shard}.pt", map_location="cpu", weights_only=True)
    return host if same else {**host, "rank": None}


def _replica_folder(folder: Path, manifest: Manifest, layout: Layout) -> Path:
    return folder / EDIT_FOLDER / f"replica-{layout.replica % manifest.num_replicas}"


# -- tensors by name ---------------------------------------------------------------------------------------------------


def outer_tensors(sync: OuterSync) -> dict[str, Tensor]:
    """Anchor, momentum and detectors by name, sharing their memory: reading them changes nothing."""
    found: dict[str, Tensor] = {f"detector/{k}": v for k, v in sync.detectors.state_dict().items()}
    for unit, state in zip(sync.units, sync.states, strict=False):
        for kind, flat in {"anchor": state.anchor, **state.tensors}.items():
            views = state.views(flat.detach())
            for name, param, view in zip(unit.names, unit.params, views, strict=True):
                found[f"{kind}/{name}"] = like_param(param, view)
        if state.optimizer is not None:
            owners = list(zip(unit.names, unit.params, strict=True))
            tensors, _ = pack_optimizer(state.optimizer, owners, Layout(1, 1, 0))
            found |= {f"outer/{key}": tensor for key, tensor in tensors.items()}
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # what is offloaded may still be on its way to the host
    return found


def model_tensors(model: nn.Module, sync: OuterSync) -> dict[str, Tensor]:
    """What the anchors do not hold: buffers, parameters of the warm-up, and frozen ones unless PEFT keeps them."""
    params, buffers = named_tensors(model)
    anchored = {name for unit in sync.units for name in unit.names} if sync.states else set()
    peft = any(hasattr(module, "peft_config") for module in model.modules())
    kept = {n: p.detach() for n, p in params.items() if n not in anchored and (p.requires_grad or not peft)}
    return {f"model/{name}": tensor for name, tensor in {**kept, **buffers}.items()}


def pack_optimizer(
    optimizer: Any, owners: Sequence[tuple[str, Tensor]], layout: Layout
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors by "parameter/key", and the rest: its groups and what is no tensor.

    Args:
        owners: name and model parameter of each of the optimizer's parameters, in its order.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for number, entries in state["state"].items():
        name, param = owners[number]
        for key, value in entries.items():
            if not isinstance(value, Tensor):
                values.setdefault(name, {})[key] = value
            elif local_part(value) is not value or value.numel() <= 1 or local_part(param) is param:
                tensors[f"{name}/{key}"] = value
            elif value.shape == local_part(param).shape:
                tensors[f"{name}/{key}"] = like_param(param, value)
            else:  # of a shape of its own on every rank
                tensors[f"{name}/{key}@{layout.shard}of{layout.replica_size}"] = value
    groups = [{key: v for key, v in group.items() if key != "params"} for group in state["param_groups"]]
    return tensors, {"groups": groups, "values": values}


def _unpack_optimizer(
    optimizer: Any, owners: Sequence[tuple[str, Tensor]], loaded: Mapping[str, Tensor], prefix: str,
    rest: dict[str, Any], whole: bool,
) -> None:  # fmt: skip
    entries: dict[int, dict[str, Any]] = {}
    for number, (name, _) in enumerate(owners):
        start = f"{prefix}{name}/"
        found = {key.removeprefix(start).split("@")[0]: t for key, t in loaded.items() if key.startswith(start)}
        found = {key: tensor if whole else local_part(tensor) for key, tensor in found.items() if "/" not in key}
        found |= rest.get("values", {}).get(name, {})
        if found:
            entries[number] = found
    state = optimizer.state_dict()
    groups, saved = state["param_groups"], rest.get("groups")
    if saved is not None and len(saved) == len(groups):
        groups = [{**group, **kept} for group, kept in zip(groups, saved, strict=True)]
    elif saved is not None:
        logger.warning("EDiT: the inner optimizer had %d parameter groups and has %d; the groups' settings are the "
                       "new ones.", len(saved), len(groups))  # fmt: skip
    optimizer.load_state_dict({"state": entries, "param_groups": groups})


def _templates(
    owners: Sequence[tuple[str, Tensor]], saved: Mapping[str, Any], prefix: str, layout: Layout | None
) -> dict[str, Tensor]:
    """Empty tensors for the saved state of `owners`, sharded as their parameters are now."""
    found = {}
    params = {prefix + name: param for name, param in owners}
    for key, meta in saved.items():
        param = params.get(key.rpartition("/")[0])
        if param is None:
            continue
        part = local_part(param)
        sharded = part is not param
        dtype = meta.properties.dtype
        if "@" in key:
            if layout is None or not key.endswith(f"@{layout.shard}of{layout.replica_size}"):
                continue
            found[key] = torch.empty(meta.size, dtype=dtype, device=part.device)
        elif sharded and meta.size == param.shape:
            found[key] = like_param(param, torch.empty_like(part, dtype=dtype))
        elif meta.size.numel() <= 1:
            found[key] = torch.empty(meta.size, dtype=dtype)
        elif not sharded:
            found[key] = torch.empty(meta.size, dtype=dtype, device=part.device)
    return found


def _owners(optimizer: Any, model: nn.Module) -> list[tuple[str, Tensor]]:
    names = {param: name for name, param in named_tensors(model)[0].items()}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [(names.get(param, f"parameter {number}"), param) for number, param in enumerate(params)]


def _place_detectors(sync: OuterSync, saved: dict[str, Tensor], manifest: Manifest) -> None:
    """Replica i takes the detectors of saved replica i mod R, by the units' names; a unit that is new starts anew."""
    mine = DetectorState.zeros(len(sync.units), sync.peers.num_replicas)
    rows = {name: row for row, name in enumerate(manifest.units)}
    columns = [replica % manifest.num_replicas for replica in range(sync.peers.num_replicas)]
    for number, unit in enumerate(sync.units):
        if unit.name in rows:
            for name, tensor in mine.state_dict().items():
                tensor[number] = saved[name][rows[unit.name]][columns]
    sync.detectors = mine


def _saved_keys(place: Path) -> dict[str, Any]:
    return dict(FileSystemReader(place).read_metadata().state_dict_metadata)


def _write(tensors: dict[str, Tensor], place: Path, group: Any) -> None:
    save(tensors, storage_writer=FileSystemWriter(place), process_group=group, no_dist=group is None)


def _read(tensors: dict[str, Tensor], place: Path, group: Any) -> None:
    load(tensors, storage_reader=FileSystemReader(place), process_group=group, no_dist=group is None)
