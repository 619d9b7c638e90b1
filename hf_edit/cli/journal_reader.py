"""Reads `edit_syncs.jsonl`, the journal of syncs that a training leaves in its output folder.

Shape suffixes: N syncs, U units, R replicas.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

JOURNAL = "edit_syncs.jsonl"
VERSION = 1  # of the format; a newer one is refused
Array = npt.NDArray[np.float32]


class JournalError(ValueError):
    """What was given is no journal; the text says what is needed and what to do."""


@dataclass
class Sync:
    """One outer sync. What was not written, or was not finite, is NaN."""

    number: int
    step: int
    seconds: float  # of training since the run's first step, over resumes
    exposed_seconds: float
    wait_seconds: float
    sync_bytes: float
    gradient_bytes: float  # that averaging the gradients once would have sent
    effective_replicas: float
    inner_steps: list[float]  # [R], as the lists below
    losses: list[float]
    tokens: list[float]
    training_seconds: list[float]
    before_exposed_seconds: list[float]  # of the sync before, which fell into the interval that this one ended
    before_wait_seconds: list[float]
    norms: Array | None  # [U, R]; None: the record was thinned
    weights: Array | None
    anomalous: list[tuple[int, int]]  # (unit, replica)
    restarted: list[tuple[int, int]]
    rolled_back: list[int]
    units: list[int]  # that took part; []: all did


@dataclass
class Journal:
    """What is left of a run after every resume took back the future that it gave up."""

    path: Path
    name: str
    run: dict[str, Any] = field(default_factory=dict)  # the last "run" line
    syncs: list[Sync] = field(default_factory=list)
    logs: list[dict[str, Any]] = field(default_factory=list)
    spikes: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)  # steps
    ended: bool = False
    failed: str = ""  # by what it was broken off
    steps: int = 0
    seconds: float = 0.0
    malformed: int = 0  # lines
    void: int = 0  # records of a future that was given up

    @property
    def units(self) -> list[str]:
        """Their names, in the order of the tables."""
        return [str(name) for name in self.run.get("units", [])]

    @property
    def num_replicas(self) -> int:
        """The most that ever took part."""
        return max([int(self.run.get("replicas", 1)), *(len(sync.inner_steps) for sync in self.syncs)])

    def per_replica(self, name: str) -> npt.NDArray[np.float64]:
        """[N, R]: a list of each sync, NaN where a replica did not take part."""
        table = np.full((len(self.syncs), self.num_replicas), np.nan)
        for row, sync in zip(table, self.syncs, strict=True):
            values = getattr(sync, name)
            row[: len(values)] = values
        return table

    def per_unit(self, name: str) -> npt.NDArray[np.float32]:
        """[N, U, R]: "norms" or "weights" of each sync, NaN where the unit had no part or the record was thinned."""
        table = np.full((len(self.syncs), len(self.units), self.num_replicas), np.nan, dtype=np.float32)
        for plane, sync in zip(table, self.syncs, strict=True):
            values, units = getattr(sync, name), sync.units or range(len(plane))
            if values is not None and len(values) == len(units) and max(units) < len(plane):
                plane[list(units), : values.shape[1]] = values
        return table

    def left_out(self) -> npt.NDArray[np.bool_]:
        """[N, U, R]: the replica was anomalous in this unit."""
        table = np.zeros((len(self.syncs), len(self.units), self.num_replicas), dtype=bool)
        for plane, sync in zip(table, self.syncs, strict=True):
            for unit, replica in sync.anomalous:
                if unit < plane.shape[0] and replica < plane.shape[1]:
                    plane[unit, replica] = True
        return table

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of what `Trainer.log` got under `key`; not finite ones are left out."""
        found = [(log["step"], number(log.get(key))) for log in self.logs]
        found = [(step, value) for step, value in found if math.isfinite(value)]
        return [step for step, _ in found], [value for _, value in found]

    def eval_key(self) -> str | None:
        """The name of the evaluation loss in the logs."""
        keys = {key for log in self.logs for key in log if re.fullmatch(r"eval_(.*_)?loss", key)}
        return "eval_loss" if "eval_loss" in keys else min(keys, default=None)


def read_journals(paths: Sequence[str]) -> list[Journal]:
    """The journal of each run, with names that tell them apart.

    Raises:
        JournalError: one of `paths` is not there, or holds no journal.
    """
    files = [find_journal(path) for path in paths]
    return [read_journal(file, name) for file, name in zip(files, _names(files), strict=True)]


def find_journal(path: str) -> Path:
    """The journal's file, of the folder of a run or of the file itself."""
    given = Path(path)
    needed = f"A RUN is the output_dir of a training with EDiTTrainer, which holds {JOURNAL}, or that file."
    if given.is_file():
        return given
    if not given.exists():
        raise JournalError(f"{path}: there is no such folder or file. {needed} Check the path.")
    if (given / JOURNAL).is_file():
        return given / JOURNAL
    near = [given.resolve().parent / JOURNAL, *sorted(given.glob(f"*/{JOURNAL}"))]
    found = [str(file.parent) for file in near if file.is_file()][:4]
    if found:
        raise JournalError(f"{path}: the folder has no {JOURNAL}. {needed} Did you mean {', '.join(found)}?")
    raise JournalError(
        f"{path}: the folder has no {JOURNAL}. {needed} It is written from the start of a training with more than one "
        "replica; give the folder of such a training."
    )


def _names(files: Sequence[Path]) -> list[str]:
    """The shortest ends of the folders' paths that differ."""
    parts = [(file.parent if file.name == JOURNAL else file.with_suffix("")).resolve().parts for file in files]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(part[-1:])} ({place})" for place, part in enumerate(parts, start=1)]  # one given twice


def read_journal(path: Path, name: str) -> Journal:
    """The journal in the file `path`.

    Raises:
        JournalError: the file has no "run" line, or is of a newer version.
    """
    journal = Journal(path, name)
    with path.open(encoding="utf-8", errors="replace") as lines:
        kept = _kept(lines, journal)
    if not journal.run:
        raise JournalError(
            f'{path}: no line says {{"kind": "run", ...}}, so it is no journal of EDiTTrainer. Give the output_dir of '
            f"a training, or its {JOURNAL}."
        )
    for record in kept:
        _take(record, journal)
    journal.steps = max((record["step"] for record in kept), default=0)
    journal.seconds = max((record["seconds"] for record in kept), default=0.0)
    return journal


def _kept(lines: Iterable[str], journal: Journal) -> list[dict[str, Any]]:
    """The records that no resume made void; their seconds go on where those of the resumed part ended."""
    kept: list[dict[str, Any]] = []
    base = 0.0
    for line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
        except (ValueError, TypeError, KeyError):
            journal.malformed += 1
            continue
        if record.get("kind") == "run":
            if record.get("version", VERSION) > VERSION:
                raise JournalError(
                    f"{journal.path}: version {record['version']} of the format; this hf-edit reads up to {VERSION}. "
                    "Install the hf_edit that wrote it, or a newer one."
                )
            # A training from step 0 has no past at all.
            valid = [one for one in kept if one["step"] <= record["step"]] if record["step"] > 0 else []
            journal.void += len(kept) - len(valid)
            kept, base, journal.run = valid, max((one["seconds"] for one in valid), default=0.0), record
        if not journal.run:  # what stands before the first run line belongs to none
            continue
        seconds = number(record.get("seconds"))
        record["seconds"] = base + seconds if math.isfinite(seconds) else (kept[-1]["seconds"] if kept else base)
        try:
            kept.append(_parsed(record, number(journal.run.get("gradient_bytes"))))
        except (ValueError, TypeError, AttributeError):
            journal.malformed += 1
    return kept


def _parsed(record: dict[str, Any], gradient_bytes: float) -> dict[str, Any]:
    """The record, a sync's large tables packed."""
    if record.get("kind") != "sync":
        return record
    sync = _sync(record, gradient_bytes)
    return {"kind": "sync", "step": sync.step, "seconds": sync.seconds, "sync": sync}


def _take(record: dict[str, Any], journal: Journal) -> None:
    kind = record.get("kind")
    if kind in ("end", "run"):
        journal.failed = str(record.get("failed") or "")
        journal.ended = kind == "end" and not journal.failed
    if kind == "sync":
        journal.syncs.append(record["sync"])
    elif kind == "log":
        journal.logs.append(record)
    elif kind == "spike":
        journal.spikes.append(record)
    elif kind == "event":
        journal.events.append(record)
    elif kind == "run" and record["step"] > 0:
        journal.resumed_at.append(record["step"])


def _sync(record: dict[str, Any], gradient_bytes: float) -> Sync:
    replicas = record.get("replicas") or {}
    before = record.get("before") or {}
    steps = numbers(replicas.get("inner_steps"))
    nothing = [math.nan] * len(steps)
    units = list(record.get("units") or [])

    def index(row: int) -> int:
        return units[row] if row < len(units) else row

    return Sync(
        number=int(record.get("sync") or 0),
        step=record["step"],
        seconds=record["seconds"],
        exposed_seconds=number(record.get("exposed_seconds")),
        wait_seconds=number(record.get("wait_seconds")),
        sync_bytes=number(record.get("sync_bytes")),
        gradient_bytes=gradient_bytes,
        effective_replicas=number(record.get("effective_replicas")),
        inner_steps=steps,
        losses=numbers(replicas.get("loss")) or nothing,
        tokens=numbers(replicas.get("tokens")) or nothing,
        training_seconds=numbers(replicas.get("training_seconds")) or nothing,
        before_exposed_seconds=numbers(before.get("exposed_seconds")) or nothing,
        before_wait_seconds=numbers(before.get("wait_seconds")) or nothing,
        norms=_table(record.get("norms")),
        weights=_table(record.get("weights")),
        anomalous=[(index(unit), replica) for unit, replica in record.get("anomalous") or []],
        restarted=[(index(unit), replica) for unit, replica in record.get("restarted") or []],
        rolled_back=[index(unit) for unit in record.get("rolled_back") or []],
        units=units,
    )


def _table(rows: list[list[float | None]] | None) -> Array | None:
    return np.array(rows, dtype=np.float32) if rows else None  # null becomes NaN


def numbers(values: Sequence[Any] | None) -> list[float]:
    """
    >>> numbers([1, None])
    [1.0, nan]
    """
    return [number(value) for value in values or []]


def number(value: Any) -> float:
    """`value` as a float; NaN for what is none.

    >>> number(2), number(None)
    (2.0, nan)
    """
    return float(value) if isinstance(value, int | float) else math.nan
