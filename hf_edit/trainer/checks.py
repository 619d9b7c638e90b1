"""What EDiT cannot train with, refused at the start: what was given, what is needed, what to do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from accelerate import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy

from hf_edit.config import EDiTConfig
from hf_edit.model_ends import GETTERS, ask
from hf_edit.peers.layout import Layout
from hf_edit.sync.units import wrapping_groups

# -- the launch -------------------------------------------------------------------------------------------------------


def check_launcher(args: Any) -> None:
    """Raises ValueError if the launcher's processes do not know of each other."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != args.world_size:
        raise ValueError(
            f"The launcher started {launched} processes (WORLD_SIZE={launched}), but Accelerate sees "
            f"{args.world_size}: each process would train alone. On CPU, set ACCELERATE_USE_CPU=true or "
            "TrainingArguments(use_cpu=True); on GPUs, check that every process sees its own."
        )


def check_sharding(args: Any, model: Any) -> None:
    """Raises ValueError if anything but FSDP2 is to shard the model."""
    if args.deepspeed or flag("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError("EDiT shards replicas with FSDP2, but DeepSpeed is on. Turn DeepSpeed off and set fsdp=True.")
    if flag("ACCELERATE_USE_MEGATRON_LM"):
        raise ValueError("EDiT shards replicas with FSDP2, but Megatron-LM is on. Turn it off and set fsdp=True.")
    if wants_fsdp(args) and (version := fsdp_version(args)) != 2:
        raise ValueError(
            f"fsdp_version={version}: EDiT needs FSDP2. Set fsdp_version: 2 in the Accelerate config file, or "
            "fsdp_config={'version': 2} in TrainingArguments."
        )
    if getattr(model, "is_distributed_loading_by_transformers", False):
        raise ValueError(
            "The model was sharded when it was loaded (DistributedConfig), so replicas cannot be formed any more. Load "
            "it without distributed_config; EDiTTrainer shards it."
        )


def check_axes(given: ParallelismConfig, args: Any, check_product: bool) -> None:
    """Raises ValueError for axes that a replica does not have."""
    for axis in ("tp", "cp", "sp"):
        if (size := getattr(given, f"{axis}_size")) > 1:
            raise ValueError(
                f"{axis}_size={size}: EDiT shards a replica with FSDP2 (dp_shard) alone. Set {axis}_size to 1."
            )
    replicas, shards = given.dp_replicate_size, given.dp_shard_size
    if check_product and shards > 1 and replicas * shards != args.world_size:
        raise ValueError(
            f"dp_replicate_size={replicas} times dp_shard_size={shards} is not the {args.world_size} processes of this "
            f"launch. Make their product {args.world_size}."
        )


def check_plugin(plugin: FullyShardedDataParallelPlugin) -> None:
    """Raises ValueError if parameters would live in host memory."""
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError(
            "FSDP's cpu_offload keeps the parameters in host memory, where replicas cannot sync them. Turn it off; "
            "offload_outer_state=True moves EDiT's own state there."
        )


def wants_fsdp(args: Any) -> bool:
    """True if TrainingArguments or the Accelerate config file ask for FSDP."""
    return args.fsdp_plugin_args is not None or flag("ACCELERATE_USE_FSDP")


def fsdp_version(args: Any) -> int:
    """The one that TrainingArguments or the Accelerate config file ask for."""
    return (args.fsdp_plugin_args or {}).get("fsdp_version") or int(os.environ.get("FSDP_VERSION", "1"))


def flag(name: str) -> bool:
    """True if the environment variable says so."""
    return os.environ.get(name, "false").lower() in ("1", "true", "yes", "on")


def check_batches(args: Any, layout: Layout, elastic: bool) -> None:
    """Raises ValueError for ways to make batches that replicas cannot have."""
    if layout.num_replicas == 1:
        return
    if args.auto_find_batch_size and layout.replica_size > 1:
        raise ValueError(
            f"auto_find_batch_size=True with replicas of {layout.replica_size} ranks: where one runs out of memory in "
            "the middle of a step, the others wait in FSDP2's collectives. Set per_device_train_batch_size, or "
            f"num_replicas={layout.num_replicas * layout.replica_size} for replicas of one rank"
            f"{', each a launch of one process' if elastic else ''}."
        )
    if elastic and args.train_sampling_strategy == "batch_rebalance":
        raise ValueError(
            "train_sampling_strategy='batch_rebalance' with elastic=True: its sampler deals batches out to the ranks "
            "of one launch, so every replica would read the same ones. Take another train_sampling_strategy."
        )


# -- the model --------------------------------------------------------------------------------------------------------


def check_wrapping(model: nn.Module, plugin: FullyShardedDataParallelPlugin, layout: Layout) -> None:
    """Raises ValueError if FSDP2, as Accelerate is about to wrap `model`, could not shard it; torch would not say why.

    Args:
        model: not prepared yet.
    """
    instead = (
        f"train replicas of one rank (num_replicas={layout.num_replicas * layout.replica_size}), which need no FSDP"
    )
    name, raised = type(model).__name__, object()
    for getter in GETTERS:
        if ask(model, getter, raised) is raised:
            raise ValueError(
                f"{name}.{getter}() raises, and Accelerate asks it when it shards with FSDP2. Define it in a subclass "
                f"of the model (it may return None), or {instead}."
            )
    if any(getattr(c, "is_prompt_learning", False) for c in getattr(model, "peft_config", {}).values()):
        raise ValueError(
            "PEFT runs the prompt encoder of a prompt-learning adapter when it saves it, on one rank, where FSDP2 has "
            f"but a shard of it. Take LoRA, or {instead}."
        )
    if (problem := wrapping_problem(model, _groups(model, plugin))) is None:
        return
    classes = plugin.transformer_cls_names_to_wrap or list(getattr(model, "_no_split_modules", None) or ())
    for left_out in classes:
        others = [other for other in classes if other != left_out]
        if others and wrapping_problem(model, _groups(model, plugin, others)) is None:
            instead = (
                f"leave out {left_out}: fsdp_transformer_layer_cls_to_wrap: {','.join(others)} in the Accelerate "
                f"config file, or fsdp_config={{'transformer_layer_cls_to_wrap': {others}}} in TrainingArguments; or "
                + instead
            )
            break
    raise ValueError(f"FSDP2 cannot shard {name}: {problem}. Way out: {instead}.")


def _groups(
    model: nn.Module, plugin: FullyShardedDataParallelPlugin, classes: list[str] | None = None
) -> list[list[nn.Module]]:
    if classes is not None:
        return wrapping_groups(model, lambda module: type(module).__name__ in classes)
    return wrapping_groups(model, fsdp2_prepare_auto_wrap_policy(plugin, model) or (lambda _: False))


def wrapping_problem(model: nn.Module, groups: Sequence[Sequence[nn.Module]]) -> str | None:
    """Why FSDP2 cannot make these groups of `model`, one after the other and each with what lies below it; or None.

    Parameters belong to the first group that reaches them: none can be in two, and no group can be inside an earlier.
    """
    names = {module: name or "the model" for name, module in model.named_modules()}
    wrapped: dict[nn.Module, nn.Module] = {}  # each module, and the one that it is wrapped with
    homes: dict[nn.Parameter, tuple[int, str]] = {}
    for index, group in enumerate(groups):
        for module in group:
            outer = wrapped.get(module)
            if outer is not None and any(True for _ in module.parameters()):
                return (
                    f"{names[module]} lies inside {names[outer]} ({type(outer).__name__}), which is wrapped before it"
                )
        for module in group:
            for below in module.modules():
                if below in wrapped:
                    continue
                wrapped[below] = module
                for name, param in below.named_parameters(recurse=False):
                    home, first = homes.setdefault(param, (index, f"{names[below]}.{name}"))
                    if home != index:
                        return f"{first} and {names[below]}.{name} are one parameter in two of FSDP2's groups"
    return None


# -- the training -----------------------------------------------------------------------------------------------------

# Of the optimizers that TrainingArguments.optim names (transformers 5.24), those that cannot step FSDP2's shards.
WHOLE_PARAMETERS_ONLY = (
    "transformers.optimization.Adafactor", "galore_torch.adafactor.", "galore_torch.adamw8bit.", "bitsandbytes.",
    "apollo_torch.",
)  # fmt: skip


def check_optimizer(optimizer: Any, layout: Layout, config: EDiTConfig) -> None:
    """Raises ValueError if replicas cannot train with `optimizer`, torch's or as Accelerate prepared it."""
    torch_optimizer = getattr(optimizer, "optimizer", optimizer)
    problem = optimizer_problem(torch_optimizer, layout.replica_size > 1, config.warmup_steps > 0)
    if problem is not None:
        raise ValueError(problem)


def optimizer_problem(optimizer: Any, sharded: bool, warms_up: bool) -> str | None:
    """What keeps replicas from training with `optimizer`, and the way out; or None.

    Args:
        sharded: its parameters are FSDP2's shards.
        warms_up: there are synchronous steps first.
    """
    name = type(optimizer).__name__
    kinds = [f"{kind.__module__}.{kind.__name__}" for kind in type(optimizer).__mro__]
    if callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None)):
        return (
            f"{name} moves the parameters by its own state whenever an evaluation begins or ends (its eval() and "
            "train()), and that state is each replica's own: replicas would differ where they must be equal. Take an "
            "optimizer that does not, such as optim='adamw_torch'; the outer sync averages."
        )
    if warms_up and any(kind.startswith("lomo_optim.") for kind in kinds):
        return (
            f"{name} steps each parameter while the backward pass still runs, before the warm-up could average its "
            "gradient over the replicas. Set warmup_steps=0, or take another optimizer."
        )
    if sharded and any(kind.startswith(WHOLE_PARAMETERS_ONLY) for kind in kinds):
        return (
            f"{kinds[0]} cannot step parameters that FSDP2 has sharded. Take another optimizer, such as "
            "optim='adamw_torch' or 'adamw_torch_8bit' (torchao), or replicas of one rank (num_replicas = number of "
            "processes), which need no FSDP."
        )
    return None


def never_due(config: EDiTConfig, first_step: int, last_step: int) -> str | None:
    """What to say of a training whose optimizer steps first_step + 1 ... last_step are too few for a sync; or None."""
    steps = last_step - max(first_step, config.warmup_steps)
    if config.sync_seconds is not None or steps >= config.sync_interval // config.fragments:
        return None
    return (
        f"this training takes {max(steps, 0)} inner steps, fewer than sync_interval={config.sync_interval}: the "
        "replicas are averaged at its end alone. Set a smaller sync_interval to sync on the way."
    )


def check_order(cls: type, mixin: type, base: type) -> None:
    """Raises TypeError if in `cls` the trainer `base` stands before `mixin`, whose methods nobody would call then."""
    order = cls.__mro__
    if base in order and order.index(base) < order.index(mixin):
        raise TypeError(
            f"{cls.__name__} inherits from {mixin.__name__} after a Trainer, which hides it. Put it first: class "
            f"{cls.__name__}({mixin.__name__}, TheirTrainer)."
        )


def passed_over(trainer: Any, method: str) -> RuntimeError:
    """For a subclass that overrides `method` and does not call super()'s, without which replicas cannot be trained."""
    culprit = next(kind.__name__ for kind in type(trainer).__mro__ if method in vars(kind))
    return RuntimeError(
        f"{culprit}.{method}() does not call super().{method}(), in which EDiT does its part. Call it; or, to replace "
        f"the Trainer's part alone, derive {culprit} from Trainer and put EDiT around it: "
        f"class Mine(EDiTMixin, {culprit})."
    )


def check_loop(config: EDiTConfig) -> None:
    """Raises ValueError for settings that a hand-written loop cannot train with."""
    refused = {
        "on_loss_spike": (
            config.on_loss_spike != "log",
            "you see the loss before you step, and may not step",
        ),
        "balance": (
            config.balance,
            "the data are yours to deal out; with sync_seconds (A-EDiT) fast replicas take more steps",
        ),
        "sync_interval_end": (
            config.sync_interval_end is not None,
            "the number of steps is not known, over which it goes in a straight line",
        ),
    }
    for name, (given, why) in refused.items():
        if given:
            value = getattr(config, name)
            raise ValueError(f"{name}={value!r} is EDiTTrainer's; in a loop of your own {why}. Leave {name} out.")
