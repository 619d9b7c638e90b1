"""Run by every rank of a torchrun: FSDP2 through TrainingArguments, as 2 x 2 and, with nothing left to shard, 4 x 1;
also what is refused with replicas of several ranks."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

import pytest
from accelerate import ParallelismConfig

from tests.launch.scripts.scenarios import (
    EDiTConfig,
    EDiTTrainer,
    FSDPModule,
    compare,
    dist,
    make_args,
    make_model,
    make_rows,
    train,
)

FSDP = dict(fsdp=True, fsdp_config={"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"})


def make(edit_config: Any = {"num_replicas": 2}, **settings: Any) -> EDiTTrainer:  # noqa: B006
    args = make_args(**settings)
    return EDiTTrainer(model=make_model(), args=args, eval_dataset=make_rows(4), edit_config=edit_config)


def refused(kind: type[Exception], body: Any, text: str) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        body()


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    for replicas in (2, 4):
        config = EDiTConfig(num_replicas=replicas, sync_interval=4, warmup_steps=2)
        trainer = train(config, **FSDP)
        assert (trainer.edit_layout.num_replicas, trainer.edit_layout.replica_size) == (replicas, 4 // replicas)
        compare(trainer, steps=9, tau=4, warmup=2)
    refused(ValueError, make, "replicas of 2 ranks, which need FSDP2, but FSDP is off. Set fsdp=True")
    offload = {**FSDP["fsdp_config"], "cpu_offload": True}
    text = "FSDP's cpu_offload keeps the parameters in host memory"
    refused(ValueError, lambda: make(fsdp=True, fsdp_config=offload), text)
    odd = ParallelismConfig(dp_replicate_size=2, dp_shard_size=4)
    text = "dp_replicate_size=2 times dp_shard_size=4 is not the 4 processes"
    refused(ValueError, lambda: make(edit_config={}, parallelism_config=odd, **FSDP), text)
    untrained = make(eval_on_start=True, max_steps=1, **FSDP)
    before = untrained.evaluate()["eval_loss"]  # whole; FSDP2 shards when training starts
    assert not isinstance(untrained.model, FSDPModule)
    untrained.train_dataset = make_rows()
    untrained.train()
    assert isinstance(untrained.model, FSDPModule)
    started = next(entry["eval_loss"] for entry in untrained.state.log_history if "eval_loss" in entry)
    assert abs(before - started) < 1e-5, (before, started)
    dist.barrier()
    print("passed: 2x2 and 4x1", flush=True)
