"""One rank of slow_network.py and stragglers.py: trains a Llama on random tokens. Argument: a `Job` as JSON.

The figures are taken between the ends of steps; the sync that ends every EDiT training is never among them.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ["ACCELERATE_USE_CPU"] = "true"

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig, PartialState
from accelerate.utils import DistributedType
from lib.bench import RandomTokens, build_llama
from lib.network_job import PRESETS, SYNC_FIGURES, TIMED, TUNED_FIGURES, Job, combine, edit_settings
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_edit import EDiTConfig, EDiTTrainer

NO_LOGS = 10**9  # steps between two logs


class Reading(NamedTuple):
    """`seconds` of a monotonic clock, `cpu_seconds` of all threads of this rank, bytes that this host has `sent`."""

    seconds: float
    cpu_seconds: float
    sent: int


class Recorder(TrainerCallback):
    """Keeps times and bytes sent at the end of every step and of every sync, this rank's first batch, and the rows of
    each of its batches, one a step."""

    def __init__(self, started: Path) -> None:
        self.started = started
        self.steps: list[Reading] = []
        self.syncs: list[tuple[int, Reading, dict[str, float]]] = []  # after so many steps
        self.first_batch: str | None = None
        self.rows: list[int] = []
        interface = os.environ["GLOO_SOCKET_IFNAME"]
        self._counter = Path(f"/sys/class/net/{interface}/statistics/tx_bytes")

    def collate(self, rows: list[Any]) -> dict[str, Any]:
        self.rows.append(len(rows))
        batch = default_data_collator(rows)
        self.first_batch = self.first_batch or digest(batch["input_ids"])
        return batch

    def now(self) -> Reading:
        return Reading(time.monotonic(), time.process_time(), int(self._counter.read_text()))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.steps:
            self.started.touch()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps.append(self.now())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "edit/sync_seconds" in logs:
            names = (*SYNC_FIGURES, *(name for name in TUNED_FIGURES if f"edit/{name}" in logs))
            figures = {name: logs[f"edit/{name}"] for name in names}
            self.syncs.append((len(self.steps), self.now(), figures))


def digest(*tensors: torch.Tensor) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def build_trainer(job: Job, recorder: Recorder) -> Trainer:
    replica = int(os.environ["RANK"]) // job.ranks_per_replica
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=job.replica_steps[replica],
        per_device_train_batch_size=job.batch_size,
        learning_rate=1e-3,
        fsdp=job.ranks_per_replica > 1,
        fsdp_config={"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
        # Tokens are as many on every rank, so the plain Trainer needs no exchange of their number in every step.
        average_tokens_across_devices=False,
        logging_steps=NO_LOGS,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    common: dict[str, Any] = dict(
        model=build_llama(),
        args=args,
        train_dataset=RandomTokens(job.sequence_length),
        data_collator=recorder.collate,
        callbacks=[recorder],
    )
    if job.method != "hsdp":
        config = EDiTConfig.preset(PRESETS.get(job.method, "edit"), **edit_settings(job))
        return EDiTTrainer(**common, edit_config=config)
    args.parallelism_config = ParallelismConfig(dp_replicate_size=job.num_replicas, dp_shard_size=job.ranks_per_replica)
    # Accelerate 1.15 gives FSDP2 to several GPUs only; check_layout fails if it does not take CPUs for them.
    PartialState().distributed_type = DistributedType.MULTI_GPU
    return Trainer(**common)


def check_layout(trainer: Trainer, job: Job) -> None:
    """The training has as many ranks, replicas and shards as asked for, and FSDP2 is on where there are shards."""
    accelerator, asked = trainer.accelerator, (job.num_replicas, job.ranks_per_replica)
    assert accelerator.num_processes == dist.get_world_size() == asked[0] * asked[1]
    assert accelerator.is_fsdp2 == (job.ranks_per_replica > 1), accelerator.distributed_type
    if isinstance(trainer, EDiTTrainer):
        assert (trainer.edit_layout.num_replicas, trainer.edit_layout.replica_size) == asked, trainer.edit_layout
    if accelerator.is_fsdp2:
        axes = accelerator.parallelism_config
        assert (axes.dp_replicate_size, axes.dp_shard_size) == asked, axes


def check_averaged(trainer: Trainer, recorder: Recorder, job: Job) -> None:
    """HSDP has averaged gradients over all ranks: they saw different batches and have the same parameters.

    A parameter's gradient is the mean over its replica through the shards, and over the replicas since two ranks that
    hold the same shard in two replicas still agree.
    """
    shards = digest(*(parameter.to_local() for parameter in trainer.model_wrapped.parameters()))
    everyone = gather((recorder.first_batch, shards))
    assert len({batch for batch, _ in everyone}) == len(everyone), "ranks trained on the same data"
    for shard in range(job.ranks_per_replica):
        held = {parameters for _, parameters in everyone[shard :: job.ranks_per_replica]}
        assert len(held) == 1, f"shard {shard} differs between the replicas"


def gather(figures: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, figures)
    return everyone


def measure(recorder: Recorder, job: Job) -> dict[str, Any]:
    """This rank's figures: of the window of steps, or with a timed sync from the end of its first sync to a later one.

    Raises:
        RuntimeError: training ended before two timed syncs had.
    """
    last_step = len(recorder.steps)
    syncs = [sync for sync in recorder.syncs if sync[0] < last_step]  # the others end the training, and wait for all
    if job.method in TIMED:
        syncs = syncs[:-1]  # who is ahead begins the last one early, when it expects the end
        if len(syncs) < 2:
            raise RuntimeError(f"{len(syncs)} syncs of {job.sync_seconds:g} s do not make an interval; train longer.")
        (first, begin, _), (last, end, _) = syncs[0], syncs[-1]
    else:
        first = job.first_step
        last = first + job.measured_steps if job.measured_steps else len(recorder.steps)
        begin, end = recorder.steps[first - 1], recorder.steps[last - 1]
    return {
        "inner_steps": len(recorder.steps),
        "window_steps": last - first,
        "rows": sum(recorder.rows[first:last]),
        "window_seconds": end.seconds - begin.seconds,
        "cpu_seconds": end.cpu_seconds - begin.cpu_seconds,
        "bytes_sent": end.sent - begin.sent,
        "syncs": [figures for step, _, figures in syncs if first < step <= last],
    }


def main() -> None:
    job = Job.from_json(sys.argv[1])
    torch.set_num_threads(1)
    recorder = Recorder(Path(job.report + ".started"))
    trainer = build_trainer(job, recorder)
    check_layout(trainer, job)
    trainer.train()
    if job.method == "hsdp":
        check_averaged(trainer, recorder, job)
    ranks = gather(measure(recorder, job))
    if dist.get_rank() == 0:
        Path(job.report).write_text(json.dumps(combine(ranks, job)), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
