from __future__ import annotations

from hf_edit.method.schedule import GlobalProgress, SyncSchedule


def test_every_tau_inner_steps_after_the_warmup() -> None:
    schedule = SyncSchedule(sync_interval=3, warmup_steps=2)
    due = []
    for step in range(1, 12):
        if schedule.advance():
            due.append(step)
            schedule.restart()
    assert due == [5, 8, 11]


def test_the_warmup_says_when_it_ends() -> None:
    schedule = SyncSchedule(sync_interval=1, warmup_steps=2)
    seen = []
    for _ in range(3):
        seen.append(schedule.warming_up)
        schedule.advance()
    assert seen == [True, True, False]


def test_by_time_from_the_end_of_a_sync() -> None:
    now = 100.0
    schedule = SyncSchedule(sync_seconds=10.0, clock=lambda: now)
    now = 109.0
    assert not schedule.advance()
    now = 110.5
    assert schedule.advance()
    schedule.restart()
    now = 118.0  # the others took their time
    assert not schedule.advance(), "the timer stands still"
    schedule.restart_timer(now)
    now = 127.9
    assert not schedule.advance()
    now = 128.0
    assert schedule.advance()


def test_the_timer_starts_when_the_warmup_ends() -> None:
    now = 0.0
    schedule = SyncSchedule(sync_seconds=10.0, warmup_steps=1, clock=lambda: now)
    now = 50.0
    assert not schedule.advance()
    now = 55.0
    assert not schedule.advance()
    now = 60.0
    assert schedule.advance()


def test_a_skipped_step_is_no_inner_step_but_takes_its_turn() -> None:
    """Another replica may not skip it, and both must come to the same syncs."""
    one, other = SyncSchedule(sync_interval=3, warmup_steps=1), SyncSchedule(sync_interval=3, warmup_steps=1)
    assert not one.advance(skipped=True)
    assert one.warming_up, "a skipped step is no warm-up step"
    one.advance()
    other.advance()
    assert [one.advance(skipped=number == 1) for number in range(3)] == [other.advance() for _ in range(3)]
    assert (one.inner_steps, other.inner_steps) == (2, 3)
    assert (one.step, other.step) == (3, 4)
    one.restart()
    assert (one.inner_steps, one.interval_steps) == (0, 0)


def test_who_waits_for_the_others_is_not_taken_for_a_slow_replica() -> None:
    """Replica 0 takes 10 steps in an interval, replica 1 five; then that one has ended, and waits for ten syncs."""
    fast = GlobalProgress(replica=0)
    for steps in [(10, 5)] * 3 + [(10, 0)] * 10:
        for _ in range(10):
            fast.take_step()
        fast.hand_over()
        fast.confirm(steps)
    assert fast.confirmed == 3 * 7.5 + 10 * 5
    assert fast.rate == 0.75


def test_what_is_decided_where_replicas_meet_depends_on_what_they_told_alone() -> None:
    """One applies a delayed sync after its five steps, the other after two, as its next one is due."""
    told = []
    for own_steps in (5, 2):
        progress = GlobalProgress(replica=0)
        progress.hand_over()
        for _ in range(own_steps):
            progress.take_step()
        progress.confirm([6, 3], delay_steps=5)
        told.append((progress.at_apply, progress.furthest))
        assert progress.furthest >= own_steps + 6, "no replica's step count goes back"
    assert told == [(9.5, 11.0)] * 2
