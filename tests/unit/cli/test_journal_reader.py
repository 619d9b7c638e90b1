from __future__ import annotations

import doctest
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_edit.cli import journal_reader
from hf_edit.cli.journal_reader import JOURNAL, JournalError, find_journal, read_journal, read_journals
from hf_edit.cli.journal_sums import headlines
from tests.unit.cli.fake_journal import FakeRun

RUN = {"kind": "run", "version": 1, "step": 0, "replicas": 2, "shards": 1, "units": ["a", "b"], "gradient_bytes": 10}


def sync(number: int, step: int, **more: Any) -> dict[str, Any]:
    return {"kind": "sync", "sync": number, "step": step, "seconds": float(step), "sync_bytes": 10,
            "replicas": {"inner_steps": [4.0, 4.0], "loss": [2.0, None]},
            "norms": [[1.0, None], [2.0, 3.0]], "weights": [[1.0, 0.0], [0.6, 0.4]], **more}  # fmt: skip


def write(folder: Path, *records: dict[str, Any] | str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / JOURNAL
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return path


def test_doctests() -> None:
    assert doctest.testmod(journal_reader).failed == 0


def test_a_resume_voids_the_future_that_it_gave_up(tmp_path: Path) -> None:
    again = {**RUN, "step": 8, "replicas": 3}
    path = write(tmp_path, RUN, sync(1, 4), sync(2, 8), sync(3, 12), {"kind": "end", "step": 12, "seconds": 12},
                 again, sync(3, 12, seconds=5.0))  # fmt: skip
    journal = read_journal(path, "run")
    assert [(s.number, s.step, s.seconds) for s in journal.syncs] == [(1, 4, 4.0), (2, 8, 8.0), (3, 12, 13.0)]
    assert (journal.void, journal.resumed_at, journal.seconds, journal.steps) == (2, [8], 13.0, 12)
    assert not journal.ended, "the end was of what was given up"
    assert journal.num_replicas == 3


def test_a_training_from_the_start_voids_all(tmp_path: Path) -> None:
    path = write(tmp_path, RUN, {"kind": "log", "step": 0, "eval_loss": 9.0}, sync(1, 4), RUN, sync(1, 4),
                 {"kind": "end", "step": 4, "seconds": 6})  # fmt: skip
    journal = read_journal(path, "run")
    assert (len(journal.syncs), journal.logs, journal.resumed_at, journal.void) == (1, [], [], 3)
    assert journal.ended


def test_a_training_that_was_broken_off(tmp_path: Path) -> None:
    broken = {"kind": "end", "step": 6, "seconds": 6, "failed": "RuntimeError: the network is down\nmore"}
    journal = read_journal(write(tmp_path / "one", RUN, sync(1, 4), broken), "run")
    assert not journal.ended
    assert "broken off: RuntimeError: the network is down" in [headline.note for headline in headlines(journal)]
    resumed = read_journal(
        write(tmp_path / "two", RUN, sync(1, 4), broken, {**RUN, "step": 4}, sync(2, 8), {"kind": "end", "step": 8}),
        "run",
    )
    assert (resumed.ended, resumed.failed) == (True, "")


def test_resumed_twice(tmp_path: Path) -> None:
    path = write(tmp_path, RUN, sync(1, 4), sync(2, 8), {**RUN, "step": 8}, sync(3, 12), {**RUN, "step": 4}, sync(2, 8))
    journal = read_journal(path, "run")
    assert ([s.step for s in journal.syncs], journal.resumed_at) == ([4, 8], [4])


def test_lines_that_are_cut_off_or_unknown(tmp_path: Path) -> None:
    path = write(tmp_path, RUN, sync(1, 4), '{"kind": "weather", "step": 4}', '{"kind": "sync", "st', "[1]",
                 '{"kind": "sync", "step": 8, "replicas": 7}')  # fmt: skip
    journal = read_journal(path, "run")
    assert (len(journal.syncs), journal.malformed) == (1, 3)


def test_nulls_are_nan(tmp_path: Path) -> None:
    (only,) = read_journal(write(tmp_path, RUN, sync(1, 4, exposed_seconds=None)), "run").syncs
    assert only.norms is not None
    np.testing.assert_array_equal(only.norms, np.array([[1.0, math.nan], [2.0, 3.0]], dtype=np.float32))
    assert math.isnan(only.exposed_seconds)
    assert only.losses[0] == 2.0
    assert math.isnan(only.losses[1])
    assert all(map(math.isnan, only.before_wait_seconds)), "the first sync has none before it"


def test_thinned_records(tmp_path: Path) -> None:
    thin = {name: value for name, value in sync(1, 4, anomalous=[[1, 0]]).items() if name not in ("norms", "weights")}
    journal = read_journal(write(tmp_path, RUN, thin, sync(2, 8)), "run")
    norms = journal.per_unit("norms")
    assert norms.shape == (2, 2, 2)
    assert np.isnan(norms[0]).all()
    assert norms[1, 1].tolist() == [2.0, 3.0]
    assert journal.left_out()[0].tolist() == [[False, False], [True, False]], "that is kept"


def test_a_sync_of_some_units(tmp_path: Path) -> None:
    """With fragments: the rows are theirs."""
    part = sync(1, 4, units=[1], norms=[[5.0, 6.0]], weights=[[0.5, 0.5]], anomalous=[[0, 1]], rolled_back=[0])
    journal = read_journal(write(tmp_path, RUN, part, sync(2, 8)), "run")
    assert np.isnan(journal.per_unit("norms")[0, 0]).all()
    assert journal.per_unit("norms")[0, 1].tolist() == [5.0, 6.0]
    assert journal.left_out()[0].tolist() == [[False, False], [False, True]]
    assert journal.syncs[0].rolled_back == [1]


def test_other_units_or_replicas_before_a_resume(tmp_path: Path) -> None:
    more = {"norms": [[1.0] * 3] * 3, "weights": [[1.0] * 3] * 3, "replicas": {"inner_steps": [4.0] * 3}}
    journal = read_journal(write(tmp_path, RUN, sync(1, 4, **more), {**RUN, "step": 4}, sync(2, 8)), "run")
    assert journal.per_unit("norms").shape == (2, 2, 3)
    assert np.isnan(journal.per_unit("norms")[0]).all()
    assert journal.per_replica("inner_steps")[1].tolist()[:2] == [4.0, 4.0]


def test_series_and_evaluation(tmp_path: Path) -> None:
    logs = [{"kind": "log", "step": 1, "loss": 3.0}, {"kind": "log", "step": 2, "loss": None},
            {"kind": "log", "step": 2, "eval_dev_loss": 2.5, "eval_runtime": 1.0}]  # fmt: skip
    journal = read_journal(write(tmp_path, RUN, *logs), "run")
    assert journal.series("loss") == ([1], [3.0])
    assert journal.eval_key() == "eval_dev_loss"


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    for name in ("one/out", "two/out", "three"):
        FakeRun(num_syncs=2, num_units=2, resume_at=None).write(tmp_path / name)
    given = [str(tmp_path / "one/out"), str(tmp_path / "two/out" / JOURNAL)]
    assert [journal.name for journal in read_journals(given)] == ["one/out", "two/out"]
    assert [journal.name for journal in read_journals([given[0], str(tmp_path / "three")])] == ["out", "three"]
    assert [journal.name for journal in read_journals([given[0], given[0]])] == ["out (1)", "out (2)"]


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    run = tmp_path / "run"
    FakeRun(num_syncs=2, num_units=2, resume_at=None).write(run)
    (run / "checkpoint-4").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "deep").mkdir()
    needed = r"A RUN is the output_dir of a training with EDiTTrainer, which holds edit_syncs\.jsonl"
    with pytest.raises(JournalError, match=f"gone: there is no such folder or file. {needed}"):
        find_journal(str(tmp_path / "gone"))
    with pytest.raises(JournalError, match=r"the folder has no edit_syncs.jsonl\..* Did you mean .*run\?"):
        find_journal(str(run / "checkpoint-4"))
    with pytest.raises(JournalError, match=r"Did you mean .*run\?"):
        find_journal(str(tmp_path))
    with pytest.raises(JournalError, match="more than one replica"):
        find_journal(str(tmp_path / "empty" / "deep"))
    (tmp_path / "config.json").write_text('{"lr": 1}\n', encoding="utf-8")
    with pytest.raises(JournalError, match=r"no line says .*so it is no journal of EDiTTrainer"):
        read_journal(tmp_path / "config.json", "config")
    with pytest.raises(JournalError, match=r"version 2 of the format; this hf-edit reads up to 1"):
        read_journal(write(tmp_path, {**RUN, "version": 2}), "run")
