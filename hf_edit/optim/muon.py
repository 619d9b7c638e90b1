"""Muon for the matrices of a model's blocks, AdamW for the rest, whole or sharded by FSDP2.

Both steps are torch's (`torch.optim.Muon`, `torch.optim.AdamW`). Muon orthogonalises whole matrices: those that FSDP2
has sharded are gathered in the replica, each by one of its ranks and in bf16, in which torch's Muon computes anyway, so
that a step costs each rank 1/S of the arithmetic, and less traffic than one more gather of the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from hf_edit.model_ends import GETTERS, ask
from hf_edit.peers.matrices import Round


def matrices(model: nn.Module) -> set[str]:
    """Names of the parameters that Muon is for: matrices, but for embeddings and the output head."""
    ends = {id(module) for module in model.modules() if isinstance(module, nn.Embedding)}
    ends |= {id(ask(model, getter)) for getter in GETTERS}
    left_out = {id(param) for module in model.modules() if id(module) in ends for param in module.parameters()}
    return {name for name, param in model.named_parameters() if param.ndim == 2 and id(param) not in left_out}


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Three groups for `MuonAdamW`: Muon's matrices, AdamW's with weight decay, AdamW's without (biases and norms).

    Raises:
        ValueError: there is no matrix to train.
    """
    chosen = matrices(model)
    trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in trained if name in chosen], "muon": True, "weight_decay": weight_decay},
        {"params": [p for name, p in trained if name not in chosen and p.ndim > 1], "muon": False,
         "weight_decay": weight_decay},
        {"params": [p for name, p in trained if name not in chosen and p.ndim <= 1], "muon": False,
         "weight_decay": 0.0},
    ]  # fmt: skip
    if not groups[0]["params"]:
        raise ValueError(
            f"Muon steps matrices, and {type(model).__name__} has none to train but embeddings and the output head. "
            "Take another optimizer, such as optim='adamw_torch'."
        )
    return [group for group in groups if group["params"]]


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the groups with `muon=True`, AdamW for the others.

    Args:
        groups: as `param_groups` makes them.
        lr: learning rate of both, [per step].
        muon_lr: Muon's own; None: `lr`.
        momentum, ns_steps: of Muon, as of `torch.optim.Muon`, with Nesterov's momentum.
        adjust_lr_fn: "match_rms_adamw" scales Muon's update by 0.2 sqrt(max(rows, columns)), so that AdamW's learning
            rate serves both (arXiv 2502.16982); "original" by sqrt(max(1, rows / columns)), for rates of about 0.02.
        betas, eps: of AdamW.

    Raises:
        ValueError: a group for Muon holds something else than matrices, or they are sharded in a way that FSDP2 does
            not shard them in.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float = 1e-3,
        muon_lr: float | None = None,
        *,
        momentum: float = 0.95,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        for group in groups:
            group.setdefault("lr", lr if not group["muon"] or muon_lr is None else muon_lr)
            if group["muon"]:
                group.update(momentum=momentum, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn)
            else:
                group.update(betas=tuple(betas), eps=eps)
        super().__init__(groups, {})
        for kind, muon in ((torch.optim.Muon, True), (torch.optim.AdamW, False)):
            if any(group["muon"] is muon for group in self.param_groups):
                self._torchs(kind, muon)  # it checks what it is given, and fills in the rest of its settings

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        whole, sharded = [], []
        for group in self.param_groups:
            if group["muon"]:
                stepped = [param for param in group["params"] if param.grad is not None]
                sharded += [_Sharded(param, group, self.state[param]) for param in stepped if _is_sharded(param)]
                if rest := [param for param in stepped if not _is_sharded(param)]:
                    whole.append({**group, "params": rest})
        if whole:
            self._torchs(torch.optim.Muon, True, whole).step()
        _step_sharded(sharded)
        if any(not group["muon"] for group in self.param_groups):
            self._torchs(torch.optim.AdamW, False).step()
        return loss

    def _torchs(self, kind: Any, muon: bool, groups: list[dict[str, Any]] | None = None) -> Any:
        """Torch's optimizer for groups of ours, which it fills in, with its state in ours."""
        made = kind(groups or [group for group in self.param_groups if group["muon"] is muon])
        made.state = self.state
        return made


def _is_sharded(param: Tensor) -> bool:
    return isinstance(param, DTensor) and any(
        placement.is_shard() and param.device_mesh.size(axis) > 1 for axis, placement in enumerate(param.placements)
    )


class _Sharded:
    """A matrix of which this rank has some rows, and Muon's step of it but for the orthogonalisation."""

    def __init__(self, param: DTensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        self.shape = param.shape
        axes = [axis for axis, placement in enumerate(param.placements) if placement.is_shard()]
        if len(axes) != 1 or param.placements[axes[0]] != Shard(0):
            raise ValueError(
                f"Muon: a matrix of {tuple(param.shape)} has the placements {param.placements}; rows over one axis of "
                "the mesh are needed, as FSDP2 shards by default. Take another optimizer for it."
            )
        self.ranks = param.device_mesh.get_group(axes[0])
        assert isinstance(param.grad, DTensor)
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param.grad)
        self._param, self._grad = param.to_local(), param.grad.to_local()
        self._momentum, self._group = state["momentum_buffer"].to_local(), group

    def update(self) -> Tensor:
        """This rank's rows of what is to be orthogonalised, bf16."""
        beta = self._group["momentum"]
        self._momentum.lerp_(self._grad, 1 - beta)
        return self._grad.lerp(self._momentum, beta).bfloat16()

    def orthogonal(self, update: Tensor) -> Tensor:
        """Of the whole update [rows, columns], bf16: torch's, from one step of its optimizer on zeros."""
        matrix = torch.zeros(update.shape, device=update.device)
        matrix.grad = update.float()
        torch.optim.Muon(
            [matrix], lr=1 / _ratio(self.shape, "original"), weight_decay=0.0, momentum=0.0, nesterov=False,
            ns_coefficients=self._group["ns_coefficients"], eps=self._group["eps"], ns_steps=self._group["ns_steps"],
        ).step()  # fmt: skip
        return matrix.neg_().bfloat16()

    def write(self, orthogonal: Tensor) -> None:
        """Takes this rank's rows of it."""
        lr = self._group["lr"]
        self._param.mul_(1 - lr * self._group["weight_decay"])
        self._param.add_(orthogonal, alpha=-lr * _ratio(self.shape, self._group["adjust_lr_fn"]))


def _ratio(shape: torch.Size, adjust_lr_fn: str) -> float:
    rows, columns = shape
    return (
        0.2 * math.sqrt(max(rows, columns)) if adjust_lr_fn == "match_rms_adamw" else math.sqrt(max(1, rows / columns))
    )


def _step_sharded(found: list[_Sharded]) -> None:
    """In rounds, the largest matrices first, so that those of a round take about equally long: while one round is
    orthogonalised, the next one is gathered, and what was made of the last one goes back."""
    for ranks in dict.fromkeys(matrix.ranks for matrix in found):
        size, rank = dist.get_world_size(ranks), dist.get_rank(ranks)
        ordered = sorted((m for m in found if m.ranks is ranks), key=lambda matrix: -matrix.shape.numel())
        rounds = [ordered[first : first + size] for first in range(0, len(ordered), size)]
        under_way: dict[int, Round] = {}
        for number in range(len(rounds) + 2):
            if number < len(rounds):
                chosen = rounds[number]
                under_way[number] = Round([m.update() for m in chosen], [m.shape for m in chosen], ranks)
            if 0 <= number - 1 < len(rounds):
                whole = under_way[number - 1].whole()
                under_way[number - 1].give_back(None if whole is None else rounds[number - 1][rank].orthogonal(whole))
            if number >= 2:
                for matrix, part in zip(rounds[number - 2], under_way.pop(number - 2).parts(), strict=True):
                    matrix.write(part)


class MuonFactory:
    """What the Trainer calls with the model; see `muon`."""

    def __call__(self, model: nn.Module, weight_decay: float = 0.0, **settings: Any) -> MuonAdamW:
        return MuonAdamW(param_groups(model, weight_decay), **settings)


def muon(args: Any, **settings: Any) -> tuple[type[MuonFactory], dict[str, Any]]:
    """Muon as `optimizer_cls_and_kwargs` of `EDiTTrainer`, of any Trainer with `EDiTMixin`, or of the plain one:

        EDiTTrainer(model=model, args=args, optimizer_cls_and_kwargs=muon(args), ...)

    Args:
        args: `TrainingArguments`: learning rate, weight decay, and Adam's betas and epsilon come from there.
        settings: what of `MuonAdamW` shall differ.
    """
    return MuonFactory, {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        **settings,
    }
