"""Replicas are killed, stopped, slow, and come back: the others go on with what all have learnt."""

from __future__ import annotations

import itertools
import re
import signal
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from hf_edit.config import EDiTConfig
from tests.dist.elastic import HEARTBEAT_SECONDS, OTHER_ANCHOR, OTHER_SETTINGS, UNREACHABLE, Replicas
from tests.dist.nets import train
from tests.dist.threads import run_ranks

pytestmark = pytest.mark.skipif(find_spec("torchft") is None, reason="hf_edit[elastic] is not installed")

FAULTS = ["step", "begin-after", "gather", "all_reduce-after", "commit", "vote", "commit-after", "receive"]
OVERLAPS = [{"overlap": "none"}, {"overlap": "delayed", "delay_steps": 2}]

Make = Callable[..., Replicas]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Replicas] = []

    def replicas(*args: Any, **settings: Any) -> Replicas:
        made.append(Replicas(tmp_path, *args, **settings))
        return made[-1]

    yield replicas
    for one in made:
        one.close()


def check_ends(ends: list[dict[str, Any]], count: int) -> None:
    """All ended equal, and what each has learnt was told."""
    assert len(ends) == count
    for end in ends:
        assert end["finite"]
        for name in ("sync", "params", "anchors", "buffer", "totals", "confirmed"):
            assert end[name] == ends[0][name], name
        assert end["totals"][end["replica"]] == end["steps"], "every step was told once"


@pytest.mark.parametrize(
    ("overlap", "faults"),
    [(OVERLAPS[0], ["gather", "commit", "receive"]), (OVERLAPS[1], FAULTS)],
    ids=["none", "delayed"],
)
def test_a_replica_dies_at_every_point_and_comes_back(make: Make, overlap: dict[str, Any], faults: list[str]) -> None:
    replicas = make(3, [0.02] * 3, sync_interval=4, **overlap)
    replicas.start_both()
    for fault in faults:
        replicas.start(2, fault)
        replicas.wait(lambda: replicas.processes[2].poll() is not None)
        replicas.wait_for_syncs(0, 2)
        replicas.wait_for_syncs(1, 2)
    assert [note["fault"] for note in replicas.notes("dies")] == faults
    replicas.start(2)
    replicas.wait_for_syncs(2, 2)
    check_ends(replicas.finish(), 3)
    began, joined = replicas.notes("begins", 2)[-1], replicas.notes("joined", 2)
    assert joined[-1]["at"] - began["at"] < 30
    assert all(note["moments"] > 0 for note in joined[1:]), "it got an inner optimizer's state"


@pytest.mark.parametrize("overlap", OVERLAPS, ids=["none", "delayed"])
def test_what_others_have_committed_without_ones_knowledge_is_counted_once(make: Make, overlap: dict[str, Any]) -> None:
    """It cannot know whether they have. When it meets them again they tell, and it tells only of its steps since."""
    replicas = make(3, [0.02] * 3, sync_interval=4, **overlap)
    replicas.start(0)
    replicas.start(1, "deaf")
    replicas.start(2)
    replicas.wait(lambda: replicas.notes("deaf", 1))
    replicas.wait_for_syncs(1, 3)
    check_ends(replicas.finish(), 3)
    at = replicas.notes("deaf", 1)[0]["at"]
    sync = next(note["sync"] for note in replicas.notes("synced", 0) if note["at"] > at - 0.01)
    assert sync not in [note["sync"] for note in replicas.notes("synced", 1)], "they had a sync that it had not"


@pytest.mark.parametrize("overlap", OVERLAPS, ids=["none", "delayed"])
def test_without_faults_it_is_the_static_mode(make: Make, overlap: dict[str, Any]) -> None:
    config = EDiTConfig(sync_interval=4, sync_moments="both", **overlap)
    static = run_ranks(2, lambda rank: train(rank, 2, config, steps=26))[0]
    replicas = make(2, [0.0] * 2, sync_interval=4, sync_moments="both", steps=26, **overlap)
    replicas.start_both()
    ends = replicas.finish()
    check_ends(ends, 2)
    expected = [float(param.double().sum()) for param in static.params.values()]
    assert ends[0]["params"] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert ends[0]["confirmed"] == 26


@pytest.mark.parametrize("overlap", OVERLAPS, ids=["none", "delayed"])
def test_the_one_that_heals_dies(make: Make, overlap: dict[str, Any]) -> None:
    replicas = make(3, [0.02] * 3, sync_interval=4, **overlap)
    replicas.start(0, "send")  # once at the beginning, where all take its parameters; then for the one that comes back
    replicas.start(1)
    replicas.start(2)
    replicas.wait(lambda: replicas.notes("dies", 0))  # "send" occurs several times in one healing
    replicas.wait_for_syncs(1, 2)
    replicas.start(0)
    replicas.wait_for_syncs(0, 2)
    check_ends(replicas.finish(), 3)


def test_survivors_commit_soon_after_a_kill(make: Make) -> None:
    replicas = make(2, [0.02] * 2, sync_interval=4, overlap="none")
    replicas.start_both()
    replicas.wait_for_syncs(0, 3)
    replicas.processes[1].send_signal(signal.SIGKILL)
    killed_at = time.time()
    replicas.wait_for_syncs(0, 3)
    alone = [note["at"] for note in replicas.notes("synced", 0) if note["members"] == [0]]
    assert alone[0] - killed_at < HEARTBEAT_SECONDS + 3.0
    ends = replicas.finish()
    assert [end["replica"] for end in ends] == [0]


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_replica_is_left_out_and_goes_on_with_what_it_has(make: Make, stopped: int) -> None:
    replicas = make(2, [0.02] * 2, sync_interval=4, overlap="delayed", delay_steps=2)
    replicas.start_both()
    replicas.wait_for_syncs(0, 3)
    replicas.processes[stopped].send_signal(signal.SIGSTOP)
    replicas.wait_for_syncs(1 - stopped, 4)
    replicas.processes[stopped].send_signal(signal.SIGCONT)
    replicas.wait_for_syncs(stopped, 3)
    syncs = replicas.notes("synced", stopped)
    assert syncs[-1]["members"] == [0, 1]
    back = next(after for before, after in itertools.pairwise(syncs) if after["sync"] > before["sync"] + 2)
    assert 0 < back["weights"][stopped] < 0.4, "what it learnt at an anchor that the other one has left weighs less"
    assert syncs[-1]["weights"][stopped] > 0.4
    check_ends(replicas.finish(), 2)


@pytest.mark.parametrize("slow", [0, 1])
def test_of_two_a_slow_one_is_waited_for_only_so_long(make: Make, slow: int) -> None:
    """torchft's lighthouse alone would have the other one wait without end."""
    pauses = [0.02, 0.02]
    pauses[slow] = 1.1  # 4.4 s between its syncs
    replicas = make(2, pauses, sync_interval=4, overlap="none")
    replicas.start_both()
    replicas.wait_for_syncs(slow, 3)
    alone = [note for note in replicas.notes("synced", 1 - slow) if note["members"] == [1 - slow]]
    assert len(alone) >= 2
    assert all(note["members"] == [0, 1] for note in replicas.notes("synced", slow)), "it never went on alone"
    check_ends(replicas.finish(), 2)


def test_by_time_with_outer_state_on_the_host(make: Make) -> None:
    """A-EDiT: a fast one takes more steps, and both are counted; one is killed, and comes back."""
    replicas = make(2, [0.02, 0.1], sync_seconds=0.5, overlap="delayed", delay_steps=2, offload_outer_state=True,
                    compression="int8")  # fmt: skip
    replicas.start_both()
    replicas.wait_for_syncs(1, 3)
    steps = [replicas.notes("synced", number)[-1]["steps"] for number in (0, 1)]
    assert steps[0] > 2 * steps[1]
    replicas.processes[1].send_signal(signal.SIGKILL)
    replicas.wait_for_syncs(0, 3)
    replicas.start(1)
    replicas.wait_for_syncs(1, 3)
    check_ends(replicas.finish(), 2)


def test_a_lone_fresh_replica_waits(make: Make) -> None:
    replicas = make(2, [0.02] * 2, sync_interval=4, overlap="none")
    replicas.start(1)
    replicas.wait(lambda: replicas.notes("begins", 1))
    time.sleep(3.0)
    assert not replicas.notes("joined")
    replicas.start(0)
    replicas.wait_for_syncs(0, 1)
    check_ends(replicas.finish(), 2)


def test_one_with_other_settings_is_refused_and_the_others_go_on(make: Make) -> None:
    replicas = make(3, [0.02] * 3, sync_interval=4, overlap="none")
    replicas.start_both()
    replicas.wait_for_syncs(0, 2)
    replicas.start(2, OTHER_SETTINGS)
    assert replicas.processes.pop(2).wait(timeout=60) == 1
    assert "Replica 2 differs from replica 0, which has trained longer, in EDiTConfig" in replicas.outputs()
    replicas.wait_for_syncs(0, 2)
    check_ends(replicas.finish(), 2)


def test_replicas_with_other_anchors_stop_with_both_digests(make: Make) -> None:
    replicas = make(2, [0.02] * 2, sync_interval=4, overlap="delayed", delay_steps=2)
    replicas.start(0)
    replicas.start(1, OTHER_ANCHOR)
    assert [replicas.processes.pop(number).wait(timeout=60) for number in (0, 1)] == [1, 1]
    found = re.findall(
        r"replica (\d) have the digest (\S+), but those of replicas \[(\d)\] \['(\S+)'\]", replicas.outputs()
    )
    (first, own, other, theirs), again = found[0], found[1]
    assert (first, other) == ("0", "1")
    assert own != theirs
    assert again == ("1", theirs, "0", own)


def test_who_reaches_the_lighthouse_and_nobody_else_says_so(make: Make) -> None:
    replicas = make(2, [0.02] * 2, sync_interval=4, overlap="none")
    replicas.start(0)
    replicas.start(1, UNREACHABLE)
    assert replicas.processes[1].wait(timeout=60) == 1
    assert re.search(r"Replica 1 has not carried out a sync for \d+ s, though replicas", replicas.outputs())
    assert "The last failure: no connection to anybody" in replicas.outputs()


def test_a_second_launch_takes_the_place_of_the_first(make: Make) -> None:
    replicas = make(2, [0.02] * 2, sync_interval=4, overlap="none")
    replicas.start_both()
    replicas.wait_for_syncs(0, 2)
    first = replicas.processes[1]
    replicas.start(1)
    assert first.wait(timeout=30) == 1
    assert "A later launch of replica 1 has come" in replicas.outputs()
    replicas.wait_for_syncs(1, 2)
    check_ends(replicas.finish(), 2)
