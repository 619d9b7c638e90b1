"""The README's short table and its figure, from several benchmarks' results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import learning
import slow_network
import stragglers
from lib.bench import markdown_table, share_text, subplots
from lib.convergence_report import excess, percent, runs_of

Read = Callable[[str], dict[str, Any]]  # the results of a file by its name

RATES = {"50mbit": "50 Mbit/s", "100mbit": "100 Mbit/s", "1gbit": "1 Gbit/s", "unlimited": "unlimited"}
LINES = {
    "hsdp": "synchronous (HSDP)",
    "diloco": "DiLoCo",
    "edit-forward": "EDiT, forward",
    "edit-delayed": "EDiT, delayed",
}
SLOW_HOST = {
    "hsdp": "synchronous (HSDP)",
    "edit-forward": "EDiT, forward",
    "a-edit": "A-EDiT, forward",
    "a-edit-delayed": "A-EDiT, delayed",
}
# From the results of convergence.py, then those of learning.py: the default, and sync_moments="both" beside
# inner_lr_scale=1.4. Both have the same synchronous training.
LOSSES = {
    "diloco": "DiLoCo",
    "post-local-sgd": "Post Local SGD",
    "edit-follows-lr": "EDiT",
    "edit-moments-inner-1.4": "EDiT, two settings",
}
BATCHES = {"_batch32": "4 replicas, batch 32", "": "4 replicas, batch 8", "_2x2": "2 replicas, batch 16"}
LEARNING = {"_2x2": "_r2"}  # the ends of its files' names, where they differ
# Text and grid for a light and a dark page, and a colour that is seen on both for each label above.
PAGES = {"light": ("#1f2328", "#d1d9e0"), "dark": ("#e6edf3", "#3d444d")}
COLOURS = {
    "synchronous (HSDP)": "#8b949e",
    "DiLoCo": "#4393d8",
    "Post Local SGD": "#2aa198",
    "EDiT, forward": "#e8b04a",
    "A-EDiT, forward": "#c98a2b",
    "EDiT, delayed": "#e2571e",
    "A-EDiT, delayed": "#e2571e",
    "EDiT": "#e2571e",
    "EDiT, two settings": "#e8b04a",
}


def numbers(read: Read) -> dict[str, Any]:
    """What table and figure show.

    Returns:
        `speed`: by method and rate (no delay, tau 8) the cell of `slow_network.summary`; `slow_host`: by method that of
        `stragglers.summary` for a host at half speed, "a-edit-delayed-10s" with a sync every 10 s; `loss`: by batch and
        method the loss over synchronous training's at equal tokens; `same_time`: the same at equal time.
    """
    speed: dict[str, dict[str, Any]] = {}
    for cell in slow_network.summary(read("slow_network")):
        if not cell["delay_milliseconds"] and cell["tau"] in (8, None) and not cell["units_in_flight"]:
            speed.setdefault(cell["method"], {})[cell["rate"]] = cell
    slow = {c["method"]: c for c in stragglers.summary(read("stragglers")) if c["scenario"] == "2x"}
    slow["a-edit-delayed-10s"] = stragglers.summary(read("stragglers_10s"))[0]
    return {
        "speed": speed,
        "slow_host": slow,
        "loss": {batch: {method: _loss(read, batch, method) for method in LOSSES} for batch in BATCHES},
        "same_time": {m: _over_sync(read("convergence_100mbit"), m) for m in ("sync-same-time", "edit")},
    }


def _loss(read: Read, batch: str, method: str) -> float | None:
    if method in ("diloco", "post-local-sgd"):
        return _over_sync(read(f"convergence{batch}"), method)
    results = read(f"learning{LEARNING.get(batch, batch)}")
    return learning.over(*(learning.best_runs(results, "adamw", name) for name in (method, "sync")))


def _over_sync(results: dict[str, Any], method: str) -> float | None:
    return excess(runs_of(results, "clean", method), runs_of(results, "clean", "sync"))


def table(read: Read) -> str:
    """Six rows of Markdown."""
    found = numbers(read)

    def speed(method: str, rate: str) -> str:
        return share_text(found["speed"][method][rate]["share"], digits=2)

    def loss(batch: str, method: str) -> str:
        return percent(found["loss"][batch][method], 1)

    slow = {method: share_text(cell["share"], digits=2) for method, cell in found["slow_host"].items()}
    rows = [
        [f"speed at {label}{unit}", speed("hsdp", rate), speed("diloco", rate),
         f"{speed('edit-delayed', rate)} delayed, {speed('edit-forward', rate)} forward"]
        for label, unit, rate in (("1 Gbit/s", " (1: never syncing)", "1gbit"), ("100 Mbit/s", "", "100mbit"))
    ]  # fmt: skip
    rows.append(["speed, one of two hosts at half speed (1: both alone)", slow["hsdp"], "",
                 f"{slow['a-edit-delayed']} syncing every 5 s, {slow['a-edit-delayed-10s']} every 10 s (A-EDiT, "
                 f"delayed); {slow['edit-forward']} every 16 steps"])  # fmt: skip
    rows += [
        [f"{what}, {BATCHES[batch]}", "0", loss(batch, "diloco"),
         f"{loss(batch, 'edit-follows-lr')}, two settings {loss(batch, 'edit-moments-inner-1.4')}"]
        for what, batch in (("loss over synchronous, equal tokens", "_batch32"), ("the same", ""))
    ]  # fmt: skip
    late = found["same_time"]
    rows.append(["the same, equal time at 100 Mbit/s", percent(late["sync-same-time"], 1), "",
                 percent(late["edit"], 1)])  # fmt: skip
    return markdown_table(["measured", "synchronous", "DiLoCo", "EDiT"], rows)


# -- figure -----------------------------------------------------------------------------------------------------------


def plotted(read: Read) -> dict[str, dict[str, list[float | None]]]:
    """The figure's values, three digits: by panel and label."""
    found = numbers(read)
    return {
        "speed": {
            label: [_rounded(found["speed"][method].get(rate, {}).get("share")) for rate in RATES]
            for method, label in LINES.items()
        },
        "slow host": {label: [_rounded(found["slow_host"][method]["share"])] for method, label in SLOW_HOST.items()},
        "loss": {
            label: [_rounded(found["loss"][batch][method]) for batch in BATCHES] for method, label in LOSSES.items()
        },
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def draw(read: Read, page: str, path: Path) -> None:
    """The figure for a light or dark page as SVG, without a background; its description holds the plotted values."""
    import matplotlib

    text, grid = PAGES[page]
    style = {"text.color": text, "axes.labelcolor": text, "xtick.color": text, "ytick.color": text, "font.size": 9,
             "axes.edgecolor": grid, "axes.titlesize": 9,
             "svg.hashsalt": "hf_edit", "svg.fonttype": "none"}  # fmt: skip
    values = plotted(read)
    with matplotlib.rc_context(style):
        figure, axes = subplots(1, 3)
        figure.set_size_inches(10.0, 3.3)
        axes[0].get_gridspec().set_width_ratios([1.0, 0.8, 1.2])
        _draw_speed(axes[0], values["speed"], grid)
        _draw_slow_host(axes[1], values["slow host"], grid)
        _draw_loss(axes[2], values["loss"], grid)
        for axis in axes:
            axis.patch.set_alpha(0.0)
            axis.spines[["top", "right"]].set_visible(False)
        metadata = {"Date": None, "Description": json.dumps(values)}
        figure.savefig(path, transparent=True, metadata=metadata)


def _draw_speed(axis: Any, lines: dict[str, list[float | None]], grid: str) -> None:
    for label, shares in lines.items():
        axis.plot(list(RATES.values()), shares, marker="o", markersize=4, color=COLOURS[label], label=label)
    axis.axhline(1.0, color=grid, linewidth=0.8, zorder=0)
    axis.set(
        title="speed by network rate, a sync every 8 steps", ylim=(0, 1.12), ylabel="of a training that never syncs"
    )
    axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncol=2)


def _draw_slow_host(axis: Any, bars: dict[str, list[float | None]], grid: str) -> None:
    labels = list(bars)
    drawn = axis.barh(labels, [share for (share,) in bars.values()], color=[COLOURS[label] for label in labels])
    axis.bar_label(drawn, fmt="%.2f", padding=3)
    axis.axvline(1.0, color=grid, linewidth=0.8, zorder=0)
    axis.set(title="speed, one of two hosts at half speed", xlim=(0, 1.12), xlabel="of what both hosts do alone")
    axis.invert_yaxis()


def _draw_loss(axis: Any, bars: dict[str, list[float | None]], grid: str) -> None:
    width = 0.88 / len(bars)
    for number, (label, values) in enumerate(bars.items()):
        places = [place + (number - (len(bars) - 1) / 2) * width for place in range(len(values))]
        drawn = axis.bar(places, [100 * (value or 0.0) for value in values], width, color=COLOURS[label], label=label)
        axis.bar_label(drawn, fmt="%.1f", padding=2, fontsize=8)
    axis.set_xticks(range(len(BATCHES)), [label.replace(", ", "\n") for label in BATCHES.values()])
    axis.set(title="validation loss at equal tokens", ylabel="% above synchronous training", ylim=(-1, 11.5))
    axis.axhline(0.0, color=grid, linewidth=0.8, zorder=0)
    axis.legend(frameon=False, fontsize=8, loc="upper left", ncol=2, columnspacing=0.8, handlelength=1.0)
