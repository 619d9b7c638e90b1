"""What is drawn equals what the journal says."""

from __future__ import annotations

import doctest
import math
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from hf_edit.cli import drawing, figures, journal_sums
from hf_edit.cli.journal_reader import Journal, read_journal
from hf_edit.cli.journal_sums import carried, cumulative_bytes, fold_mean, stands_for, time_shares
from tests.unit.cli.fake_journal import FakeRun

WIDE, NARROW = drawing.rooms(1)["wide"], drawing.rooms(1)["narrow"]
RED = to_rgba(figures.LEFT_OUT)


def journal_of(folder: Path, fake: FakeRun, name: str = "run") -> Journal:
    return read_journal(fake.write(folder / name), name)


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Journal:
    return journal_of(tmp_path_factory.mktemp("figures"), FakeRun(num_syncs=20, num_units=5, resume_at=11))


def lines(figure: Figure) -> dict[str, tuple[list[float], list[float]]]:
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines}


@pytest.mark.parametrize("module", [figures, drawing, journal_sums])
def test_doctests(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]


def test_the_loss(journal: Journal) -> None:
    drawn = lines(figures.draw_loss([journal], WIDE))
    logs = [(log["step"], log["loss"]) for log in journal.logs if "loss" in log]
    assert len(logs) == 80, "what was given up is not drawn"
    assert drawn["training"] == ([step for step, _ in logs], [loss for _, loss in logs])
    assert drawn["evaluation"][0] == [192]
    assert drawn["loss spike"] == ([140], [6.9])
    assert drawn["rollback"][0] == [208]
    assert drawn["resumed"][0] == [192, 192]
    assert drawn["sync"][0] == [16 * sync for sync in range(1, 21)]


def test_the_spread_of_the_losses(journal: Journal) -> None:
    (band,) = figures.draw_loss([journal], WIDE).axes[0].collections
    low, high = band.get_paths()[0].get_extents().intervaly
    losses = journal.per_replica("losses")
    assert (low, high) == pytest.approx((losses.min(), losses.max()))


def test_a_loss_that_would_flatten_all_others(journal: Journal) -> None:
    logs = [*journal.logs, {"kind": "log", "step": 321, "loss": 9e4}]
    spikes = [{"step": 321, "loss": 9e4}, {"step": 322, "loss": None}]
    figure = figures.draw_loss([replace(journal, logs=logs, spikes=spikes)], WIDE)
    top = figure.axes[0].get_ylim()[1]
    assert 10 < top < 15, "the initial loss fits in"
    assert lines(figure)["loss spike"] == ([321, 322], [top, top])


def test_another_replicas_loss_does_not_flatten_either(journal: Journal) -> None:
    syncs = [*journal.syncs[:-1], replace(journal.syncs[-1], losses=[2.0, 2.0, 2.0, 9e4])]
    bottom, top = figures.draw_loss([replace(journal, syncs=syncs)], WIDE).axes[0].get_ylim()
    assert 1 < bottom < 2 < 10 < top < 15


def test_runs_have_colours_of_their_own(journal: Journal) -> None:
    figure = figures.draw_loss([journal, replace(journal, name="_other$x$")], NARROW)
    trained = [line for line in figure.axes[0].lines if line.get_label() == "training"]
    assert [line.get_color() for line in trained] == figures.SERIES[:2]
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["run", r" _other\$x\$"]


def test_where_the_time_went(journal: Journal) -> None:
    steps, shares = time_shares(journal, 100)
    assert steps.tolist() == [16 * sync for sync in range(21)]
    for place, sync in enumerate(journal.syncs):
        for replica in range(4):
            training = sync.training_seconds[replica]
            exposed, waiting = (sync.before_exposed_seconds[replica], sync.before_wait_seconds[replica])
            parts = [training, exposed - waiting, waiting] if place else [training, 0.0, 0.0]
            assert shares[:, place, replica] == pytest.approx(np.array(parts) / sum(parts))
    figure = figures.draw_time(journal, WIDE)
    assert len(figure.axes) == 4
    heights = [patch.get_data().values for patch in figure.axes[0].patches]
    np.testing.assert_allclose(heights, 100 * np.cumsum(shares[:, :, 0], axis=0))


def test_stretches_weigh_seconds(journal: Journal) -> None:
    steps, shares = time_shares(journal, 1)
    assert steps.tolist() == [0, 320]
    training = sum(sync.training_seconds[3] for sync in journal.syncs)
    exposed = sum(sync.before_exposed_seconds[3] for sync in journal.syncs[1:])
    assert shares[0, 0, 3] == pytest.approx(training / (training + exposed))


def test_bytes_against_averaging(journal: Journal) -> None:
    drawn = lines(figures.draw_bytes([journal], WIDE))
    steps = [16 * sync for sync in range(1, 21)]
    assert drawn["EDiT"] == (steps, [3e8 * sync for sync in range(1, 21)])
    assert drawn["averaging every gradient (HSDP)"] == (steps, [3e8 * step for step in steps])


def test_the_warm_up_sends_gradients(tmp_path: Path) -> None:
    fake = FakeRun(num_syncs=4, num_units=2, resume_at=None, settings={"edit_warmup_steps": 20})
    _, sent, _ = cumulative_bytes(journal_of(tmp_path, fake))
    assert sent.tolist() == [3e8 * count for count in (17, 22, 23, 24)]


def test_a_thinned_journal_keeps_its_totals(journal: Journal) -> None:
    kept = replace(journal, syncs=journal.syncs[1::2])
    assert stands_for(kept).tolist() == [1] + [2] * 9
    assert cumulative_bytes(kept)[1][-1] == 3e8 * 19
    idle = replace(journal, syncs=[replace(sync, number=2 * sync.number) for sync in journal.syncs])
    assert stands_for(idle).tolist() == [1] * 20, "syncs without a step leave no record"


def test_inner_steps(tmp_path: Path) -> None:
    drawn = lines(
        figures.draw_steps(journal_of(tmp_path, FakeRun(num_syncs=8, num_units=2, by_time=True, resume_at=None)), WIDE)
    )
    assert drawn["replica 0"][1] == [19.0] * 8
    assert drawn["replica 3"][1] == [13.0] * 8


@pytest.mark.parametrize("which", ["norms", "weights"])
@pytest.mark.parametrize("room", [WIDE, NARROW])
def test_heat_maps(journal: Journal, which: str, room: drawing.Room) -> None:
    figure = figures.draw_units(journal, room, which)
    pictures = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    assert len(pictures) == 4
    values = journal.per_unit(which)
    for replica, picture in enumerate(pictures):
        assert picture.shape == (5, 20, 4), "a row for each unit, a column for each sync"
        red = (np.asarray(picture) == RED).all(axis=-1)
        assert (red == journal.left_out()[:, :, replica].T).all()
        bright = np.asarray(picture)[..., 1][~red]  # green grows with the value in all shades
        order = np.argsort(values[:, :, replica].T[~red])
        assert (np.diff(bright[order]) >= -1e-6).all()
    assert sum((np.asarray(picture) == RED).all(axis=-1).sum() for picture in pictures) == 5 + 4 * 3


def test_many_syncs_share_a_column(tmp_path: Path) -> None:
    fake = FakeRun(num_syncs=200, num_replicas=2, num_units=4, resume_at=None)
    room = replace(WIDE, pixels=4 * 2 * 50)
    journal = journal_of(tmp_path, fake)
    pictures = [axis.images[0].get_array() for axis in figures.draw_units(journal, room, "norms").axes if axis.images]
    assert pictures[1].shape == (4, 50, 4)
    red = (np.asarray(pictures[1]) == RED).all(axis=-1)
    assert red.sum(axis=0).nonzero()[0].tolist() == [80 // 4, 120 // 4], "one of four syncs is enough"


def test_columns_that_were_thinned() -> None:
    table = np.array([[math.nan], [1.0], [math.nan], [3.0], [math.nan]])
    assert carried(table).flatten().tolist() == [1.0, 1.0, 1.0, 3.0, 3.0]
    assert fold_mean(np.array([1.0, math.nan, math.nan, 4.0]), np.array([0, 2])).tolist() == [1.0, 4.0]
    assert np.isnan(fold_mean(np.array([math.nan]), np.array([0]))).all()


def test_of_many_replicas_the_remarkable_are_shown() -> None:
    assert figures.shown_replicas([0.0] * 3, WIDE) == [0, 1, 2]
    assert figures.shown_replicas([0.0] * 14 + [3.0, 5.0], WIDE) == [0, 1, 2, 3, 4, 5, 14, 15]


def test_many_runs_fit_on_a_page(tmp_path: Path) -> None:
    num_runs, room = 8, drawing.rooms(8)["narrow"]
    journal = journal_of(tmp_path, FakeRun(num_syncs=60, num_units=30, num_replicas=8, by_time=True))
    size = 0
    with matplotlib.rc_context(drawing.STYLE):
        for figure in (
            figures.draw_time(journal, room),
            figures.draw_steps(journal, room),
            figures.draw_units(journal, room, "norms"),
            figures.draw_units(journal, room, "weights"),
        ):
            size += num_runs * len(drawing.svg(figure, "x"))
        size += 2 * len(drawing.svg(figures.draw_loss([journal] * num_runs, room), "x"))
    assert size < 1_800_000


def test_an_svg_is_ready_for_a_page(journal: Journal) -> None:
    with matplotlib.rc_context(drawing.STYLE):
        text = drawing.svg(figures.draw_loss([replace(journal, name="a<b")] * 2, NARROW), "x1")
    assert text.startswith("<svg viewBox=")
    assert "http" not in text
    assert "a&lt;b" in text
    assert "var(--ink)" in text
    assert drawing.INK not in text
    assert 'id="x1-' in text
    assert "url(#x1-" in text
    assert 'id="' not in text.replace('id="x1-', "")
