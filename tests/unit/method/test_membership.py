"""Who heals whom, and who may go on: the same on all members, whatever has happened."""

from __future__ import annotations

from typing import Any

import pytest

from hf_edit.method.membership import Meeting, News, members_of, why_wait


def news(replica: int, sync: int = 0, *commits: str, **more: Any) -> News:
    values = {
        "launch": f"launch of {replica}", "launched_at": 0.0, "store": "", "port": 0, "settings": "", "quorum": 7,
        "link": "", "patient": False, "waited_seconds": 0.0,
    }  # fmt: skip
    return News(replica=replica, sync=sync, commits=commits, **{**values, **more})


def meeting(*members: News, quorum: int = 7) -> Meeting:
    return Meeting("9", quorum, members)


def test_nobody_is_stale_who_holds_the_last_sync() -> None:
    found = meeting(news(0, 5, "a", "b"), news(1, 5, "b"), news(2, 5, "b"))
    assert (found.sync, found.stale, found.fresh) == (5, [], [])


def test_who_lacks_a_sync_is_healed_by_the_first_that_has_it() -> None:
    found = meeting(news(0, 4, "a"), news(1, 5, "a", "b"), news(2, 5, "a", "b"), news(3))
    assert found.source.replica == 1
    assert (found.stale, found.fresh) == ([0, 3], [3])
    assert found.missed == [1, 0, 0, 0], "the last one has nothing to tell"


def test_all_take_the_first_ones_initial_parameters() -> None:
    found = meeting(news(0), news(1), news(2))
    assert (found.source.replica, found.stale, found.fresh) == (0, [1, 2], [1, 2])


def test_after_a_checkpoint_all_have_the_same() -> None:
    assert meeting(news(0, 20), news(1, 20)).stale == []


def test_who_went_on_alone_takes_what_was_committed_last() -> None:
    """Two that each held the other for lost have as many syncs, but not the same."""
    found = meeting(news(0, 19, "17", "18"), news(1, 19, "17", "19"))
    assert (found.source.replica, found.stale, found.fresh) == (1, [0], [])
    assert meeting(news(0, 20, "17", "18"), news(1, 19, "17", "19")).source.replica == 0


def test_a_meeting_in_doubt_was_committed_if_anybody_has() -> None:
    found = meeting(news(0, 4, "a"), news(1, 5, "a", "b"))
    assert found.committed("b")
    assert not found.committed("c")


@pytest.mark.parametrize(
    ("last", "patient", "again"),
    [(7, False, False), (6, False, False), (5, False, True), (5, True, False), (-1, False, True), (9, False, True)],
)
def test_who_missed_a_meeting_looks_again_before_it_goes_on_alone(last: int, patient: bool, again: bool) -> None:
    assert meeting(news(0, 3, "a", quorum=last, patient=patient)).must_look_again is again


def test_one_that_was_at_the_last_meeting_is_enough() -> None:
    found = meeting(news(0, 3, "a", quorum=5), news(1, 3, "a", quorum=6))
    assert not found.must_look_again


def test_before_the_first_step_nobody_can_be_left_behind() -> None:
    assert not meeting(news(0, quorum=-1), news(1, quorum=-1)).must_look_again


def test_a_later_launch_takes_the_place_of_an_earlier_one() -> None:
    early, late = news(1, 5, launched_at=1.0), news(1, launched_at=2.0, launch="again")
    assert [member.launch for member in members_of([late, news(0), early])] == ["launch of 0", "again"]


@pytest.mark.parametrize(
    ("syncs", "num_replicas", "min_replicas", "waited", "why"),
    [
        ([0], 2, 1, 99.0, "1 of 2 replicas is here; 2 must be, to begin"),
        ([0, 0], 2, 1, 0.0, ""),
        ([0, 0], 3, 1, 3.0, "2 of 3 replicas are here; 30 s are waited for the others, to begin"),
        ([0, 0], 3, 1, 31.0, ""),
        ([0, 0], 3, 3, 31.0, "2 of 3 replicas are here; 3 must be, to begin"),
        ([0, 0], 4, 1, 31.0, "2 of 4 replicas are here; 3 must be, to begin"),
        ([7], 4, 1, 0.0, ""),
        ([7, 0], 4, 3, 0.0, "2 of 4 replicas are here; min_replicas=3"),
    ],
)  # fmt: skip
def test_what_they_wait_for(syncs: list[int], num_replicas: int, min_replicas: int, waited: float, why: str) -> None:
    members = [news(replica, sync, waited_seconds=waited) for replica, sync in enumerate(syncs)]
    assert why_wait(members, num_replicas, min_replicas) == why


def test_news_travel_as_json_has_them() -> None:
    import json

    one = news(3, 5, "a", "b", link="c")
    assert News.read(json.loads(json.dumps(one.as_dict()))) == one
