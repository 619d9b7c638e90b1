"""What is told of a sync, and to the active W&B run: alerts, settings, axes, a table of the units' norms and weights.

Whatever W&B raises when it is down is said, and the training goes on.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from hf_edit.method.plan import SyncRecord
from hf_edit.telemetry.journal import Journal
from hf_edit.telemetry.logs import sync_events

logger = logging.getLogger(__name__)

COLUMNS = ["sync", "step", "unit", "replica", "norm", "z", "weight", "left_out"]
MAX_ROWS = 10_000  # of the table


def alert(title: str, text: str) -> None:
    """Warns in the log, and in W&B if a run is active."""
    logger.warning("%s. %s", title, text)
    _tell_wandb("alert", lambda run: run.alert(title=title, text=text))


def publish_settings(settings: dict[str, Any]) -> None:
    """Puts EDiT's settings beside the Trainer's in the active W&B run's config, and its metrics on the global step."""
    _tell_wandb("configuration", lambda run: run.config.update({"edit": settings}, allow_val_change=True))
    _tell_wandb("axes", lambda run: run.define_metric("train/edit/*", step_metric="train/global_step"))


def _tell_wandb(what: str, tell: Callable[[Any], object]) -> None:
    run = getattr(sys.modules.get("wandb"), "run", None)
    if run is None:
        return
    try:
        tell(run)
    except Exception as error:  # whatever W&B raises when it is down: that is said, and training goes on
        logger.warning("W&B did not take the %s: %s", what, error)


def go_offline_without_login(report_to: list[str]) -> None:
    """Sets WANDB_MODE=offline if W&B is to be used but nobody is logged in, and says so.

    Without it W&B asks for a key, or ends the training where nobody can answer.
    """
    if "wandb" not in report_to or os.environ.get("WANDB_MODE") or os.environ.get("WANDB_API_KEY"):
        return
    try:
        import wandb
    except ImportError:
        return  # the Trainer's own error names the missing package
    if wandb.run is not None:
        return  # the user started a run, however they did
    try:
        logged_in = wandb.login(prompt=False, verify=False)
    except TypeError:  # an older wandb, which cannot look without asking
        logged_in = wandb.api.api_key is not None
    if not logged_in:
        os.environ["WANDB_MODE"] = "offline"
        wandb.teardown()  # looking has read the environment; the next run shall read it anew
        logger.warning("No W&B login was found: logging offline. `wandb login`, or `wandb sync` the run afterwards.")


def tell(record: SyncRecord, step: int, journal: Journal | None, response: str = "log") -> None:
    """On the first rank: the journal gets the sync that was applied at `step`, and what matters of it is alerted."""
    events = sync_events(record)
    if journal is not None:
        journal.sync(step, record, response)
    for title, text in events:
        alert(title, text)
        if journal is not None:
            journal.write("event", step=step, title=title, text=text)


class UnitTable:
    """Norms and weights of every unit of every replica at the syncs, or from a number of rows on at every second,
    fourth, ... of them; becomes `edit/units` in the W&B run."""

    def __init__(self) -> None:
        self.rows: list[list[Any]] = []
        self._every = 1

    def add(self, record: SyncRecord, step: int) -> None:
        if record.sync % self._every:
            return
        plan = record.plan
        for unit, name in enumerate(record.unit_names):
            numbers = (plan.norms[unit], plan.z[unit], plan.weights[unit], plan.anomalous[unit])
            for replica, row in enumerate(zip(*(column.tolist() for column in numbers), strict=True)):
                self.rows.append([record.sync, step, name, replica, *row])
        while len(self.rows) > MAX_ROWS:
            self._every *= 2
            self.rows = [row for row in self.rows if row[0] % self._every == 0]

    def publish(self) -> None:
        """At the end of a training."""
        if self.rows:
            _tell_wandb("table of units", self._log)

    def _log(self, run: Any) -> None:
        import wandb

        run.log({"edit/units": wandb.Table(columns=COLUMNS, data=self.rows)})
