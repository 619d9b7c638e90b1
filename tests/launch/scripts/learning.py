"""Run by every rank of a launch: what makes replicas learn as well as together. Arguments as for scenarios.py."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from transformers import Trainer

from hf_edit import EDiTConfig, EDiTTrainer, MuonAdamW, muon
from hf_edit.optim.muon import param_groups
from tests.launch.scripts.checkpoints import assert_same_end, run
from tests.launch.scripts.features import assert_replicas_equal
from tests.launch.scripts.scenarios import (
    FOLDER,
    compare,
    distance,
    forget_trainings,
    make_args,
    make_model,
    make_rows,
    parameters,
    train,
)

MUON_TOLERANCE = 5e-3


class Muons(EDiTTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, optimizer_cls_and_kwargs=muon(kwargs["args"]), **kwargs)


def muon_resumes_bit_for_bit() -> dict[str, Any]:
    """With every rank's part of the momentum, and another replica's where there are others."""
    whole = run("muon", trainer=Muons)
    assert_replicas_equal(whole)
    kinds = {name.rpartition("/")[2] for name in whole.end.tensors if name.startswith("inner/")}
    assert kinds == {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}
    for step in (2, 5, 8):
        assert_same_end(whole, run(f"muon-{step}", str(FOLDER / "muon" / f"checkpoint-{step}"), trainer=Muons), step)
    return {}


def muon_of_names(params: Any) -> MuonAdamW:
    """For the simulation, on whole matrices."""
    model = make_model()
    model.load_state_dict(dict(zip(dict(model.named_parameters()), params := list(params), strict=True)))
    of = dict(zip(map(id, model.parameters()), params, strict=True))
    groups = [{**group, "params": [of[id(p)] for p in group["params"]]} for group in param_groups(model, 0.0)]
    return MuonAdamW(groups, lr=1e-2)


def simulation_muon() -> dict[str, Any]:
    """Sharded matrices in replicas that drift apart. In bf16, where gradients that differ in the last bit tell."""
    trainer = train(EDiTConfig(sync_interval=3, warmup_steps=2), trainer=Muons)
    assert isinstance(trainer.optimizer.optimizer, MuonAdamW)
    return compare(trainer, tolerance=MUON_TOLERANCE, steps=9, tau=3, warmup=2, make_optimizer=muon_of_names)


def muon_of_one_replica_is_the_plain_trainers() -> dict[str, Any]:
    """On all ranks as one replica."""
    args = make_args(max_steps=6)
    chosen = muon(args, adjust_lr_fn="original", muon_lr=0.02)
    ended = []
    for kind, more in ((Trainer, {}), (EDiTTrainer, {"edit_config": EDiTConfig(num_replicas=1)})):
        forget_trainings()
        trainer = kind(
            model=make_model(), args=make_args(max_steps=6), train_dataset=make_rows(),
            optimizer_cls_and_kwargs=chosen, **more,
        )  # fmt: skip
        trainer.train()
        assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.02, 1e-2, 1e-2]
        ended.append(parameters(trainer))
    if dist.get_rank() == 0:
        different = distance(*ended)
        assert different == 0.0, different
    return {}
