"""What a journal comes to: sums and stretches for figures; totals, findings, events and settings for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_edit.cli.journal_reader import Journal

Values = npt.NDArray[np.float64]


# -- stretches --------------------------------------------------------------------------------------------------------


def starts(count: int, limit: int) -> npt.NDArray[np.int_]:
    """Where each of at most `limit` stretches of `count` things begins.

    >>> starts(5, 2).tolist()
    [0, 2]
    """
    bins = min(count, limit)
    return (np.arange(bins) * count) // max(bins, 1)


def thin(x: Sequence[float], y: Sequence[float], limit: int) -> tuple[list[float], list[float]]:
    """At most `limit` points of a line, the lowest and the highest of each stretch among them.

    >>> thin([0, 1, 2, 3, 4, 5], [0, 9, 0, 0, -9, 0], 4)
    ([0, 1, 3, 4], [0, 9, 0, -9])
    """
    if len(x) <= limit:
        return list(x), list(y)
    kept = set()
    for stretch in np.array_split(np.arange(len(x)), max(1, limit // 2)):
        values = np.asarray(y, dtype=float)[stretch]
        kept |= {int(stretch[values.argmin()]), int(stretch[values.argmax()])}
    places = sorted(kept)
    return [x[place] for place in places], [y[place] for place in places]


def fold_mean(table: Any, first: npt.NDArray[np.int_]) -> Values:
    """The mean over each stretch of the first axis; NaN counts as nothing, and is the mean of nothing."""
    known = np.isfinite(table)
    sums = np.add.reduceat(np.where(known, table, 0.0).astype(np.float64), first, axis=0)
    counts = np.add.reduceat(known.astype(np.float64), first, axis=0)
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def carried(table: Any) -> Any:
    """`table` with a plane of NaN replaced by the plane before, the first ones by the first that is known."""
    known = np.isfinite(table).reshape(len(table), -1).any(axis=1)
    if not known.any():
        return table
    return table[np.maximum.accumulate(np.where(known, np.arange(len(table)), known.argmax()))]


# -- sums -------------------------------------------------------------------------------------------------------------


def time_shares(journal: Journal, limit: int) -> tuple[Values, Values]:
    """[B + 1] steps at which stretches begin and end, and [3, B, R] shares of computing, exposed traffic, waiting."""
    first = starts(len(journal.syncs), limit)
    training = journal.per_replica("training_seconds")
    exposed = np.nan_to_num(journal.per_replica("before_exposed_seconds"))
    waiting = np.minimum(np.nan_to_num(journal.per_replica("before_wait_seconds")), exposed)
    parts = [np.add.reduceat(np.nan_to_num(part), first, axis=0) for part in (training, exposed - waiting, waiting)]
    total = np.sum(parts, axis=0)
    shares = np.divide(parts, total, out=np.zeros((3, *total.shape)), where=total > 0)
    steps = [sync.step for sync in journal.syncs]
    return np.array([0.0, *(steps[place - 1] for place in [*first[1:], len(steps)])]), shares


def cumulative_bytes(journal: Journal) -> tuple[list[int], Values, Values]:
    """Steps, bytes that one rank has sent to other replicas by then, and what averaging each gradient would have."""
    steps = [0, *(sync.step for sync in journal.syncs)]
    per_step = np.nan_to_num([sync.gradient_bytes for sync in journal.syncs])
    warm_up = int(journal.run.get("settings", {}).get("edit_warmup_steps") or 0)
    in_warm_up = np.diff(np.minimum(steps, warm_up)) * per_step
    sent = stands_for(journal) * np.nan_to_num([sync.sync_bytes for sync in journal.syncs])
    return steps[1:], np.cumsum(sent + in_warm_up), np.cumsum(np.diff(steps) * per_step)


def stands_for(journal: Journal) -> Values:
    """[N] how many syncs each record stands for: 1, or more where the journal was thinned by whole lines."""
    counts = np.ones(len(journal.syncs))
    for place, (before, sync) in enumerate(zip(journal.syncs, journal.syncs[1:], strict=False), start=1):
        taken = sum(sync.inner_steps) / len(sync.inner_steps) if sync.inner_steps else math.nan
        if taken > 0:  # numbers alone do not tell: a sync without a step has one, and no record
            counts[place] = max(1, min(sync.number - before.number, round((sync.step - before.step) / taken)))
    return counts


# -- words ------------------------------------------------------------------------------------------------------------


def bytes_text(count: float) -> str:
    """
    >>> bytes_text(36_540_000), bytes_text(0), bytes_text(2e12)
    ('36.5 MB', '0 B', '2 TB')
    """
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def seconds_text(seconds: float) -> str:
    """
    >>> seconds_text(42.4), seconds_text(754), seconds_text(15_000)
    ('42 s', '12.6 min', '4 h 10 min')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{minutes // 60:,} h {minutes % 60} min"


@dataclass
class Headline:
    """A number that is read first, and what it is to be compared with."""

    label: str
    value: str
    note: str = ""


def _how_it_ended(journal: Journal) -> str:
    if journal.failed:
        return f"broken off: {journal.failed.splitlines()[0][:120]}"
    return "ended" if journal.ended else "has not ended, or was killed"


def headlines(journal: Journal) -> list[Headline]:
    """Of every journal the same labels, in the same order."""
    run, syncs = journal.run, journal.syncs
    planned = int(run.get("training", {}).get("max_steps") or 0)
    _, sent, averaging = cumulative_bytes(journal)
    ratio = averaging[-1] / sent[-1] if len(syncs) and sent[-1] > 0 else math.nan
    _, losses = journal.series("loss")
    last = min(10, max(1, len(losses) // 20))
    evaluated = journal.series(journal.eval_key() or "")[1]
    tokens = float(np.nansum(journal.per_replica("tokens").sum(axis=1) * stands_for(journal))) if syncs else 0.0
    effective = [sync.effective_replicas for sync in syncs if math.isfinite(sync.effective_replicas)]
    return [
        Headline("Layout", f"{run.get('replicas', '?')} x {run.get('shards', '?')}", "replicas x shards"),
        Headline("Steps", f"{journal.steps:,}", _how_it_ended(journal)
                 + (f"; {planned:,} planned" if planned > 0 and planned != journal.steps else "")),
        Headline("Time", seconds_text(journal.seconds), f"{tokens / journal.seconds:,.0f} tokens a second"
                 if tokens > 0 and journal.seconds > 0 else ""),
        Headline("Syncs", f"{num_syncs(journal):,}", f"one in {journal.steps / max(1, num_syncs(journal)):,.0f} steps"
                 if syncs else ""),
        Headline("Waited for syncs", f"{exposed_share(journal):.1%}", "of the time, in replica 0"),
        Headline("Sent by a rank", bytes_text(sent[-1]) if syncs else "0 B",
                 f"{bytes_text(averaging[-1])} by averaging every gradient ({ratio:.1f} times)" if ratio > 0 else ""),
        Headline("Loss", f"{np.mean(losses[-last:]):.3f}" if losses else "-", f"mean of the last {last} logged"),
        Headline("Evaluation loss", f"{evaluated[-1]:.3f}" if evaluated else "-",
                 f"lowest {min(evaluated):.3f}" if evaluated else "none was logged"),
        Headline("Loss spikes", f"{sum(int(spike.get('count') or 1) for spike in journal.spikes):,}",
                 "far above the moving mean"),
        Headline("Left out", f"{sum(bool(sync.anomalous) for sync in syncs):,}", "syncs that left a replica out"),
        Headline("Rollbacks", f"{sum(len(sync.rolled_back) for sync in syncs):,}", "units put back to the last sync"),
        Headline("Replicas that count", f"{np.mean(effective):.2f}" if effective else "-",
                 f"of {journal.num_replicas}, by their weights"),
    ]  # fmt: skip


def num_syncs(journal: Journal) -> int:
    """With those whose records were thinned out."""
    return int(stands_for(journal).sum())


def exposed_share(journal: Journal) -> float:
    """Of the time, what replica 0 waited for syncs."""
    exposed = np.nansum([sync.exposed_seconds for sync in journal.syncs] * stands_for(journal))
    return float(exposed) / journal.seconds if journal.seconds > 0 else 0.0


def findings(journal: Journal) -> list[str]:
    """What somebody should look at first, and what can be done about it."""
    found = []
    if journal.syncs:
        found += [*_about_time(journal), *_about_replicas(journal)]
    if journal.spikes:
        worst = max(journal.spikes, key=lambda spike: math.inf if spike.get("size") is None else spike["size"])
        count = len(journal.spikes)
        found.append(("The largest of the loss spikes: " if count > 1 else "A loss spike: ") + _spike_text(worst))
    if journal.void:
        found.append(f"{journal.void:,} records of steps that a resume gave up are not shown.")
    if journal.malformed:
        found.append(malformed_text(journal))
    if journal.syncs and stands_for(journal).max() > 1:
        found.append("The journal had grown too long and was thinned: totals are made up from the records left, and "
                     "events may be missing.")  # fmt: skip
    return found


def malformed_text(journal: Journal) -> str:
    """What was skipped, and why that is usual."""
    return (
        f"{journal.malformed} malformed line{'s' * (journal.malformed > 1)} skipped (a training that is killed cuts "
        "off its last one)."
    )


def _about_time(journal: Journal) -> list[str]:
    _, shares = time_shares(journal, 1)
    _, exposed, waiting = shares[:, 0, :]
    settings = journal.run.get("settings") or {}
    more = "a larger delay_steps" if settings.get("overlap") == "delayed" else 'overlap="delayed"'
    rarer = f"A larger {'sync_seconds' if settings.get('sync_seconds') else 'sync_interval'} makes that rarer"
    instead = "" if settings.get("sync_seconds") else ", and with sync_seconds (A-EDiT) a fast replica takes more steps"
    found = []
    if exposed.max() > 0.05:
        found.append(f"Replica {exposed.argmax()} spent {exposed.max():.0%} of its time on traffic that nothing hid. "
                     f"{rarer}; {more} hides more.")  # fmt: skip
    if waiting.max() > 0.05:
        found.append(f"Replica {waiting.argmax()} spent {waiting.max():.0%} of its time waiting for others, replica "
                     f"{waiting.argmin()} {waiting.min():.0%}. {rarer}{instead}.")  # fmt: skip
    return found


def _about_replicas(journal: Journal) -> list[str]:
    found = []
    out = journal.left_out().any(axis=1).sum(axis=0)
    if out.max() > 0:
        replica = int(out.argmax())
        found.append(f"Replica {replica} was left out of units in {out[replica]:,} of {len(journal.syncs):,} syncs"
                     + (", the most of all." if (out == out.max()).sum() == 1 else ", as were others.")
                     + " If that goes on, look at its data and its machine.")  # fmt: skip
    units = sum(len(sync.rolled_back) for sync in journal.syncs)
    if units:
        found.append(f"{units} times a unit went back to the last sync, because all replicas were anomalous in it: "
                     "what was learnt there since was lost. A lower learning rate makes that rarer.")  # fmt: skip
    late = [sync.effective_replicas for sync in journal.syncs[-max(1, len(journal.syncs) // 4) :]]
    effective, most = float(np.nanmean([*late, journal.num_replicas])), journal.num_replicas
    if effective < 1 + 0.25 * (most - 1):
        found.append(f"At the end only {effective:.2f} of {most} replicas counted: the one with the smallest norm "
                     'decided nearly alone. weighting="relative" or "uniform" uses them all.')  # fmt: skip
    return found


def events(journal: Journal) -> list[tuple[int, str, str]]:
    """(step, title, text), in the order of steps: spikes, what was alerted, resumes."""
    found = [(step, "Resumed", "The training went on from a checkpoint.") for step in journal.resumed_at]
    found += [(spike["step"], "Loss spike", _spike_text(spike)) for spike in journal.spikes]
    for event in journal.events:
        title = str(event.get("title", "")).removeprefix("EDiT: ")
        if title != "loss spike" or not journal.spikes:  # their own lines say more
            found.append((event["step"], title[:1].upper() + title[1:], str(event.get("text", ""))))
    return sorted(found, key=lambda event: event[0])


def _spike_text(spike: dict[str, Any]) -> str:
    size, loss = spike.get("size"), spike.get("loss")
    text = f"replica {spike.get('replica')}, step {spike['step']:,}: the loss "
    text += "was not finite" if size is None else f"of {loss:.4g} lay {size:.1f} standard deviations above its mean"
    text += f" (epoch {spike.get('epoch')}, batch {spike.get('batch')})."
    if spike.get("response", "log") != "log":
        text += f" Response: {spike['response']}."
    if spike.get("weight") is not None:
        text += f" Sync {spike.get('sync')} gave it a weight of {spike['weight']:.2f}"
        text += f", and left it out of {spike['left_out_units']} units." if spike.get("left_out_units") else "."
    return text


@dataclass
class Row:
    """A setting, and its value in each run."""

    name: str
    values: list[str]

    @property
    def differs(self) -> bool:
        """Between the runs."""
        return len(set(self.values)) > 1


def settings_table(journals: Sequence[Journal]) -> list[Row]:
    """Settings of EDiT, of the Trainer, and versions; those that differ between the runs first."""
    rows = []
    for group, prefix in (("settings", "edit"), ("training", "training"), ("versions", "version")):
        held = [journal.run.get(group) or {} for journal in journals]
        for name in dict.fromkeys(name for values in held for name in values):
            rows.append(Row(f"{prefix}: {name}", [_setting_text(values.get(name, "-")) for values in held]))
    return sorted(rows, key=lambda row: not row.differs)


def _setting_text(value: Any) -> str:
    return "unset" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
