"""Run by every rank of a launch: continues runs with other numbers of replicas and shards.

Arguments: the folder, then runs as NAME:REPLICAS:SOURCE (SOURCE empty to begin anew), in order. Every run must begin
with the parameters, anchor, momentum and inner state that its source ended with, replica i with replica i mod R's.
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ["ACCELERATE_USE_CPU"] = "true"

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from hf_edit import EDiTConfig, EDiTTrainer
from hf_edit.checkpoint.outer import outer_tensors
from hf_edit.sync.units import named_tensors
from tests.launch.scripts.checkpoints import make_model
from tests.launch.scripts.scenarios import FOLDER, LENGTH, VOCABULARY, make_args

FSDP = dict(fsdp=True, fsdp_config={"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"})


def make_rows(num_rows: int, seed: int) -> list[dict[str, Tensor]]:
    """Sequences that count up, so that there is something to learn."""
    starts = torch.randint(0, VOCABULARY, (num_rows, 1), generator=torch.Generator().manual_seed(seed))
    rows = (starts + torch.arange(LENGTH)) % VOCABULARY
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in tensors.items()}


def state_of(trainer: Any) -> dict[str, Tensor]:
    named, _ = named_tensors(trainer.model_wrapped)
    found = {f"param/{name}": param for name, param in named.items()}
    for name, param in named.items():
        found |= {f"inner/{name}/{key}": value for key, value in trainer.optimizer.state[param].items()}
    if trainer._engine is not None:
        found |= outer_tensors(trainer._engine.sync, trainer._training().ranks)
    return whole(found)


class Compare(TrainerCallback):
    """Keeps what a run ends with, and checks what its continuation begins with."""

    def __init__(self, name: str, source: str) -> None:
        self.name, self.source, self.trainer = name, source, None
        self.compared: set[str] = set()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.source or self.compared:
            return
        mine, layout = state_of(self.trainer), self.trainer.edit_layout
        saved_replicas = len(list((FOLDER / self.source).glob("state-*.pt")))
        theirs = torch.load(FOLDER / self.source / f"state-{layout.replica % saved_replicas}.pt")
        for name in set(mine) & set(theirs):
            if not name.startswith("detector/"):
                assert torch.equal(mine[name], theirs[name]), f"{self.name} from {self.source}: {name}"
                self.compared.add(name.split("/")[0])
        assert state.global_step == theirs["step"], (state.global_step, theirs["step"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        layout = self.trainer.edit_layout
        tensors = {**state_of(self.trainer), "step": state.global_step}
        if layout.shard == 0:
            torch.save(tensors, FOLDER / self.name / f"state-{layout.replica}.pt")
        dist.barrier()


def run(name: str, replicas: int, source: str) -> Any:
    compare = Compare(name, source)
    steps = 8 if not source else torch.load(FOLDER / source / "state-0.pt")["step"] + 8
    # One epoch, as the rows are many; the final save falls on the end.
    args = make_args(
        output_dir=str(FOLDER / name), max_steps=steps, save_strategy="steps", save_steps=8, learning_rate=3e-3,
        eval_on_start=True, eval_strategy="steps", eval_steps=8, **FSDP,
    )  # fmt: skip
    trainer = EDiTTrainer(
        model=make_model(), args=args, train_dataset=make_rows(512, seed=1), eval_dataset=make_rows(64, seed=2),
        edit_config=EDiTConfig(num_replicas=replicas, sync_interval=4), callbacks=[compare],
    )  # fmt: skip
    compare.trainer = trainer
    trainer.train(None if not source else str(FOLDER / source / f"checkpoint-{steps - 8}"))
    assert trainer.accelerator.num_processes == int(os.environ["WORLD_SIZE"]) == dist.get_world_size()
    assert trainer.edit_layout.num_replicas == replicas
    losses = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert losses[-1] < losses[-2], losses
    if source:
        both = replicas > 1 and len(list((FOLDER / source).glob("state-*.pt"))) > 1
        expected = {"param", "inner", *(("anchor", "outer", "syncs", "rates") if both else ())}
        assert compare.compared == expected, compare.compared
    if dist.get_rank() == 0:
        print(f"passed: {name} {trainer.edit_layout} from {source or 'nothing'}: {sorted(compare.compared)} {losses}")
    return trainer


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    for item in sys.argv[2:]:
        name, replicas, source = item.split(":")
        run(name, int(replicas), source)
        dist.barrier()
