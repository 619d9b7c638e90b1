"""Run by every rank of a launch: what the Trainer can do, with replicas. Arguments as for scenarios.py.

With SGD, a sync after every step and the plain average, replicas are one big batch: EDiT must end with the parameters
of a plain Trainer on the same data, and report its losses.
"""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    TrainerCallback,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from hf_edit import EDiTConfig, EDiTTrainer
from hf_edit.sync.units import is_compiled, local_part, named_tensors
from hf_edit.trainer.progress import FollowProgress
from tests.launch.scripts.scenarios import (
    BATCH,
    FOLDER,
    TOLERANCE,
    VOCABULARY,
    forget_trainings,
    make_args,
    make_model,
    make_rows,
    parameters,
)

ONE_BIG_BATCH = dict(sync_interval=1, outer_optimizer="none", weighting="uniform", max_pseudo_grad_norm=None)
STEPS = 6


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(make_rows())


def of_many_lengths() -> list[dict[str, Tensor]]:
    return [{key: value[: 4 + number % 9] for key, value in row.items()} for number, row in enumerate(make_rows())]


def pad(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    filler = {"input_ids": 0, "labels": -100}
    return {
        key: torch.stack([nn.functional.pad(r[key], (0, longest - len(r[key])), value=filler[key]) for r in rows])
        for key in filler
    }


def nats(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs.logits[:, :-1].flatten(0, 1).float()
    return nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def accuracy(prediction: Any) -> dict[str, float]:
    right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
    return {"accuracy": float(right.mean())}


def frozen_embeddings() -> LlamaForCausalLM:
    model = make_model()
    model.model.embed_tokens.requires_grad_(False)
    return model


# Each feature: what of the defaults it changes. Of different lengths, every process takes the mean of its own tokens.
FEATURES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a short last window": {"gradient_accumulation_steps": 3, "rows": make_rows(5 * 2 * 4), "num_train_epochs": 3},
    "label smoothing, a schedule": {
        "label_smoothing_factor": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2
    },
    "compute_loss_func": {"compute_loss_func": nats},
    "compute_metrics, tokens seen": {
        "compute_metrics": accuracy, "eval_strategy": "steps", "eval_steps": 2,
        "include_num_input_tokens_seen": "non_padding", "logging_strategy": "steps",
    },
    "group by length": {
        "train_sampling_strategy": "group_by_length", "rows": of_many_lengths(), "data_collator": pad,
        "average_tokens_across_devices": False,
    },
    "workers": {"dataloader_num_workers": 2},
    "a stream": {"rows": Stream()},
    "gradient checkpointing, clipping that does not bite": {"gradient_checkpointing": True, "max_grad_norm": 1e9},
    "bf16": {"bf16": True, "use_cpu": not torch.cuda.is_available(), "tolerance": 2e-2},
    "tied embeddings": {"make": lambda: make_model(tied=True)},
    "frozen embeddings": {"make": frozen_embeddings},
    "epochs": {"rows": make_rows(3 * 2 * 4), "max_steps": -1, "num_train_epochs": 2, "eval_strategy": "epoch"},
    "torch.compile": {"torch_compile": True, "torch_compile_backend": "aot_eager"},  # last: leaves much to collect
}  # fmt: skip
if torch.cuda.is_available():
    FEATURES["fp16"] = {"fp16": True, "tolerance": 2e-2}


def run(
    num_replicas: int | None, rows: Any = None, make: Any = make_model, tolerance: float = 0.0,
    late_callbacks: Any = (), no_wait: bool = False, **settings: Any,
) -> Any:  # fmt: skip
    kwargs = {key: settings.pop(key) for key in ("compute_loss_func", "compute_metrics", "data_collator", "callbacks")
              if key in settings}  # fmt: skip
    kind, resume = settings.pop("trainer", EDiTTrainer), settings.pop("resume", None)
    config = settings.pop("config", None) or EDiTConfig(**ONE_BIG_BATCH, num_replicas=num_replicas)
    args = make_args(**{"max_steps": STEPS, "optim": "sgd", "learning_rate": 0.3, **settings})
    trainer = kind(
        model=make(), args=args, train_dataset=rows or make_rows(), eval_dataset=make_rows(8), edit_config=config,
        **kwargs,
    )  # fmt: skip
    for callback in late_callbacks:
        trainer.add_callback(callback)
    if no_wait:
        trainer._jit.jit_manager.kill_wait = 0
    if args.torch_compile:
        trainer.evaluate()  # leaves a compiled model that is not sharded yet
    trainer.train(resume)
    assert not multiprocessing.active_children(), "they read no more; the garbage collector waits 5 s for each"
    return trainer


def losses(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def features_agree_with_the_plain_trainer() -> dict[str, Any]:
    """One replica is a plain Trainer (FSDP2 or DDP over all ranks); several must come to the same."""
    found = {}
    for name, settings in FEATURES.items():
        forget_trainings()
        plain, edit = run(1, **settings), run(None, **settings)
        assert plain.edit_layout.num_replicas == 1
        assert edit.edit_layout.num_replicas > 1
        assert plain.accelerator.num_processes == edit.accelerator.num_processes == dist.get_world_size()
        assert plain.state.global_step == edit.state.global_step
        tolerance = settings.get("tolerance", TOLERANCE)
        one, other, begun = parameters(plain), parameters(edit), settings.get("make", make_model)().state_dict()
        apart = {n: float((one[n] - other[n]).norm() / one[n].norm()) for n in one}
        assert all(distance <= tolerance for distance in apart.values()), (name, apart)
        assert any(not torch.equal(one[n], begun[n]) for n in one) or dist.get_rank(), f"{name}: nothing was trained"
        assert is_compiled(edit.model_wrapped) == (name == "torch.compile"), name
        means = losses(edit, "edit/replica_loss_mean")
        if "average_tokens_across_devices" not in settings and "eval" not in name:
            assert means == pytest.approx(losses(plain, "loss"), rel=tolerance), name
        for key in ("eval_loss", "eval_accuracy"):
            assert losses(edit, key) == pytest.approx(losses(plain, key), rel=tolerance), (name, key)
        assert edit.state.num_input_tokens_seen == plain.state.num_input_tokens_seen, name
        found[name] = max(apart.values(), default=0.0)
    return found


class Request(TrainerCallback):
    """Wants something on one rank alone."""

    def __init__(self, rank: int, step: int, flag: str, event: str = "on_step_end") -> None:
        self.rank, self.step, self.flag = rank, step, flag
        setattr(self, event, self.request)

    def request(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index == self.rank and state.global_step == self.step:
            setattr(control, self.flag, True)


def what_one_rank_wants_all_do_at_the_next_sync() -> dict[str, Any]:
    world = dist.get_world_size() if dist.is_initialized() else 4
    requests = [
        Request(rank=world - 1, step=3, flag="should_evaluate", event="on_log"),  # its own replica's loss was odd
        Request(rank=0, step=5, flag="should_save", event="on_substep_end"),
        Request(rank=1, step=9, flag="should_training_stop"),
    ]
    config = EDiTConfig(sync_interval=4)
    saving = dict(save_strategy="steps", save_steps=1000, output_dir=str(FOLDER / "requests"))
    trainer = run(None, config=config, callbacks=requests, max_steps=40, gradient_accumulation_steps=2, **saving)
    found: list[Any] = [None] * dist.get_world_size()
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    dist.all_gather_object(found, (trainer.state.global_step, evaluated))
    assert found == [(12, [4])] * dist.get_world_size(), found
    if dist.get_rank() == 0:
        assert [path.name for path in (FOLDER / "requests").glob("checkpoint-*")] == ["checkpoint-8"]
    return {}


class TooLarge(EDiTTrainer):
    """One rank cannot take more than one row at a time."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if len(inputs["input_ids"]) > 1 and dist.get_rank() == dist.get_world_size() - 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate a lot.")
        return super().compute_loss(model, inputs, *args, **kwargs)


def a_batch_too_large_for_one_rank_is_made_smaller_on_all() -> dict[str, Any]:
    if int(run(None, max_steps=1).edit_layout.replica_size) > 1:
        return {"not here": "the other ranks of its replica would wait in FSDP2's all-gather"}
    trainer = run(None, trainer=TooLarge, auto_find_batch_size=True, max_steps=4, config=EDiTConfig(sync_interval=2))
    assert trainer.state.global_step == 4
    assert trainer._train_batch_size == 1
    assert_replicas_equal(trainer)
    return {}


class Scaled(EDiTTrainer):
    """With a gradient scaler, as fp16 has it; on one replica its first step overflows."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        scale = 2.0**127 if self.edit_layout.replica == 1 else 2.0
        self.accelerator.scaler = torch.amp.GradScaler(
            self.args.device.type, init_scale=scale, backoff_factor=2.0**-110
        )


def steps_that_fp16_skips_are_no_inner_steps() -> dict[str, Any]:
    """One replica skips a step; all come to the same syncs nevertheless, and end alike."""
    if int(run(None, max_steps=1).edit_layout.replica_size) > 1:
        return {"not here": "torch's scaler has no common decision for FSDP2's shards on CPU"}
    trainer = run(None, trainer=Scaled, max_steps=6, config=EDiTConfig(sync_interval=2))
    steps: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(steps, (trainer.edit_stats.inner_steps, trainer.edit_stats.syncs))
    assert steps[0] == (6, 3), steps
    assert steps[1] == (5, 3), steps
    logged = [entry["edit/inner_steps"] for entry in trainer.state.log_history if "edit/inner_steps" in entry]
    assert logged == [2 - 1 / trainer.edit_layout.num_replicas, 2, 2], logged
    assert_replicas_equal(trainer)
    return {"steps": steps}


class Blocks(nn.Module):
    """A mixture of blocks behind batch normalization: a row's first token says which block it passes."""

    _no_split_modules = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.norm = nn.BatchNorm1d(8)
        self.blocks = nn.ModuleList(Block(8, 8) for _ in range(4))
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.embed(input_ids).transpose(1, 2)).transpose(1, 2)
        chosen = int(input_ids[0, 0]) % len(self.blocks)
        x = x + self.blocks[chosen](x)
        logits = self.head(x)
        return {"loss": nn.functional.cross_entropy(logits.transpose(1, 2), labels), "logits": logits}


class Block(nn.Linear):
    pass


def buffers_follow_and_blocks_may_rest() -> dict[str, Any]:
    """Statistics of batch normalization are replica 0's after a sync; a rank need not run every block."""
    if int(run(None, max_steps=1).edit_layout.replica_size) > 1:
        return {"not here": "FSDP2 itself needs all ranks of a replica to run the same blocks"}
    trainer = run(None, make=Blocks, config=EDiTConfig(sync_interval=2), max_steps=7, max_grad_norm=1.0)
    assert trainer.edit_stats.syncs == 4
    assert_replicas_equal(trainer)
    buffers = named_tensors(trainer.model_wrapped)[1]
    assert int(buffers["norm.num_batches_tracked"]) == 7
    assert float(buffers["norm.running_mean"].abs().sum()) > 0
    return {}


class Own(EDiTTrainer):
    """Whatever a user may override, and none of it calls super()."""

    def get_train_dataloader(self) -> Any:
        length = 5 + 2 * self.args.process_index  # batches
        return DataLoader(self.train_dataset[: BATCH * length], batch_size=BATCH, collate_fn=self.data_collator)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return DataLoader(self.eval_dataset, batch_size=BATCH, collate_fn=self.data_collator)

    def create_optimizer(self, model: Any = None) -> Any:
        self.optimizer = torch.optim.SGD((model or self.model).parameters(), lr=0.1)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        line = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, total_iters=num_training_steps)
        self.lr_scheduler = line
        return line

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        return [next(epoch_iterator) for _ in range(num_batches)], None

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None: ...

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = self.evaluation_loop(self.get_eval_dataloader(), "Evaluation", prediction_loss_only=True).metrics
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, metrics["eval_loss"])
        self.evaluated = [*getattr(self, "evaluated", []), (self.state.global_step, len(set(everyone)))]
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None: ...


def a_subclass_may_override_without_super() -> dict[str, Any]:
    """Its loader has 5 batches on rank 0, 7 on rank 1, ...: an epoch has 5 on all."""
    settings = dict(max_steps=-1, num_train_epochs=2, eval_strategy="epoch")
    trainer = run(None, trainer=Own, config=EDiTConfig(sync_interval=5), **settings)
    assert trainer.state.global_step == 10
    assert trainer.edit_stats.syncs == 2
    assert trainer.evaluated == [(5, 1), (10, 1)]
    assert trainer.lr_scheduler.get_last_lr() == [0.0]
    assert_replicas_equal(trainer)
    rows = make_rows(BATCH * (2 * dist.get_world_size() + 1))  # 3 batches on rank 0, else 2
    uneven = {"even_batches": False}
    short = run(None, rows=rows, max_steps=-1, num_train_epochs=2, accelerator_config=uneven)
    assert short.state.global_step == short.edit_stats.syncs == 4
    assert_replicas_equal(short)
    by_time = run(None, trainer=Own, config=EDiTConfig(sync_seconds=0.3), max_steps=10)
    assert by_time.state.global_step == 10
    assert isinstance(by_time.lr_scheduler, FollowProgress)
    assert by_time.lr_scheduler.get_last_lr() == [0.0]
    return {}


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            max_position_embeddings=16, problem_type="single_label_classification",
        )
    )  # fmt: skip


def speech() -> Wav2Vec2ForCTC:
    torch.manual_seed(0)
    return Wav2Vec2ForCTC(
        Wav2Vec2Config(
            vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
            conv_dim=(8,), conv_stride=(5,), conv_kernel=(10,), num_feat_extract_layers=1, num_conv_pos_embeddings=2,
            num_conv_pos_embedding_groups=2, apply_spec_augment=False, layerdrop=0.0,
        )
    )  # fmt: skip


def models_that_fsdp2_cannot_shard_are_refused() -> dict[str, Any]:
    """They train with replicas of one rank; with larger ones after what the text advises, if there is a way."""
    sentences = [{"input_ids": row["input_ids"], "labels": row["labels"][0] % 2} for row in make_rows(64)]
    sounds = [{"input_values": torch.randn(160), "labels": torch.tensor([1, 2])} for _ in range(64)]
    config = EDiTConfig(sync_interval=2)
    for make, rows, promise in ((bert, sentences, "BertLayer"), (speech, sounds, "get_input_embeddings")):
        settings = dict(make=make, rows=rows, config=config, max_steps=3)
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            with pytest.raises(ValueError, match=promise):
                run(None, **settings)
            if make is speech:
                continue
            os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = promise
        trainer = run(None, **settings)
        os.environ.pop("FSDP_TRANSFORMER_CLS_TO_WRAP", None)
        assert trainer.edit_stats.syncs == 2
        assert_replicas_equal(trainer)
    return {}


class Broken(EDiTTrainer):
    """The loss of one replica is not a number in step 3."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * (float("nan") if self.state.global_step == 2 and self.edit_layout.replica == 0 else 1.0)


def losses_that_are_no_numbers_are_filtered_from_the_logs() -> dict[str, Any]:
    for filtered in (True, False):
        trainer = run(
            None, trainer=Broken, logging_nan_inf_filter=filtered, config=EDiTConfig(sync_interval=4), max_steps=8
        )
        logged = torch.tensor(losses(trainer, "loss"))
        # Its parameters stay broken until the sync leaves the replica out and gives it the others'.
        wrong = 0 if filtered else (2 if trainer.edit_layout.replica == 0 else 0)
        assert int(logged.isnan().sum()) == wrong, (filtered, logged)
        assert_replicas_equal(trainer)
    return {}


def predictions_are_of_equal_replicas() -> dict[str, Any]:
    trainer = run(None, config=EDiTConfig(sync_interval=4), compute_metrics=accuracy)
    output = trainer.predict(make_rows(10))
    assert output.predictions.shape[:2] == (10, 12)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, output.predictions.tobytes())
    assert len(set(found)) == 1
    return {"accuracy": output.metrics["test_accuracy"]}


def assert_replicas_equal(trainer: Any) -> None:
    params, buffers = named_tensors(trainer.model_wrapped)
    for name, tensor in {**params, **buffers}.items():
        mine = local_part(tensor).detach().contiguous()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine.cpu().numpy().tobytes())
        size = trainer.edit_layout.replica_size
        assert all(everyone[rank] == everyone[rank % size] for rank in range(len(everyone))), name
