"""Run by every rank of a torchrun: FSDP2 through TrainingArguments, as 2 x 2 and, with nothing left to shard, 4 x 1."""

from __future__ import annotations

import os

from tests.launch.scenarios import EDiTConfig, compare, dist, train

FSDP = dict(fsdp=True, fsdp_config={"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"})

if __name__ == "__main__":
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    for replicas in (2, 4):
        config = EDiTConfig(num_replicas=replicas, sync_interval=4, warmup_steps=2)
        trainer = train(config, **FSDP)
        assert (trainer.edit_layout.num_replicas, trainer.edit_layout.replica_size) == (replicas, 4 // replicas)
        compare(trainer, steps=9, tau=4, warmup=2)
    dist.barrier()
    print("passed: 2x2 and 4x1", flush=True)
