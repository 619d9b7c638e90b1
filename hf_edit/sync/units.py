"""What is synchronised together. The only file that knows FSDP2 and DDP.

A unit is what one FSDP2 group all-gathers: the input embeddings, each transformer block, the final norm with the
head, and what is left. Replicas of one rank (DDP) are cut the same way, so that both kinds train alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.nn.parallel import DistributedDataParallel

from hf_edit.model_ends import GETTERS, ask


@dataclass
class Unit:
    """Parameters that are synchronised together.

    `modules` are those whose forward pass first uses the parameters; `names` are the parameters' names in the
    unwrapped model; only parameters that require gradients are in a unit.
    """

    name: str
    modules: list[nn.Module]
    names: list[str] = field(default_factory=list)
    params: list[nn.Parameter] = field(default_factory=list)

    @torch.no_grad()
    def parts(self) -> list[Tensor]:
        """This rank's part of each parameter, sharing the parameter's memory."""
        return [local_part(param) for param in self.params]

    def drop_gathered(self) -> None:
        """Drops gathered copies, which a forward pass without backward may have left, and those that a prefetch has on
        their way; the next use gathers anew."""
        for module in self.modules:
            reshard(module, recurse=False)

    def start_gathering(self) -> None:
        """Starts the all-gather on the current stream, so that it is ordered after what was just written to the
        parameters; FSDP2's own streams wait for the current one only at the root."""
        seen = set()
        for module in self.modules:
            if isinstance(module, FSDPModule) and (state := id(_fsdp_state(module))) not in seen:
                seen.add(state)
                module.unshard(async_op=True)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, or the tensor itself; shares its memory. Call it without gradients."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like_param(param: Tensor, part: Tensor) -> Tensor:
    """`part`, this rank's part of something of `param`'s shape, as that whole; shares its memory, on its device."""
    if not isinstance(param, DTensor):
        return part
    # Private in torch 2.13: DTensor.from_local would copy a part in host memory to the mesh's device, and what is then
    # read into the copy is lost. FSDP2 makes its own the same way. tests/dist/test_groups.py fails when it moves.
    spec = DTensorSpec(param.device_mesh, param.placements, TensorMeta(param.shape, param.stride(), part.dtype))
    return DTensor(part, spec, requires_grad=False)


def named_tensors(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """The parameters and the persistent buffers of the unwrapped model by their names there."""
    model = unwrap(model)
    reshard(model)
    params = {clean_name(name): param for name, param in model.named_parameters()}
    saved = model.state_dict().keys() if any(True for _ in model.buffers()) else ()
    buffers = {clean_name(name): buffer for name, buffer in model.named_buffers() if name in saved}
    return params, buffers


def is_prepared(model: nn.Module) -> bool:
    """True if FSDP2 or DDP is at work in the model."""
    return any(isinstance(module, FSDPModule | DistributedDataParallel) for module in model.modules())


def is_compiled(model: nn.Module) -> bool:
    """True if torch.compile traces the model or a part of it: hooks that come and go would be traced anew each time."""
    # _compiled_call_impl is private in torch 2.13; nn.Module.compile() leaves no other trace. Every test fails
    # when it moves.
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP and torch.compile."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def find_units(model: nn.Module) -> list[Unit]:
    """The units of a model that Accelerate has prepared, in the order of its modules.

    Raises:
        ValueError: no parameter requires gradients, or FSDP2 leaves out one that does.
    """
    model = unwrap(model)
    reshard(model)
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    owners = _fsdp_groups(model) if sharded else _wrapping_groups(model)
    units: dict[int, Unit] = {}
    for name, module in model.named_modules():
        if module in owners:
            unit = units.setdefault(owners[module], Unit(clean_name(name) or "root", []))
            if unit.modules:
                unit.name += f"+{clean_name(name)}"
            unit.modules.append(module)
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        if sharded and not isinstance(param, DTensor):
            raise ValueError(
                f"The trainable parameter {name} is not sharded by FSDP2, so its gradient would stay on each rank. "
                "Take its module out of FSDP's ignored_modules, or freeze it."
            )
        unit = units[owners[_owner(model, name, owners)]]
        unit.names.append(clean_name(name))
        unit.params.append(param)
    found = [unit for unit in units.values() if unit.params]
    if not found:
        raise ValueError("No parameter of the model requires gradients: there is nothing to train or to synchronise.")
    return found


def start_averaging_gradients(model: nn.Module, average: Callable[[Tensor], None]) -> None:
    """Every gradient is averaged over the replicas in the backward pass (warm-up).

    `average` takes a gradient that is already averaged over the replica and averages it over the replicas, in place.
    """
    _route_gradients(model, average, ddp_averages=True)


def keep_gradients_local(model: nn.Module) -> None:
    """Gradients stay in the replica (inner steps).

    FSDP2 shards over the replica alone and needs no hook. DDP is left in the state of its `no_sync()`: a communication
    hook would still exchange the map of unused parameters in every backward pass.
    """
    _route_gradients(model, None, ddp_averages=False)


def release(model: nn.Module) -> None:
    """Gradients are treated as before training: DDP averages them again."""
    _route_gradients(model, None, ddp_averages=True)


def _route_gradients(model: nn.Module, hook: Callable[[Tensor], None] | None, ddp_averages: bool) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_all_reduce_hook(hook)  # type: ignore[arg-type]  # None is its initial value in torch 2.13
        elif isinstance(module, DistributedDataParallel):
            module.require_backward_grad_sync = ddp_averages
            module.require_forward_param_sync = ddp_averages  # else the next forward pass still broadcasts buffers


def reshard(model: nn.Module, recurse: bool = True) -> None:
    """Puts the shards back in the place of gathered copies, those on their way too."""
    for module in model.modules() if recurse else [model]:
        if isinstance(module, FSDPModule):
            if _is_gathering(module):
                module.unshard()  # waits; else the next forward pass would take it for one of its own
            module.reshard()


def _is_gathering(module: FSDPModule) -> bool:
    # Private in torch 2.13, which has no public way to ask. Without these names every module is gathered once more
    # than needed, and the values are right; tests/dist/test_groups.py fails when they move.
    state = _fsdp_state(module)
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None and hasattr(state, "_fsdp_param_group"):  # torch 2.11 has at most one
        groups = [group for group in [state._fsdp_param_group] if group is not None]
    results = [True] if groups is None else [getattr(group, "_all_gather_result", True) for group in groups]
    return any(result is not None for result in results)


def _fsdp_state(module: FSDPModule) -> object:
    return fully_shard.state(module)  # type: ignore[attr-defined]


def _fsdp_groups(model: nn.Module) -> dict[nn.Module, int]:
    # fully_shard([a, b]) gives its modules one state.
    return {m: id(_fsdp_state(m)) for m in model.modules() if isinstance(m, FSDPModule)}


def wrapping_groups(model: nn.Module, is_block: Callable[[nn.Module], bool]) -> list[list[nn.Module]]:
    """The groups that accelerate.utils.fsdp_utils.fsdp2_prepare_model (1.15) makes of `model`, in its order.

    Blocks from the bottom up, embeddings, final norm with head, and what is left; a module is in the first that it is
    below.
    """
    groups = [[module] for module in reversed(list(model.modules())) if module is not model and is_block(module)]
    taken = {module for group in groups for module in group}
    embedding, head = (end if isinstance(end := ask(model, getter), nn.Module) else None for getter in GETTERS)
    weight = getattr(embedding, "weight", None)
    tied = weight is not None and getattr(head, "weight", None) is weight
    ends = [[_final_norm(model), embedding, head]] if tied else [[embedding], [_final_norm(model), head]]
    for end in ends:
        group = [module for module in end if module is not None and module not in taken]
        taken.update(group)
        groups += [group] if group else []
    return groups if model in taken else [*groups, [model]]


def _wrapping_groups(model: nn.Module) -> dict[nn.Module, int]:
    """As Accelerate would wrap `model` by transformer blocks for FSDP2."""
    block_names = set(getattr(model, "_no_split_modules", None) or ())
    groups = wrapping_groups(model, lambda module: type(module).__name__ in block_names)
    return {module: id(group[0]) for group in groups for module in group}


def _final_norm(model: nn.Module) -> nn.Module | None:
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, None) if prefix else model
    children: Iterable[nn.Module] = base.children() if isinstance(base, nn.Module) else ()
    norms = [child for child in children if "Norm" in type(child).__name__]
    return norms[-1] if norms else None


def _owner(model: nn.Module, param_name: str, owners: dict[nn.Module, int]) -> nn.Module:
    """The innermost module around the parameter that is in `owners`; the model itself always is."""
    path = param_name.split(".")[:-1]
    for end in range(len(path), 0, -1):
        if (module := model.get_submodule(".".join(path[:end]))) in owners:
            return module
    return model


def clean_name(name: str) -> str:
    """A parameter's or module's name without what torch.compile and activation checkpointing put into it."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
