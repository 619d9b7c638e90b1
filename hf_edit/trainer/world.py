"""Which world a training step lives in: the replica.

A trainer's step (the Trainer's, TRL's, a user's `compute_loss`) is written for a world whose processes all take part in
every step: it gathers from them, counts them, divides by their number and knows its place among them. Between two syncs
these are the ranks of one replica. So inside a step everything that a trainer asks the world for is the replica's:

- What it asks its accelerator (`num_processes`, `process_index`, `is_main_process`, `gather`, `gather_for_metrics`,
  `reduce`, `pad_across_processes`, `wait_for_everyone`): that accelerator becomes a `ReplicaAccelerator`, once. No
  other accelerator and no shared state of Accelerate changes.
- A model's `generate` asks all ranks after every token whether any has more to generate, since ranks that shard it
  take part in each other's forward passes: here the ranks of the replica.
- What it asks the functions of `accelerate.utils`, which know the whole world only and take no group (TRL's GRPO and
  RLOO: `gather`, `gather_object`): while a step runs, the names under which the modules of the trainer's own classes
  have imported these functions stand for the replica's. A scope, not a patch: nothing of torch, transformers and
  accelerate is touched, nothing outlasts the step, and no other trainer can be in a step of this process meanwhile.

Outside is the whole world: the data (every rank reads its own part), evaluation, saving, callbacks, and the warm-up,
whose steps all replicas take together. What calls `torch.distributed` without a group reaches the whole world from
everywhere; a step must not.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Iterator, Mapping
from types import ModuleType
from typing import Any

import accelerate.utils
import torch
from accelerate import Accelerator
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from transformers.generation.utils import GenerationMixin

from hf_edit.peers.group import Peers
from hf_edit.peers.layout import Layout
from hf_edit.trainer.accelerate_hook import PlacedAccelerator

# Functions of accelerate.utils that reach the whole world.
COLLECTIVES = (
    "gather", "gather_object", "broadcast", "broadcast_object_list", "reduce", "pad_across_processes",
    "wait_for_everyone",
)  # fmt: skip
LEFT_ALONE = ("transformers", "accelerate", "torch", "hf_edit", "builtins")  # packages whose names stay as they are


class ReplicaWorld:
    """One replica as the whole world of an accelerator; what is in `COLLECTIVES` as `accelerate.utils` has it."""

    def __init__(self, peers: Peers) -> None:
        self._inside = peers.inside
        self.num_processes = peers.layout.replica_size
        self.process_index = peers.layout.shard
        self.is_main_process = self.process_index == 0

    def gather(self, tensor: Any) -> Any:
        return recursively_apply(self._inside.gather, tensor, error_on_other_type=True)

    def gather_object(self, object: Any) -> list[Any]:
        return [item for items in self._inside.gather_object(object) for item in items]

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        # All of it: Accelerate cuts off what fills up the world's last batch, which is for evaluation.
        objects = use_gather_object or next(_tensors(input_data), None) is None
        return self.gather_object(input_data) if objects else self.gather(input_data)

    def broadcast(self, tensor: Any, from_process: int = 0) -> Any:
        def take(part: Tensor) -> Tensor:
            return part.copy_(self._inside.gather(part[None])[from_process])

        return recursively_apply(take, tensor, error_on_other_type=True)

    def broadcast_object_list(self, object_list: list[Any], from_process: int = 0) -> list[Any]:
        object_list[:] = self._inside.gather_object(object_list)[from_process]
        return object_list

    def reduce(self, tensor: Any, reduction: str = "mean", scale: float = 1.0) -> Any:
        def combine(part: Tensor) -> Tensor:
            parts = self._inside.gather(part[None])
            if reduction == "max":
                return parts.amax(0)
            total = parts.sum(0, dtype=part.dtype)
            return total / self.num_processes if reduction == "mean" else total

        return recursively_apply(combine, tensor, error_on_other_type=True)

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        def pad(part: Tensor) -> Tensor:
            if dim >= part.ndim:  # as Accelerate does
                return part
            sizes = self._inside.gather(torch.tensor(part.shape[dim], device=part.device))
            shape = list(part.shape)
            shape[dim] = int(sizes.max()) - part.shape[dim]
            filler = part.new_full(shape, pad_index)
            return torch.cat([filler, part] if pad_first else [part, filler], dim=dim)

        return recursively_apply(pad, tensor, error_on_other_type=True)

    def wait_for_everyone(self) -> None:
        self._inside.gather_object(None)

    def has_unfinished_sequences(self, this_peer_finished: bool, synced_gpus: bool, device: torch.device) -> bool:
        """As `GenerationMixin._has_unfinished_sequences`."""
        if not synced_gpus:
            return not this_peer_finished
        return float(self._inside.sum(torch.tensor(float(not this_peer_finished), device=device))) > 0


class ReplicaAccelerator(PlacedAccelerator):
    """An `Accelerator` whose world is one replica while it is `in_replica`, else the whole one."""

    _world: ReplicaWorld | None = None
    _outputs: list[Any] | None = None

    @classmethod
    def take_over(cls, accelerator: Accelerator) -> None:
        """Makes one of these of the Trainer's, which takes no other class than Accelerate's."""
        accelerator.__class__ = cls

    @contextlib.contextmanager
    def in_replica(
        self, peers: Peers, modules: Collection[ModuleType] = (), generators: Collection[Any] = ()
    ) -> Iterator[None]:
        """Inside, the world is this rank's replica, also for what `modules` have imported from `accelerate.utils`, and
        for what the models `generators` generate."""
        outside, self._world = self._world, ReplicaWorld(peers)
        imported = _imported_collectives(modules)
        for module, name, function in imported:
            setattr(module, name, getattr(self._world, function.__name__))
        generators = [
            part for part in generators if "_has_unfinished_sequences" not in vars(part)
        ]  # else a scope around
        for part in generators:
            # Private in transformers 5.24, which takes no group. An attribute of this one model, for this one step;
            # tests/unit/trainer/test_world.py fails when it moves.
            part._has_unfinished_sequences = self._world.has_unfinished_sequences
        try:
            yield
        finally:
            self._world = outside
            for part in generators:
                del part._has_unfinished_sequences
            for module, name, function in imported:
                setattr(module, name, function)

    @contextlib.contextmanager
    def without_gradient(self, model: nn.Module) -> Iterator[None]:
        """Inside, `backward` gives what `model` used a gradient of exactly zero, whatever the loss is, also NaN.

        The backward pass runs all the same: other ranks of the replica, which have something to learn, wait for it.
        """
        outputs = self._outputs = []
        hook = model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        try:
            yield
        finally:
            hook.remove()
            self._outputs = None

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        if self._outputs is not None:
            # From the model's outputs: the loss's own backward may be 0/0. A scalar output is a loss, too.
            used = [tensor for tensor in _tensors(self._outputs) if tensor.requires_grad and tensor.ndim > 0]
            loss = torch.stack([tensor.sum() * 0 for tensor in used]).sum() if used else loss * 0
        super().backward(loss, **kwargs)

    @property
    def _shown(self) -> Any:
        return self._world or super()

    @property
    def num_processes(self) -> int:
        return self._shown.num_processes

    @property
    def process_index(self) -> int:
        return self._shown.process_index

    @property
    def is_main_process(self) -> bool:
        return self._shown.is_main_process

    def gather(self, tensor: Any) -> Any:
        return self._shown.gather(tensor)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        return self._shown.gather_for_metrics(input_data, use_gather_object)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        return self._shown.reduce(tensor, reduction, scale)

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        return self._shown.pad_across_processes(tensor, dim, pad_index, pad_first)

    def wait_for_everyone(self) -> None:
        self._shown.wait_for_everyone()


def modules_of(trainer: Any) -> frozenset[ModuleType]:
    """The modules that the code of a trainer's step was written in, but for the libraries'."""
    names = {cls.__module__ for cls in type(trainer).__mro__}
    names.add(getattr(getattr(trainer, "compute_loss_func", None), "__module__", None) or "builtins")
    return frozenset(sys.modules[name] for name in names if name.partition(".")[0] not in LEFT_ALONE)


def generators_of(model: nn.Module) -> list[Any]:
    """`model`, or what it wraps, where that has transformers' `generate`."""
    return [part for part in model.modules() if isinstance(part, GenerationMixin)]


def _imported_collectives(modules: Collection[ModuleType]) -> list[tuple[ModuleType, str, Any]]:
    """Module, name in it, and function."""
    ours = {id(getattr(accelerate.utils, name)) for name in COLLECTIVES}
    return [(module, name, value) for module in modules for name, value in vars(module).items() if id(value) in ours]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def check_generation(args: Any, layout: Layout, warmup_steps: int) -> None:
    """Trainers that generate what they learn from (TRL's GRPO, RLOO): what of it needs the whole world is refused.

    Args:
        args: the trainer's arguments; those of other trainers pass.

    Raises:
        ValueError: what was given, what is needed, what to do.
    """
    if layout.num_replicas == 1:
        return
    if getattr(args, "use_vllm", False):
        raise ValueError(
            "use_vllm=True: TRL's vLLM engines hold one policy for all processes and make them wait for each other in "
            "every step, while the replicas' policies differ. Set use_vllm=False, or num_replicas=1."
        )
    generations = getattr(args, "num_generations", None)
    if generations is None:
        return
    batches = getattr(args, "steps_per_generation", None) or 1
    generated = args.per_device_train_batch_size * batches * layout.replica_size
    if generated % generations:
        raise ValueError(
            f"num_generations={generations} completions of a prompt are compared with each other, but a replica "
            f"generates {generated} at a time (per_device_train_batch_size={args.per_device_train_batch_size} x "
            f"steps_per_generation={batches} x {layout.replica_size} ranks), so they would lie on two replicas. Make "
            f"that a multiple of {generations}."
        )
    uses = batches * (getattr(args, "num_iterations", None) or 1)
    if warmup_steps * args.gradient_accumulation_steps % uses:
        raise ValueError(
            f"warmup_steps={warmup_steps}: the warm-up would end while completions are in use, whose tokens were "
            f"counted over all replicas (each is used in {uses} batches, a step takes "
            f"{args.gradient_accumulation_steps}). End it where new ones are generated."
        )


def num_targets(batch: Any, shifted: bool) -> Tensor | None:
    """Labels in `batch` that a loss counts, as the Trainer counts them, a scalar; None if it has no such labels.

    Args:
        batch: what the data collator made: a dict with "labels" (or "shift_labels") [..., L], -100 where there is none.
        shifted: the first of the "labels" is no target.
    """
    if not isinstance(batch, Mapping):
        return None
    labels = batch.get("shift_labels")
    if labels is None:
        labels = batch.get("labels")
        if shifted and isinstance(labels, Tensor):
            labels = labels[..., 1:]
    return labels.ne(-100).sum() if isinstance(labels, Tensor) else None
