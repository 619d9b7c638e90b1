"""The accelerator of a hand-written loop: Accelerate's, with replicas."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration
from torch import nn

from hf_edit.config import EDiTConfig
from hf_edit.peers.layout import Layout
from hf_edit.sync.units import is_prepared
from hf_edit.trainer.accelerate_hook import (
    PlacedAccelerator,
    check_accelerator,
    equalise_sampler_once,
    plan_layout,
    read_everywhere,
    replica_accelerator_args,
)
from hf_edit.trainer.checks import check_wrapping, flag


class _LoopAccelerator(PlacedAccelerator):
    """Looks at a model before it is sharded, as `EDiTTrainer.train` does; of replicas that are launches of their own,
    each reads its part of the data."""

    edit_layout: Layout
    elastic: bool

    def prepare_data_loader(self, *args: Any, **kwargs: Any) -> Any:
        if not self.elastic:
            return super().prepare_data_loader(*args, **kwargs)
        with self.among_all(self.edit_layout):
            return super().prepare_data_loader(*args, **kwargs)

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        if self.edit_layout.num_replicas > 1 and self.is_fsdp2:
            for model in args:
                if isinstance(model, nn.Module) and not is_prepared(model):
                    check_wrapping(model, self.state.fsdp_plugin, self.edit_layout)
        return super().prepare(*args, **kwargs)


def make_accelerator(config: EDiTConfig, settings: dict[str, Any]) -> Accelerator:
    """`Accelerator(**settings)` with replicas, for a hand-written loop."""
    # Without an accelerator Accelerate must know, or each process would train alone.
    on_cpu = settings.get("cpu") or flag("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    settings = {**settings, "cpu": on_cpu}
    state = PartialState(cpu=on_cpu)
    # A copy, for it is changed and the user's.
    data = copy.copy(settings.get("dataloader_config")) or DataLoaderConfiguration(use_seedable_sampler=True)
    plugin = settings.get("fsdp_plugin")
    args = SimpleNamespace(  # what TrainingArguments would say
        world_size=state.num_processes,
        process_index=state.process_index,
        device=state.device,
        fsdp_plugin_args=None if plugin is None else {"fsdp_version": plugin.fsdp_version},
        parallelism_config=settings.get("parallelism_config"),
        deepspeed=settings.get("deepspeed_plugin"),
    )
    layout = plan_layout(args, config)
    if layout.num_replicas > 1:
        read_everywhere(data)
    built = replica_accelerator_args({**settings, "dataloader_config": data}, args, layout, config.elastic)
    accelerator = _LoopAccelerator(**built)
    check_accelerator(accelerator, layout.alone if config.elastic else layout)
    accelerator.edit_layout, accelerator.elastic = layout, config.elastic
    return accelerator


def layout_of(accelerator: Accelerator, config: EDiTConfig) -> Layout:
    """The layout of an accelerator that `make_accelerator` has made.

    Raises:
        ValueError: it was made otherwise, or for another number of replicas.
    """
    layout = getattr(accelerator, "edit_layout", None)
    if layout is None:
        raise ValueError(
            "This Accelerator does not know of replicas. Write `accelerator = EDiT.accelerator(edit_config, ...)` in "
            "the place of `Accelerator(...)`."
        )
    if config.num_replicas not in (None, layout.num_replicas):
        raise ValueError(
            f"num_replicas={config.num_replicas}, but the Accelerator was made for {layout}. Give EDiT.accelerator and "
            "EDiT the same edit_config."
        )
    return layout


def keep_loader_local(accelerator: Accelerator) -> None:
    """No epoch of a prepared loader begins with a broadcast."""
    # Private in Accelerate 1.15, which names no public way to the loaders it has prepared; tests/launch counts bytes.
    for loader in accelerator._dataloaders:
        equalise_sampler_once(loader)
