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
    now = 118.0  # the sync took its time
    schedule.restart()
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
