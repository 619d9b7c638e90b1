"""All all-reduces of a delayed sync, beside the training: on a thread of its own, on CUDA on a stream of its own."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from hf_edit.groups import Peers, Pending
from hf_edit.penalty import weighed
from hf_edit.plan import SyncPlan

T = TypeVar("T")
Runner = Callable[[Callable[[], T]], Callable[[], T]]  # starts a job; the result waits for it and raises what it raised


def in_thread(job: Callable[[], T]) -> Callable[[], T]:
    """Runs `job` on a new daemon thread, which does not keep a process alive that has failed."""
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(job())
        except BaseException as error:  # raised again by result()
            failure.append(error)

    thread = threading.Thread(target=run, name="hf_edit-sync", daemon=True)
    thread.start()

    def result() -> T:
        thread.join()
        if failure:
            raise failure[0]
        return outcome[0]

    return result


def at_once(job: Callable[[], T]) -> Callable[[], T]:
    """Runs `job` here and now: the same result, without the overlap."""
    value = job()
    return lambda: value


class Scratch:
    """What one delayed sync leaves to the next: flat host tensors, and on CUDA the stream beside the training's.

    Fresh memory costs a page fault every 4 KiB. On CUDA torch's own allocators keep what was used, for each stream.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = {}
        self._stream: Any = None

    def stream(self, device: torch.device) -> Any:
        """The stream of `device` that the syncs run on; its allocator's blocks are of no use on another."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream

    def take(self, like: Tensor) -> Tensor:
        """An uninitialised tensor of `like`'s shape [n], dtype and device."""
        free = self._free.get(like.numel())
        return free.pop() if free and like.device.type == "cpu" else torch.empty_like(like)

    def give(self, tensor: Tensor) -> None:
        if tensor.device.type == "cpu" and not tensor.is_pinned():
            self._free.setdefault(tensor.numel(), []).append(tensor)


class BackgroundReduction:
    """The exchange and the all-reduces of one sync, running beside the training.

    Args:
        decide: waits for the other replicas and says what is to be done.
        deltas: this replica's pseudo-gradient of each unit, flat fp32 [n]; kept in host memory where `device` is CUDA.
        peers: the other replicas; nobody else may talk to them until `wait` has returned.
        device: where the tensors that are all-reduced live.
        scratch: where host tensors come from; the caller gives them back.
        units_in_flight: how many units' are under way, and so on `device`, at a time.
        runner: what runs it.
    """

    def __init__(
        self, decide: Callable[[], SyncPlan], deltas: Sequence[Tensor], peers: Peers, device: torch.device,
        scratch: Scratch, units_in_flight: int, runner: Runner[list[Tensor | None]] = in_thread,
    ) -> None:  # fmt: skip
        self.deltas = list(deltas)
        self.square_norms: list[Tensor] = []  # of the averages that are not None, this rank's part, [] float64
        self._decide = decide
        self._peers = peers
        self._device = device
        self._scratch = scratch
        self._units_in_flight = units_in_flight
        self._plan: SyncPlan | None = None
        self._decided = threading.Event()
        self._written = _mark(device)  # the deltas are
        self._done: Any = None
        self._result = runner(self._run)

    def plan(self) -> SyncPlan:
        """Waits until all replicas have come."""
        self._decided.wait()
        if self._plan is None:
            self._result()  # raises what went wrong
            raise RuntimeError("The exchange ended without a plan.")
        return self._plan

    def wait(self) -> list[Tensor | None]:
        """Waits until all is reduced; the average of each unit, flat fp32 [n], or None where nothing changes.

        On CUDA they are in host memory, and the current stream waits for their way there.
        """
        averages = self._result()
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)
        return averages

    @torch.no_grad()
    def _run(self) -> list[Tensor | None]:
        try:
            with self._aside():
                return self._reduce()
        finally:
            self._decided.set()  # whatever failed, so that nobody waits for the plan for ever

    def _reduce(self) -> list[Tensor | None]:
        self._plan = plan = self._decide()
        self._decided.set()
        averages: list[Tensor | None] = []
        flying: deque[tuple[Tensor, Pending] | None] = deque()
        weights = plan.weights[:, self._peers.replica].tolist()
        for delta, weight, unchanged in zip(self.deltas, weights, plan.unchanged.tolist(), strict=True):
            if len(flying) == self._units_in_flight:
                averages.append(self._land(flying.popleft()))
            if unchanged:
                flying.append(None)
                continue
            moved = delta.to(self._device, non_blocking=True)
            gradient = weighed(moved, weight, out=self._scratch.take(moved) if moved is delta else moved)
            flying.append((gradient, self._peers.all_reduce([gradient])))
        averages += [self._land(one) for one in flying]
        self._done = _mark(self._device)
        return averages

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """On CUDA a stream beside the training's, after the deltas; a thread has its own current device and stream."""
        if self._device.type != "cuda":
            yield
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._scratch.stream(self._device)):
            torch.cuda.current_stream().wait_event(self._written)
            yield

    def _land(self, flying: tuple[Tensor, Pending] | None) -> Tensor | None:
        if flying is None:
            return None
        average, work = flying
        work.wait()
        self.square_norms.append(torch.linalg.vector_norm(average).double().square())
        return to_host(average)


def to_host(tensor: Tensor) -> Tensor:
    """A CUDA tensor on its way into pinned memory, ordered on the current stream; a host tensor as it is."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return host


def _mark(device: torch.device) -> Any:
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
