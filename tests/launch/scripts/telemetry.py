"""Run by every rank of a launch: what a training leaves behind of its syncs and loss spikes, and its responses.

Arguments as for scenarios.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import ProgressCallback, TrainerCallback

from hf_edit import EDiT, EDiTConfig, EDiTTrainer
from hf_edit.method.tuning import Tuned
from tests.launch.scripts.features import assert_replicas_equal
from tests.launch.scripts.looping import Loop
from tests.launch.scripts.scenarios import (
    FOLDER,
    forget_trainings,
    make_args,
    make_model,
    make_rows,
    parameters,
    train,
)

TAU, STEPS, SPOILED = 3, 32, 26  # the optimizer step, from 1 on, whose loss replica 1 sees spoiled


class Spoiled(EDiTTrainer):
    """On replica 1 the loss of one step, or of all from it on, is multiplied."""

    factor, for_ever = float("nan"), False

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        step = self.state.global_step + 1
        spoils = self.model.training and self.edit_layout.replica == 1
        return loss * self.factor if spoils and (step == SPOILED or (self.for_ever and step > SPOILED)) else loss


def spoiled(
    name: str, factor: float = math.nan, for_ever: bool = False, trainer: Any = Spoiled, **settings: Any
) -> Any:
    forget_trainings()
    kind = type("Spoiled", (trainer,), {"factor": factor, "for_ever": for_ever})
    options = {key: settings.pop(key) for key in ("max_steps", "learning_rate", "rows", "report_to") if key in settings}
    config = EDiTConfig(**{"sync_interval": TAU, **settings})
    made = train(config, trainer=kind, output_dir=str(FOLDER / name), **{"max_steps": STEPS, **options})
    assert_replicas_equal(made)
    return made


def journal(name: str, *kinds: str) -> list[dict[str, Any]]:
    dist.barrier()
    text = (FOLDER / name / "edit_syncs.jsonl").read_text(encoding="utf-8")
    return [entry for entry in map(json.loads, text.splitlines()) if entry["kind"] in kinds]


def everywhere(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


# -- scenarios --------------------------------------------------------------------------------------------------------


class Breaks(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise OSError("the disk has gone")


def a_training_that_breaks_off_says_so() -> dict[str, Any]:
    forget_trainings()
    trainer = EDiTTrainer(
        model=make_model(), args=make_args(output_dir=str(FOLDER / "broken")), train_dataset=make_rows(),
        edit_config=EDiTConfig(sync_interval=TAU), callbacks=[Breaks()],
    )  # fmt: skip
    with pytest.raises(OSError, match="the disk has gone"):
        trainer.train()
    (end,) = journal("broken", "end")
    assert (end["step"], end["failed"], end["syncs"]) == (5, "OSError: the disk has gone", 1)
    return {}


def a_run_is_in_the_journal() -> dict[str, Any]:
    """Every sync with the figures of all replicas; what else was logged; the totals."""
    trainer = spoiled("journal", factor=30.0, rows=make_rows(ragged=True))
    replicas = trainer.edit_layout.num_replicas
    (run,) = journal("journal", "run")
    assert (run["replicas"], run["shards"], run["step"]) == (replicas, trainer.edit_layout.replica_size, 0)
    assert run["settings"]["sync_interval"] == TAU
    assert run["training"]["learning_rate"] == 0.01
    assert sum(run["unit_parameters"]) == sum(p.numel() for p in make_model().parameters())
    syncs = journal("journal", "sync")
    assert [entry["step"] for entry in syncs] == [*range(TAU + 1, STEPS, TAU), STEPS][: len(syncs)], syncs
    assert len(syncs) == trainer.edit_stats.syncs == math.ceil(STEPS / TAU)
    logged = [entry for entry in trainer.state.log_history if "edit/sync_seconds" in entry]
    for entry, log in zip(syncs, logged, strict=True):
        assert (
            len(entry["norms"]) == len(entry["z"]) == len(entry["weights"]) == len(entry["clip"]) == len(run["units"])
        )
        assert all(len(row) == replicas for row in entry["norms"])
        assert all(abs(sum(row) - 1) < 1e-5 for row in entry["weights"])
        assert entry["replicas"]["inner_steps"] == [log["edit/inner_steps"]] * replicas
        assert all(0 < seconds < 60 for seconds in entry["replicas"]["training_seconds"])
        assert abs(sum(entry["replicas"]["loss"]) / replicas - log["edit/replica_loss_mean"]) < 1e-4
    for entry, log in zip(syncs[1:], logged, strict=False):
        before = entry["before"]
        if dist.get_rank() == 0 and run["shards"] == 1:
            assert abs(before["exposed_seconds"][0] - log["edit/exposed_seconds"]) < 1e-5, "replica 0 logs its own"
        assert all(seconds >= 0 for seconds in before["network_seconds"])
    assert syncs[0]["before"]["exposed_seconds"] == [None] * replicas
    losses = {entry["step"]: entry["loss"] for entry in journal("journal", "log") if "loss" in entry}
    assert sorted(losses) == list(range(1, STEPS + 1))
    (spike,) = journal("journal", "spike")
    assert (spike["step"], spike["replica"], spike["count"], spike["response"]) == (SPOILED, 1, 1, "log")
    assert spike["size"] > 6
    assert (spike["epoch"], spike["batch"]) == (0, SPOILED)
    assert [entry["title"] for entry in journal("journal", "event")] == ["EDiT: loss spike"]
    (end,) = journal("journal", "end")
    assert (end["syncs"], end["loss_spikes"], end["step"]) == (len(syncs), 1, STEPS)
    assert trainer.edit_stats.loss_spikes == 1, "on every rank"
    logged_spikes = [(e["step"], e["edit/loss_spikes"]) for e in trainer.state.log_history if "edit/loss_spike" in e]
    assert [count for _, count in logged_spikes] == [1]
    return {"spike": spike}


def a_resumed_run_goes_on_in_it() -> dict[str, Any]:
    """The monitor has seen what it had seen; records that are void are marked by where the run begins again."""
    settings = dict(sync_interval=TAU)
    forget_trainings()
    whole = train(
        EDiTConfig(**settings), trainer=type("S", (Spoiled,), {"factor": 30.0}), max_steps=STEPS,
        output_dir=str(FOLDER / "resumed"), save_strategy="steps", save_steps=24,
    )  # fmt: skip
    assert whole.edit_stats.loss_spikes == 1
    forget_trainings()

    class Resumed(Spoiled):
        factor = 30.0

        def train(self, *args: Any, **kwargs: Any) -> Any:
            return super().train(resume_from_checkpoint=str(FOLDER / "resumed" / "checkpoint-24"))

    again = train(EDiTConfig(**settings), trainer=Resumed, max_steps=STEPS, output_dir=str(FOLDER / "resumed"))
    assert again.edit_stats.loss_spikes == 1, "with so few steps of its own it could not know"
    runs = journal("resumed", "run")
    assert [run["step"] for run in runs] == [0, 24]
    spikes = journal("resumed", "spike")
    assert [spike["step"] for spike in spikes] == [SPOILED, SPOILED]
    assert spikes[0]["size"] == spikes[1]["size"]
    return {}


def a_skipped_step_is_one_without_labels() -> dict[str, Any]:
    """Parameters bit for bit those of a run whose replica 1 had nothing to learn from in that step."""
    skipped = spoiled("skip", on_loss_spike="skip", rows=make_rows())
    (spike,) = journal("skip", "spike")
    assert (spike["step"], spike["size"], spike["response"]) == (SPOILED, None, "skip")

    size, world = skipped.edit_layout.replica_size, dist.get_world_size()

    def without_labels(batch: list[dict[str, Any]]) -> dict[str, Any]:
        found = {key: torch.stack([row[key] for row in batch]) for key in ("input_ids", "labels")}
        number = int(batch[0]["number"]) // (2 * world)  # the step, from 0 on
        if number + 1 == SPOILED and dist.get_rank() // size == 1:
            found["labels"] = torch.full_like(found["labels"], -100)
        return found

    forget_trainings()
    rows = [{**row, "number": torch.tensor(number)} for number, row in enumerate(make_rows())]
    config = EDiTConfig(sync_interval=TAU)
    other = train(config, max_steps=STEPS, rows=rows, collator=without_labels, remove_unused_columns=False)
    one, two = parameters(skipped), parameters(other)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert everywhere(skipped.edit_stats.inner_steps) == everywhere(other.edit_stats.inner_steps)
    return {}


def a_replica_that_goes_back_tells_only_what_follows() -> dict[str, Any]:
    found = {}
    for overlap in ("none", "forward", "delayed"):
        trainer = spoiled(f"back-{overlap}", on_loss_spike="rollback", overlap=overlap, delay_steps=1)
        sync = next(entry for entry in journal(f"back-{overlap}", "sync") if entry["sync"] == -(-SPOILED // TAU))
        assert sync["replicas"]["inner_steps"][0] == TAU
        assert sync["replicas"]["inner_steps"][1] == -SPOILED % TAU, sync
        assert all(math.isfinite(float(p.sum())) for p in parameters(trainer).values())
        assert trainer.edit_stats.anomalous_replicas == 0, "no NaN came to the sync"
        found[overlap] = sync["weights"][0]
    return found


def a_spike_stops_all_at_the_next_sync() -> dict[str, Any]:
    trainer = spoiled("stop", on_loss_spike="stop")
    steps = everywhere(trainer.state.global_step)
    assert set(steps) == {-(-SPOILED // TAU) * TAU} or set(steps) == {-(-SPOILED // TAU) * TAU + 1}, steps
    for response in ("skip", "rollback"):
        trainer = spoiled(f"beyond-{response}", on_loss_spike=response, for_ever=True, max_steps=3 * STEPS)
        steps = everywhere(trainer.state.global_step)
        assert len(set(steps)) == 1, steps
        assert SPOILED + 3 <= steps[0] <= SPOILED + 3 + 2 * TAU, "after max_consecutive_spikes losses that are NaN"
    return {"steps": steps}


def spikes_in_the_warm_up_are_of_all() -> dict[str, Any]:
    """Its steps are taken together, so they are left out together."""
    trainer = spoiled("warm", on_loss_spike="rollback", warmup_steps=STEPS - 2)
    assert all(math.isfinite(float(p.sum())) for p in parameters(trainer).values())
    (spike,) = [entry for entry in journal("warm", "spike") if entry["replica"] == 1]
    assert spike["step"] == SPOILED
    return {}


class Bar(TrainerCallback):
    """Reads the progress bar."""

    texts: list[str]

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                self.texts.append(callback.training_bar.postfix or "")


def reports_to_trackers() -> dict[str, Any]:
    """W&B (offline), TensorBoard and trackio get every sync; the progress bar shows the last one.

    Where they write is in the environment.
    """
    bar = Bar()
    bar.texts = []

    class Reporting(Spoiled):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs, callbacks=[bar])
            bar.trainer = self

    forget_trainings()
    kind = type("Reporting", (Reporting,), {"factor": 30.0})
    settings = dict(report_to=["wandb", "tensorboard", "trackio"], disable_tqdm=False, max_steps=STEPS)
    trainer = train(EDiTConfig(sync_interval=TAU), trainer=kind, output_dir=str(FOLDER / "trackers"), **settings)
    if dist.get_rank() == 0:
        import wandb

        assert any("9 syncs, " in text for text in bar.texts), bar.texts[-3:]
        wandb.finish()
    return {"syncs": trainer.edit_stats.syncs}


def syncs_of_parts_and_settings_are_in_the_journal() -> dict[str, Any]:
    """With fragments the units of each sync; with tune what was in force, and why it changes."""
    forget_trainings()

    def look(measured: Any, now: Tuned) -> tuple[Tuned, str]:  # what is measured differs from run to run
        wanted = Tuned(2, 1, "int8")
        return wanted, "" if now == wanted else "a sync as int8 is enough"

    class Told(EDiTTrainer):
        def _log_syncs(self) -> None:
            self._engine.tuning._tuner.look = look
            super()._log_syncs()

    settings = dict(overlap="delayed", delay_steps=2, fragments=2, tune="auto")
    trainer = train(EDiTConfig(sync_interval=4, **settings), trainer=Told, max_steps=STEPS,
                    output_dir=str(FOLDER / "parts"))  # fmt: skip
    assert_replicas_equal(trainer)
    syncs = journal("parts", "sync")
    units = journal("parts", "run")[0]["units"]
    parts = [sync["units"] for sync in syncs if "units" in sync]
    assert len(parts) >= 8
    assert sorted(parts[0] + parts[1]) == list(range(len(units)))
    assert all(len(sync["norms"]) == len(sync.get("units", units)) for sync in syncs)
    assert syncs[0]["sync_interval"] == 4
    assert any(sync["bytes_per_parameter"] < 2 for sync in syncs), "int8 from some sync on"
    events = [event for event in journal("parts", "event") if "settings" in event["title"]]
    assert any("as int8" in event["text"] for event in events), events
    return {}


def a_loop_has_a_journal() -> dict[str, Any]:
    loop = Loop(EDiTConfig(sync_interval=TAU))
    loop.asks = False
    with EDiT(loop.accelerator, loop.model, loop.optimizer, loop.config, output_dir=FOLDER / "loop") as edit:
        loop.train(edit, batches=8)
        edit.log(8, {"loss": 2.5})
    kinds = [entry["kind"] for entry in journal("loop", "run", "sync", "log", "end")]
    assert kinds == ["run", "sync", "sync", "log", "sync", "end"], kinds
    return {"path": str(Path(FOLDER / "loop").absolute())}
