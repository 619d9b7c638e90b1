"""A delayed sync's exchange and all-reduces, beside the training: on a thread of its own, all in host memory.

So they never touch the device, and nothing there waits for them. On CUDA that also keeps NCCL out of it: two of its
communicators used at a time, by FSDP2 in the replica and by a sync among the replicas, can wait for one another if the
ranks start their operations in different orders, and a thread's order is nobody's.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from hf_edit.method.penalty import square_norm, weighed
from hf_edit.method.plan import SyncPlan
from hf_edit.peers.group import Peers, Pending

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
    """Flat host tensors that one delayed sync leaves to the next: fresh memory costs a page fault every 4 KiB.

    Args:
        device: the training's; for CUDA they are pinned, so that copying keeps no host waiting. What is given back may
            be on its way to the device yet: writing to it must be ordered after that, as `BackgroundReduction` does.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: dict[tuple[int, torch.dtype], list[Tensor]] = {}

    def take(self, like: Tensor) -> Tensor:
        """An uninitialised host tensor of `like`'s shape [n] and dtype."""
        free = self._free.get((like.numel(), like.dtype))
        return free.pop() if free else torch.empty(like.shape, dtype=like.dtype, pin_memory=self._device.type == "cuda")

    def to_host(self, tensor: Tensor) -> Tensor:
        """A CUDA tensor on its way into host memory, ordered on the current stream; a host tensor as it is."""
        return tensor if tensor.device.type == "cpu" else self.take(tensor).copy_(tensor, non_blocking=True)

    def give(self, tensor: Tensor) -> None:
        self._free.setdefault((tensor.numel(), tensor.dtype), []).append(tensor)


class BackgroundReduction:
    """The exchange and the all-reduces of one sync, running beside the training.

    Args:
        decide: exchanges what there is to tell, waits for the other replicas and says what is to be done.
        deltas: this replica's pseudo-gradient of each unit, flat fp32 [n], in host memory or on the way there.
        peers: the other replicas; nobody else may talk to them until `wait` has returned.
        device: the training's. On CUDA nothing is read that its current stream is yet to write.
        scratch: where host tensors come from; the caller gives them back.
        units_in_flight: how many units' are under way at a time.
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
        self._scratch = scratch
        self._units_in_flight = units_in_flight
        self._plan: SyncPlan | None = None
        self._decided = threading.Event()
        self._written = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        self._result = runner(self._run)

    def plan(self) -> SyncPlan:
        """Waits until all replicas have come."""
        self._decided.wait()
        if self._plan is None:
            self._result()  # raises what went wrong
            raise RuntimeError("The exchange ended without a plan.")
        return self._plan

    def wait(self) -> list[Tensor | None]:
        """Waits until all is reduced; the average of each unit, flat fp32 [n] in host memory, or None where nothing
        changes."""
        return self._result()

    @torch.no_grad()
    def _run(self) -> list[Tensor | None]:
        try:
            if self._written is not None:
                self._written.synchronize()
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
            gradient = weighed(delta, weight, out=self._scratch.take(delta))
            flying.append((gradient, self._peers.all_reduce([gradient])))
        return averages + [self._land(one) for one in flying]

    def _land(self, flying: tuple[Tensor, Pending] | None) -> Tensor | None:
        if flying is None:
            return None
        average, work = flying
        work.wait()
        self.square_norms.append(square_norm(average))
        return average
