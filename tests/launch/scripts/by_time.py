"""Run by every rank of a launch: A-EDiT, where replica 0 is slower than the others. Arguments as for scenarios.py."""

from __future__ import annotations

import json
import os
import re
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset
from transformers import DefaultFlowCallback, TrainerCallback

from hf_edit import EDiTConfig, EDiTTrainer
from hf_edit.checkpoint.manifest import MARK
from hf_edit.sync.units import find_units
from tests.launch.scripts.scenarios import FOLDER, make_args, make_model, make_rows

BY_TIME = EDiTConfig(sync_seconds=0.4, edit_warmup_steps=2)
DELAYED = EDiTConfig(sync_seconds=0.4, overlap="delayed", delay_steps=2)


class Slowed(EDiTTrainer):
    """By time, replica 0 takes three times as long for a step, on a busy machine as well, where a step takes long."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        begun = time.monotonic()
        loss = super().training_step(*args, **kwargs)
        if self.edit_layout.replica == 0 and self.edit_config.sync_seconds is not None:
            time.sleep(max(0.06, 2 * (time.monotonic() - begun)))
        return loss


class Watch(TrainerCallback):
    """What other callbacks see, and own learning rates."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.own = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)
        self.own += 1


def run(config: EDiTConfig = BY_TIME, rows: Any = None, callbacks: Any = (), **settings: Any) -> Any:
    watch = Watch()
    settings = {"max_steps": 60, "lr_scheduler_type": "linear", **settings}
    trainer = Slowed(
        model=make_model(), args=make_args(**settings), train_dataset=rows or make_rows(), eval_dataset=make_rows(8),
        edit_config=config, callbacks=[watch, *callbacks],
    )  # fmt: skip
    trainer.watch = watch
    trainer.train()
    assert trainer._engine is None
    equal_everywhere(trainer.state.global_step)
    sums = everywhere([part.double().sum().item() for unit in find_units(trainer.model) for part in unit.parts()])
    size = trainer.edit_layout.replica_size
    assert all(sums[rank] == sums[rank % size] for rank in range(len(sums))), "the replicas ended apart"
    assert isinstance(trainer.callback_handler.callbacks[0], DefaultFlowCallback), "it was not put back"
    return trainer


def everywhere(value: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def equal_everywhere(value: Any) -> Any:
    found = everywhere(value)
    assert all(one == found[0] for one in found), found
    return found[0]


def own_steps(trainer: Any) -> list[int]:
    """Of each replica; the ranks of one have taken the same."""
    size, steps = trainer.edit_layout.replica_size, everywhere(trainer.watch.own)
    for rank, taken in enumerate(steps):
        assert taken == steps[rank // size * size], steps
    return steps[::size]


# -- scenarios --------------------------------------------------------------------------------------------------------


def _ends_where_all_have_taken_the_steps(config: EDiTConfig) -> dict[str, Any]:
    saving = dict(eval_strategy="steps", eval_steps=20, save_strategy="steps", save_steps=30, logging_steps=5)
    trainer = run(config, **saving)
    steps = own_steps(trainer)
    mean = sum(steps) / len(steps)
    assert min(steps[1:]) > steps[0], f"replica 0 is slower: {steps}"
    assert trainer.state.global_step == 60
    # `GlobalSteps.agree`: one that applies the last sync before its delay is over takes fewer steps than were counted.
    early = config.delay_steps if config.overlap == "delayed" else 0
    assert 60 - early <= mean < 75, f"{steps}: max_steps=60 is the mean"
    assert trainer.watch.steps == sorted(trainer.watch.steps)
    assert trainer.lr_scheduler.get_last_lr()[0] < 0.1 * 1e-2, "the schedule has come to its end on every replica"
    history = trainer.state.log_history
    evaluated = [entry["step"] for entry in history if "eval_loss" in entry]
    # Each moves to the next sync; on a busy machine two may fall on the same.
    assert 1 <= len(evaluated) == len(set(evaluated)) <= 3, evaluated
    assert evaluated[0] >= 20, evaluated
    assert evaluated[-1] == 60, evaluated
    saved = equal_everywhere(sorted(path.name for path in (FOLDER / "trainer").glob("checkpoint-*")))
    assert "checkpoint-60" in saved, saved
    for name in saved:
        state = json.loads((FOLDER / "trainer" / name / "trainer_state.json").read_text(encoding="utf-8"))
        assert state["stateful_callbacks"][MARK]["args"]["step"] == state["global_step"] == int(name[11:]), name
    assert all(0 < entry["loss"] < 10 for entry in history if "loss" in entry)
    assert [e["step"] for e in history] == sorted(e["step"] for e in history)
    total = next(entry["train_loss"] for entry in history if "train_loss" in entry)
    assert 2 < total < 6, f"a mean over the steps: {total}"
    syncs = [entry for entry in history if "edit/inner_steps" in entry]
    assert len(syncs) >= 2, syncs
    return {"own_steps": steps, "evaluated": evaluated, "saved": saved}


def a_slow_replica_keeps_nobody() -> dict[str, Any]:
    return _ends_where_all_have_taken_the_steps(BY_TIME)


def nor_with_delayed_syncs() -> dict[str, Any]:
    return _ends_where_all_have_taken_the_steps(DELAYED)


def epochs_are_of_all_replicas_together() -> dict[str, Any]:
    """A fast replica goes through its data once more than a slow one; epochs end by the progress of all."""
    world = int(os.environ["WORLD_SIZE"])
    settings = dict(max_steps=-1, num_train_epochs=3, eval_strategy="epoch", logging_steps=5)
    trainer = run(rows=make_rows(2 * 20 * world), **settings)
    steps = own_steps(trainer)
    assert trainer.state.max_steps == trainer.state.global_step == 60
    assert max(steps) > 60, steps
    assert trainer.state.epoch == trainer.state.num_train_epochs == 3
    evaluated = [entry["epoch"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert 1 <= len(evaluated) == len(set(evaluated)) <= 3, evaluated
    assert evaluated[-1] == 3
    return {"own_steps": steps, "evaluated": evaluated}


class Stream(IterableDataset):
    """Ends early on the ranks of replica 1, for good."""

    def __init__(self, layout: Any) -> None:
        self.rows = iter(make_rows(600 if layout.replica != 1 else 30))

    def __iter__(self) -> Any:
        return self.rows


class Streaming(Slowed):
    def get_train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(Stream(self.edit_layout), batch_size=2)


def _ends_together(config: EDiTConfig) -> dict[str, Any]:
    watch = Watch()
    trainer = Streaming(
        model=make_model(), args=make_args(max_steps=1000), train_dataset=make_rows(), edit_config=config,
        callbacks=[watch],
    )  # fmt: skip
    trainer.watch = watch
    trainer.train()
    steps = own_steps(trainer)
    assert steps[1] == 15, "what it has it uses up"
    assert equal_everywhere(trainer.edit_stats.syncs)
    return {"own_steps": steps}


def data_that_run_out_on_one_replica_end_all() -> dict[str, Any]:
    return _ends_together(EDiTConfig(sync_seconds=0.4))


def also_with_delayed_syncs_and_by_steps() -> dict[str, Any]:
    told = [
        _ends_together(config)
        for config in (DELAYED, EDiTConfig(sync_interval=8), EDiTConfig(sync_interval=5), EDiTConfig(sync_interval=100))
    ]
    assert told[1]["own_steps"][0] == 16, told
    assert told[3]["own_steps"][0] == 100, told
    return {"told": told}


class StopAt(TrainerCallback):
    """Replica 1's last rank has seen enough."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= 20 and dist.get_rank() == dist.get_world_size() - 1:
            control.should_training_stop = True


def what_one_rank_wants_all_do() -> dict[str, Any]:
    trainer = run(callbacks=[StopAt()])
    assert 20 <= trainer.state.global_step < 60
    return {"stopped": trainer.state.global_step}


def a_resumed_run_reads_on_where_each_replica_was() -> dict[str, Any]:
    """Rows are read in order, so each batch of a rank is known; a resumed run begins with the first not yet seen, once
    it has read the three before it again: the last one must come out as it did."""
    seen: list[int] = []

    def collator(batch: list[dict[str, Any]]) -> dict[str, Any]:
        seen.extend(int(row["number"]) for row in batch)
        return {key: torch.stack([row[key] for row in batch]) for key in ("input_ids", "labels")}

    rows = [{**row, "number": torch.tensor(n)} for n, row in enumerate(make_rows(4096))]

    def part(resume: Any, max_steps: int) -> Any:
        seen.clear()
        settings = dict(output_dir=str(FOLDER / "again"), max_steps=max_steps, save_strategy="steps", save_steps=20)
        trainer = Slowed(
            model=make_model(), args=make_args(remove_unused_columns=False, **settings), train_dataset=rows,
            edit_config=BY_TIME, data_collator=collator,
        )  # fmt: skip
        trainer.train(resume)
        assert trainer.state.global_step == max_steps
        return trainer

    layout = part(None, 40).edit_layout
    folder = FOLDER / "again" / "checkpoint-40"
    saved = torch.load(folder / "edit" / f"replica-{layout.replica}" / f"host-{layout.shard}.pt")
    own = saved["host"]["rank"]["own_steps"]
    part(str(folder), 52)
    world = dist.get_world_size()
    read = [
        row
        for step in range(own - 3, own + len(seen))
        for row in (2 * (step * world + layout.rank) + i for i in (0, 1))
    ]
    assert seen
    assert seen == read[: len(seen)], (own, seen[:4], read[:4])
    assert len(set(everywhere(own))) > 1, "replicas stood at different places"
    return {"own": own, "resumed": len(seen) // 2}


def on_another_layout_it_goes_on_from_the_global_step() -> dict[str, Any]:
    """The checkpoint is that of `a_resumed_run_reads_on_where_each_replica_was`, launched with another layout."""
    begun: list[float] = []

    class Begin(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not begun:
                begun.extend((state.global_step, trainer._engine.progress.value))

    trainer = Slowed(
        model=make_model(), args=make_args(output_dir=str(FOLDER / "again"), max_steps=60), train_dataset=make_rows(),
        edit_config=BY_TIME, callbacks=[watch := Watch(), Begin()],
    )  # fmt: skip
    trainer.watch = watch
    trainer.train(str(FOLDER / "again" / "checkpoint-40"))
    steps = own_steps(trainer)
    assert begun == [40, 40.0], "each replica's own steps are not the global one"
    assert trainer.state.global_step == 60
    assert 20 <= sum(steps) / len(steps) < 35, steps
    return {"own_steps": steps}


def a_callback_that_evaluates_is_refused() -> dict[str, Any]:
    class Evaluate(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                kwargs_trainer[0].evaluate()

    kwargs_trainer: list[Any] = []
    trainer = Slowed(
        model=make_model(), args=make_args(), train_dataset=make_rows(), eval_dataset=make_rows(8),
        edit_config=EDiTConfig(sync_seconds=100.0), callbacks=[Evaluate()],
    )  # fmt: skip
    kwargs_trainer.append(trainer)
    with pytest.raises(RuntimeError, match=re.escape("set control.should_evaluate or control.should_save instead")):
        trainer.train()
    dist.barrier()
    return {}
