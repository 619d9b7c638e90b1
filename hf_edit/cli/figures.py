"""The figures of a report: each a function of a journal and of the room that it is drawn for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, LogNorm, Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from hf_edit.cli.drawing import Room, add_legend, new_figure, plain, step_axis, whole_numbers
from hf_edit.cli.journal_reader import Journal
from hf_edit.cli.journal_sums import bytes_text, carried, cumulative_bytes, fold_mean, starts, thin, time_shares

# Seen on light and dark pages alike.
SERIES = ["#4393d8", "#e2571e", "#2aa198", "#a371f7", "#d29922", "#db61a2", "#8b949e", "#57ab5a"]
GREY = "#8b949e"
COMPUTING, EXPOSED, WAITING = "#2aa198", "#e8b04a", "#e2571e"
LEFT_OUT = "#ff3b30"
SHADES = 24  # of a heat map: more are not told apart, and fewer compress better
MAX_TICKS = 300  # of syncs


def shown_replicas(scores: Any, room: Room) -> list[int]:
    """The replicas that a figure shows: all, or those with the highest of `scores` [R]."""
    order = np.argsort(-np.nan_to_num(np.asarray(scores, dtype=float)), kind="stable")
    return sorted(order[: room.replicas].tolist())


# -- figures ----------------------------------------------------------------------------------------------------------


def draw_loss(journals: Sequence[Journal], room: Room) -> Figure:
    """Loss and evaluation loss over steps, with syncs, spikes, rollbacks and resumes."""
    figure, (axis,) = new_figure(room, 3.4)
    known = [_losses(journal) for journal in journals]
    top = max(_top(losses) for losses in known)
    for journal, colour in zip(journals, SERIES * len(journals), strict=False):
        _draw_losses(axis, journal, colour, room)
        _mark_losses(axis, journal, colour, top)
    if any(max(losses, default=0.0) > top for losses in known):
        lowest = min(min(losses, default=top) for losses in known)
        axis.set_ylim(lowest - 0.05 * (top - lowest), top)
    if len(journals) == 1 and 0 < len(journals[0].syncs) <= MAX_TICKS:
        axis.plot([sync.step for sync in journals[0].syncs], [0.01] * len(journals[0].syncs), "|", color=SERIES[0],
                  markersize=7, transform=axis.get_xaxis_transform(), label="sync", zorder=3)  # fmt: skip
    step_axis(axis)
    axis.set_ylabel("loss")
    axis.grid(axis="y")
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))  # one for each label
    if len(journals) > 1:
        named = {plain(j.name): Line2D([], [], color=c) for j, c in zip(journals, SERIES * len(journals), strict=False)}
        handles = {**named, **{label: _grey(handle) for label, handle in handles.items() if label != "training"}}
    add_legend(figure, list(handles.values()), list(handles), columns=7 if room.wide else 3)
    return figure


def _losses(journal: Journal) -> list[float]:
    """All that were logged, and those of each replica between syncs."""
    by_replica = journal.per_replica("losses")
    return [*journal.series("loss")[1], *by_replica[np.isfinite(by_replica)].tolist()]


def _top(losses: Sequence[float]) -> float:
    """Where the axis is to end: below the highest, if few losses would make all others flat."""
    usual, highest = (float(np.percentile(losses, 99, method="lower")), max(losses)) if losses else (0.0, 0.0)
    return 1.2 * usual if highest > 6 * usual > 0 else highest


def _draw_losses(axis: Axes, journal: Journal, colour: str, room: Room) -> None:
    steps, losses = journal.series("loss")
    if steps:
        axis.plot(*thin(steps, losses, room.points), color=colour, linewidth=1.2, label="training")
    by_replica = journal.per_replica("losses")
    known = np.isfinite(by_replica).any(axis=1)
    if known.any() and journal.num_replicas > 1:
        first = starts(int(known.sum()), room.bars)
        low = np.fmin.reduceat(np.fmin.reduce(by_replica[known], axis=1), first)
        high = np.fmax.reduceat(np.fmax.reduce(by_replica[known], axis=1), first)
        at = np.array([sync.step for sync in journal.syncs])[known][first]
        axis.fill_between(at, low, high, color=colour, alpha=0.25, linewidth=0, label="spread over replicas")
    key = journal.eval_key()
    if key is not None and (points := journal.series(key))[0]:
        axis.plot(*thin(*points, room.points // 4), color=colour, linewidth=0.8, linestyle=":",
                  marker="o" if len(points[0]) <= 60 else "", markersize=3.5, label="evaluation")  # fmt: skip


def _mark_losses(axis: Axes, journal: Journal, colour: str, top: float) -> None:
    _, losses = journal.series("loss")
    spikes = [
        (spike["step"], top if spike.get("loss") is None else min(top, spike["loss"])) for spike in journal.spikes
    ]
    rollbacks = [(sync.step, min(losses, default=0.0)) for sync in journal.syncs if sync.rolled_back]
    for points, label, marker in ((spikes, "loss spike", "v"), (rollbacks, "rollback", "X")):
        if points:
            line = thin([at for at, _ in points], [value for _, value in points], 200)
            axis.plot(*line, linestyle="", marker=marker, markersize=6.5, color=colour, markerfacecolor=LEFT_OUT,
                      markeredgewidth=0.8, label=label, clip_on=False, zorder=4)  # fmt: skip
    for step in journal.resumed_at[:40]:
        axis.axvline(step, color=colour, linewidth=0.9, linestyle="--", label="resumed")


def _grey(handle: Any) -> Any:
    """What a mark looks like in every run, whose colours differ."""
    if isinstance(handle, Line2D):
        return Line2D([], [], color=GREY, linestyle=handle.get_linestyle(), linewidth=handle.get_linewidth(),
                      marker=handle.get_marker(), markersize=handle.get_markersize(),
                      markerfacecolor=LEFT_OUT if handle.get_linestyle() == "None" else GREY)  # fmt: skip
    return Patch(color=GREY, alpha=0.25)


def draw_time(journal: Journal, room: Room) -> Figure:
    """For each replica, the shares of its time over the steps."""
    _, totals = time_shares(journal, 1)
    shown = shown_replicas(totals[1:, 0].sum(axis=0), room)
    edges, shares = time_shares(journal, room.bars)
    figure, axes = new_figure(room, 0.55 + 0.72 * len(shown), len(shown))
    for axis, replica in zip(axes, shown, strict=True):
        bottom = np.zeros(len(edges) - 1)
        for part, colour, text in zip(
            shares[:, :, replica], (COMPUTING, EXPOSED, WAITING),
            ("computing", "network, not hidden", "waiting for others"), strict=True,
        ):  # fmt: skip
            axis.stairs(100 * (bottom + part), edges, baseline=100 * bottom, fill=True, color=colour, label=text)
            bottom = bottom + part
        computing, exposed, waiting = 100 * totals[:, 0, replica]
        title = f"replica {replica}: {computing:.1f}% computing"
        title += f", {exposed:.1f}% network, {waiting:.1f}% waiting" if room.wide else f", {waiting:.1f}% waiting"
        axis.set_title(title, pad=3)
        axis.set(ylim=(0, 100), yticks=[0, 50, 100], xlim=(edges[0], edges[-1]))
        axis.tick_params(labelbottom=axis is axes[-1])
    step_axis(axes[-1])
    handles, labels = axes[0].get_legend_handles_labels()
    add_legend(figure, handles, labels, columns=3)
    figure.supylabel("% of the time", fontsize=9)
    return figure


def draw_bytes(journals: Sequence[Journal], room: Room) -> Figure:
    """Bytes sent by one rank so far, against those of averaging every gradient."""
    figure, (axis,) = new_figure(room, 2.7)
    for journal, colour in zip(journals, SERIES * len(journals), strict=False):
        steps, sent, averaging = cumulative_bytes(journal)
        prefix = f"{plain(journal.name)}: " if len(journals) > 1 else ""
        for values, text, dashes in ((averaging, "averaging every gradient (HSDP)", "--"), (sent, "EDiT", "-")):
            if len(values) and values[-1] > 0:
                axis.plot(*thin(steps, values.tolist(), room.points // 2), dashes, color=colour, label=prefix + text)
                axis.annotate(bytes_text(values[-1]), (steps[-1], values[-1]), xytext=(4, 0), va="center",
                              textcoords="offset points", fontsize=8, annotation_clip=False)  # fmt: skip
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_text(value)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.grid(axis="y")
    axis.set_ylabel("sent by a rank")
    step_axis(axis)
    add_legend(figure, *axis.get_legend_handles_labels(), columns=2 if room.wide else 1)
    return figure


def draw_steps(journal: Journal, room: Room) -> Figure:
    """Inner steps of each replica in each interval."""
    table = journal.per_replica("inner_steps")
    shown = shown_replicas(-np.nanmean(table, axis=0) + np.nanmax(table), room)
    figure, (axis,) = new_figure(room, 2.2)
    first = starts(len(table), room.bars)
    steps = np.array([sync.step for sync in journal.syncs])[np.append(first[1:], len(table)) - 1]
    for replica in shown:
        axis.plot(steps, fold_mean(table, first)[:, replica], color=SERIES[shown.index(replica)], linewidth=1.3,
                  label=f"replica {replica}", drawstyle="steps-pre")  # fmt: skip
    axis.set_ylim(0, 1.15 * float(np.nanmax(table)))
    axis.set_ylabel("inner steps")
    axis.grid(axis="y")
    step_axis(axis)
    add_legend(figure, *axis.get_legend_handles_labels(), columns=8 if room.wide else 4)
    return figure


def draw_units(journal: Journal, room: Room, which: str) -> Figure:
    """Heat maps of "norms" or "weights": a panel for each replica, a row for each unit, a column for each sync."""
    left_out, table = journal.left_out(), journal.per_unit(which)
    shown = shown_replicas(left_out.sum(axis=(0, 1)), room)
    num_units = len(journal.units)
    columns = max(30, min(200 if room.wide else 90, room.pixels // (num_units * len(shown))))
    first = starts(len(table), columns)
    bad = np.logical_or.reduceat(left_out, first, axis=0)
    values = carried(np.fmax.reduceat(table, first, axis=0) if which == "norms" else fold_mean(table, first))
    scale = _scale(values[~bad], which, journal.num_replicas)
    rows = math.ceil(len(shown) / (2 if room.wide else 1))
    height = rows * min(2.6, max(0.8, 0.15 * num_units)) + 1.3
    figure, axes = new_figure(room, height, rows, min(len(shown), 2) if room.wide else 1)
    shades = LinearSegmentedColormap.from_list("shades", matplotlib.colormaps["viridis"](np.linspace(0.08, 0.92, 9)))
    colours = ListedColormap(shades(np.linspace(0, 1, SHADES)))
    extent = (journal.syncs[0].number - 0.5, journal.syncs[-1].number + 0.5, num_units - 0.5, -0.5)
    for place, (axis, replica) in enumerate(zip(axes, shown, strict=False)):
        picture = colours(scale(np.ma.masked_invalid(values[:, :, replica].T)))
        picture[~np.isfinite(values[:, :, replica].T)] = (0, 0, 0, 0)
        picture[bad[:, :, replica].T] = to_rgba(LEFT_OUT)
        axis.imshow(picture, aspect="auto", interpolation="none", extent=extent)
        axis.set_title(f"replica {replica}, left out {left_out[:, :, replica].sum()} times", pad=3)
        whole_numbers(axis)
        _name_units(axis, journal.units, named=place % 2 == 0 or not room.wide)
        if place >= len(shown) - (2 if room.wide and len(shown) > 1 else 1):
            axis.set_xlabel("sync")
    for axis in axes[len(shown) :]:
        axis.remove()
    text = "norm of the pseudo-gradient" if which == "norms" else f"weight (equal: {1 / journal.num_replicas:.3g})"
    mappable = ScalarMappable(scale, colours)
    thick = 0.11  # inches
    figure.colorbar(mappable, ax=axes[: len(shown)], location="top", label=text, shrink=0.6, anchor=(0.0, 0.0),
                    pad=0.1 / height, fraction=thick / height, aspect=0.48 * room.inches / thick)  # fmt: skip
    return figure


# -- their parts -------------------------------------------------------------------------------------------------------


def _scale(values: Any, which: str, num_replicas: int) -> Normalize:
    """From a value to a shade: of norms by their logarithm; of weights from 0 on."""
    if which == "weights":
        return Normalize(0.0, float(np.nanmax(values, initial=2 / num_replicas)), clip=True)
    positive = values[np.isfinite(values) & (values > 0)]
    if not len(positive):
        return LogNorm(1.0, 10.0, clip=True)
    low, high = np.percentile(positive, 0.5), float(positive.max())
    return LogNorm(float(low), max(high, 1.05 * float(low)), clip=True)


def _name_units(axis: Axes, units: Sequence[str], named: bool) -> None:
    step = max(1, math.ceil(len(units) / 14))
    places = list(range(0, len(units), step))
    axis.set_yticks(places, [plain(_short(units[place])) for place in places] if named else [], fontsize=7)
    axis.tick_params(axis="y", length=0)


def _short(name: str, length: int = 18) -> str:
    """
    >>> _short("model.layers.11"), _short("transformer.decoder.layers.11")
    ('model.layers.11', '\u2026decoder.layers.11')
    """
    return name if len(name) <= length else "\u2026" + name[-length + 1 :]
