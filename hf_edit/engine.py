"""EDiT for one model: warm-up, inner steps, outer syncs (EDiT, Algorithm 1).

Ties schedule, units, groups and sync together. The Trainer drives it with four calls: `start`, `before_optimizer_step`,
`step`, `flush`.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_edit.config import EDiTConfig
from hf_edit.groups import ProcessGroupPeers
from hf_edit.schedule import SyncSchedule
from hf_edit.sync import OuterSync, SyncRecord
from hf_edit.units import find_units, keep_gradients_local, local_part, start_averaging_gradients, unwrap

logger = logging.getLogger(__name__)

# What every rank counts between two syncs over its own micro-batches, so that the sum over the replica's ranks is the
# replica's: training loss, tokens (for the throughput), tokens as the Trainer counts them, floating point operations.
TALLIES = ("loss", "tokens", "input_tokens", "flos")


class Engine:
    """The method at work on one prepared model.

    Args:
        model: as Accelerate prepared it: sharded by FSDP2 over the replica, or DDP for replicas of one rank.
        optimizer: the inner optimizer.
        config: the method's settings, equal on all ranks.
        peers: this rank's groups.
        on_begin: called when a sync begins and takes the tallies with it.
        clock: monotonic seconds.

    Raises:
        ValueError: configuration or model differ between the ranks.
        RuntimeError: frozen parameters differ between the replicas.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        config: EDiTConfig,
        peers: ProcessGroupPeers,
        on_begin: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.peers = peers
        self._model = model
        self._on_begin = on_begin
        _check_agreement(model, config)
        self.units = find_units(model)
        self.schedule = SyncSchedule(config.sync_interval, config.sync_seconds, config.warmup_steps, clock)
        self.sync = OuterSync(self.units, peers, peers.sum_in_replica, config, optimizer)
        self._tallies: dict[str, Any] = dict.fromkeys(TALLIES, 0.0)
        _make_replicas_equal(model, peers)
        if self.schedule.warming_up:
            start_averaging_gradients(model, peers.average)
        else:
            self._end_warmup()

    def _end_warmup(self) -> None:
        keep_gradients_local(self._model)
        self.sync.take_anchors()
        self._tallies.update(loss=0.0, tokens=0.0)  # of the interval that begins; the others are totals

    @property
    def warming_up(self) -> bool:
        """True if the next optimizer step is a synchronous one."""
        return self.schedule.warming_up

    @property
    def replicas_equal(self) -> bool:
        """True if nothing was learnt since the last finished sync, or in warm-up."""
        return self.schedule.inner_steps == 0 and not self.sync.pending

    def tally(self, **amounts: Tensor | float) -> None:
        """Adds to this rank's counts since the last sync (see `TALLIES`); a sync sums each over the replica's ranks."""
        for name, amount in amounts.items():
            self._tallies[name] = self._tallies[name] + amount

    def before_optimizer_step(self) -> None:
        """Ends a sync whose units were not all used by the forward pass."""
        self.sync.finish()

    def step(self) -> None:
        """One optimizer step was taken: begins the sync if it is due."""
        was_warming_up = self.schedule.warming_up
        due = self.schedule.advance()
        if was_warming_up and not self.schedule.warming_up:
            _make_replicas_equal(self._model, self.peers)  # machines of different kinds may round differently
            self._end_warmup()
        if due:
            self._begin()
            if self.config.overlap == "none":
                self.sync.finish()
            else:
                self.sync.apply_in_forward()

    def flush(self) -> None:
        """Makes the replicas equal: ends a sync under way, and syncs what was learnt since the last one."""
        self.sync.finish()
        if self.schedule.inner_steps:
            self._begin()
            self.sync.finish()

    def abandon(self) -> None:
        """Forgets a sync under way; for a training that was broken off."""
        self.sync.abandon()

    def _begin(self) -> None:
        # Inner steps are equal on all ranks of a replica, and what is gathered is the sum over them.
        inner_steps = self.schedule.inner_steps / self.peers.layout.replica_size
        self.sync.begin({**self._tallies, "inner_steps": inner_steps})
        self._tallies = dict.fromkeys(TALLIES, 0.0)
        self.schedule.restart()
        if self._on_begin is not None:
            self._on_begin()

    def take_records(self) -> list[SyncRecord]:
        """The records of the syncs that ended since the last call."""
        return self.sync.take_records()


def _check_agreement(model: nn.Module, config: EDiTConfig) -> None:
    """All ranks must have the same configuration and a model of the same shape."""
    shapes = [(name, tuple(p.shape), p.requires_grad) for name, p in unwrap(model).named_parameters()]
    mine = {**config.to_dict(), "model": hashlib.sha256(repr(shapes).encode()).hexdigest()}
    everyone: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    differing = {
        name: {rank: other[name] for rank, other in enumerate(everyone)}
        for name in mine
        if any(other[name] != everyone[0][name] for other in everyone)
    }
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
def _make_replicas_equal(model: nn.Module, peers: ProcessGroupPeers) -> None:
    """Every replica takes replica 0's trainable parameters and buffers where digests show that they differ."""
    model = unwrap(model)
    named = [*model.named_parameters(), *model.named_buffers()]
    digests = torch.stack([_digest(local_part(tensor)) for _, tensor in named])
    table = peers.gather(peers.sum_in_replica(digests.flatten()))().view(peers.num_replicas, -1, 2)
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


def _digest(tensor: Tensor) -> Tensor:
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
