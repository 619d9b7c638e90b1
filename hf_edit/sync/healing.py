"""A replica that lacks a sync, or all of them, takes part in the next one all the same: how it gets what it lacks.

The others' state as of the last sync (anchors, outer state, detectors) comes to it in the sync itself, before the
exchange, and is staged like all else: it holds once the sync is committed. So all members step from the same anchor to
the same new one. What it has learnt since its own last sync it tells as its pseudo-gradient, from its own old anchor;
that weighs the less, the more syncs it lacks.
A replica without any state gets an inner optimizer's, too; it has nothing to tell, and weighs nothing.

Where a replica cannot know whether the others have committed a sync that failed for it, it keeps what it told; when it
meets them again, they know, and if they have, it tells only what it has learnt since.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

import hf_edit.sync.unit_values as unit_values
from hf_edit.method.penalty import DetectorState, square_norm
from hf_edit.peers.elastic import ElasticPeers
from hf_edit.sync.equality import Buffers, digest
from hf_edit.sync.running import Running
from hf_edit.sync.units import like_param, local_part

# Of a sync's tallies, those that add up from sync to sync.
ADDED_UP = ("loss", "tokens", "input_tokens", "flos", "learning_rate", "inner_steps", "interval_steps")
DIGEST = 1 << 40  # float64 holds sums of such numbers exactly


@dataclass
class Healed:
    """What a member was sent, as of the last sync. Host tensors, of this rank's shards.

    `outer` are each unit's anchor and outer state; `inner` the inner optimizer's tensors and numbers, by the number of
    the parameter and the key; `more` is what the engine and the trainer tell.
    """

    outer: list[dict[str, Tensor]]
    detectors: DetectorState
    unit_syncs: Tensor
    unit_rates: Tensor
    buffers: list[Tensor]
    more: dict[str, Any]
    inner: list[tuple[int, str, Any]] = field(default_factory=list)


@dataclass
class Doubt:
    """A sync that may have been committed by the others: where the parameters were, and what was told of them."""

    key: str
    params: list[Tensor]  # of each unit, flat fp32 in host memory
    told: Tensor  # the tallies that add up


class Healing:
    """What of a sync is about members that lack one, on either side.

    Args:
        sync: the outer syncs that this is of.
        optimizer: the inner one.
        buffers: the model's.
        tell: what the engine has to tell a replica that lacks a sync, as JSON takes it.
    """

    def __init__(
        self, sync: Any, optimizer: Any, buffers: Buffers, peers: ElasticPeers, tell: Callable[[], dict[str, Any]]
    ) -> None:
        self._sync, self._buffers, self._peers, self._tell = sync, buffers, peers, tell
        self._optimizer = getattr(optimizer, "optimizer", optimizer)
        self._doubts: list[Doubt] = []
        self._stepping = threading.Lock()  # a delayed sync reads the optimizer's state beside the training
        self._in_step = False
        self._hooks = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]

    def close(self) -> None:
        """Lets go of the optimizer, which may train on, and would keep the anchors."""
        while self._hooks:
            self._hooks.pop().remove()
        self._after_step()

    def _before_step(self, *_: object) -> None:
        if not self._in_step:  # else the last one was broken off
            self._stepping.acquire()
            self._in_step = True

    def _after_step(self, *_: object) -> None:
        if self._in_step:
            self._in_step = False
            self._stepping.release()

    def measure(self) -> None:
        """The anchors have been taken: how long the others may have to wait for state that is sent."""
        states = self._sync.states
        elements = sum(state.anchor.numel() * (1 + len(state.tensors)) for state in states)
        self._peers.state_bytes = 4 * elements + 8 * sum(state.anchor.numel() for state in states)

    # -- before the exchange ------------------------------------------------------------------------------------------

    def meet(self, run: Running) -> None:
        """The members of `run` are known."""
        meeting = self._peers.meeting
        assert meeting is not None
        run.number = meeting.sync + 1
        run.missed = torch.zeros(self._peers.num_replicas, dtype=torch.int64)
        run.missed[meeting.replicas] = torch.tensor(meeting.missed)
        counted = [doubt for doubt in self._doubts if meeting.committed(doubt.key)]
        if counted:
            self._leave_out(run, counted[-1])
        if meeting.source.replica == self._peers.replica:
            for replica in meeting.stale:
                self._send(replica, replica in meeting.fresh)
        elif self._peers.replica in meeting.stale:
            run.healed = self._receive(meeting.source.replica)
        anchors = self._anchors() if run.healed is None else [unit[""] for unit in run.healed.outer]
        run.digest = torch.stack([digest(anchor) % DIGEST for anchor in anchors]).sum(dim=0).double()
        run.sent = torch.cat([run.sent, run.digest])

    def check(self, run: Running, rows: Tensor) -> Tensor:
        """The exchange's rows [members, ...] without the digests.

        Raises:
            RuntimeError: another member has other anchors.
        """
        others = rows[:, -2:]
        differing = (others != run.digest).any(dim=1).nonzero().flatten().tolist()
        if differing:
            raise RuntimeError(
                f"Before sync {run.number} the anchors of replica {self._peers.replica} have the digest "
                f"{_hex(run.digest)}, but those of replicas {[run.members[place] for place in differing]} "
                f"{[_hex(others[place]) for place in differing]}: they were taught different things. Start all "
                "replicas again from the last checkpoint."
            )
        return rows[:, :-2]

    # -- after the commit ---------------------------------------------------------------------------------------------

    def take(self, run: Running, place: int) -> None:
        """Before the unit at `place` is stepped."""
        if run.healed is None:
            return
        state = self._sync.states[place]
        for name, tensor in run.healed.outer[place].items():
            (state.tensors[name] if name else state.anchor).copy_(tensor, non_blocking=True)
        if place == 0:
            self._sync.unit_syncs.copy_(run.healed.unit_syncs)
            self._sync.unit_rates.copy_(run.healed.unit_rates)
            self._buffers.take(run.healed.buffers)
            self._load_inner(run.healed.inner)

    def end(self) -> None:
        """A sync was carried out: what was in doubt is in it."""
        self._doubts.clear()

    def forget(self, run: Running) -> None:
        """A sync has come to nothing, as far as this replica knows."""
        if self._peers.in_doubt is None or run.plan is None:
            return
        params = []
        for place, index in enumerate(run.units):
            where = run.deltas[place].neg()
            if place in run.bases:
                where.add_(run.bases[place])
            else:
                unit_values.add_given(self._sync.units[index], self._sync.states[index], where, self._anchor(index), 1)
            params.append(where)
        told = run.sent[len(run.units) :][: len(run.tally_names)].clone()
        if run.already_told is not None:
            told += run.already_told
        self._doubts.append(Doubt(self._peers.in_doubt, params, told))

    # -- inside -------------------------------------------------------------------------------------------------------

    def _leave_out(self, run: Running, doubt: Doubt) -> None:
        """What the others have committed already is not told again."""
        norms = []
        for place, index in enumerate(run.units):
            delta = run.deltas[place]
            unit_values.add_given(self._sync.units[index], self._sync.states[index], delta, self._anchor(index), -1)
            delta.add_(doubt.params[place])
            norms.append(square_norm(delta))
            run.bases[place] = doubt.params[place]
        count = len(run.units)
        run.sent[:count] = self._peers.beside.sum_in_host(torch.stack(norms))
        run.already_told = doubt.told
        for place, name in enumerate(run.tally_names):
            if name in ADDED_UP:
                run.sent[count + place] -= doubt.told[place]

    def _anchors(self) -> list[Tensor]:
        return [self._anchor(index) for index in range(len(self._sync.units))]

    def _anchor(self, index: int) -> Tensor:
        return self._sync.states[index].anchor.cpu()

    def _counts(self) -> list[Tensor]:
        return [*self._sync.detectors.state_dict().values(), self._sync.unit_syncs, self._sync.unit_rates]

    def _send(self, replica: int, fresh: bool) -> None:
        entries, tensors = self._inner() if fresh else ([], [])
        text = json.dumps({"more": self._tell(), "inner": entries}).encode()
        self._peers.send(torch.tensor([len(text)]), replica)
        self._peers.send(torch.frombuffer(bytearray(text), dtype=torch.uint8), replica)
        outer = [tensor.cpu() for state in self._sync.states for tensor in (state.anchor, *_by_name(state.tensors))]
        buffers = [tensor.cpu() for tensor in self._buffers.tensors]
        for tensor in (*outer, *self._counts(), *buffers, *tensors):
            self._peers.send(tensor.detach().contiguous(), replica)

    def _receive(self, replica: int) -> Healed | None:
        """None if it broke off."""
        length = torch.zeros(1, dtype=torch.int64)
        self._peers.receive(length, replica)
        text = torch.empty(int(length), dtype=torch.uint8)
        self._peers.receive(text, replica)
        outer = []
        for state in self._sync.states:
            unit = {
                name: torch.empty(tensor.shape) for name, tensor in [("", state.anchor), *sorted(state.tensors.items())]
            }
            for tensor in unit.values():
                self._peers.receive(tensor, replica)
            outer.append(unit)
        *detectors, syncs, rates = [torch.empty_like(tensor) for tensor in self._counts()]
        buffers = [torch.empty(t.shape, dtype=t.dtype) for t in self._buffers.tensors]
        for tensor in (*detectors, syncs, rates, *buffers):
            self._peers.receive(tensor, replica)
        if self._peers.failed:
            return None
        header = json.loads(text.numpy().tobytes())
        names = [f.name for f in fields(DetectorState)]
        found = DetectorState(**dict(zip(names, detectors, strict=True)))
        healed = Healed(outer, found, syncs, rates, buffers, header["more"])
        for number, key, dtype, value in header["inner"]:
            if dtype is not None:
                value = torch.empty(value, dtype=_DTYPES[dtype])
                self._peers.receive(value, replica)
            healed.inner.append((number, key, value))
        return None if self._peers.failed else healed

    def _inner(self) -> tuple[list[list[Any]], list[Tensor]]:
        """The inner optimizer's state: number of the parameter, key, and dtype with shape, or None with a number."""
        entries: list[list[Any]] = []
        tensors: list[Tensor] = []
        with self._stepping:
            for number, param in enumerate(self._params()):
                for key, value in self._optimizer.state.get(param, {}).items():
                    if isinstance(value, Tensor):
                        part = local_part(value).detach().cpu().clone()
                        entries.append([number, key, _NAMES[part.dtype], list(part.shape)])
                        tensors.append(part)
                    elif isinstance(value, int | float | bool | type(None)):
                        entries.append([number, key, None, value])
        return entries, tensors

    def _load_inner(self, inner: list[tuple[int, str, Any]]) -> None:
        params = self._params()
        groups = {param: group for group in self._optimizer.param_groups for param in group["params"]}
        for number, key, value in inner:
            param = params[number]
            if isinstance(value, Tensor):
                part = local_part(param)
                if value.shape == part.shape:
                    value = like_param(param, value.to(part.device))
                elif key != "step" or groups[param].get("capturable") or groups[param].get("fused"):
                    value = value.to(part.device)  # as torch's load_state_dict does it
            self._optimizer.state[param][key] = value

    def _params(self) -> list[Any]:
        return [param for group in self._optimizer.param_groups for param in group["params"]]


_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8,
                  torch.bool)
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def _by_name(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [tensors[name] for name in sorted(tensors)]


def _hex(numbers: Tensor) -> str:
    return "-".join(f"{int(number):x}" for number in numbers)
