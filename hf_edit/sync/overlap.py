"""When an outer sync happens: at once, unit by unit in the next forward pass, or beside the steps that follow.

What happens then is the business of unit_sync.py.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from hf_edit.method.plan import SyncPlan
from hf_edit.sync.fragments import Part
from hf_edit.sync.running import Running
from hf_edit.sync.unit_sync import OuterSync

logger = logging.getLogger(__name__)

T = TypeVar("T")
Runner = Callable[[Callable[[], T]], Callable[[], T]]  # starts a job; the result waits for it and raises what it raised


class Blocking:
    """At once: `begin`, `decide` and `carry_out` where the sync is due. Nothing changes before all is reduced.

    A failure in any of these leaves the replica as it was, and the sync to be abandoned.
    """

    def __init__(self, sync: OuterSync) -> None:
        self._sync = sync

    def begin(self, tallies: dict[str, Tensor | float], part: Part | None = None) -> None:
        """Tells the other replicas; the parameters must not change until the sync has ended.

        Args: as of `OuterSync.begin`.
        """
        with self._sync.exposed:
            self._sync.begin(tallies, part=part)

    def decide(self) -> SyncPlan:
        """Waits until all replicas have come to the sync under way; what they decided."""
        run = self._running()
        with self._sync.exposed:
            waited_from = self._sync.clock()
            plan = self._await_plan(run)
            run.wait_seconds += self._sync.clock() - waited_from
        return plan

    def carry_out(self, steps: int = 0) -> bool:
        """After `decide`: carries the sync out, or sees to it that it will be. False: the replicas did not all agree
        to it, and it is forgotten.

        Args:
            steps: that the replica has taken since `begin`; it keeps what it has learnt in them.
        """
        run = self._running()
        with self._sync.exposed:
            if not self._reduce(run):
                self._sync.forget()
                return False
            self._apply(run, steps)
        return True

    def finish(self) -> None:
        """Carries out what is left of a sync that `carry_out` has left to the forward pass."""

    def abandon(self) -> None:
        """Forgets the sync under way."""
        self._sync.forget()

    def _running(self) -> Running:
        if self._sync.running is None:
            raise RuntimeError("No sync is under way; begin() one first.")
        return self._sync.running

    def _await_plan(self, run: Running) -> SyncPlan:
        return self._sync.await_plan(run)

    def _reduce(self, run: Running) -> bool:
        return self._sync.reduce(run)

    def _apply(self, run: Running, steps: int) -> None:
        self._sync.apply(run, len(run.units))


class Forward(Blocking):
    """Unit by unit in the next forward pass: while a unit computes, the all-reduces of the next ones are under way, on
    the process group's own threads (gloo) or stream (NCCL).

    With members that can leave, all is reduced and committed before the first unit is written.
    """

    def __init__(self, sync: OuterSync) -> None:
        super().__init__(sync)
        self._hooks: list[RemovableHandle] = []

    def finish(self) -> None:
        if self._sync.running is not None:
            with self._sync.exposed:
                self._apply_before(self._sync.running, len(self._sync.running.units))

    def abandon(self) -> None:
        super().abandon()
        self._remove_hooks()

    def _reduce(self, run: Running) -> bool:
        if not self._sync.peers.fixed:
            return self._sync.reduce(run)
        self._sync.launch(run, self._sync.config.units_in_flight)
        return self._sync.peers.commit(run.number)

    def _apply(self, run: Running, steps: int) -> None:
        for place, index in enumerate(run.units):
            for module in self._sync.units[index].modules:
                hook = partial(self._before_forward, place)
                # Before FSDP2's own hook, which gathers the shards.
                self._hooks.append(module.register_forward_pre_hook(hook, prepend=True))

    def _before_forward(self, place: int, module: torch.nn.Module, args: Any) -> None:
        run = self._sync.running
        if run is None or place < run.applied:
            return
        with self._sync.exposed:
            # All before it too: a rank that does not use a unit in this step must not change the collectives' order.
            self._apply_before(run, place + 1)
            self._sync.units[run.units[place]].start_gathering()

    def _apply_before(self, run: Running, end: int) -> None:
        for place in range(run.applied, end):
            if self._sync.peers.fixed:
                self._sync.land(run, place)
            self._sync.apply(run, place + 1)
        if not self._sync.pending:
            self._remove_hooks()

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()


class Delayed(Blocking):
    """Beside the steps that follow, on a thread of its own and all in host memory; `carry_out` comes later, and adds to
    the parameters the difference between the new anchor and where they were.

    So nothing on the device waits for the network. On CUDA that also keeps NCCL out of it: two of its communicators
    used at a time, by FSDP2 in the replica and by a sync among the replicas, can wait for one another if the ranks
    start their operations in different orders, and a thread's order is nobody's.

    Args:
        runner: what runs it; nobody else may talk to the other replicas until `carry_out` or `abandon` has returned.
    """

    def __init__(self, sync: OuterSync, runner: Runner[bool]) -> None:
        super().__init__(sync)
        self._runner = runner
        self._decided = threading.Event()
        self._committed: Callable[[], bool] | None = None

    def begin(self, tallies: dict[str, Tensor | float], part: Part | None = None) -> None:
        with self._sync.exposed:
            run = self._sync.begin(tallies, in_host=True, part=part)
            device = self._sync.device
            written = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
            self._decided = decided = threading.Event()
            self._committed = self._runner(partial(self._beside, run, written, decided))

    @torch.no_grad()
    def _beside(self, run: Running, written: Any, decided: threading.Event) -> bool:
        try:
            if written is not None:
                torch.cuda.set_device(self._sync.device)  # of this thread: else it makes a context on device 0
                written.synchronize()  # nothing is read that the training's stream is yet to write
            self._sync.await_plan(run)
            decided.set()
            return self._sync.reduce(run)
        finally:
            decided.set()  # whatever failed, so that nobody waits for the plan for ever

    def abandon(self) -> None:
        committed, self._committed = self._committed, None
        if committed is not None:
            try:
                committed()  # or it would go on talking to the others while the next training does
            except RuntimeError as error:
                logger.warning("EDiT: the sync that was given up had failed: %s", error)
        super().abandon()

    def _await_plan(self, run: Running) -> SyncPlan:
        self._decided.wait()
        if run.plan is None:
            self._reduce(run)  # raises what went wrong
            raise RuntimeError("The exchange ended without a plan.")
        return run.plan

    def _reduce(self, run: Running) -> bool:
        committed, self._committed = self._committed, None
        assert committed is not None
        return committed()

    def _apply(self, run: Running, steps: int) -> None:
        self._sync.apply(run, len(run.units), steps)


class _Outcome(Generic[T]):
    def __init__(self, job: Callable[[], T]) -> None:
        self._job = job
        self._values: list[T] = []
        self._failure: BaseException | None = None
        self._ended = threading.Event()

    def run(self) -> None:
        try:
            self._values.append(self._job())
        except BaseException as error:  # raised again by result()
            self._failure = error
        self._ended.set()

    def result(self) -> T:
        self._ended.wait()
        if self._failure is not None:
            raise self._failure
        return self._values[0]


class Worker:
    """Runs jobs one after the other on one daemon thread, which does not keep a process alive that has failed.

    It lives as long as the process: a thread that begins or ends takes locks of the interpreter that a fork in that
    moment would copy as taken.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def __call__(self, job: Callable[[], T]) -> Callable[[], T]:
        outcome = _Outcome(job)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="hf_edit-sync", daemon=True)
            self._thread.start()
        self._jobs.put(outcome.run)
        return outcome.result

    def _work(self) -> None:
        while True:
            self._jobs.get()()


beside: Runner[Any] = Worker()


def at_once(job: Callable[[], T]) -> Callable[[], T]:
    """Runs `job` here and now: the same result, or failure, without the overlap."""
    outcome = _Outcome(job)
    outcome.run()
    return outcome.result


def ways(sync: OuterSync, hooks: bool, runner: Runner[bool]) -> tuple[Blocking, Blocking]:
    """How a sync that is due is carried out, and one that makes all equal at once.

    Args:
        hooks: those of a forward pass can be had; one that is compiled would be traced anew for every sync.
    """
    config = sync.config
    if config.overlap == "delayed":
        # A replica that is at a sync of all may meet others there that begin a delayed one: through the same process
        # group, that of host memory.
        in_host = sync.device.type == "cuda" or config.elastic
        return Delayed(sync, runner), Delayed(sync, at_once) if in_host else Blocking(sync)
    if config.elastic:  # in host memory, as what a replica lacks is sent from there
        return (both := Delayed(sync, at_once)), both
    blocking = Blocking(sync)
    return Forward(sync) if config.overlap == "forward" and hooks else blocking, blocking
