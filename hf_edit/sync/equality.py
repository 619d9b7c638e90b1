"""What must be equal on all ranks or replicas, and how it is made so: settings, model, parameters, buffers."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from hf_edit.config import EDiTConfig
from hf_edit.peers.elastic import ElasticPeers
from hf_edit.peers.group import Peers
from hf_edit.sync.units import local_part, named_tensors, unwrap

logger = logging.getLogger(__name__)


class Buffers:
    """The model's saved buffers, which follow a replica at a sync if they have changed anywhere since the last one."""

    def __init__(self, model: nn.Module, peers: Peers) -> None:
        self._peers = peers
        self.tensors = list(named_tensors(model)[1].values())
        self._seen = [tensor.clone() for tensor in self.tensors]
        self._said = False

    def changed(self) -> Tensor | float:
        """1 if any has changed on this rank since the last sync, else 0."""
        if not self.tensors:
            return 0.0
        pairs = zip(self.tensors, self._seen, strict=True)
        return torch.stack([tensor.ne(seen).any() for tensor, seen in pairs]).any().double()

    @torch.no_grad()
    def take(self, values: Sequence[Tensor]) -> None:
        """They become `values`, as of the last sync."""
        for tensor, seen, value in zip(self.tensors, self._seen, values, strict=True):
            tensor.copy_(value)
            seen.copy_(value)

    @torch.no_grad()
    def follow(self, replica: int | None) -> None:
        """All take those of `replica`; None: go back to the last sync's, as does one that has become infinite or NaN
        on `replica` after the sync has begun."""
        if replica and not self._said and self._peers.layout.rank == 0:
            self._said = True
            logger.warning("EDiT: the buffers follow replica %d, the first that went right in every unit.", replica)
        for tensor, seen in zip(self.tensors, self._seen, strict=True):
            if replica is not None:
                self._peers.broadcast_to_all(tensor, replica)
                if isinstance(self._peers, ElasticPeers) and self._peers.failed:
                    return  # they have changed still, so all follow one at the next sync
                broken = (seen.isfinite() & ~tensor.isfinite()).any()
                seen.copy_(torch.where(broken, seen, tensor))
            tensor.copy_(seen)


def installed_versions() -> dict[str, str]:
    return {name: version(name) for name in ("hf_edit", "torch", "transformers", "accelerate")}


def check_agreement(model: nn.Module, config: EDiTConfig, peers: Peers) -> None:
    """All ranks must have the same hf_edit, the same configuration and a model of the same shape.

    Raises:
        ValueError: which of these differs, and on which ranks.
    """
    shapes = [(name, tuple(p.shape), p.requires_grad) for name, p in unwrap(model).named_parameters()]
    versions = installed_versions()
    mine = {**config.to_dict(), **versions, "model": hashlib.sha256(repr(shapes).encode()).hexdigest()}
    everyone: list[dict[str, Any]] = peers.gather_object(mine)
    if isinstance(peers, ElasticPeers):  # they compare it when they meet
        mine["ranks"] = peers.layout.replica_size
        mine = {name: value for name, value in mine.items() if name not in ("torch", "transformers", "accelerate")}
        peers.settings = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
    differing = {
        name: {rank: other.get(name) for rank, other in enumerate(everyone)}
        for name in dict.fromkeys(name for other in everyone for name in other)
        if any(other.get(name) != everyone[0].get(name) for other in everyone)
    }
    if "hf_edit" in differing:
        raise ValueError(f"hf_edit's versions by rank: {differing['hf_edit']}. Install the same one on every host.")
    others = {name: differing.pop(name) for name in versions if name in differing}
    if others and peers.layout.rank == 0:
        logger.warning("EDiT: the hosts have different versions, by rank: %s.", others)
    if "model" in differing:
        raise ValueError(
            "The model's parameters (names, shapes, or which of them are trained) differ between the ranks: "
            f"fingerprints by rank {differing['model']}. Build the same model on every rank."
        )
    if differing:
        raise ValueError(
            f"EDiTConfig differs between the ranks; values by rank: {differing}. Every rank needs the same settings: "
            "check the files, environment variables and flags on each host."
        )


@torch.no_grad()
def make_replicas_equal(model: nn.Module, peers: Peers) -> None:
    """Every replica takes replica 0's trainable parameters and buffers where digests show that they differ."""
    model = unwrap(model)
    named = [*model.named_parameters(), *model.named_buffers()]
    digests = torch.stack([digest(local_part(tensor)) for _, tensor in named])
    table = peers.gather(peers.inside.sum(digests.flatten()))().view(peers.num_replicas, -1, 2)
    differing = (table != table[0]).any(dim=2).any(dim=0).tolist()
    names = [name for (name, _), differs in zip(named, differing, strict=True) if differs]
    if not names:
        return
    for (name, tensor), differs in zip(named, differing, strict=True):
        if not differs:
            continue
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
            raise RuntimeError(
                f"The frozen parameter {name} differs between the replicas, and frozen parameters are never sent. "
                "Load the same weights on every rank."
            )
        peers.broadcast(local_part(tensor))
    logger.warning(
        "The replicas held different values of %d tensors (%s, ...); all took those of replica 0.",
        len(names), names[0],
    )  # fmt: skip


def digest(tensor: Tensor) -> Tensor:
    """Two int64 [2] that change with any bit of `tensor` and with the order of its elements."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    words = raw.view(torch.int32) if raw.numel() % 4 == 0 else raw
    digest = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    chunk = 1 << 22  # bounds the int64 copies
    for start in range(0, words.numel(), chunk):
        piece = words[start : start + chunk].to(torch.int64)
        place = torch.arange(start + 1, start + 1 + piece.numel(), device=tensor.device)
        digest += torch.stack([piece.sum(), (piece * place).sum()])
    return digest
