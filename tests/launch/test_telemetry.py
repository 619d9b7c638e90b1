"""What a training leaves behind: the journal, W&B's and TensorBoard's files; responses to loss spikes."""

from __future__ import annotations

import json
import sqlite3
import struct
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.launch.launching import launch_scenarios

SCENARIOS = [
    "a_run_is_in_the_journal",
    "a_resumed_run_goes_on_in_it",
    "a_skipped_step_is_one_without_labels",
    "a_replica_that_goes_back_tells_only_what_follows",
    "a_spike_stops_all_at_the_next_sync",
    "spikes_in_the_warm_up_are_of_all",
    "a_loop_has_a_journal",
    "a_training_that_breaks_off_says_so",
    "syncs_of_parts_and_settings_are_in_the_journal",
]


@pytest.mark.parametrize("config", ["cpu_2x2.yaml", "cpu_4x1.yaml"])
def test_the_scenarios_pass(config: str, tmp_path: Path) -> None:
    launch_scenarios(config, "telemetry", tmp_path, *SCENARIOS)


BLOCK, HEADER, FILE_HEADER = 32768, 7, 7  # of the LevelDB log that an offline run is


def read_wandb(folder: Path) -> dict[str, list[Any]]:
    """The records of an offline run by kind, in W&B's own messages; its reader (0.31) is a binary, for its server."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, place, message = path.read_bytes(), FILE_HEADER, b""
    assert data[:4] == b":W&B"
    found = defaultdict(list)
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        message += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4):  # whole, or its last piece
            record = wandb_internal_pb2.Record.FromString(message)
            name, message = record.WhichOneof("record_type"), b""
            found[name].append(getattr(record, name))
    return found


def test_trackers_get_every_sync(tmp_path: Path) -> None:
    places = {
        "WANDB_DIR": str(tmp_path),
        "WANDB_MODE": "offline",
        "TENSORBOARD_LOGGING_DIR": str(tmp_path / "tensorboard"),
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "HF_HUB_OFFLINE": "1",
    }
    results, _ = launch_scenarios("cpu_4x1.yaml", "telemetry", tmp_path, "reports_to_trackers", **places)
    told = results["reports_to_trackers"]
    records = read_wandb(tmp_path)
    entries = [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in history.item}
        for history in records["history"]
    ]
    syncs = [entry for entry in entries if "train/edit/exposed_seconds" in entry]
    assert len(syncs) == told["syncs"]
    assert all(entry["train/global_step"] > 0 for entry in syncs)
    assert any("train/edit/loss_spike" in entry for entry in syncs)
    assert "train/edit/*" in {metric.glob_name for metric in records["metric"]}, "on the global step"
    settings = {
        (".".join(item.nested_key) or item.key): item.value_json
        for config in records["config"]
        for item in config.update
    }
    assert json.loads(settings["edit"])["sync_interval"] == 3
    assert "EDiT: loss spike" in [alert.title for alert in records["alert"]]
    assert any(name.startswith("edit/units") for entry in entries for name in entry), "norms and weights"

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    exposed = events.Scalars("train/edit/exposed_seconds")
    assert len(exposed) == told["syncs"]
    assert [event.step for event in exposed] == [entry["train/global_step"] for entry in syncs]

    with sqlite3.connect(tmp_path / "trackio" / "huggingface.db") as database:
        rows = [json.loads(row[0]) for row in database.execute("select metrics from metrics order by id")]
    assert len([row for row in rows if "train/edit/exposed_seconds" in row]) == told["syncs"]
