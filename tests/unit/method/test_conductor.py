"""Joint decisions: tables of single points, and whole trainings of several replicas in random order, without torch.

In the trainings a replica is a coroutine. What it exchanges with the others is the n-th exchange of its own; its result
is there once all have come to their n-th, which must be of the same kind on all, as for collectives.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from hf_edit.method.conductor import REQUESTS, Conductor, Point

# -- one point ---------------------------------------------------------------------------------------------------------


def moves(conductor: Conductor, at: Point, *received: set[str]) -> list[str]:
    """The names of the moves at `at`; `received` are the answers to those that ask, in order."""
    answers, names = list(received), []
    conductor.arrive(at)
    while (move := conductor.next(at)).name != "go on":
        names.append(move.name if move.name != "act" else "act " + " ".join(sorted(move.what)))
        if move.name in ("agree", "leave") or (move.name in ("drain", "flush") and answers):
            conductor.receive(answers.pop(0) if answers else set())
        if move.name in ("drain", "leave", "flush"):
            at = replace(at, equal=True, pending=False)
    return names


EQUAL_STEP = Point(equal=True)


@pytest.mark.parametrize(
    ("at", "received", "expected"),
    [
        (Point(), [], []),
        (Point(warm_up=True, equal=True), [set()], ["agree"]),
        (Point(warm_up=True, equal=True), [{"stop"}], ["agree", "flush", "act stop"]),
        (Point(warm_up=True, equal=True), [{"save"}], ["agree", "flush", "act save", "agree"]),
        (Point(epoch_ended=True), [], []),
        (Point(epoch_ended=True, equal=True), [set()], ["agree"]),
        (Point(epoch_ended=True, pending=True), [set()], ["agree"]),
        (Point(epoch_ended=True, equal=True, lockstep=False), [], []),
        (Point(last=True), [{"stop"}], ["flush", "act stop"]),
        (Point(last=True, lockstep=False), [{"stop"}], ["leave", "flush", "act stop"]),
        (Point(last=True, lockstep=False, out_of_data=True, epoch_ended=True), [{"stop"}],
         ["leave", "flush", "act stop", "agree"]),
        (Point(urgent=True), [{"save", "stop"}], ["leave", "flush", "act save stop", "agree"]),
    ],
)  # fmt: skip
def test_what_is_done_at_a_point(at: Point, received: list[set[str]], expected: list[str]) -> None:
    assert moves(Conductor(), at, *received) == expected


def test_what_is_heard_on_the_way_counts_at_the_point() -> None:
    conductor = Conductor()
    conductor.receive({"evaluate"})
    assert moves(conductor, EQUAL_STEP) == ["flush", "act evaluate", "agree"]
    assert moves(conductor, EQUAL_STEP) == []


def test_a_decided_flag_is_no_new_request() -> None:
    conductor = Conductor()
    conductor.receive({"epoch_stop"})
    moves(conductor, EQUAL_STEP)
    assert conductor.cutting
    conductor.request({"epoch_stop"})  # the Trainer's flag still stands
    assert moves(conductor, Point(epoch_ended=True, lockstep=False)) == ["agree"], "all have ended it together"
    assert (conductor.requests, conductor.cutting) == (set(), False)
    conductor.request({"epoch_stop"})
    assert moves(conductor, Point(epoch_ended=True, lockstep=False)) == []
    assert conductor.requests == set(), "an epoch that has ended cannot be ended"


# -- whole trainings ---------------------------------------------------------------------------------------------------


@dataclass
class World:
    replicas: int
    exchanges: list[dict[int, tuple[str, set[str], float]]] = field(default_factory=list)

    def tell(self, replica: int, number: int, kind: str, requests: set[str], steps: float = 0.0) -> None:
        while len(self.exchanges) <= number:
            self.exchanges.append({})
        self.exchanges[number][replica] = kind, set(requests), steps
        kinds = {kind for kind, *_ in self.exchanges[number].values()}
        assert len(kinds) == 1, f"exchange {number} is {self.exchanges[number]}"

    def answer(self, number: int) -> tuple[set[str], float] | None:
        told = self.exchanges[number]
        if len(told) < self.replicas:
            return None
        return set().union(*(requests for _, requests, _ in told.values())), sum(s for *_, s in told.values())


@dataclass
class Setting:
    """`taus`: steps between syncs of each replica, equal ones unless by time. `epochs`: steps in each replica's."""

    taus: list[int]
    epochs: list[int]
    delay: int = 0
    warmup: int = 0
    max_steps: int = 60
    by_time: bool = False
    lockstep: bool = True


class Replica:
    """The loop of the Trainer and what the engine does in it, with numbers alone."""

    def __init__(self, world: World, number: int, setting: Setting, asks: dict[tuple[str, int], set[str]]) -> None:
        self.world, self.number, self.setting, self.asks = world, number, setting, asks
        self.tau, self.delay = setting.taus[number], setting.delay
        self.conductor = Conductor(by_time=setting.by_time)
        self.own = self.interval = self.exchanged = 0
        self.pending: int | None = None
        self.total = 0.0  # steps of all replicas that are known of
        self.told = 0
        self.acts: list[tuple[str, ...]] = []
        self.epochs_begun: list[int] = []
        self.urgent_from = 10**9

    # the engine
    def begin(self) -> int:
        number, self.exchanged = self.exchanged, self.exchanged + 1
        self.world.tell(self.number, number, "sync", self.conductor.requests, self.interval)
        self.told, self.interval = self.told + self.interval, 0
        return number

    def complete(self, number: int) -> Iterator[None]:
        while (answer := self.world.answer(number)) is None:
            yield
        self.pending = None
        requests, steps = answer
        self.total += steps
        if self.setting.by_time and self.total / self.world.replicas >= self.setting.max_steps:
            requests |= {"stop"}
        return requests

    def agree(self) -> Iterator[None]:
        number, self.exchanged = self.exchanged, self.exchanged + 1
        self.world.tell(self.number, number, "agree", self.conductor.requests)
        while (answer := self.world.answer(number)) is None:
            yield
        return answer[0]

    def step(self, warm_up: bool) -> Iterator[None]:
        """As `Engine.step`."""
        received = None
        if warm_up:
            return None
        self.interval += 1
        if self.pending is not None and self.interval >= self.delay:
            received = yield from self.complete(self.pending)
        if self.interval >= self.tau:
            if self.pending is not None:
                received = yield from self.complete(self.pending)
            number = self.begin()
            if self.delay:
                self.pending = number
            else:
                received = yield from self.complete(number)
        return received

    def converse(self, move: Any) -> Iterator[None]:
        if move.name == "agree":
            return (yield from self.agree())
        received = None
        if self.pending is not None:
            received = yield from self.complete(self.pending)
        if move.name == "leave" or (move.name == "flush" and (self.interval or (move.leaving and self.delay))):
            received = (received or set()) | (yield from self.complete(self.begin()))
        return received

    # the Trainer
    def train(self) -> Iterator[None]:
        steps = 0
        while not self.conductor.stopping:
            self.epochs_begun.append(self.own)
            began = self.own
            length = self.setting.epochs[self.number]
            if self.own >= length and not self.setting.lockstep:
                length = 0  # a stream has ended
            for _ in range(length):
                self.own += 1
                yield
                yield from self.point(warm_up=self.own <= self.setting.warmup)
                if self.conductor.stopping or self.conductor.cutting:
                    break
            if self.own == began:
                self.conductor.request({"stop"})
            yield from self.point(epoch_ended=True, out_of_data=self.own == began)
            steps += 1
            assert steps < 10**4

    def point(self, epoch_ended: bool = False, warm_up: bool = False, out_of_data: bool = False) -> Iterator[None]:
        conductor = self.conductor
        conductor.request(self.asks.pop(("end" if epoch_ended else "step", self.own), set()))
        last = not self.setting.by_time and self.own >= self.setting.max_steps
        if last and not epoch_ended:
            conductor.request({"stop"})
        urgent = self.own >= self.urgent_from

        def here() -> Point:
            return Point(
                epoch_ended=epoch_ended, warm_up=warm_up, lockstep=self.setting.lockstep,
                equal=self.interval == 0 and self.pending is None, pending=self.pending is not None,
                last=last or out_of_data or conductor.stopping, out_of_data=out_of_data, urgent=urgent,
            )  # fmt: skip

        conductor.arrive(here())
        if urgent:
            conductor.request({"save", "stop"})
        if not epoch_ended:
            conductor.receive((yield from self.step(warm_up)))
        while (move := conductor.next(here())).name != "go on":
            if move.name == "act":
                assert here().equal, "what needs equal replicas"
                self.acts.append(tuple(sorted(move.what)))
                conductor.request(self.asks.pop(("during " + "+".join(sorted(move.what)), self.own), set()))
            else:
                conductor.receive((yield from self.converse(move)))


def train(setting: Setting, asks: list[dict[tuple[str, int], set[str]]], rng: random.Random, urgent: Any = ()) -> Any:
    """All replicas, whose turns come in random order; they must end, each with the same exchanges and acts."""
    world = World(len(setting.taus))
    replicas = [Replica(world, number, setting, dict(asks[number])) for number in range(len(setting.taus))]
    for number, step in urgent:
        replicas[number].urgent_from = step
    running = {replica.number: replica.train() for replica in replicas}
    idle = 0
    while running:
        number = rng.choice(list(running))
        before = (replicas[number].own, replicas[number].exchanged)
        try:
            next(running[number])
        except StopIteration:
            del running[number]
            continue
        idle = 0 if (replicas[number].own, replicas[number].exchanged) != before else idle + 1
        assert idle < 2000, f"replicas {list(running)} wait for ever: {world.exchanges[-2:]}"
    assert len({replica.exchanged for replica in replicas}) == 1
    assert len({tuple(replica.acts) for replica in replicas}) == 1, [replica.acts for replica in replicas]
    for replica in replicas:
        assert replica.conductor.requests <= {"epoch_stop"}, "nothing that was asked for is left undone"
        assert replica.interval == 0
        assert replica.pending is None
    return replicas


def random_asks(rng: random.Random, steps: int, count: int) -> dict[tuple[str, int], set[str]]:
    kinds = ["step", "end", *("during " + what for what in ("evaluate", "save", "evaluate+save"))]
    requests = ("evaluate", "save", "epoch_stop", *(("stop",) if rng.random() < 0.3 else ()))
    return {
        (rng.choice(kinds), rng.randrange(1, steps)): set(rng.sample(requests, rng.randint(1, len(requests))))
        for _ in range(count)
    }


@pytest.mark.parametrize("delay", [0, 1, 3])
@pytest.mark.parametrize("kind", ["lockstep", "streams", "by time", "by time, streams"])
@pytest.mark.parametrize("urgent", [False, True])
def test_replicas_always_decide_alike(kind: str, delay: int, urgent: bool) -> None:
    """Random trainings: whatever is asked for, on any rank, at any event. (2,400 of each passed, too.)"""
    for seed in range(12):
        rng = random.Random(f"{kind} {delay} {seed}")
        number, tau = rng.randint(2, 4), rng.randint(max(1, delay), 9)
        by_time, lockstep = kind.startswith("by time"), kind == "lockstep" and not urgent
        lengths = (
            [rng.randint(3, 25)] * number
            if not kind.endswith("streams")
            else [rng.randint(0, 80) for _ in range(number)]
        )
        if by_time and not kind.endswith("streams"):
            lengths = [10**3] * number
        setting = Setting(
            taus=[rng.randint(max(1, delay), 9) for _ in range(number)] if by_time else [tau] * number,
            epochs=lengths, delay=delay, warmup=rng.choice([0, 0, 5]) if kind == "lockstep" else 0, by_time=by_time,
            lockstep=lockstep or kind in ("lockstep", "by time"),
        )  # fmt: skip
        if by_time or (urgent and kind == "lockstep"):
            setting.lockstep = False
        asks = [random_asks(rng, 60, rng.randint(0, 4)) for _ in range(number)]
        who = [(i, rng.randrange(1, 60)) for i in range(number) if rng.random() < 0.7] if urgent else []
        replicas = train(setting, asks, rng, who)
        assert any("stop" in act for act in replicas[0].acts)


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("step", range(1, 13))
def test_what_one_rank_asks_for_is_done_at_the_next_sync(request_: str, step: int) -> None:
    setting = Setting(taus=[4, 4], epochs=[100, 100], warmup=3, max_steps=40)
    first, _ = train(setting, [{}, {("step", step): {request_}}], random.Random(0))
    done_at = step if step <= 3 else 3 + -(-(step - 3) // 4) * 4
    assert first.acts[0] == (request_,)
    if request_ == "stop":
        assert first.own == done_at
    if request_ == "epoch_stop":
        assert first.epochs_begun == [0, done_at]


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("asked_at", range(1, 20))
def test_an_epoch_is_cut_once(asked_at: int, delay: int) -> None:
    """Epochs of 10 steps, a sync every 4: the one in which it was asked for, or none if it ended by itself before."""
    setting = Setting(taus=[4, 4], epochs=[10, 10], delay=delay, max_steps=60)
    first, _ = train(setting, [{("step", asked_at): {"epoch_stop"}}, {}], random.Random(0))
    begun = -(-asked_at // 4) * 4
    heard_at = begun + delay
    epoch_ends = -(-asked_at // 10) * 10
    expected = [0, 10, 20, 30, 40, 50]
    if heard_at < epoch_ends:
        expected = [*(e for e in expected if e < heard_at), *range(heard_at, 60, 10)]
    assert first.epochs_begun == expected


def test_one_that_is_asked_to_leave_saves_with_the_others_within_a_step_of_the_slowest() -> None:
    setting = Setting(taus=[32] * 4, epochs=[1000] * 4, max_steps=96, lockstep=False)
    replicas = train(setting, [{}] * 4, random.Random(3), urgent=[(0, 5), (1, 6), (2, 5), (3, 3)])
    assert replicas[0].acts == [("save", "stop")]
    assert [replica.own for replica in replicas] == [5, 6, 5, 3]
