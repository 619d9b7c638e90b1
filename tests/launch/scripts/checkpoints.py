"""Run by every rank of a launch: saves, resumes and compares. Arguments as for scenarios.py."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import datasets
import pytest
import torch
import torch.distributed as dist
import transformers
from packaging.version import Version
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

from hf_edit import EDiTConfig, EDiTTrainer
from hf_edit.checkpoint.outer import outer_tensors
from tests.launch.scripts.scenarios import FOLDER, VOCABULARY, forget_trainings, make_args, make_rows, parameters

STEPS = 12


def make_model(vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            attention_dropout=0.1,
        )
    )  # fmt: skip


class Snapshot(TrainerCallback):
    """What the run ended with: everything that a resumed one must have, too."""

    tensors: dict[str, Tensor]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if type(trainer) is Trainer:
            return
        found = {f"param/{n.removeprefix('module.')}": p for n, p in trainer.model_wrapped.named_parameters()}
        found |= outer_tensors(trainer._engine.sync, trainer._training().ranks)
        for number, entries in enumerate(trainer.optimizer.state_dict()["state"].values()):
            found |= {f"inner/{number}/{key}": value for key, value in entries.items()}
        self.tensors = {
            name: (t.to_local() if isinstance(t, DTensor) else t).detach().clone() for name, t in found.items()
        }
        self.host = {"lr": trainer.lr_scheduler.state_dict(), "rng": torch.get_rng_state().tolist()}


def run(
    name: str, resume: Any = None, config: Any = None, steps: int = STEPS, model: Any = None, callbacks: Any = (),
    trainer: Any = EDiTTrainer, data: Any = None, **settings: Any,
) -> Any:  # fmt: skip
    """A finished trainer, with its Snapshot as `.end`; five batches a rank make an epoch of 3 steps, the last short.

    Of those before, nothing but that and the logs can be used any more."""
    forget_trainings()
    snapshot = Snapshot()
    world = int(os.environ["WORLD_SIZE"])
    defaults = dict(
        output_dir=str(FOLDER / name), max_steps=steps, gradient_accumulation_steps=2, save_strategy="steps",
        save_steps=1, include_num_input_tokens_seen="all", lr_scheduler_type="cosine", warmup_steps=3,
        train_sampling_strategy="random", weight_decay=0.1, max_grad_norm=1.0,
    )  # fmt: skip
    config = config or EDiTConfig(sync_interval=3, warmup_steps=2, max_pseudo_grad_norm=0.5, ema_warmup_syncs=1)
    edit = {"edit_config": config} if issubclass(trainer, EDiTTrainer) else {}
    made = trainer(
        model=model or make_model(), args=make_args(**{**defaults, **settings}), callbacks=[snapshot, *callbacks],
        train_dataset=data or make_rows(5 * 2 * world, ragged=True), eval_dataset=make_rows(8), **edit,
    )  # fmt: skip
    snapshot.trainer, made.end = made, snapshot
    made.train(resume)
    return made


def saved_steps(name: str) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (FOLDER / name).glob("checkpoint-*"))


def logged(trainer: Any, after: int) -> list[dict[str, float]]:
    timeless = ("step", "loss", "grad_norm", "learning_rate", "epoch", "num_input_tokens_seen", "edit/inner_steps",
                "edit/pseudo_grad_norm", "edit/replica_loss_mean", "edit/effective_replicas", "eval_loss")  # fmt: skip
    history = [e for e in trainer.state.log_history if e["step"] > after and "train_runtime" not in e]
    return [{key: e[key] for key in timeless if key in e} for e in history]


def assert_same_end(one: Any, other: Any, after: int) -> None:
    mine, theirs = one.end.tensors, other.end.tensors
    assert set(mine) == set(theirs), set(mine) ^ set(theirs)
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not different, f"resumed after {after}: {different}"
    assert one.end.host == other.end.host, f"resumed after {after}"
    assert logged(one, after) == logged(other, after), f"after {after}: {logged(one, after)} {logged(other, after)}"
    assert one.state.total_flos == other.state.total_flos


# -- scenarios --------------------------------------------------------------------------------------------------------


def resumed_runs_are_bit_for_bit() -> dict[str, Any]:
    """From every checkpoint of a run: in warm-up, at its end, at a pending sync, at a final one."""
    whole = run("whole")
    steps = saved_steps("whole")
    assert steps == [1, 2, 5, 8, 11, 12], steps  # warm-up; then at syncs; then the end
    for step in steps[:-1]:
        resumed = run(f"from-{step}", str(FOLDER / "whole" / f"checkpoint-{step}"))
        assert resumed.state.global_step == STEPS
        assert_same_end(whole, resumed, step)
    assert_same_end(whole, run("quiet", save_strategy="no"), after=STEPS)  # saving changes nothing
    blocking = EDiTConfig(sync_interval=3, warmup_steps=2, max_pseudo_grad_norm=0.5, ema_warmup_syncs=1, overlap="none")
    assert_same_end(whole, run("blocking", str(FOLDER / "whole" / "checkpoint-5"), config=blocking), after=5)
    return {"steps": steps}


def resumed_behind_an_epochs_last_step() -> dict[str, Any]:
    """Saved by the step count, before the epoch ends: no batch of it is left, and the next one must begin."""
    config = EDiTConfig(sync_interval=1, warmup_steps=2, ema_warmup_syncs=1, overlap="none")
    for kind, accumulation, epoch in (("random", 1, 5), ("random", 2, 3), ("group_by_length", 1, 5)):
        name = f"ends-{kind}-{accumulation}"
        settings: dict[str, Any] = dict(config=config, save_steps=epoch, train_sampling_strategy=kind)
        settings["gradient_accumulation_steps"] = accumulation
        whole = run(name, **settings)
        for step in (epoch, 2 * epoch):
            again = run("again", str(FOLDER / name / f"checkpoint-{step}"), **{**settings, "save_strategy": "no"})
            assert again.state.global_step == STEPS, (name, step, again.state.global_step)
            assert_same_end(whole, again, step)
    return {}


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Five batches a rank; the last is accumulated into the first step of the next epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rows = make_rows(5 * 2 * int(os.environ["WORLD_SIZE"]), ragged=True)
        return iter(rows[self.epoch :] + rows[: self.epoch])


def hub_stream() -> datasets.IterableDataset:
    rows = make_rows(5 * 2 * int(os.environ["WORLD_SIZE"]), ragged=True)
    listed = datasets.Dataset.from_list([{key: value.tolist() for key, value in row.items()} for row in rows])
    return listed.to_iterable_dataset(num_shards=1).shuffle(seed=3, buffer_size=4).with_format("torch")


def every_kind_of_data_resumes_in_later_epochs() -> dict[str, Any]:
    """From the first, second and fourth epoch, in its middle and at its end; without a word of other data."""
    kinds = {
        "grouped": dict(train_sampling_strategy="group_by_length"),
        "stream": dict(data=Stream()),
        "hub": dict(data=hub_stream()),
    }
    config = EDiTConfig(sync_interval=3, warmup_steps=2, ema_warmup_syncs=1, overlap="none")
    for kind, settings in kinds.items():
        whole = run(kind, config=config, **settings)
        with warnings_of_hf_edit() as said:
            for step in (2, 5, 11):
                folder = str(FOLDER / kind / f"checkpoint-{step}")
                again = run("again", folder, config=config, **settings, save_strategy="no")
                assert_same_end(whole, again, step)
        assert "other data" not in " ".join(said), said
    return {}


def delayed_syncs_resume_bit_for_bit() -> dict[str, Any]:
    """A checkpoint between a sync's beginning and its application ends it first, and one between the fragments' syncs
    all of theirs; what codes leave out is in it."""
    plain = EDiTConfig(sync_interval=3, warmup_steps=2, ema_warmup_syncs=1, overlap="delayed", delay_steps=2)
    coded = dataclasses.replace(plain, compression="int4", offload_outer_state=True)
    parts = dataclasses.replace(plain, sync_interval=4, fragments=2)
    for config in (plain, coded, parts):
        name = f"delayed-{config.compression}-{config.fragments}"
        whole = run(name, config=config, save_steps=4)
        assert ("residual" in str(whole.end.tensors.keys())) == (config.compression != "none")
        steps = saved_steps(name)
        for step in steps[:-1]:
            resumed = run(f"{name}-{step}", str(FOLDER / name / f"checkpoint-{step}"), config=config, save_steps=4)
            assert_same_end(whole, resumed, step)
    return {"steps": steps}


def sharded_checkpoints() -> dict[str, Any]:
    """SHARDED_STATE_DICT: no replica's state is mixed with another's; save_model() writes a whole model."""
    with environment(FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT"):
        best = dict(eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="loss")
        whole = run("sharded", **best)
        names = {path.name for path in (FOLDER / "sharded" / "checkpoint-5").iterdir()}
        assert {"pytorch_model_fsdp_0", "optimizer_0", "edit"} <= names, names
        assert "model.safetensors" not in names, names
        assert_same_end(whole, run("sharded-5", str(FOLDER / "sharded" / "checkpoint-5"), **best), after=5)
        whole.save_model(str(FOLDER / "sharded-model"))
    dist.barrier()
    loaded = LlamaForCausalLM.from_pretrained(FOLDER / "sharded-model").state_dict()
    mine = parameters(whole)
    if dist.get_rank() == 0:
        assert all(torch.equal(mine[name], loaded[name]) for name in loaded)
    return {"best": whole.state.best_global_step}


def a_checkpoint_that_is_not_whole_is_passed_over() -> dict[str, Any]:
    run("broken", steps=8)
    folder = FOLDER / "broken"
    if dist.get_rank() == 0:
        (folder / "checkpoint-8" / "edit" / "manifest.json").unlink()
        shard = next((folder / "checkpoint-5" / "edit" / "replica-1").glob("*.distcp"))
        shard.write_bytes(shard.read_bytes()[:-1])
    dist.barrier()
    refused(run, "broken", str(folder / "checkpoint-8"), steps=8, text="edit/ has no manifest, so it was not written "
            "to its end. The newest whole one is")  # fmt: skip
    refused(run, "broken", str(folder / "checkpoint-5"), steps=8, text="bytes were written")
    with warnings_of_hf_edit() as said:
        resumed = run("broken", True, steps=8)
    assert resumed.state.global_step == 8
    if dist.get_rank() == 0:
        text = " ".join(said)
        assert "checkpoint-8 is passed over (edit/ has no manifest" in text, text
        assert "checkpoint-5 is passed over" in text, text
        assert f"resuming from {folder / 'checkpoint-2'}" in text, text
    return {}


def another_model_is_refused_another_method_is_told() -> dict[str, Any]:
    run("method", steps=5)
    saved = str(FOLDER / "method" / "checkpoint-5")
    larger = make_model(vocabulary=VOCABULARY + 2)
    refused(run, "other", saved, model=larger, text="model.embed_tokens.weight is [64, 16] there, [66, 16] here")
    config = EDiTConfig(sync_interval=3, warmup_steps=2, outer_optimizer="none", weighting="uniform")
    with warnings_of_hf_edit() as said:
        resumed = run("other", saved, config=config)
    assert resumed.state.global_step == STEPS
    if dist.get_rank() == 0:
        text = " ".join(said)
        assert "outer_optimizer 'nesterov' -> 'none'" in text, text
        assert "weighting 'norm' -> 'uniform'" in text, text
    return {}


def a_users_outer_optimizer_resumes() -> dict[str, Any]:
    def adam(params: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=1e-3)

    config = EDiTConfig(sync_interval=3, warmup_steps=2, outer_optimizer=adam, offload_outer_state=True)
    whole = run("adam", config=config)
    resumed = run("adam-8", str(FOLDER / "adam" / "checkpoint-8"), config=config)
    assert any(name.startswith("outer/") for name in whole.end.tensors), sorted(whole.end.tensors)
    assert_same_end(whole, resumed, after=8)
    return {}


def a_bf16_model_resumes() -> dict[str, Any]:
    """Its anchor is fp32: more than its parameters hold."""
    whole = run("half", model=make_model().to(torch.bfloat16))
    resumed = run("half-8", str(FOLDER / "half" / "checkpoint-8"), model=make_model().to(torch.bfloat16))
    assert any(t.dtype == torch.bfloat16 for n, t in whole.end.tensors.items() if n.startswith("param/"))
    assert all(t.dtype == torch.float32 for n, t in whole.end.tensors.items() if n.startswith("anchor/"))
    assert_same_end(whole, resumed, after=8)
    return {}


def limits_and_the_best_model() -> dict[str, Any]:
    """save_total_limit, save_only_model, save_strategy best and epoch, load_best_model_at_end, early stopping."""
    run("limit", save_total_limit=2)
    assert saved_steps("limit") == [11, 12]
    (FOLDER / "reused" / "checkpoint-99").mkdir(parents=True, exist_ok=True)  # of another run, whose clock was ahead
    os.utime(FOLDER / "reused" / "checkpoint-99", (2**32, 2**32))
    with warnings_of_hf_edit() as said:
        run("reused", save_total_limit=1)
    assert saved_steps("reused") == [99], "the Trainer keeps what looks newest"
    if dist.get_rank() == 0:
        assert any("save_total_limit=1 has deleted" in text for text in said), said
    run("bare", save_only_model=True)
    assert not (FOLDER / "bare" / "checkpoint-12" / "edit").exists()
    run("epochs", save_strategy="epoch")  # epochs end at 3, 6, 9, 12; syncs at 5, 8, 11
    assert saved_steps("epochs") == [5, 8, 11, 12], saved_steps("epochs")
    best = dict(eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="loss")
    stopper = EarlyStoppingCallback(early_stopping_patience=1)
    trainer = run("best", callbacks=[stopper], save_strategy="best", learning_rate=0.5, max_steps=60, **best)
    stops: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(
        stops, (trainer.state.global_step, trainer.state.best_global_step, trainer.state.best_metric)
    )
    assert len(set(stops)) == 1, stops
    assert trainer.state.global_step < 60, "early stopping did not stop"
    evaluated = trainer.evaluate()["eval_loss"]
    assert abs(evaluated - trainer.state.best_metric) < 1e-5, (evaluated, trainer.state.best_metric)
    return {"stopped": stops[0]}


def plain_trainers_checkpoints() -> dict[str, Any]:
    """A plain Trainer's checkpoint goes on with EDiT, and the other way round; without FSDP."""
    if Version(transformers.__version__) < Version("5.23"):
        return {}  # 5.17's plain Trainer cannot load an optimizer on several CPUs: torch knows no device "cpu:0"
    plain = run("plain", trainer=Trainer, steps=4, save_steps=4)
    with warnings_of_hf_edit() as said:
        resumed = run("taken-over", str(FOLDER / "plain" / "checkpoint-4"))
    assert resumed.state.global_step == STEPS
    if dist.get_rank() == 0:
        assert plain.state.log_history[0] == resumed.state.log_history[0]
        assert "has no edit/: the outer state starts anew" in " ".join(said), said
    back = run("given-back", str(FOLDER / "taken-over" / "checkpoint-12"), trainer=Trainer, steps=14)
    assert back.state.global_step == 14
    return {}


def refused(body: Any, *args: Any, text: str, **settings: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        body(*args, **settings)
    dist.barrier()


@contextlib.contextmanager
def warnings_of_hf_edit() -> Iterator[list[str]]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hf_edit").addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger("hf_edit").removeHandler(handler)


@contextlib.contextmanager
def environment(**settings: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
