from __future__ import annotations

import contextlib
import io
import json
import re
import struct
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from hf_edit.cli.journal_reader import JOURNAL, Journal, read_journal, read_journals
from hf_edit.cli.journal_sums import events, findings, headlines, settings_table
from hf_edit.cli.main import main
from hf_edit.cli.report import MAX_EVENTS, PAGE, write_report
from tests.unit.cli.fake_journal import FakeRun

SMALL = {"num_syncs": 20, "num_units": 5, "resume_at": 11}


def journal_of(folder: Path, fake: FakeRun, name: str = "run") -> Journal:
    return read_journal(fake.write(folder / name), name)


@dataclass
class Written:
    folder: Path
    page: str
    out: str
    err: str


def report(folder: Path, *runs: FakeRun) -> Written:
    """What the command wrote of runs called a <run>, b, ..., the first of which has a last line that was cut off."""
    places = [fake.write(folder / name).parent for fake, name in zip(runs, ("a <run>", "b"), strict=False)]
    with (places[0] / JOURNAL).open("a", encoding="utf-8") as file:
        file.write('{"kind": "sy')
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(["report", *map(str, places), *(["--output", str(folder / "out")] if len(runs) > 1 else [])]) == 0
    written = folder / "out" if len(runs) > 1 else places[0] / "report"
    return Written(written, (written / PAGE).read_text(encoding="utf-8"), out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return report(tmp_path_factory.mktemp("one"), FakeRun(**SMALL))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Written:
    other = FakeRun(num_syncs=20, num_units=5, resume_at=None, trouble=False, by_time=True,
                    settings={"weighting": "uniform"}, seed=1)  # fmt: skip
    return report(tmp_path_factory.mktemp("two"), FakeRun(**SMALL), other)


def test_one_run(one: Written) -> None:
    assert one.err.count("1 malformed line skipped") == 1
    assert one.out.startswith(str(one.folder / PAGE))
    assert "a &lt;run&gt;" in one.page
    assert "<run>" not in one.page
    titles = ("At a glance", "Loss", "Where the time went", "Sent between replicas", "Norms", "Weights", "Events")
    for title in titles:
        assert re.search(rf"<h2 id=[^>]*>{title}</h2>", one.page)
    assert one.page.count("<svg") == one.page.count('role="img" aria-label="') == 10, "wide and narrow ones"
    assert "In each interval of a &lt;run&gt; all replicas took as many, mostly 16." in one.page


def test_a_picture_of_each_figure(one: Written) -> None:
    names = {path.name for path in one.folder.glob("*.png")}
    assert names == {"loss.png", "time.png", "bytes.png", "norms.png", "weights.png"}
    for name in names:
        content = (one.folder / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert struct.unpack(">I", content[16:20])[0] == 1410


def test_the_page_needs_nothing_from_outside(two: Written) -> None:
    assert not re.findall(r"https?:|//[a-z]+\.|@import|<script|<link|<iframe", two.page)
    targets = re.findall(r"""\b(?:src|href)="([^"]*)"|url\(([^)]*)\)""", two.page)
    found = [attribute or call for attribute, call in targets]
    assert found
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in found)
    ids = re.findall(r'\bid="([^"]*)"', two.page)
    assert len(ids) == len(set(ids))
    assert {target[1:] for target in found if target.startswith("#")} <= set(ids)


def test_several_runs_side_by_side(two: Written) -> None:
    assert {"norms-a_run_.png", "norms-b.png", "loss.png"} <= {path.name for path in two.folder.iterdir()}
    assert '<th scope="col">a &lt;run&gt;</th><th scope="col">b</th>' in two.page
    differs = re.findall(r'<tr class="differs"><th scope="row">(\S+) (\S+) ', two.page)
    assert differs == [("edit:", "weighting"), ("edit:", "sync_seconds"), ("training:", "seed")]


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_text(json.dumps(FakeRun().run_line(0)), encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 0
    text = (tmp_path / "report" / PAGE).read_text(encoding="utf-8")
    assert "has not ended, or was killed" in text


def test_headlines(tmp_path: Path) -> None:
    found = {line.label: (line.value, line.note) for line in headlines(journal_of(tmp_path, FakeRun(**SMALL)))}
    assert found["Layout"] == ("4 x 2", "replicas x shards")
    assert found["Steps"] == ("320", "ended")
    assert found["Syncs"] == ("20", "one in 16 steps")
    assert found["Sent by a rank"] == ("6 GB", "96 GB by averaging every gradient (16.0 times)")
    assert found["Loss spikes"][0] == "1"
    assert found["Left out"][0] == "2"
    assert found["Rollbacks"][0] == "3"
    assert found["Time"] == ("7.0 min", f"{20 * 16 * 4096 * 4 / 422:,.0f} tokens a second")
    assert found["Waited for syncs"][0] == f"{20 * (14.4 / 0.72 - 14.4 + 0.7) / 422:.1%}"


def test_findings(tmp_path: Path) -> None:
    text = " ".join(findings(journal_of(tmp_path, FakeRun(**SMALL))))
    assert "Replica 0 spent 26% of its time waiting for others, replica 3 0%." in text
    assert "Replica 1 was left out of units in 2 of 20 syncs, the most of all." in text
    assert "3 times a unit went back" in text
    assert "A loss spike: replica 1, step 140: the loss of 6.9 lay 17.3 standard deviations above its mean" in text
    assert "records of steps that a resume gave up" in text
    assert findings(journal_of(tmp_path, FakeRun(trouble=False, resume_at=None, by_time=True), "fine")) == []


def test_events_in_order_and_each_once(tmp_path: Path) -> None:
    journal = journal_of(tmp_path, FakeRun(**SMALL))
    journal.events.append({"kind": "event", "step": 144, "title": "EDiT: loss spike", "text": "again"})
    assert [(step, title) for step, title, _ in events(journal)] == [
        (140, "Loss spike"), (192, "Resumed"), (208, "Rollback"),
    ]  # fmt: skip
    assert "was not finite" in events_text(journal, size=None)
    assert "Response: skip." in events_text(journal, response="skip")


def test_the_first_of_many_events(tmp_path: Path) -> None:
    journal = journal_of(tmp_path, FakeRun(num_syncs=2, num_units=2, resume_at=None, trouble=False))
    journal.syncs.clear()  # so that few figures are drawn
    journal.events += [{"kind": "event", "step": 300, "title": "EDiT: noise", "text": "x"}] * 63
    page, *_ = write_report([journal], tmp_path / "out")
    assert f"The first {MAX_EVENTS} of 63." in page.read_text(encoding="utf-8")


def events_text(journal: Journal, **changes: object) -> str:
    journal.spikes[0].update(changes)
    return events(journal)[0][2]


def test_settings_differ_first(tmp_path: Path) -> None:
    journals = [journal_of(tmp_path, FakeRun(**SMALL, seed=seed), str(seed)) for seed in (0, 1)]
    first, *rest = settings_table(journals)
    assert (first.name, first.values, first.differs) == ("training: seed", ["42", "43"], True)
    assert not any(row.differs for row in rest)
    assert {row.name: row.values[0] for row in rest}["edit: sync_seconds"] == "unset"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["nowhere"], "nowhere: there is no such folder or file. A RUN is the output_dir"),
        (["run", "--output", "run/edit_syncs.jsonl"], "cannot be written to (File exists). Give another folder"),
    ],
)
def test_errors(given: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FakeRun(num_syncs=2, num_units=2, resume_at=None).write(tmp_path / "run")
    words = [word if word.startswith("--") else str(tmp_path / word) for word in given]
    assert main(["report", *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("hf-edit report: ")
    assert text in said.err


def test_help_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["report", "--help"])
    assert ended.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) < 20


def long_journal(path: Path, num_syncs: int, num_units: int) -> None:
    """As long as one gets; the tables repeat after 200 syncs."""
    fake = FakeRun(num_syncs=200, num_units=num_units, resume_at=None)
    some = [fake.interval_records(sync, 0.0) for sync in range(200)]
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(fake.run_line(0)) + "\n")
        for group in some:
            for record in group:
                record.pop("z", None), record.pop("clip", None)
        lines = [[json.dumps(record) for record in group] for group in some]
        for sync in range(num_syncs):
            step = 16 * (sync + 1)
            for line in lines[sync % 200]:
                line = re.sub(r'"sync": \d+, "step": \d+', f'"sync": {sync + 1}, "step": {step}', line, count=1)
                file.write(re.sub(r'"kind": "log", "step": \d+', f'"kind": "log", "step": {step}', line) + "\n")


def test_the_page_stays_small(tmp_path: Path) -> None:
    begun_at = time.process_time()
    long_journal(tmp_path / JOURNAL, num_syncs=10_000, num_units=40)
    (journal,) = read_journals([str(tmp_path)])
    assert (len(journal.syncs), journal.steps, journal.malformed) == (10_000, 160_000, 0)
    page, *_ = write_report([journal], tmp_path / "out")
    assert page.stat().st_size < 2_000_000
    assert time.process_time() - begun_at < 30
