"""Accelerate's part: replicas in, a mesh that FSDP2 shards over the replica only.

`ParallelismConfig.fsdp_dim_names` names the mesh axes that `fully_shard` gets. Without `dp_replicate` among them,
Accelerate shards over the replica and leaves the replicas to themselves, while its data loader still gives every rank
its own data.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator, ParallelismConfig, PartialState
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    FullyShardedDataParallelPlugin,
    synchronize_rng_states,
)
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import save

from hf_edit.config import EDiTConfig
from hf_edit.peers.launch import lighthouse_of_this_launch, replica_of_this_launch
from hf_edit.peers.layout import Layout, default_num_replicas
from hf_edit.peers.lighthouse import torchft
from hf_edit.trainer.checks import (
    check_axes,
    check_launcher,
    check_plugin,
    check_sharding,
    flag,
    fsdp_version,
    wants_fsdp,
)

logger = logging.getLogger(__name__)


@dataclass(repr=False)
class ReplicaParallelismConfig(ParallelismConfig):
    """`dp_replicate_size` replicas of `dp_shard_size` ranks, FSDP2 sharding over the replica only.

    It also turns FSDP2 on for CPU, which Accelerate 1.15 does not: `AcceleratorState` stays MULTI_CPU, drops the
    plugin, and DDP would be used silently.
    """

    cpu_fsdp_plugin: FullyShardedDataParallelPlugin | None = None

    @property
    def fsdp_dim_names(self) -> list[str]:
        return ["dp_shard_cp"]

    def _validate_accelerator(self, accelerator: Accelerator) -> None:
        # Private in Accelerate 1.15, and the first call that gets the accelerator: FSDP2 must be on before it checks
        # that this configuration has FSDP2. tests/launch fails when it moves: ranks would come up under DDP.
        if self.cpu_fsdp_plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
            if accelerator.mixed_precision != "no":
                self.cpu_fsdp_plugin.set_mixed_precision(accelerator.mixed_precision)
            PartialState().distributed_type = DistributedType.FSDP
            accelerator.state.distributed_type = DistributedType.FSDP
            accelerator.state.fsdp_plugin = self.cpu_fsdp_plugin
        super()._validate_accelerator(accelerator)


def plan_layout(args: Any, config: EDiTConfig, model: Any = None) -> Layout:
    """How the processes of this launch form replicas; refuses what EDiT cannot train with.

    Args:
        args: `TrainingArguments`.

    Raises:
        ValueError: what was given, what is allowed, what to do.
    """
    check_launcher(args)
    if config.elastic:
        return _elastic_layout(args, config, model)
    if args.world_size == 1:
        return Layout.split(1, config.num_replicas or 1, 0)
    given = _given_parallelism(args)
    num_replicas = config.num_replicas or default_num_replicas(
        args.world_size, fsdp=wants_fsdp(args), dp_replicate_size=given.dp_replicate_size if given else None
    )
    if num_replicas == 1:
        return Layout.split(args.world_size, 1, args.process_index)  # a plain Trainer, whatever it is asked to do
    check_sharding(args, model)
    if given is not None:
        check_axes(given, args, check_product=config.num_replicas is None)
    layout = Layout.split(args.world_size, num_replicas, args.process_index)
    if layout.replica_size > 1 and not wants_fsdp(args):
        raise ValueError(
            f"num_replicas={num_replicas} on {args.world_size} processes gives replicas of {layout.replica_size} ranks,"
            " which need FSDP2, but FSDP is off. Set fsdp=True in TrainingArguments (or take an Accelerate config with "
            f"fsdp_version: 2), or set num_replicas={args.world_size} for replicas of one rank."
        )
    return layout


def _elastic_layout(args: Any, config: EDiTConfig, model: Any) -> Layout:
    """Of a launch that is one replica."""
    lighthouse_of_this_launch()
    torchft()
    assert config.num_replicas is not None
    replica, size = replica_of_this_launch(config.num_replicas), args.world_size
    check_sharding(args, model)
    if (given := _given_parallelism(args)) is not None:
        check_axes(given, args, check_product=True)
    if size > 1 and not wants_fsdp(args):
        raise ValueError(
            f"elastic=True, and this launch has {size} processes: it is one replica, whose ranks need FSDP2, but FSDP "
            "is off. Set fsdp=True in TrainingArguments (or take an Accelerate config with fsdp_version: 2), or launch "
            "one process."
        )
    return Layout(config.num_replicas, size, replica * size + args.process_index)


def _given_parallelism(args: Any) -> ParallelismConfig | None:
    """Accelerate's axes, from TrainingArguments or its config file."""
    if args.parallelism_config is None and flag("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return ParallelismConfig()
    return args.parallelism_config


def replica_accelerator_args(built: dict[str, Any], args: Any, layout: Layout, elastic: bool = False) -> dict[str, Any]:
    """The arguments of `Accelerator` for `layout`, from those that the Trainer built."""
    on_cpu = args.device.type == "cpu"
    if elastic:
        if layout.replica_size > 1:
            check_plugin(built.get("fsdp_plugin") or FullyShardedDataParallelPlugin())
        elif wants_fsdp(args):
            return _without_fsdp(built, args)
        layout = layout.alone
    plain = layout.num_replicas == 1 and not (on_cpu and fsdp_version(args) == 2)
    if not wants_fsdp(args) or args.world_size == 1 or plain:
        if layout.num_replicas > 1:
            built["parallelism_config"] = None
        return built
    if layout.replica_size == 1:
        return _without_fsdp(built, args)
    plugin = built.get("fsdp_plugin") or FullyShardedDataParallelPlugin()
    if layout.num_replicas > 1:
        check_plugin(plugin)
    parallelism = ReplicaParallelismConfig(
        dp_replicate_size=layout.num_replicas,
        dp_shard_size=layout.replica_size,
        cpu_fsdp_plugin=plugin if on_cpu else None,
    )
    return {**built, "fsdp_plugin": plugin, "parallelism_config": parallelism}


def _without_fsdp(built: dict[str, Any], args: Any) -> dict[str, Any]:
    """Nothing to shard: DDP. The Trainer must not see FSDP either, hence the arguments and the variable."""
    args.fsdp, args.fsdp_plugin_args = None, None
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    return {**built, "fsdp_plugin": None, "parallelism_config": None}


def saves_sharded(accelerator: Accelerator) -> bool:
    """True if the user chose fsdp_state_dict_type SHARDED_STATE_DICT."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return plugin is not None and "SHARDED_STATE_DICT" in str(plugin.state_dict_type)


def save_sharded(model: nn.Module, optimizer: Any, output_dir: str, group: Any) -> None:
    """As accelerate.utils.save_fsdp_model and save_fsdp_optimizer (1.15) write shards, but by one replica's `group`.

    Accelerate's `load_fsdp_model` and `load_fsdp_optimizer` read it.
    """
    adapters = StateDictOptions(ignore_frozen_params=hasattr(model, "peft_config"))  # alone, as Accelerate does
    parts = {
        f"{FSDP_MODEL_NAME}_0": {"model": get_model_state_dict(model, options=adapters)},
        f"{OPTIMIZER_NAME}_0": {"optimizer": get_optimizer_state_dict(model, optimizer)},
    }
    for name, state in parts.items():
        save(state, storage_writer=FileSystemWriter(os.path.join(output_dir, name)), process_group=group)


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """The whole model in host memory on rank 0, empty on the others."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def check_accelerator(accelerator: Accelerator, layout: Layout) -> None:
    """The accelerator must have come up as `layout` says.

    Raises:
        RuntimeError: another Accelerator of this process was there first, with another layout.
    """
    if layout.replica_size == 1 or layout.num_replicas == 1:
        return
    parallelism = accelerator.parallelism_config
    if not accelerator.is_fsdp2 or not isinstance(parallelism, ReplicaParallelismConfig) or (
        parallelism.dp_replicate_size, parallelism.dp_shard_size
    ) != (layout.num_replicas, layout.replica_size):  # fmt: skip
        raise RuntimeError(
            f"EDiT needs {layout}, but this process has an Accelerator already, which came up with "
            f"{accelerator.distributed_type.value} and {parallelism}. Create the EDiTTrainer before any other "
            "Accelerator, or leave accelerator_config.use_configured_state off."
        )


class PlacedAccelerator(Accelerator):
    """An `Accelerator` that can prepare data loaders for more processes than its world has."""

    _place: Layout | None = None

    @contextlib.contextmanager
    def among_all(self, layout: Layout) -> Iterator[None]:
        """Inside, a data loader is prepared as if all replicas of `layout` were processes of one world."""
        outside, self._place = self._place, layout
        try:
            yield
        finally:
            self._place = outside

    @property
    def num_processes(self) -> int:
        place = self._place
        return super().num_processes if place is None else place.num_replicas * place.replica_size

    @property
    def process_index(self) -> int:
        return super().process_index if self._place is None else self._place.rank

    @property
    def torch_device_mesh(self) -> Any:
        # Of a mesh, Accelerate would take how many processes read the data, and there it has one replica alone.
        return super().torch_device_mesh if self._place is None else None


def prepare_anew(model: nn.Module) -> None:
    """A model that was prepared for an evaluation alone shall be prepared for the training."""
    # Private in Accelerate 1.15: a compiled model hands the mark on to the one that it compiles, which would then be
    # left without DDP. tests/launch/scripts/features.py fails when it moves: ranks would train alone.
    if hasattr(model, "_is_accelerate_prepared"):
        del model._is_accelerate_prepared


def read_everywhere(config: DataLoaderConfiguration) -> bool | None:
    """Every process reads the data itself; Accelerate would let process 0 send every batch of a stream to all.

    Returns:
        What `dispatch_batches` was.
    """
    asked = config.dispatch_batches
    if asked and PartialState().is_main_process:
        logger.warning(
            "EDiT: dispatch_batches=True is turned off where replicas train: every process reads its part of the data."
        )
    config.dispatch_batches = False
    return asked


@contextlib.contextmanager
def dispatching(config: DataLoaderConfiguration, asked: bool | None) -> Iterator[None]:
    """Inside, loaders are prepared with `dispatch_batches=asked`."""
    config.dispatch_batches = asked
    try:
        yield
    finally:
        config.dispatch_batches = False


def equalise_sampler_once(loader: Any) -> None:
    """Accelerate would broadcast the sampler's generator at the start of every epoch. Equal once, they stay so."""
    generator = getattr(loader, "synchronized_generator", None)
    if generator is not None and loader.rng_types:
        synchronize_rng_states(loader.rng_types, generator)
        loader.rng_types = []
