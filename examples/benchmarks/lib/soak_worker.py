"""One rank of a replica of soak.py, which may be killed, stopped or cut off at any moment. Argument: a Job as JSON.

Appends what it does to FOLDER/notes-REPLICA-PID.jsonl, with the time of each.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["ACCELERATE_USE_CPU"] = "true"

import torch
from lib.convergence_worker import NUM_BYTES, Blocks, read_bytes
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from hf_edit import EDiTConfig, EDiTTrainer


@dataclass(frozen=True)
class Job:
    """What every rank gets; `step_seconds` is what a step takes at least, so that hosts on one machine keep pace."""

    folder: str
    seed: int
    replicas: int
    ranks: int
    steps: int
    tau: int
    delay_steps: int
    step_seconds: float
    heartbeat_seconds: float
    batch: int
    block: int
    hidden_size: int
    layers: int
    learning_rate: float
    train_file: str | None
    validation_file: str | None

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Notes(TrainerCallback):
    """Keeps the pace, and what happens when."""

    def __init__(self, job: Job) -> None:
        path = Path(job.folder) / f"notes-{os.environ['EDIT_REPLICA']}-{os.getpid()}.jsonl"
        self.seconds, self.began_at, self.steps = job.step_seconds, time.monotonic(), 0
        self.file = path.open("a") if os.environ.get("RANK", "0") == "0" else None
        self.note("begins")

    def note(self, what: str, **values: Any) -> None:
        if self.file is not None:
            self.file.write(json.dumps({"what": what, "at": time.time(), **values}) + "\n")
            self.file.flush()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.steps:
            self.note("joined", step=state.global_step)
        time.sleep(max(0.0, self.began_at + self.seconds - time.monotonic()))
        self.began_at = time.monotonic()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1
        self.note("step")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "edit/sync_seconds" in logs:
            self.note("sync", waited=logs["edit/wait_seconds"])


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    torch.manual_seed(job.seed)
    notes = Notes(job)
    validation = Blocks(read_bytes(job.validation_file, True), job.block)
    args = TrainingArguments(
        output_dir=str(Path(job.folder) / "out"), max_steps=job.steps, per_device_train_batch_size=job.batch,
        learning_rate=job.learning_rate, lr_scheduler_type="cosine", warmup_steps=20, weight_decay=0.1, seed=job.seed,
        logging_steps=50, save_strategy="steps", save_steps=200, save_total_limit=2, report_to="none",
        disable_tqdm=True, per_device_eval_batch_size=32, dataloader_pin_memory=False, num_train_epochs=100,
        fsdp=job.ranks > 1, fsdp_config={"version": 2} if job.ranks > 1 else None,
    )  # fmt: skip
    trainer = EDiTTrainer(
        model=LlamaForCausalLM(
            LlamaConfig(
                vocab_size=NUM_BYTES, hidden_size=job.hidden_size, intermediate_size=job.hidden_size * 8 // 3,
                num_hidden_layers=job.layers, num_attention_heads=4, max_position_embeddings=job.block,
            )
        ),
        args=args,
        train_dataset=Blocks(read_bytes(job.train_file, False), job.block),
        eval_dataset=validation.spread(256),
        callbacks=[notes],
        edit_config=EDiTConfig(
            elastic=True, num_replicas=job.replicas, heartbeat_seconds=job.heartbeat_seconds, overlap="delayed",
            delay_steps=job.delay_steps, sync_interval=job.tau,
        ),
    )  # fmt: skip
    trainer.train()
    told = sum(note["replicas"]["inner_steps"][trainer.edit_layout.replica] for note in _syncs(trainer))
    digest = hashlib.sha256()
    for param in trainer.model.parameters():
        whole = param.full_tensor() if isinstance(param, DTensor) else param
        digest.update(whole.detach().numpy().tobytes())
    loss = trainer.evaluate()["eval_loss"]
    notes.note("ended", told=told, taken=notes.steps, params=digest.hexdigest(), loss=loss)


def _syncs(trainer: EDiTTrainer) -> list[dict[str, Any]]:
    """Of this launch, in which this replica told of its steps."""
    path = Path(trainer.args.output_dir) / f"replica-{trainer.edit_layout.replica}" / "edit_syncs.jsonl"
    notes = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            notes.append(json.loads(line))
        except ValueError:  # cut off when an earlier launch was killed
            continue
    last = max(number for number, note in enumerate(notes) if note["kind"] == "run")
    return [note for note in notes[last:] if note["kind"] == "sync"]


if __name__ == "__main__":
    main()
