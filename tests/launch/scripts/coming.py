"""One replica of a launch of its own; started by tests/launch/test_elastic.py for each.

    coming.py KIND FOLDER MAX_STEPS PAUSE     (torchrun or python; EDIT_REPLICA and TORCHFT_LIGHTHOUSE are set)

Writes what it reads and where it ends to FOLDER/NUMBER.PID.jsonl.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback, default_data_collator

from hf_edit import EDiT, EDiTConfig, EDiTTrainer
from hf_edit.sync.units import named_tensors
from tests.dist.nets import full
from tests.launch.scripts.scenarios import BATCH, make_args, make_model, make_rows

REPLICAS = 2
CONFIG = dict(elastic=True, num_replicas=REPLICAS, heartbeat_seconds=2.0, sync_interval=4, overlap="delayed",
              delay_steps=2)  # fmt: skip


class Notes:
    def __init__(self, folder: Path) -> None:
        self.file = (folder / f"{os.environ['EDIT_REPLICA']}.{os.getpid()}.jsonl").open("a")

    def __call__(self, what: str, **values: Any) -> None:
        first = os.environ.get("RANK", "0") == "0"
        self.file.write(json.dumps({"what": what, "first": first, "at": time.time(), **values}) + "\n")
        self.file.flush()


def numbered_rows() -> list[dict[str, Any]]:
    """Rows that say which they are."""
    return [{**row, "number": torch.tensor(number)} for number, row in enumerate(make_rows(4096))]


def sums(model: Any) -> list[float]:
    return [float(full(param).double().sum()) for param in named_tensors(model)[0].values()]


class Pause(TrainerCallback):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        random.seed(os.environ["EDIT_REPLICA"])  # each has a random state of its own

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(self.seconds)


def with_trainer(
    folder: Path, max_steps: int, pause: float, note: Notes, config: dict[str, Any] = CONFIG, **more: Any
) -> None:
    class Reading(EDiTTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            rows, noise = inputs.pop("number").tolist(), random.random()
            note("reads", step=self._steps.own, rows=rows, noise=noise)
            return super().training_step(model, inputs, num_items_in_batch)

    args = make_args(
        output_dir=str(folder / "out"), max_steps=max_steps, save_strategy="steps", save_steps=40, logging_steps=4,
        remove_unused_columns=False, train_sampling_strategy="random", num_train_epochs=50, **more,
    )  # fmt: skip
    trainer = Reading(
        model=make_model(), args=args, train_dataset=numbered_rows(), edit_config=config, callbacks=[Pause(pause)]
    )
    trainer.train()
    trainer.save_model()
    note("ended", step=trainer.state.global_step, own=trainer._steps.own, params=sums(trainer.model))


def with_loop(folder: Path, max_steps: int, pause: float, note: Notes) -> None:
    config = EDiTConfig(**CONFIG)
    accelerator = EDiT.accelerator(config)
    model = make_model()
    loader = DataLoader(numbered_rows(), batch_size=BATCH, collate_fn=default_data_collator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    with EDiT(accelerator, model, optimizer, config) as edit:
        first = edit.own_steps
        for step, batch in enumerate(loader):
            if step < first:
                continue
            if edit.progress >= max_steps:
                break
            time.sleep(pause)
            note("reads", step=step, rows=batch.pop("number").tolist())
            loss = model(**batch)["loss"]
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            edit.step(loss)
    edit.save(folder / "state")
    note("ended", step=round(edit.progress), own=edit.own_steps, params=sums(model))


def main() -> None:
    kind, folder, max_steps, pause = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    torch.set_num_threads(1)
    note = Notes(folder)
    if kind == "together":  # all or none, so that what they learn does not depend on when one is there
        config = {**CONFIG, "overlap": "none", "min_replicas": REPLICAS, "compression": "int8"}
        with_trainer(folder, max_steps, pause, note, config, lr_scheduler_type="cosine")
    elif kind == "loop":
        with_loop(folder, max_steps, pause, note)
    elif kind == "sharded":
        with_trainer(folder, max_steps, pause, note, fsdp=True, fsdp_config={"version": 2})
    else:
        with_trainer(folder, max_steps, pause, note)


if __name__ == "__main__":
    main()
