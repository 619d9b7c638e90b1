"""The outer state as named tensors: what is equal on all replicas, and the residuals, which are each replica's own.

anchor/NAME        fp32, of the parameter's shape
outer/NAME/KEY     what the outer rule keeps, by the rule's own names; or a user's optimizer, as tensors.py says
detector/FIELD     statistics of all units and replicas
syncs, rates       in which each unit took part; the inner learning rate of the last of them
tuning             settings that find themselves, and what they come from
residual/NAME      fp32, of the parameter's shape: what compressed syncs left out; beside the inner optimizer's state
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_edit.checkpoint.manifest import Manifest
from hf_edit.checkpoint.storage import read, saved_tensors
from hf_edit.checkpoint.tensors import Owners, ReplicaRanks, optimizer_class, pack, templates, unpack
from hf_edit.method.outer import OuterState
from hf_edit.method.penalty import DetectorState
from hf_edit.sync.unit_sync import OuterSync
from hf_edit.sync.units import Unit, like_param, local_part

logger = logging.getLogger(__name__)


def outer_tensors(sync: OuterSync, ranks: ReplicaRanks) -> dict[str, Tensor]:
    """Anchor, outer rule's state, detectors and this replica's residuals (residual/REPLICA/NAME) by name, sharing their
    memory: reading them changes nothing.

    With a user's outer optimizer all ranks of the replica call it.
    """
    return {**pack_outer(sync, ranks)[0], **residual_tensors(sync, f"residual/{ranks.layout.replica}")}


def residual_tensors(sync: OuterSync, prefix: str = "residual") -> dict[str, Tensor]:
    """What compressed syncs have left out so far, sharing its memory; {} without compression."""
    found: dict[str, Tensor] = {}
    for (unit, state), residual in zip(_pairs(sync), sync.reduction.residuals, strict=False):
        for name, param, view in zip(unit.names, unit.params, state.views(residual), strict=True):
            found[f"{prefix}/{name}"] = like_param(param, view)
    return found


def load_residuals(place: Path, sync: OuterSync, ranks: ReplicaRanks) -> None:
    """Adds what is in the part of a saved replica; also for a run without codes, whose next sync sends it."""
    saved = saved_tensors(place)
    if not sync.states or not any(name.startswith("residual/") for name in saved):
        return
    sync.keep_residuals()
    found = {name: tensor for name, tensor in residual_tensors(sync).items() if name in saved}
    read_in = {name: torch.empty_like(tensor) for name, tensor in found.items()}
    read(read_in, place, ranks.group)
    for name, tensor in found.items():
        local_part(tensor).add_(local_part(read_in[name]))


def pack_outer(sync: OuterSync, ranks: ReplicaRanks) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is equal on all replicas, as of `outer_tensors`; and of a user's optimizers what is no tensor: their class,
    and by unit what `pack` leaves."""
    found, rest = _declared(sync), {}
    for unit, state in _pairs(sync):
        if state.optimizer is not None:
            tensors, rest[unit.name] = pack(state.optimizer, _owners(unit), ranks)
            found |= {f"outer/{key}": tensor for key, tensor in tensors.items()}
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # what is offloaded may still be on its way to the host
    return found, {"class": _users_class(sync), "units": rest}


def load_outer(place: Path, manifest: Manifest, sync: OuterSync, rest: Mapping[str, Any], ranks: ReplicaRanks) -> None:
    """In place. A checkpoint of the warm-up, or of one replica, has no anchor, and leaves it."""
    saved = saved_tensors(place)
    state = {key: tensor for key, tensor in _declared(sync).items() if key in saved and not _is_by_unit(key)}
    by_unit = {
        key: torch.empty(meta.size, dtype=meta.properties.dtype) for key, meta in saved.items() if _is_by_unit(key)
    }
    state |= by_unit
    same_class = (users := _users_class(sync)) == rest.get("class")
    entries = saved if users is not None and same_class else {}
    owners = [owner for unit in sync.units for owner in _owners(unit)]
    made, lost = templates(owners, entries, "outer/", ranks.layout)
    read({**state, **made}, place, ranks.group)
    for unit, outer in _pairs(sync) if entries else ():
        unpack(outer.optimizer, _owners(unit), made, "outer/", rest["units"].get(unit.name, {}), lost, parts=True)
    if any(key.startswith("anchor/") for key in saved) and sync.states:
        _tell_what_starts_anew(sync, saved, rest.get("class"))
    if by_unit:
        _place_by_unit(sync, by_unit, manifest)
    sync.sync_count = manifest.sync_count


def _tell_what_starts_anew(sync: OuterSync, saved: Mapping[str, Any], saved_class: str | None) -> None:
    users = _users_class(sync)
    there = sorted({key.rpartition("/")[2].partition("@")[0] for key in saved if key.startswith("outer/")})
    here = sorted({name for state in sync.states for name in state.tensors})
    if users != saved_class or (users is None and there != here):
        logger.warning(
            "EDiT: the checkpoint's outer state is %s of %s, this run's is %s of %s: what both have goes on, what one "
            "alone has is left out or starts anew.",
            there, saved_class or "a built-in rule", here if users is None else "its own", users or "a built-in rule",
        )  # fmt: skip


def _declared(sync: OuterSync) -> dict[str, Tensor]:
    """Anchors, what a built-in rule keeps, detectors."""
    found: dict[str, Tensor] = {f"detector/{k}": v for k, v in sync.detectors.state_dict().items()}
    found["syncs"], found["rates"] = sync.unit_syncs, sync.unit_rates
    if sync.tuning is not None:
        found["tuning"] = sync.tuning
    for unit, state in _pairs(sync):
        for key, flat in (("", state.anchor), *state.tensors.items()):
            views = state.views(flat.detach())
            for name, param, view in zip(unit.names, unit.params, views, strict=True):
                found[f"outer/{name}/{key}" if key else f"anchor/{name}"] = like_param(param, view)
    return found


def _pairs(sync: OuterSync) -> list[tuple[Unit, OuterState]]:
    """None before the first anchor is taken."""
    return list(zip(sync.units, sync.states, strict=False))


def _owners(unit: Unit) -> Owners:
    return list(zip(unit.names, unit.params, strict=True))


def _users_class(sync: OuterSync) -> str | None:
    """The class of a user's outer optimizer; None for a built-in rule, and before the first anchor."""
    optimizers = [state.optimizer for state in sync.states if state.optimizer is not None]
    return optimizer_class(optimizers[0]) if optimizers else None


def _is_by_unit(key: str) -> bool:
    return key in ("syncs", "rates") or key.startswith("detector/")


def _place_by_unit(sync: OuterSync, saved: Mapping[str, Tensor], manifest: Manifest) -> None:
    """What is kept by unit, by the units' names; a unit that is new starts anew. Replica i takes the detectors of saved
    replica i mod R."""
    mine = DetectorState.zeros(len(sync.units), sync.peers.num_replicas)
    rows = {name: row for row, name in enumerate(manifest.units)}
    columns = [replica % manifest.num_replicas for replica in range(sync.peers.num_replicas)]
    for number, unit in enumerate(sync.units):
        if unit.name in rows:
            for name, tensor in mine.state_dict().items():
                tensor[number] = saved[f"detector/{name}"][rows[unit.name]][columns]
            if "syncs" in saved:
                sync.unit_syncs[number] = saved["syncs"][rows[unit.name]]
            else:  # written before units had a count of their own
                sync.unit_syncs[number] = manifest.sync_count
            if "rates" in saved:
                sync.unit_rates[number] = saved["rates"][rows[unit.name]]
    sync.detectors = mine
