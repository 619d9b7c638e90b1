"""Who is there: the replicas that have come to a sync, by torchft's lighthouse. The only file that knows torchft.

What is needed of torchft (0.2): `LighthouseServer`, which makes a quorum of those that ask once all do that have shown
life within `heartbeat_seconds`; `LighthouseClient`; `ProcessGroupGloo`, which is made anew for
other members. Its `Manager` is not used: members cannot tell anything at its quorum, one that has failed poisons it for
good, and two replicas wait for each other as long as both are alive. An engine of torch's own (`reconfigure`,
experimental in torch 2.14) would need what `met` returns: equal members on all of them, each with its news, and a key.

Who has waited for `straggler_seconds` tells the others so, and one that is still training stops its heartbeats until it
comes itself: it has agreed to be left out. It cannot go on alone then, since the others live. (The lighthouse's own
limit makes no quorum of half of the living, so that of two replicas a slow one would be waited for without end.)
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from hf_edit.method.membership import Meeting, News, members_of

logger = logging.getLogger(__name__)

BEATS = 5  # heartbeats in the time after which a replica without any counts as gone
WAIT = timedelta(days=365)  # for a quorum; a request that is broken off would be in one all the same
RETRY_SECONDS = 0.5
# What replicas tell each other beside the lighthouse, in front of the launch that is meant.
LEFT_OUT, SHOW = b"left out ", b"show "


def torchft() -> Any:
    """torchft's low-level parts.

    Raises:
        ValueError: it is not installed.
    """
    os.environ.setdefault("RUST_LOG", "warn")  # read as it is loaded; else every request is a line in the output
    try:
        import torchft.coordination as coordination
    except ImportError as error:
        raise ValueError(
            f"elastic=True needs torchft, which cannot be imported here ({error}). Install hf_edit[elastic] (Linux on "
            "x86-64), or set elastic=False."
        ) from error
    return coordination


def new_group(timeout_seconds: float) -> Any:
    """A gloo group that is yet to be told its members (`configure`), and gives up what makes no progress for so long.
    Not of its ranks' world."""
    from torchft.process_group import ProcessGroupGloo

    return ProcessGroupGloo(timeout=timedelta(seconds=timeout_seconds))


def serve(port: int, heartbeat_seconds: float) -> Any:
    """A lighthouse on all interfaces, which lives as long as what is returned; `address()` is its own name and port."""
    milliseconds = round(heartbeat_seconds * 1000)
    settings = dict(
        min_replicas=1, join_timeout_ms=round(WAIT.total_seconds() * 1000), heartbeat_timeout_ms=milliseconds,
        quorum_tick_ms=max(10, milliseconds // 20),
    )  # fmt: skip
    server = torchft().LighthouseServer
    try:
        return server(bind=f"[::]:{port}", **settings)
    except RuntimeError:  # a machine without IPv6, or the port is taken, which it says again
        return server(bind=f"0.0.0.0:{port}", **settings)


class Lighthouse:
    """The lighthouse, as the first rank of a replica sees it; keeps it informed that this replica is alive.

    Args:
        address: "host:port", with or without "http://".
        replica: which one this is.
        heartbeat_seconds: after which a replica that shows no life is gone, as the lighthouse was told.
        straggler_seconds: after which others that live and do not come are left out.
        settings: what must be equal on all replicas.
    """

    def __init__(
        self, address: str, replica: int, heartbeat_seconds: float, straggler_seconds: float, settings: str
    ) -> None:
        self.replica = replica
        self._address = address if "://" in address else f"http://{address}"
        self._seconds, self._straggler_seconds = heartbeat_seconds, straggler_seconds
        self._settings = settings
        self._client_class = torchft().LighthouseClient
        self.launch, self._launched_at = uuid.uuid4().hex, time.time()
        host = _own_address(self._address)
        self.store: Any = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        self._place = f"{host}:{self.store.port}"
        self._ear = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        self._ear.bind((host, 0))
        self._ear.setblocking(False)
        self._others: Sequence[News] = ()
        self._quorum = -1
        self._may_leave_out = True
        self._looking_since = time.monotonic()
        self._asking_since: float | None = None
        self._left_out = False
        self._closed = False
        self.trouble = ""  # what keeps the lighthouse from answering
        self._client = self._connect()
        self._questions: queue.SimpleQueue[News] = queue.SimpleQueue()
        self._answer: Any = None
        self._answered = threading.Event()
        threads = [
            threading.Thread(target=work, name="hf_edit-lighthouse", daemon=True) for work in (self._ask, self._beat)
        ]
        for thread in threads:
            thread.start()
        self._beating = threads[1]
        atexit.register(self.close)

    def meet(self, sync: int, commits: Sequence[str], link: str, patient: bool) -> None:
        """Comes to a sync: asks for a quorum, which `met` waits for.

        Args: as `News` has them.
        """
        news = News(
            self.replica, self.launch, self._launched_at, self._place, self._ear.getsockname()[1], self._settings,
            sync, tuple(commits), self._quorum, link, patient, time.monotonic() - self._looking_since,
        )  # fmt: skip
        # Who has been left out, or may have been, cannot go on alone: the others are ahead.
        self._may_leave_out = not (self._left_out or patient)
        self._left_out, self._asking_since = False, time.monotonic()
        self._answer = None
        self._answered.clear()
        self._questions.put(news)

    def met(self, seconds: float) -> Meeting | None:
        """All that have come, this launch among them; None if there is no quorum after `seconds`."""
        if not self._answered.wait(seconds) or self._answer is None:
            return None
        self._asking_since = None
        found = [News.read(member.data) for member in self._answer.participants]
        self._others = [other for other in found if other.launch != self.launch] or self._others
        self._quorum, created = self._answer.quorum_id, self._answer.created
        return Meeting(f"{created.seconds}.{created.nanos:09}", self._quorum, members_of(found))

    def begin(self) -> None:
        """A sync begins with those that were there."""
        self._looking_since = time.monotonic()

    def look_again(self) -> None:
        """The others that were left out are asked to show that they are there."""
        self._tell(SHOW)
        time.sleep(2 * self._seconds)

    def close(self) -> None:
        """No more heartbeats. A thread that is in torchft's code while Python finalizes would abort the process."""
        self._closed = True
        self._beating.join()

    def _ask(self) -> None:
        # A thread of its own: a request cannot be broken off, and the ranks of the replica want to know meanwhile.
        while True:
            news = self._questions.get()
            while not self._answered.is_set():
                try:
                    self._answer = self._client.quorum(
                        replica_id=f"edit_{self.replica}:{self.launch}", timeout=WAIT, store_address=self._place,
                        step=news.sync, data=news.as_dict(),
                    )  # fmt: skip
                    self.trouble = ""
                    self._answered.set()
                except (RuntimeError, TimeoutError) as error:  # torchft's; the lighthouse may be gone, and come back
                    self.trouble = f"the lighthouse at {self._address} does not answer ({_line(error)})"
                    time.sleep(RETRY_SECONDS)
                    self._reconnect()

    def _beat(self) -> None:
        while not self._closed:
            self._listen()
            asking_since = self._asking_since
            waits = asking_since is not None and time.monotonic() - asking_since > self._straggler_seconds
            if waits and self._may_leave_out:
                self._tell(LEFT_OUT)
            if not self._left_out:
                try:
                    self._client.heartbeat(f"edit_{self.replica}:{self.launch}", timedelta(seconds=self._seconds))
                except (RuntimeError, TimeoutError):
                    self._reconnect()
            time.sleep(self._seconds / BEATS)

    def _listen(self) -> None:
        while True:
            try:
                message = self._ear.recv(256)
            except BlockingIOError:
                return
            if message == SHOW + self.launch.encode():
                self._left_out = False
            elif message == LEFT_OUT + self.launch.encode() and self._asking_since is None and not self._left_out:
                self._left_out = True
                logger.warning(
                    "EDiT: replica %d is not waited for any more at a sync; it joins the others at the next one that "
                    "it comes to.", self.replica,
                )  # fmt: skip

    def _tell(self, what: bytes) -> None:
        for other in self._others:
            try:
                self._ear.sendto(what + other.launch.encode(), (other.store.rpartition(":")[0].strip("[]"), other.port))
            except OSError as error:  # it is gone, or cannot be reached, and so has no heartbeats either
                logger.info("EDiT: replica %d cannot be told anything: %s", other.replica, error)

    def _connect(self) -> Any:
        try:
            return self._client_class(self._address, timedelta(seconds=max(10.0, self._seconds)))
        except (RuntimeError, TimeoutError) as error:
            raise RuntimeError(
                f"There is no lighthouse at {self._address} ({_line(error)}). Start one with `hf-edit "
                "lighthouse` on a host that all replicas reach, and name it in TORCHFT_LIGHTHOUSE=host:port."
            ) from error

    def _reconnect(self) -> None:
        try:
            self._client = self._client_class(self._address, timedelta(seconds=self._seconds))
        except (RuntimeError, TimeoutError):
            time.sleep(RETRY_SECONDS)


def _own_address(lighthouse: str) -> str:
    """This machine's address on the way to the lighthouse, by which the other replicas reach it, too."""
    host, _, port = lighthouse.rpartition("://")[2].rstrip("/").rpartition(":")
    family, kind, protocol, _, place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(place)  # of a datagram socket: nothing is sent
        return str(probe.getsockname()[0])


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
