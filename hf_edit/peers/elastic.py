"""`Peers` that come and go: each replica is a launch of its own, and meets the others at syncs alone.

What fails between replicas raises nothing: what is under way ends without effect, `commit` says so on all ranks of the
replica, and the sync is tried again with those that are there. So no rank of a replica waits for one that has failed.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from hf_edit.method.membership import KEPT_COMMITS, Meeting, why_wait
from hf_edit.peers.connection import Connection, Operations
from hf_edit.peers.faults import Pending, leave_cleanly_at_exit
from hf_edit.peers.group import INSIDE_SECONDS, pieces
from hf_edit.peers.layout import Layout, ring_bytes
from hf_edit.peers.lighthouse import RETRY_SECONDS, Lighthouse
from hf_edit.peers.replica import Replica

logger = logging.getLogger(__name__)

LOOK_SECONDS = 10.0  # after which the first rank tells the others of its replica that it still waits
SAY_AFTER_SECONDS = 30.0
FAILURES = 5  # in a row, and for as long as a sync may take, until a replica gives up
MADE_ANEW = "made anew after healing"
HEALING_BYTES_PER_SECOND = 1e6  # at which state is expected to travel at least; the others wait for it meanwhile


class ElasticPeers:
    """The other replicas, as far as they are there.

    Args:
        layout: where this rank is among all R replicas.
        timeout_seconds: longest wait inside the replica.
        heartbeat_seconds: after which a replica that shows no life is gone.
        straggler_seconds: after which others that live and do not come are left out of a sync.
        min_replicas: that a sync needs.
        lighthouse: "host:port".

    All ranks of the replica construct it together.
    """

    fixed = False

    def __init__(
        self, layout: Layout, timeout_seconds: float, heartbeat_seconds: float, straggler_seconds: float,
        min_replicas: int, lighthouse: str,
    ) -> None:  # fmt: skip
        self.layout = layout
        self.num_replicas = layout.num_replicas
        self.replica = layout.replica
        self.bytes_sent = 0
        self.inside = Replica(layout.alone, max(timeout_seconds, INSIDE_SECONDS))
        # What the ranks say to each other of a sync, beside the training, which talks through `inside` meanwhile.
        self.beside = Replica(layout.alone, timeout_seconds)
        self.meeting: Meeting | None = None
        self.in_doubt: str | None = None  # the key of the last meeting, if others may have committed it
        self.settings = ""  # what must be equal on all replicas; before the first meeting
        self.state_bytes = 0  # that a replica which returns is sent by each rank
        self.on_alone: Callable[[], None] | None = None  # called where this replica finds nobody
        self._heartbeat_seconds, self._straggler_seconds = heartbeat_seconds, straggler_seconds
        self._min_replicas, self._address = min_replicas, lighthouse
        self._lighthouse: Lighthouse | None = None  # of the first rank
        self._commits: deque[str] = deque(maxlen=KEPT_COMMITS)
        self._connection = Connection(layout)
        self._said_at = 0.0
        self._timeout_seconds = timeout_seconds
        leave_cleanly_at_exit()
        self._failing_since: float | None = None  # of those since the last one that was carried out
        self._failures = 0

    # -- a sync -------------------------------------------------------------------------------------------------------

    def begin(self, sync: int) -> list[int]:
        since, patient = time.monotonic(), False
        while True:
            if self.beside.count(self.failed):
                self._connection.drop()
                if self._connection.error != MADE_ANEW:
                    self._give_up_if_none_succeeds()
            self._connection.error = self.in_doubt = None
            meeting = self._checked(self._meet(sync - 1, patient, since))
            patient = meeting.must_look_again
            if patient:
                if self._lighthouse is not None:
                    self._lighthouse.look_again()
                continue
            if len(meeting.members) == 1 and self.on_alone is not None:
                self.on_alone()
            why = why_wait(meeting.members, self.num_replicas, self._min_replicas)
            if why:
                self._say(why, since)
                time.sleep(RETRY_SECONDS)
                continue
            self._connect(meeting)
            if not self.beside.count(self.failed):
                self.meeting = meeting
                if self._lighthouse is not None:
                    self._lighthouse.begin()
                return meeting.replicas
            time.sleep(RETRY_SECONDS / 5)

    def gather(self, vector: Tensor) -> Callable[[], Tensor]:
        rows = [torch.empty_like(vector) for _ in range(self._num_members)]
        op = self._connection.start(dist.all_gather, rows, vector)
        self.bytes_sent += vector.nbytes * (len(rows) - 1)

        def result() -> Tensor:
            op.wait()
            return torch.stack([vector] * len(rows) if self.failed or len(rows) == 1 else rows)

        return result

    def all_reduce(self, tensors: Sequence[Tensor]) -> Pending:
        self.bytes_sent += ring_bytes(sum(t.nbytes for t in tensors), self._num_members)
        return Operations([self._connection.start(dist.all_reduce, piece) for t in tensors for piece in pieces(t)])

    def all_to_all(self, received: Tensor, sent: Tensor) -> Pending:
        if self._num_members == 1:
            received.copy_(sent)
        self.bytes_sent += sent.nbytes * (self._num_members - 1) // self._num_members
        return self._connection.start(dist.all_to_all_single, received, sent)

    def all_gather(self, received: Tensor, sent: Tensor) -> Pending:
        if self._num_members == 1:
            received.copy_(sent[None])
        self.bytes_sent += sent.nbytes * (self._num_members - 1)
        return self._connection.start(dist.all_gather, list(received), sent)

    def commit(self, sync: int) -> bool:
        meeting = self._met
        complete = not self.failed
        if complete:  # tells the others, whose own is complete where they hear it of all
            self.gather(torch.ones(1))()
        heard = self.beside.count(not self.failed) == self.beside.size
        self.in_doubt = meeting.key if not heard and self.beside.count(complete) == self.beside.size else None
        if heard:
            self._commits.append(meeting.key)
            self._failing_since, self._failures = None, 0
        else:
            self._connection.fail(self._connection.error or "it has failed on another rank of the replica")
        if meeting.stale:
            self._connection.drop()  # it was made with more patience than the next sync should have
            self._connection.error = self._connection.error or MADE_ANEW
        return heard

    # -- healing ------------------------------------------------------------------------------------------------------

    def send(self, tensor: Tensor, replica: int) -> None:
        """`tensor`, in host memory, to the same rank of another member, which calls `receive`."""
        place = self._met.replicas.index(replica)
        for piece in pieces(tensor):
            self._connection.start(lambda t, group, async_op: dist.isend(t, group=group, group_dst=place), piece).wait()
        self.bytes_sent += tensor.nbytes

    def receive(self, tensor: Tensor, replica: int) -> None:
        place = self._met.replicas.index(replica)
        for piece in pieces(tensor):
            self._connection.start(lambda t, group, async_op: dist.irecv(t, group=group, group_src=place), piece).wait()

    @property
    def failed(self) -> bool:
        """True if the sync under way will not be committed."""
        return self._connection.error is not None

    # -- all together -------------------------------------------------------------------------------------------------

    def broadcast(self, tensor: Tensor, replica: int = 0) -> None:
        copy = tensor.detach().cpu().clone().contiguous()
        place = self._met.replicas.index(replica)
        self._connection.start(
            lambda t, group, async_op: dist.broadcast(t, group=group, group_src=place, async_op=True), copy
        ).wait()
        if not self.failed:
            tensor.copy_(copy)

    def broadcast_to_all(self, tensor: Tensor, replica: int = 0) -> None:
        self.broadcast(tensor, replica)
        self.inside.broadcast(tensor)

    def average(self, tensor: Tensor) -> None:
        raise RuntimeError("Replicas that come and go have no synchronous steps.")

    def gather_object(self, value: Any) -> list[Any]:
        """`value` of every rank of this replica: there is no moment at which all replicas are here but a sync."""
        return self.inside.gather_object(value)

    def barrier(self) -> None:
        self.inside.gather_object(None)

    def make_host_groups(self) -> None:
        self.inside.make_host_group()
        self.beside.make_host_group()

    def wait_for_arrivals(self, seconds: float) -> None:
        """A quorum waits by itself."""

    def close(self) -> None:
        """This replica comes to no further sync."""
        self._connection.drop()
        if self._lighthouse is not None:
            self._lighthouse.close()

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def _met(self) -> Meeting:
        assert self.meeting is not None
        return self.meeting

    @property
    def _num_members(self) -> int:
        return len(self._met.members)

    def _meet(self, held: int, patient: bool, since: float) -> Meeting:
        """All that have come, on all ranks."""
        if self.layout.shard == 0:
            if self._lighthouse is None:
                self._lighthouse = Lighthouse(
                    self._address, self.replica, self._heartbeat_seconds, self._straggler_seconds, self.settings
                )
            self._lighthouse.meet(held, self._commits, self._connection.link, patient)
        while True:
            found = None
            if self._lighthouse is not None and (found := self._lighthouse.met(LOOK_SECONDS)) is None:
                self._say(self._lighthouse.trouble or "no quorum yet: the others are training, or away", since)
            if (meeting := self.beside.tell(found)) is not None:
                return cast(Meeting, meeting)

    def _give_up_if_none_succeeds(self) -> None:
        """Raises RuntimeError if for too long syncs have failed, though others were there."""
        now = time.monotonic()
        self._failing_since, self._failures = self._failing_since or now, self._failures + 1
        # Few that lie far apart are others' faults; in between it waited, or they trained.
        if now - self._failing_since > self._timeout_seconds and self._failures >= FAILURES:
            others = [replica for replica in self._met.replicas if replica != self.replica] if self.meeting else []
            raise RuntimeError(
                f"Replica {self.replica} has not carried out a sync for {now - self._failing_since:.0f} s, though "
                f"replicas {others} were there; the limit is sync_timeout_seconds. Can the hosts reach each other at "
                f"any port? The last failure: {self._connection.error}"
            )

    def _say(self, why: str, since: float) -> None:
        now = time.monotonic()
        if self.layout.shard == 0 and now - max(self._said_at, since) > SAY_AFTER_SECONDS:
            self._said_at = now
            logger.warning("EDiT: replica %d has waited %.0f s at a sync: %s.", self.replica, now - since, why)

    def _checked(self, meeting: Meeting) -> Meeting:
        """The meeting of those that train alike.

        Raises:
            RuntimeError: this launch has been replaced.
            ValueError: it has other settings than those who have trained longest.
        """
        mine = next((member for member in meeting.members if member.replica == self.replica), None)
        if self._lighthouse is not None and (mine is None or mine.launch != self._lighthouse.launch):
            raise RuntimeError(
                f"A later launch of replica {self.replica} has come, which takes the place of this one. If that was "
                "not meant, give each launch an EDIT_REPLICA of its own."
            )
        settings = meeting.source.settings
        if mine is not None and mine.settings != settings:
            raise ValueError(
                f"Replica {self.replica} differs from replica {meeting.source.replica}, which has trained longer, in "
                "EDiTConfig, in the model's parameters, in the number of ranks or in hf_edit's version. Launch all "
                "replicas with the same script and settings."
            )
        return replace(meeting, members=tuple(member for member in meeting.members if member.settings == settings))

    def _connect(self, meeting: Meeting) -> None:
        patience = self._heartbeat_seconds
        if meeting.stale:
            patience += self.state_bytes / HEALING_BYTES_PER_SECOND
        self._connection.open(meeting, patience)
