"""Batches without a label, for features.py: prompts that fill the length, of which nothing can be learnt.

Compared with a simulation in one process, which leaves them out.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_pt_utils import LabelSmoother

from hf_edit import EDiTConfig, EDiTTrainer
from tests.launch.scripts.features import ONE_BIG_BATCH, losses, nats
from tests.launch.scripts.scenarios import distance, make_args, make_model, make_rows, parameters

WORLD, STEPS, TAU, SMOOTHING = 4, 6, 3, 0.1


def mean_of_own(outputs: Any, labels: Tensor) -> Tensor:
    """0/0 without labels, and NaN in the gradient."""
    kept = labels[:, 1:] != -100
    found = torch.log_softmax(outputs.logits[:, :-1].float(), -1)
    found = -found.gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (found * kept).sum() / kept.sum()


class MeanOfOwn(EDiTTrainer):
    """A user's own loss, which does not ask how many labels the other batches have."""

    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not hasattr(Trainer, "loss_is_scaled_for_ga"):  # as it was said in transformers 5.17
            self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        return mean_of_own(model(**inputs), labels)


KINDS: dict[str, dict[str, Any]] = {
    "the model's loss": {},
    "compute_loss_func": {"compute_loss_func": nats},
    "label smoothing": {"label_smoothing_factor": SMOOTHING},
    "a mean of its own": {"kind": MeanOfOwn},
}
SHARDED = os.environ.get("ACCELERATE_USE_FSDP") == "true"
if SHARDED:  # transformers 5.24 knows a causal model by its class's name, which FSDP2 changes: it shifts no labels then
    del KINDS["label smoothing"]


def rows(accumulation: int) -> list[dict[str, Tensor]]:
    """One row for each batch. All of replica 0 is without labels in the steps 1 and 4, its first rank in step 2, the
    last rank's last batch in all."""
    made = make_rows(STEPS * accumulation * WORLD)
    replica_size = 2 if SHARDED else 1
    for number, row in enumerate(made):
        batch, rank = divmod(number, WORLD)
        step, micro = divmod(batch, accumulation)
        whole = step in (1, 4) and rank < replica_size
        if whole or (step == 2 and rank == 0) or (rank == WORLD - 1 and micro == accumulation - 1 > 0):
            row["labels"][1:] = -100  # and nothing predicts the first token
    return made


def groups(net: nn.Module) -> list[dict[str, Any]]:
    """As the Trainer decays weights, but no norms."""
    return [
        {"params": [p for p in net.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in net.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]


def simulate(
    kind: str, data: list[Any], layout: Any, accumulation: int, average: bool, warmup: int
) -> tuple[dict[str, Tensor], list[float], list[float]]:
    """Parameters at the end, the losses of replica 0, the mean over the replicas of their mean loss at each sync."""
    nets = [make_model() for _ in range(layout.num_replicas)]
    inner = [torch.optim.AdamW(groups(net), lr=1e-2) for net in nets]
    logged: list[float] = []
    means: list[float] = []
    since: list[list[float]] = [[] for _ in nets]

    def loss_of(net: nn.Module, step: int, ranks: list[int]) -> tuple[Tensor, int]:
        """As the Trainer scales it, and the number of labels."""
        batches = {
            rank: [data[(step * accumulation + micro) * WORLD + rank] for micro in range(accumulation)]
            for rank in ranks
        }
        counts = {rank: sum(int((row["labels"][1:] != -100).sum()) for row in batches[rank]) for rank in ranks}
        total, found = sum(counts.values()), []
        for rank, row in [(member, row) for member in ranks for row in batches[member]]:
            if not (row["labels"][1:] != -100).any():
                continue
            outputs, labels = net(input_ids=row["input_ids"][None]), row["labels"][None]
            if kind == "a mean of its own":
                found.append(mean_of_own(outputs, labels) / accumulation / len(ranks))
                continue
            items = torch.tensor(total if average else counts[rank] * len(ranks))
            smooth = LabelSmoother(SMOOTHING if kind == "label smoothing" else 0.0)
            found.append(smooth(outputs, labels, shift_labels=True, num_items_in_batch=items))
        return (sum(found[1:], start=found[0]) if found else torch.zeros(())), total

    for step in range(STEPS):
        everyone = list(range(WORLD))
        for i, net in enumerate(nets):
            loss, labels = loss_of(net, step, everyone if step < warmup else layout.replica_ranks(i))
            if labels:
                loss.backward()
                inner[i].step()
                inner[i].zero_grad()
                since[i] += [] if step < warmup else [float(loss)]
                logged += [float(loss)] if i == 0 else []
        if step == warmup - 1 or (step - warmup) % TAU == TAU - 1 or step == STEPS - 1:
            with torch.no_grad():
                for together in zip(*(net.parameters() for net in nets), strict=True):
                    mean = torch.stack(list(together)).mean(0)
                    for param in together:
                        param.copy_(mean)
            if step >= warmup:
                means.append(sum(sum(own) / max(1, len(own)) for own in since) / len(since))
                since = [[] for _ in nets]
    return {name: param.detach() for name, param in nets[0].named_parameters()}, logged, means


def batches_without_labels_teach_nothing() -> dict[str, Any]:
    found = {}
    for kind, (accumulation, average, warmup) in itertools.product(KINDS, ((1, True, 0), (2, False, 0), (2, True, 2))):
        settings = dict(KINDS[kind])
        made = settings.pop("kind", EDiTTrainer), {key: settings.pop(key) for key in ("compute_loss_func",)
                                                   if key in settings}  # fmt: skip
        args = make_args(
            max_steps=STEPS, per_device_train_batch_size=1, gradient_accumulation_steps=accumulation, weight_decay=0.1,
            average_tokens_across_devices=average, optim="adamw_torch", **settings,
        )  # fmt: skip
        data, config = rows(accumulation), EDiTConfig(**{**ONE_BIG_BATCH, "sync_interval": TAU}, warmup_steps=warmup)
        trainer = made[0](model=make_model(), args=args, train_dataset=data, edit_config=config, **made[1])
        trainer.train()
        assert trainer.edit_stats.rollbacks == trainer.edit_stats.anomalous_replicas == 0
        mine, name = parameters(trainer), f"{kind}, {accumulation} batches, {average}"
        if dist.get_rank() == 0:
            theirs, logged, means = simulate(kind, data, trainer.edit_layout, accumulation, average, warmup)
            assert distance(mine, theirs) < 1e-4, (name, distance(mine, theirs))
            assert losses(trainer, "loss") == pytest.approx(logged, rel=1e-4), name
            assert losses(trainer, "edit/replica_loss_mean") == pytest.approx(means, rel=1e-4), name
            assert all(norm == norm for norm in losses(trainer, "grad_norm")), f"{name}: NaN norms"
            found[name] = distance(mine, theirs)
    return found
