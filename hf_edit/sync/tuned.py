"""The settings in force, and with `tune` others from sync to sync. What is chosen is said by method/tuning.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_edit.config import EDiTConfig
from hf_edit.method.compression import bytes_per_element
from hf_edit.method.schedule import SyncSchedule
from hf_edit.method.tuning import NOTHING, NUMBERS, Tuned, Tuner, from_numbers, measure, to_numbers
from hf_edit.sync.running import Running
from hf_edit.sync.unit_sync import OuterSync


class Tuning:
    """
    Args:
        parts: the fragments.
    """

    def __init__(self, config: EDiTConfig, parts: int, schedule: SyncSchedule, sync: OuterSync) -> None:
        delay_steps = config.delay_steps if config.overlap == "delayed" else 0
        self.settings = self._chosen = self._advised = Tuned(
            config.sync_interval // parts, delay_steps, config.compression
        )
        self._config, self._mode, self._parts = config, config.tune, parts
        self._schedule, self._sync = schedule, sync
        self._tuner = Tuner(self.settings, parts)
        self._before: Tuned | None = None  # of the last sync, if it was one that the settings are for
        self._all_delayed = False  # the sync under way is such a one
        if self._mode != "off":
            sync.tuning = torch.full((NUMBERS,), NOTHING, dtype=torch.float64)

    def tallies(self, delayed: bool) -> dict[str, float]:
        """What a rank tells at a sync; `delayed`: for it, it is not one that makes all equal at once."""
        return {} if self._mode == "off" else {"delayed": float(delayed)}

    def look(self, run: Running, tallies: dict[str, Tensor]) -> None:
        """Before a sync whose exchange told `tallies` is carried out: what is to be in force behind it."""
        if self._mode == "off":
            return
        now = self.settings
        run.settings = {
            "sync_interval": float(now.interval * self._parts),
            "delay_steps": float(now.delay_steps),
            "bytes_per_parameter": bytes_per_element(now.compression),
        }
        self._chosen, self._all_delayed = now, float(tallies["delayed"].min()) > 0
        measured = None if self._before is None else measure(tallies, self._before)
        if measured is None:
            return
        chosen, why = self._tuner.look(measured, now)
        if self._mode == "auto":
            self._chosen, run.note = chosen, why
        elif chosen != self._advised:
            self._advised, run.note = chosen, f"advised: {why}" if why else "advised: the settings in force"

    def carried_out(self) -> None:
        """The sync was committed: what was chosen holds."""
        self._before = self.settings if self._all_delayed else None
        self._hold(self._chosen)
        if self._sync.tuning is not None:
            self._sync.tuning.copy_(torch.tensor(to_numbers(self._tuner, self.settings), dtype=torch.float64))

    def resume(self, config: Mapping[str, Any] | None = None) -> None:
        """What `OuterSync.tuning` has taken from a checkpoint holds, if this run is set as that one was.

        Args:
            config: that run's; None: it is this one's.
        """
        if self._sync.tuning is None:
            return
        names = ("tune", "sync_interval", "delay_steps", "compression", "fragments")
        same = config is None or all(config.get(name) == getattr(self._config, name) for name in names)
        saved = from_numbers(self._tuner, self._sync.tuning.tolist()) if same else None
        if saved is None:
            self._tuner.history.clear()
            self._sync.tuning.fill_(NOTHING)
        self._hold(saved if saved is not None and self._mode == "auto" else self._tuner.wanted)

    def _hold(self, settings: Tuned) -> None:
        if settings != self.settings:
            self._sync.use_codes(settings.compression)
            self._schedule.sync_interval = settings.interval
            self.settings = settings
