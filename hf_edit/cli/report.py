"""`hf-edit report`: one page about one run, or about several side by side, from what the Trainer has written."""

from __future__ import annotations

import argparse
import importlib.util
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from hf_edit.cli.journal_reader import JOURNAL, Journal, JournalError, read_journals
from hf_edit.cli.journal_sums import (
    bytes_text,
    cumulative_bytes,
    events,
    exposed_share,
    findings,
    headlines,
    malformed_text,
    settings_table,
)

PAGE = "edit_report.html"
MAX_EVENTS = 50  # of a run on the page
NEEDED = ("matplotlib", "jinja2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `hf-edit report`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help=f"output_dir of a training, or its {JOURNAL}")
    parser.add_argument(
        "--output", metavar="DIR", help=f"folder for {PAGE} and a PNG of each figure (default: report in the first RUN)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Writes the page; 0, or 2 if that cannot be."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return _refuse(f'{" and ".join(missing)} missing; install with: pip install "hf_edit[report]"')
    try:
        journals = read_journals(arguments.runs)
    except JournalError as error:
        return _refuse(str(error))
    for journal in journals:
        if journal.malformed:
            print(f"hf-edit report: {journal.path}: {malformed_text(journal)}", file=sys.stderr)
    folder = Path(arguments.output) if arguments.output else journals[0].path.parent / "report"
    try:
        written = write_report(journals, folder)
    except OSError as error:
        return _refuse(f"{folder}: cannot be written to ({error.strerror}). Give another folder by --output.")
    page, *pictures = written
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB), and as PNG {', '.join(path.name for path in pictures)}")
    return 0


def _refuse(text: str) -> int:
    print(f"hf-edit report: {text}", file=sys.stderr)
    return 2


def write_report(journals: Sequence[Journal], folder: Path) -> list[Path]:
    """Writes the page and the figures of `journals` into `folder`; the files, the page first."""
    import jinja2

    folder.mkdir(parents=True, exist_ok=True)
    sections = [section for section in _sections(journals) if section.items or section.note]
    pictures = [path for section in sections for path in _draw(section, len(journals), folder)]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    text = environment.get_template("report.html.jinja").render(
        runs=[_summary(journal) for journal in journals],
        sections=sections,
        settings=settings_table(journals),
        max_events=MAX_EVENTS,
        written=datetime.now().strftime("%Y-%m-%d %H:%M"),
    )
    (folder / PAGE).write_text(text, encoding="utf-8")
    return [folder / PAGE, *pictures]


def _summary(journal: Journal) -> dict[str, Any]:
    found = events(journal)
    return {
        "name": journal.name,
        "headlines": headlines(journal),
        "findings": findings(journal),
        "events": found[:MAX_EVENTS],
        "num_events": len(found),
    }


# -- figures ----------------------------------------------------------------------------------------------------------


@dataclass
class Item:
    """A figure on the page: `name` of the run, "" if it shows all; `svgs` by the variant's name."""

    name: str
    draw: Callable[[Any], Any]
    alt: str
    svgs: dict[str, str] = field(default_factory=dict)


@dataclass
class Section:
    """What belongs under one heading: `see` says what one sees, `bad` what would be a bad sign."""

    key: str
    title: str
    see: str
    bad: str
    items: list[Item]
    note: str = ""


def _sections(journals: Sequence[Journal]) -> list[Section]:
    import hf_edit.cli.drawing as drawing
    import hf_edit.cli.figures as figures

    most = drawing.rooms(len(journals))["narrow"].replicas
    synced = [journal for journal in journals if journal.syncs]
    tables = [j for j in synced if j.units and any(sync.norms is not None for sync in j.syncs)]
    some = f" Of more than {most} replicas, those are shown where most happened." * any(
        journal.num_replicas > most for journal in synced
    )

    return [
        Section(
            "loss", "Loss",
            "The training loss of replica 0, how far the replicas' losses lay apart at the syncs, and the evaluation "
            f"loss. Ticks at the bottom are syncs (of one run, up to {figures.MAX_TICKS}). A spike beyond the scale "
            "stands at its upper end.",
            "a spike from which the loss does not come back, or a spread that grows: one replica's data or hardware "
            "differ.",
            [Item("", partial(figures.draw_loss, journals), "Loss over steps. " + " ".join(map(_loss_text, journals)))],
        ),
        Section(
            "time", "Where the time went",
            "For each replica: computing, the traffic of syncs that computing could not hide, and waiting for replicas "
            "that came later. The last sync is not in it: a replica tells what it measured of one at the next." + some,
            "much yellow: the network is too slow for this sync interval. Much red: the replicas differ in speed; the "
            "one without red is the slow one.",
            _each(synced, figures.draw_time, _time_text),
        ),
        Section(
            "bytes", "Sent between replicas",
            "What one rank has sent so far, and what it would have sent had every step averaged the gradients (HSDP). "
            "The scale is logarithmic: a constant distance is a constant factor.",
            "the two lines close together: the replicas sync so often that little is saved.",
            [Item("", partial(figures.draw_bytes, synced), " ".join(map(_bytes_text, synced)))] if synced else [],
        ),
        Section(
            "steps", "Inner steps",
            "Steps that each replica took between two syncs. Equal where syncs go by steps; by time (A-EDiT) a fast "
            "replica takes more." + some,
            "a replica that falls off in the middle of a run: its machine has become slow.",
            _each([journal for journal in synced if _uneven(journal)], figures.draw_steps, _steps_text),
            " ".join(_even_text(journal) for journal in synced if not _uneven(journal)),
        ),
        *_unit_sections(tables, some),
    ]  # fmt: skip


def _unit_sections(tables: Sequence[Journal], some: str) -> list[Section]:
    import hf_edit.cli.figures as figures

    if any(sync.norms is None for journal in tables for sync in journal.syncs):
        some += " Where the journal was thinned, a column repeats the one before."
    return [
        Section(
            "norms", "Norms",
            "How far each replica moved each part of the model (unit) between two syncs: the norm of its "
            "pseudo-gradient. Red: the replica was left out of that unit's average, as its norm was not finite or far "
            f"above its own past.{some}",
            "red that stays in one replica, or a column of red in all of them: the unit was rolled back.",
            _each(tables, figures.draw_units, partial(_units_text, "Norms"), which="norms"),
        ),
        Section(
            "weights", "Weights",
            f"What each replica counted in the average of each unit. Red: left out, weight 0.{some}",
            'one replica bright and the others dark for long: it decides alone. Then weighting="relative" or '
            '"uniform" uses them all.',
            _each(tables, figures.draw_units, partial(_units_text, "Weights"), which="weights"),
        ),
    ]  # fmt: skip


def _each(journals: Sequence[Journal], draw: Any, alt: Callable[[Journal], str], **more: Any) -> list[Item]:
    return [Item(journal.name, partial(draw, journal, **more), alt(journal)) for journal in journals]


def _draw(section: Section, num_runs: int, folder: Path) -> list[Path]:
    """Puts the SVGs into the section's items, and the PNGs into `folder`."""
    import matplotlib

    import hf_edit.cli.drawing as drawing

    written = []
    for place, item in enumerate(section.items):
        shared = not item.name or num_runs == 1  # else it stands in a column
        variants = {name: room for name, room in drawing.rooms(num_runs).items() if shared or name == "narrow"}
        for number, (name, room) in enumerate(variants.items()):
            with matplotlib.rc_context(drawing.STYLE):
                figure = item.draw(room)
                item.svgs[name] = drawing.svg(figure, f"{section.key}{place}{name[0]}")
                if number == 0:
                    end = "" if shared else "-" + re.sub(r"[^\w.-]+", "_", item.name)
                    written.append(folder / f"{section.key}{end}.png")
                    written[-1].write_bytes(drawing.png(figure))
    return written


# -- what the figures say to those who do not see them ----------------------------------------------------------------


def _loss_text(journal: Journal) -> str:
    _, losses = journal.series("loss")
    fell = f"from {losses[0]:.3g} to {losses[-1]:.3g}" if losses else "not logged"
    return f"{journal.name}: {fell}, {len(journal.spikes)} spikes, {len(journal.syncs)} syncs."


def _time_text(journal: Journal) -> str:
    return f"{journal.name}: shares of computing, exposed traffic and waiting; {exposed_share(journal):.1%} exposed."


def _bytes_text(journal: Journal) -> str:
    _, sent, averaging = cumulative_bytes(journal)
    return f"{journal.name}: {bytes_text(sent[-1])} sent, {bytes_text(averaging[-1])} by averaging every gradient."


def _steps_text(journal: Journal) -> str:
    last = ", ".join(f"{steps:g}" for steps in journal.syncs[-1].inner_steps)
    return f"{journal.name}: inner steps of each replica in each interval; {last} in the last."


def _uneven(journal: Journal) -> bool:
    return any(len(set(sync.inner_steps)) > 1 for sync in journal.syncs)


def _even_text(journal: Journal) -> str:
    steps = statistics.median(step for sync in journal.syncs for step in sync.inner_steps)
    return f"In each interval of {journal.name} all replicas took as many, mostly {steps:g}."


def _units_text(what: str, journal: Journal) -> str:
    cells = sum(len(sync.anomalous) for sync in journal.syncs)
    return (
        f"{journal.name}: heat maps. {what} of {len(journal.units)} units in {journal.num_replicas} replicas over "
        f"{len(journal.syncs)} syncs; {cells} left out."
    )
