"""`edit_syncs.jsonl` in the output folder: what happened in every sync, for `hf-edit report` and whoever asks later.

One rank of a job writes it. A line is a JSON object with a "kind":

    run     a training begins, or goes on: step, replicas, units, settings; records before it of later steps are void
    sync    times, bytes; by replica its steps, loss, tokens and computing seconds in the interval that ended there;
            what each replica measured of the sync before; by unit and replica norms, z, weights; by unit the clip;
            `units`, their indices, where they are not all
    spike   the largest loss spike of a replica in an interval
    log     what else the Trainer logged
    event   what was alerted
    end     the totals; `failed`, what broke the training off

What is not finite is null. Beyond `LIMIT_BYTES` the file is thinned: every second sync loses its numbers by unit, then
they all; then every second log goes, and of what is left every second sync or log.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from hf_edit.method.plan import SyncRecord
from hf_edit.peers.layout import Layout, ring_bytes
from hf_edit.sync.engine import Engine
from hf_edit.sync.equality import installed_versions
from hf_edit.telemetry.logs import loss_spikes, sync_logs

logger = logging.getLogger(__name__)

NAME = "edit_syncs.jsonl"
LIMIT_BYTES = 32 << 20
ERROR_LENGTH = 500  # of what is kept of an error's text
DIGITS = 6  # significant ones
BY_UNIT = ("norms", "z", "weights", "clip")


class Journal:
    """Writes the file; a disk that is full is said once, and the training goes on without.

    Args:
        path: the file; an existing one is continued.
    """

    def __init__(self, path: Path, limit_bytes: int = LIMIT_BYTES, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self._limit_bytes = limit_bytes
        self._clock = clock
        self._began_at = clock()
        self._file: TextIO | None = None
        self._broken = False

    def write(self, kind: str, **values: Any) -> None:
        """One line; numpy's and torch's scalars are written as numbers."""
        if self._broken:
            return
        line = json.dumps(_plain({"kind": kind, **values}), separators=(",", ":"))
        try:
            if self._file is None:
                self._file = self._open()
            self._file.write(line + "\n")
            self._file.flush()
            if self._file.tell() > self._limit_bytes:
                self._thin()
        except OSError as error:
            self._broken = True
            logger.warning("EDiT: %s is not written any more: %s", self.path, error)

    def begin(self, step: int, **values: Any) -> None:
        self._began_at = self._clock()
        self.write("run", version=1, time=time.strftime("%Y-%m-%dT%H:%M:%S%z"), step=step, **values)

    def log(self, step: int, entry: dict[str, Any]) -> None:
        self.write("log", step=step, seconds=self.seconds, **entry)

    def sync(self, step: int, record: SyncRecord, response: str = "log") -> None:
        """A sync that was applied at `step`, with its spikes, to which replicas have responded as `response` says."""
        for spike in loss_spikes(record):
            self.write("spike", sync=record.sync, response=response, **vars(spike))
        self.write("sync", step=step, seconds=self.seconds, **sync_values(record))

    def end(self, step: int, error: BaseException | None = None, **totals: Any) -> None:
        """The training has ended at `step`, or was broken off by `error`."""
        failed = {} if error is None else {"failed": f"{type(error).__name__}: {error}"[:ERROR_LENGTH]}
        self.write("end", step=step, seconds=self.seconds, **failed, **totals)
        self.close()

    @property
    def seconds(self) -> float:
        """Since the training began."""
        return self._clock() - self._began_at

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> TextIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = not self.path.exists() or self.path.read_bytes()[-1:] in (b"", b"\n")
        file = self.path.open("a", encoding="utf-8")
        if not whole:  # the process that wrote it was killed
            file.write("\n")
        return file

    def _thin(self) -> None:
        """To half the limit, at once or not at all."""
        self.close()
        lines = self.path.read_text(encoding="utf-8").splitlines()
        for thin in _thinner():
            lines = thin(lines)
            if sum(map(len, lines)) + len(lines) <= self._limit_bytes // 2:
                break
        draft = self.path.with_suffix(".tmp")
        draft.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        os.replace(draft, self.path)
        self._file = self._open()


def description(layout: Layout, engine: Engine) -> dict[str, Any]:
    """What the journal says of a run."""
    sizes = [sum(param.numel() for param in unit.params) for unit in engine.units]
    here = [sum(part.numel() for part in unit.parts()) for unit in engine.units]
    return {
        "replicas": layout.num_replicas,
        "shards": layout.replica_size,
        "units": [unit.name for unit in engine.units],
        "unit_parameters": sizes,
        "gradient_bytes": ring_bytes(4 * sum(here), layout.num_replicas),
        "settings": engine.config.to_dict(),
        "versions": installed_versions(),
    }


def sync_values(record: SyncRecord) -> dict[str, Any]:
    """What the journal keeps of a sync."""
    plan = record.plan
    told = plan.tallies
    steps = told["inner_steps"]
    return {
        "sync": record.sync,
        **({"units": record.units} if len(record.units) < record.num_units else {}),
        **{name.removeprefix("edit/"): value for name, value in sync_logs(record).items()},
        "interval_seconds": record.interval_seconds,
        "replicas": {
            "inner_steps": steps,
            "loss": told["loss"] / steps,
            "tokens": told["tokens"],
            "training_seconds": told["training_seconds"],
        },
        "before": {name: told[f"before_{name}"] for name in ("exposed_seconds", "wait_seconds", "network_seconds")},
        "anomalous": plan.anomalous.nonzero(),
        "restarted": plan.restarted.nonzero(),
        "rolled_back": plan.rolled_back.nonzero().flatten(),
        "norms": plan.norms,
        "z": plan.z,
        "weights": plan.weights,
        "clip": record.clip_factors,
    }


def _plain(value: Any) -> Any:
    """As JSON takes it."""
    if isinstance(value, Tensor) or hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, int | str | None) else str(value)


def _thinner() -> Iterator[Callable[[list[str]], list[str]]]:
    yield lambda lines: _without_units(lines, 2)
    yield lambda lines: _without_units(lines, 1)
    yield lambda lines: _every_second(lines, ("log",))
    for _ in range(20):
        yield lambda lines: _every_second(lines, ("log", "sync"))


def _without_units(lines: list[str], every: int) -> list[str]:
    found, count = [], 0
    for line in lines:
        if line.startswith('{"kind":"sync"') and '"norms":' in line:
            count += 1
            if count % every == 0:
                line = json.dumps(
                    {name: value for name, value in json.loads(line).items() if name not in BY_UNIT},
                    separators=(",", ":"),
                )
        found.append(line)
    return found


def _every_second(lines: list[str], kinds: tuple[str, ...]) -> list[str]:
    """Without every second line of these kinds."""
    found, counts = [], dict.fromkeys(kinds, 0)
    for line in lines:
        kind = line.removeprefix('{"kind":"').partition('"')[0]
        if kind in counts:
            counts[kind] += 1
            if counts[kind] % 2 == 0:
                continue
        found.append(line)
    return found
