"""An optimizer's state as named tensors, so that another number of ranks in a replica can take it.

The key of a tensor says what it is, and nothing is guessed from sizes when it is read:

    NAME/KEY          of the parameter's shape and cut like it: resharded for any number of ranks
    NAME/KEY@part     the same, but the optimizer holds this rank's part as a plain tensor
    NAME/KEY@all      the same on all ranks of the replica, such as a step count
    NAME/KEY@R,S0     a DTensor of a shape of its own, with its placement on each axis of the mesh
    NAME/KEY@JofS     rank J's own; of use to replicas of S ranks alone
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import empty as empty_dtensor

from hf_edit.peers.layout import Layout
from hf_edit.peers.replica import gather_object
from hf_edit.sync.units import like_param, local_part

logger = logging.getLogger(__name__)

Owners = Sequence[tuple[str, Tensor]]  # name and model parameter of each of an optimizer's parameters, in its order


@dataclass(frozen=True)
class ReplicaRanks:
    """Where this rank is, and the process group of its replica; None: it is alone."""

    layout: Layout
    group: Any

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank of the replica, in their order."""
        return gather_object(value, self.layout.replica_size, self.group)


def pack(optimizer: Any, owners: Owners, ranks: ReplicaRanks) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's tensors, and the rest: its groups and what is no tensor. Called by all ranks of the replica."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, tuple[Tensor, Tensor]] = {}
    values: dict[str, dict[str, Any]] = {}
    for number, entries in state["state"].items():
        name, param = owners[number]
        for key, value in entries.items():
            if not isinstance(value, Tensor):
                values.setdefault(name, {})[key] = value
            elif isinstance(value, DTensor):
                tensors |= _packed_dtensor(f"{name}/{key}", param, value)
            else:
                plain[f"{name}/{key}"] = param, value
    tensors |= _packed_plain(plain, owners, ranks)
    rest = {
        "class": optimizer_class(optimizer),
        "groups": [{key: v for key, v in group.items() if key != "params"} for group in state["param_groups"]],
        "values": values,
        "dtypes": [str(param.dtype) for param in _params(optimizer)],
    }
    return tensors, rest


def _packed_dtensor(entry: str, param: Tensor, value: DTensor) -> dict[str, Tensor]:
    if isinstance(param, DTensor) and (value.shape, value.placements) == (param.shape, param.placements):
        return {entry: value}
    if not all(placement.is_replicate() or type(placement) is Shard for placement in value.placements):
        value = value.redistribute(placements=[Replicate()] * value.device_mesh.ndim)  # a sum that is still due
    places = (f"S{p.dim}" if isinstance(p, Shard) else "R" for p in value.placements)
    return {f"{entry}@{','.join(places)}": value}


def _packed_plain(plain: Mapping[str, tuple[Tensor, Tensor]], owners: Owners, ranks: ReplicaRanks) -> dict[str, Tensor]:
    """`plain` tensors, each with its parameter, by the keys that say what they are.

    What one rank sees does not tell: a step count has the shape of a part of one element, and the next rank's part may
    have two, or none. So all ranks of the replica look at all of it.
    """
    fits = {entry: value.shape == local_part(param).shape for entry, (param, value) in plain.items()}
    hollow = {name for name, param in owners if not local_part(param).numel()}
    everyone = ranks.gather(({e: (tuple(value.shape), fits[e]) for e, (_, value) in plain.items()}, hollow))
    free = _of_one_shape([theirs for theirs, _ in everyone], {name: param.shape for name, param in owners})

    def is_like_the_parameter(entry: str) -> bool:
        name, _, key = entry.rpartition("/")
        found = (theirs.get(entry, ((), name in empty)) for theirs, empty in everyone)
        return key not in free and all(fitting for _, fitting in found)

    like = set(filter(is_like_the_parameter, plain))
    digests = ranks.gather({entry: _digest(value) for entry, (_, value) in plain.items() if entry not in like})
    shard, size = ranks.layout.shard, ranks.layout.replica_size
    packed = {}
    for entry, (param, value) in plain.items():
        if entry in like:
            key, value = (f"{entry}@part", like_param(param, value)) if isinstance(param, DTensor) else (entry, value)
        elif len({theirs.get(entry) for theirs in digests}) == 1 and (size > 1 or entry.rpartition("/")[2] in free):
            key = f"{entry}@all"
        else:
            key = f"{entry}@{shard}of{size}"
        packed[key] = value
    return packed


def _of_one_shape(everyone: Sequence[Mapping[str, tuple[Any, bool]]], params: Mapping[str, Any]) -> set[str]:
    """The keys that have no dimension, or one shape for parameters of several shapes, such as a step count [1]."""
    shapes: dict[str, tuple[set[Any], set[Any]]] = {}
    for theirs in everyone:
        for entry, (shape, _) in theirs.items():
            name, _, key = entry.rpartition("/")
            of_params, of_values = shapes.setdefault(key, (set(), set()))
            of_params.add(params[name])
            of_values.add(shape)
    return {key for key, (of_p, of_v) in shapes.items() if of_v == {()} or len(of_v) == 1 < len(of_p)}


def _digest(tensor: Tensor) -> str:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"


def templates(
    owners: Owners, saved: Mapping[str, Any], prefix: str, layout: Layout
) -> tuple[dict[str, Tensor], set[str]]:
    """Empty tensors for what is `saved` of `owners`, cut as their parameters are now; and whose state is lost.

    A parameter's state is taken whole or, where a part of it is of use to other ranks alone, not at all: an optimizer
    takes a parameter that has any state for one that has all of it.
    """
    params = {prefix + name: param for name, param in owners}
    found: dict[str, Tensor] = {}
    lost: set[str] = set()
    for entry, meta in saved.items():
        owner, _, key = entry.rpartition("/")
        if (param := params.get(owner)) is None:
            continue
        kind = key.partition("@")[2]
        rank, own, size = kind.partition("of")
        if own and int(size) == layout.replica_size and int(rank) != layout.shard:
            continue  # another rank's
        template = None if own and int(size) != layout.replica_size else _template(param, meta, kind)
        if template is None:
            lost.add(owner)
        else:
            found[entry] = template
    if lost:
        logger.warning(
            "EDiT: the optimizer's state of %d parameters (%s, ...) is of use to replicas of the saved number of ranks "
            "alone, and starts anew.", len(lost), min(lost).removeprefix(prefix),
        )  # fmt: skip
    return {e: t for e, t in found.items() if e.rpartition("/")[0] not in lost}, {o.removeprefix(prefix) for o in lost}


def _template(param: Tensor, meta: Any, kind: str) -> Tensor | None:
    part, dtype = local_part(param), meta.properties.dtype
    if kind in ("", "part"):
        return like_param(param, torch.empty_like(part, dtype=dtype, requires_grad=False))
    if kind == "all" or "of" in kind:
        return torch.empty(meta.size, dtype=dtype)
    places = [Replicate() if place == "R" else Shard(int(place[1:])) for place in kind.split(",")]
    if not isinstance(param, DTensor):
        return torch.empty(meta.size, dtype=dtype, device=part.device)
    if len(places) != param.device_mesh.ndim:
        return None
    return empty_dtensor(meta.size, dtype=dtype, device_mesh=param.device_mesh, placements=places)


def unpack(
    optimizer: Any, owners: Owners, loaded: Mapping[str, Tensor], prefix: str, rest: Mapping[str, Any],
    lost: Collection[str] = (), parts: bool = False,
) -> None:  # fmt: skip
    """Gives the optimizer what `pack` took of one.

    Args:
        loaded: the `templates`, filled; their keys begin with `prefix`.
        rest: as `pack` gave it, or empty.
        lost: names of parameters whose state starts anew.
        parts: the optimizer works on this rank's parts of the parameters, and so does its state.
    """
    found: dict[str, dict[str, Any]] = {n: dict(v) for n, v in rest.get("values", {}).items() if n not in lost}
    for entry, tensor in loaded.items():
        owner, _, key = entry.rpartition("/")
        key, _, kind = key.partition("@")
        tensor = local_part(tensor) if parts or kind == "part" else tensor
        if owner.startswith(prefix):
            found.setdefault(owner.removeprefix(prefix), {})[key] = tensor
    state = {number: found[name] for number, (name, _) in enumerate(owners) if name in found}
    optimizer.load_state_dict({"state": state, "param_groups": _groups(optimizer, rest.get("groups"))})
    # load_state_dict turns all state into the parameters' dtype; moments or counts may have had a better one.
    for number, (param, dtype) in enumerate(zip(_params(optimizer), rest.get("dtypes", ()), strict=False)):
        for key, value in state.get(number, {}).items() if str(param.dtype) == dtype else ():
            now = optimizer.state[param].get(key)
            if isinstance(now, Tensor) and isinstance(value, Tensor) and now.dtype != value.dtype:
                optimizer.state[param][key] = value.to(now.device)


def _groups(optimizer: Any, saved: Sequence[dict[str, Any]] | None) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = optimizer.state_dict()["param_groups"]
    if saved is None:
        return groups
    if len(saved) == len(groups):
        return [{**group, **kept} for group, kept in zip(groups, saved, strict=True)]
    logger.warning("EDiT: the %s had %d parameter groups and has %d; the groups' settings are the new ones.",
                   optimizer_class(optimizer), len(saved), len(groups))  # fmt: skip
    return groups


def _params(optimizer: Any) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def optimizer_class(optimizer: Any) -> str:
    return type(getattr(optimizer, "optimizer", optimizer)).__qualname__
