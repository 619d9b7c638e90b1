from __future__ import annotations

from hf_edit.schedule import SyncSchedule


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
    schedule.restart_timer()
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
    assert (one.inner_steps, one.turns) == (0, 0)
