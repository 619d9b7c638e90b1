"""What is done on equal replicas (evaluate, save, stop, end the epoch), and when: the same on all ranks.

Any callback may ask for it, on one rank alone and at any moment, and nothing is asked of other replicas in an inner
step. So what is asked for rides on the next sync, and all do it where that sync is carried out. Where all ranks are
known to be at one place anyway (in the warm-up, behind an evaluation, at the end of an epoch that they ended together)
they agree at once.

Pure: facts in, the next move and why out. The caller carries a move out and says what it received (`receive`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

REQUESTS = ("evaluate", "save", "stop", "epoch_stop")
HEAVY = frozenset({"evaluate", "save"})  # what runs callbacks itself, which may ask for more


@dataclass(frozen=True)
class Point:
    """Where a rank is: behind an optimizer step, or at the end of an epoch.

    `warm_up`: the step was a synchronous one. `lockstep`: all replicas are known to take the same steps and epochs.
    `equal`: nothing was learnt since the last sync, and none is under way. `pending`: a delayed one is. `last`: no step
    of this rank follows. `out_of_data`: the epoch had no step. `urgent`: this replica cannot wait for the next sync.
    """

    epoch_ended: bool = False
    warm_up: bool = False
    lockstep: bool = True
    equal: bool = False
    pending: bool = False
    last: bool = False
    out_of_data: bool = False
    urgent: bool = False


@dataclass(frozen=True)
class Move:
    """What to do next, and why.

    "go on": train. "agree": tell all ranks, who are all here. "drain": end the sync under way. "leave": join the others
    at their next sync, wherever in their interval they are. "flush": make the replicas equal; `leaving` if the others
    do so behind a delayed sync. "act": do `what`, on replicas that are equal.
    """

    name: Literal["go on", "agree", "drain", "leave", "flush", "act"]
    why: str
    what: frozenset[str] = frozenset()
    leaving: bool = False


@dataclass
class Conductor:
    """The joint decisions of one training, as one rank sees them.

    Args:
        by_time: replicas take different numbers of steps (A-EDiT).
        apart: they are never all here, but at a sync.

    >>> conductor = Conductor()
    >>> conductor.arrive(Point())
    >>> conductor.request({"save"})
    >>> conductor.next(Point()).name  # between two syncs
    'go on'
    >>> conductor.arrive(Point())
    >>> conductor.receive({"save"})  # a sync was carried out behind this step
    >>> [conductor.next(Point(equal=True)).name for _ in range(2)]
    ['flush', 'act']
    """

    by_time: bool = False
    apart: bool = False
    requests: set[str] = field(default_factory=set)  # of this rank, which the others do not know of yet
    stopping: bool = False  # decided: no step follows
    cutting: bool = False  # decided: the running epoch ends here
    _left: bool = False  # the others know that this replica's training ends
    _together: bool = False  # all ranks come to the end of their epoch next
    _done: set[str] = field(default_factory=set)  # since the last step
    _stale: bool = False  # the sync under way may ask for the end of an epoch that has ended
    # At the point where this rank is:
    _received: set[str] | None = None  # None: of the others' requests nothing is known
    _flushed: bool = False
    _asked: bool = False  # all ranks have agreed here
    _leaving: bool = False
    _ask_again: bool = False  # what was done here may have made callbacks ask for more

    def request(self, names: Collection[str]) -> None:
        """A callback of this rank asks for `names`."""
        decided = {"stop"} if self.stopping else set()
        self.requests |= set(names) - decided - ({"epoch_stop"} if self.cutting else set())

    def arrive(self, at: Point) -> None:
        """The rank has come to a new point; what it received on its way there counts."""
        if at.epoch_ended:
            self.cutting = False
        else:
            self._done.clear()

    def receive(self, names: Collection[str] | None) -> None:
        """What any rank asked for, the same on all; None if nothing was received."""
        if names is None:
            return
        names = set(names)
        if self._stale:
            names.discard("epoch_stop")
            self._stale = False
        self._received = (self._received or set()) | names
        self.requests -= names

    def next(self, at: Point) -> Move:
        """The next move at the point `at`, until it is "go on"."""
        if at.epoch_ended:
            self.requests.discard("epoch_stop")  # nothing is left of it to end
        if not self._received and self._must_leave(at):
            self._leaving = True
            if at.pending:
                return Move("drain", "a sync is under way, and the others may have asked for something at it")
            self._left = True
            return Move("leave", "this replica's training ends where the others' may go on")
        if not self._flushed and (self._received or (at.last and not at.equal)):
            self._flushed, leaving, self._leaving = True, self._leaving, False
            return Move("flush", "equal replicas are needed", leaving=leaving)
        if not self._received and (why := self._why_all_are_here(at)):
            self._asked, self._ask_again = True, False
            return Move("agree", why)
        if self._received:
            return self._act(at)
        if at.epoch_ended:
            self._stale = at.lockstep and at.pending
        self._received, self._flushed, self._asked, self._leaving, self._ask_again = None, False, False, False, False
        return Move("go on", "nothing is to be done together here")

    def _act(self, at: Point) -> Move:
        what, self._received, self._flushed = frozenset(self._received or ()), None, False
        self._done |= what & HEAVY
        self._ask_again = bool(what & HEAVY)
        self.stopping |= "stop" in what
        self.cutting |= "epoch_stop" in what and not at.epoch_ended
        self._together |= bool(what & {"stop", "epoch_stop"})
        return Move("act", "all ranks received the same", what)

    def _must_leave(self, at: Point) -> bool:
        if self._left or at.warm_up or self.stopping:
            return False
        if at.urgent:
            return True
        # By time the last step is one that all have agreed on.
        return at.last and not at.lockstep and (at.out_of_data or not self.by_time)

    def _why_all_are_here(self, at: Point) -> str:
        if self.apart:
            return ""
        if self._ask_again:
            return "all have done the same, and a callback may have asked for more"
        if at.epoch_ended and self._together:
            self._together = False
            self.requests -= self._done  # no step lies between, and the Trainer's rules ask at both
            return "all have ended their epoch here together"
        if at.warm_up and not self._asked:
            return "synchronous steps are taken together"
        if at.epoch_ended and at.lockstep and not self._asked and (at.equal or at.pending):
            return "an epoch ends at a sync"
        return ""
