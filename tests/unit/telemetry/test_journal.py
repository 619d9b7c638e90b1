"""edit_syncs.jsonl: one line a record, bounded, never half."""

from __future__ import annotations

import errno
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from hf_edit.telemetry.journal import Journal
from tests.unit.telemetry.test_telemetry import record, spiking


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_sync_is_one_line_with_all_replicas(tmp_path: Path) -> None:
    path = tmp_path / "new" / "edit_syncs.jsonl"
    journal = Journal(path, clock=iter([0.0, 10.0, 12.5]).__next__)
    journal.begin(3, replicas=2)
    journal.sync(8, record([[1.0, 2.0], [1.0, math.nan]], [[False, False], [False, True]]))
    run, sync = lines(path)
    assert (run["kind"], run["step"], run["replicas"]) == ("run", 3, 2)
    assert (sync["kind"], sync["step"], sync["sync"], sync["seconds"]) == ("sync", 8, 7, 2.5)
    assert sync["norms"] == [[1.0, 2.0], [1.0, None]]
    assert sync["replicas"]["loss"] == [2.0, 3.0]
    assert sync["replicas"]["training_seconds"] == [1.0, 2.0]
    assert sync["before"]["wait_seconds"] == [0.5, None]
    assert sync["anomalous"] == [[1, 1]]
    assert sync["clip"] == [1.0, 0.4]
    assert sync["clipped_units"] == 1


def test_a_spike_has_its_own_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.sync(8, spiking(math.inf), response="skip")
    spike, sync = lines(tmp_path / "j")
    assert sync["kind"] == "sync"
    told = dict(
        kind="spike", sync=7, response="skip", replica=1, count=3, size=None, loss=5.25, step=41, epoch=1, batch=17
    )
    assert {name: spike[name] for name in told} == told


def test_a_line_that_was_cut_off_stays_alone(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_text('{"kind":"run"}\n{"kind":"sy', encoding="utf-8")
    Journal(path).begin(5)
    first, cut, last = path.read_text(encoding="utf-8").splitlines()
    assert (first, cut) == ('{"kind":"run"}', '{"kind":"sy')
    assert json.loads(last)["step"] == 5


def test_it_is_bounded_and_keeps_runs_and_the_newest(tmp_path: Path) -> None:
    path, limit = tmp_path / "j", 20_000
    journal = Journal(path, limit_bytes=limit)
    journal.begin(0)
    sizes = []
    for step in range(400):
        journal.sync(step, record([[1.0, 2.0]] * 2, [[False, False]] * 2))
        journal.log(step, {"loss": 2.0})
        if step % 100 == 0:
            journal.write("event", step=step, title="EDiT: rollback", text="")
        sizes.append(path.stat().st_size)
    assert max(sizes) < limit + 2_000
    assert min(sizes[100:]) > limit / 8, "too much was thrown away"
    kept = lines(path)
    assert kept[0]["kind"] == "run"
    assert kept[-1]["step"] == 399
    assert "norms" in [entry for entry in kept if entry["kind"] == "sync"][-1]
    assert len([entry for entry in kept if entry["kind"] == "event"]) == 4, "what happened is kept"
    steps = [entry["step"] for entry in kept]
    assert steps == sorted(steps)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_full_disk_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Full:
        def write(self, text: str) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    journal = Journal(tmp_path / "j")
    journal._file = Full()  # type: ignore[assignment]
    with caplog.at_level(logging.WARNING):
        journal.log(1, {"loss": 2.0})
        journal.log(2, {"loss": 2.0})
    assert caplog.text.count("is not written any more: [Errno 28] No space left on device") == 1
