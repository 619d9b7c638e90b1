"""What all figures share: how they look, how much they have room for, and their way into a page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Text and lines of a light page; in the page's SVG the style sheet says what stands for them, so also on a dark one.
INK, LINE = "#1f2328", "#d1d9e0"
PAGE_COLOURS = {INK: "var(--ink)", LINE: "var(--line)"}
STYLE: Any = {
    "font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "text.color": INK, "axes.labelcolor": INK, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "axes.edgecolor": LINE, "xtick.color": LINE, "ytick.color": LINE, "grid.color": LINE, "grid.linewidth": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "axes.titlelocation": "left",
    "svg.hashsalt": "hf_edit", "svg.fonttype": "none", "path.simplify_threshold": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class Room:
    """What a figure has room for: on a laptop's page (wide), or on a phone's and in one of two columns."""

    wide: bool
    inches: float
    points: int  # of a line, at most
    bars: int  # of a timeline, at most
    pixels: int  # of a heat map's panels together, at most
    replicas: int  # one by one, at most


def rooms(num_runs: int) -> dict[str, Room]:
    """By the name of the variant. With more runs each figure gets less, so that the page does not grow for ever."""
    share, replicas = 1 / max(1.0, num_runs / 2), 8 if num_runs <= 2 else 4
    return {
        "wide": Room(True, 9.4, int(1200 * share), 140, 60_000, replicas),
        "narrow": Room(False, 4.1, int(500 * share), max(24, int(70 * share)), int(30_000 * share), replicas),
    }


def new_figure(room: Room, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of `height` inches, and its panels row by row."""
    margin = 0.08  # inches; a reader's font may be wider than the one that is measured here
    figure = Figure(figsize=(room.inches, height), layout=ConstrainedLayoutEngine(w_pad=margin, h_pad=margin / 2))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.patch.set_alpha(0.0)
        axis.set_axisbelow(True)
    return figure, list(axes.flat)


def add_legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str], columns: int) -> None:
    """Above the panels; none without handles."""
    if handles:
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=1.4, columnspacing=1.2,
                      borderpad=0.1)  # fmt: skip


def step_axis(axis: Axes) -> None:
    """The axis shows steps."""
    axis.set_xlabel("step")
    axis.margins(x=0.02)
    whole_numbers(axis)


def whole_numbers(axis: Axes) -> None:
    """The axis counts."""
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def plain(text: str) -> str:
    """`text` for a label, word for word: no formulas, and no underscore first, which would hide it from a legend."""
    return re.sub(r"^_", " _", text.replace("$", r"\$"))


def png(figure: Figure) -> bytes:
    """The figure on white."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def svg(figure: Figure, mark: str) -> str:
    """The figure for the inside of a page: coloured by its style sheet, with ids that begin with `mark`."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    figure.set_layout_engine("none")  # it is laid out; drawn once more it need not be
    text = file.getvalue()
    text = text[text.index("<svg") :]
    head, end, body = text.partition(">")
    head = re.sub(r' (xmlns(:xlink)?|version|width|height)="[^"]*"', "", head)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{mark}-", body)
    body = re.sub(r'\bd="[^"]*"', lambda path: _short_path(path[0]), body)
    text = head + end + body
    for colour, variable in PAGE_COLOURS.items():
        text = text.replace(colour, variable)
    return text


def _short_path(path: str) -> str:
    """
    >>> _short_path('d="M 1.2345 67.8 \\nL 3.0449 4 \\nz\\n"')
    'd="M1.23 67.8L3.04 4z"'
    """
    return re.sub(r"\s*([A-Za-z])\s+", r"\1", re.sub(r"(\.\d\d)\d+", r"\1", path))
