"""What is wrong with a set-up: what EDiTTrainer would refuse, by its own checks, and what would be without effect."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields

from accelerate import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin, patch_environment
from torch import nn

from hf_edit.cli.launch import Launch
from hf_edit.config import EDiTConfig
from hf_edit.method.tuning import learning_steps
from hf_edit.peers.layout import Layout
from hf_edit.trainer.accelerate_hook import plan_layout
from hf_edit.trainer.checks import check_plugin, check_wrapping, flag, never_due, wants_fsdp

OVER_SETTINGS = (ValueError, OSError, RuntimeError, AssertionError)  # what Accelerate and we raise over what is given

# Settings without effect: under which condition, the setting that makes it so, what would give them one.
IDLE: tuple[tuple[Callable[[EDiTConfig], bool], str, tuple[str, ...], str], ...] = (
    (lambda c: c.overlap != "delayed", "overlap", ("delay_steps",), "overlap='delayed'"),
    (lambda c: c.weighting in ("uniform", "steps"), "weighting", ("softmax_temperature",), "weighting='norm'"),
    (lambda c: c.outer_optimizer == "none", "outer_optimizer", ("outer_lr", "outer_momentum", "outer_warmup_syncs"),
     "outer_optimizer='nesterov'"),
    (lambda c: c.outer_optimizer != "none" and not c.outer_momentum, "outer_momentum", ("outer_warmup_syncs",),
     "an outer_momentum above 0"),
    (lambda c: c.anomaly_threshold in (None, math.inf), "anomaly_threshold",
     ("ema_alpha", "ema_warmup_syncs", "max_consecutive_anomalies"), "an anomaly_threshold such as 3.0"),
)  # fmt: skip


@dataclass
class Findings:
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def refusing(self, kinds: tuple[type[Exception], ...] = OVER_SETTINGS) -> Iterator[None]:
        """What the body raises of these `kinds` is a refusal."""
        try:
            yield
        except kinds as error:
            self.refusals.append(str(error))


def find_layout(launch: Launch, config: EDiTConfig, model: nn.Module | None, findings: Findings) -> Layout | None:
    """The layout by the checks that EDiTTrainer makes at its start; None: it would refuse."""
    layout = None
    with patch_environment(**launch.environment), findings.refusing():
        args = launch.training_arguments()
        layout = plan_layout(args, config, model)
        if layout.num_replicas == 1:
            return layout
        if layout.replica_size > 1 and flag("ACCELERATE_USE_FSDP"):
            plugin = FullyShardedDataParallelPlugin()
            check_plugin(plugin)
            if model is not None:
                check_wrapping(model, plugin, layout)
        if layout.replica_size == 1 and wants_fsdp(args):
            findings.warnings.append(
                "FSDP's settings have no effect with replicas of one rank, which are DDP. Form larger replicas with a "
                "smaller num_replicas, or set distributed_type: MULTI_GPU."
            )
        given = ParallelismConfig().dp_replicate_size if flag("ACCELERATE_USE_PARALLELISM_CONFIG") else 1
        if config.num_replicas is not None and given not in (1, config.num_replicas):
            findings.warnings.append(
                f"dp_replicate_size: {given} in the Accelerate config has no effect beside num_replicas="
                f"{config.num_replicas}. Leave one of them out."
            )
    return layout


def judge_launch(launch: Launch, layout: Layout, findings: Findings) -> None:
    """Warns of what the launcher does, and of where replicas lie."""
    per_machine = launch.ranks_per_machine
    if launch.lone and launch.asked > 1:
        findings.warnings.append(
            f"num_processes: {launch.asked}, but for this distributed_type Accelerate starts one lone process. Take "
            "MULTI_GPU (on CPUs with use_cpu: true) or FSDP, which start them all."
        )
    elif launch.asked != launch.world_size:
        findings.warnings.append(
            f"num_processes: {launch.asked} on {launch.num_machines} machines starts {per_machine} on each, "
            f"{launch.world_size} in all. It counts those of all machines: make it a multiple of {launch.num_machines}."
        )
    if launch.num_machines > 1 and not launch.main_address:
        findings.warnings.append(
            "main_process_ip is not set, so the machines do not find each other. Set it to the first one's address."
        )
    if launch.world_size > 1 and launch.on_cpu and not _says_cpu(launch):
        findings.notes.append(
            "use_cpu: this launcher does not hand it on. Unless the script sees to it (the examples do), set "
            "ACCELERATE_USE_CPU=true or TrainingArguments(use_cpu=True); else the start is refused without a GPU."
        )
    if layout.num_replicas == 1:
        findings.warnings.append(
            "There is one replica, so EDiTTrainer is a plain Trainer and nothing is synced. Set num_replicas, or "
            "dp_replicate_size in the Accelerate config."
        )
        return
    for index in range(layout.num_replicas):
        first, last = (layout.replica_ranks(index)[end] // per_machine for end in (0, -1))
        if first != last:
            findings.warnings.append(
                f"Replica {index} lies on machines {first} to {last}, so each inner step gathers the model over the "
                "link between them. Let a replica fit into a machine, such as dp_replicate_size: "
                f"{launch.num_machines}, dp_shard_size: {per_machine}."
            )
            break


def _says_cpu(launch: Launch) -> bool:
    with patch_environment(**launch.environment):
        return flag("ACCELERATE_USE_CPU") or bool(launch.flags["use_cpu"])


def judge_settings(config: EDiTConfig, launch: Launch, layout: Layout, findings: Findings) -> None:
    """Warns of settings without effect; those at their defaults are left alone."""
    warn = findings.warnings.append
    changed = {f.name for f in fields(config) if getattr(config, f.name) != f.default}
    for is_idle, cause, names, instead in IDLE:
        for name in names:
            if name in changed and is_idle(config):
                warn(
                    f"{name}={getattr(config, name)!r} has no effect with {cause}={getattr(config, cause)!r}. "
                    f"Leave it out, or set {instead}."
                )
    late = config.overlap == "delayed" and config.sync_seconds is None and config.tune != "auto"
    if late and 8 * config.delay_steps > config.sync_interval:
        steps = learning_steps(config.sync_interval, config.delay_steps)
        codes = "compression='int8' needs a quarter of the delay, and " if config.compression == "none" else ""
        findings.notes.append(
            f"delay_steps={config.delay_steps} beside sync_interval={config.sync_interval}: replicas learn about as "
            f"much as with prompt syncs every {steps} steps. Take no longer delay than the network needs: {codes}"
            "beside a longer sync_interval it counts for less."
        )
    if config.weighting == "steps" and config.sync_seconds is None:
        warn(
            "weighting='steps' is no other than 'uniform' with sync_interval, where all replicas take as many steps. "
            "It is for sync_seconds."
        )
    if config.offload_outer_state and launch.on_cpu:
        warn("offload_outer_state=True has no effect on CPUs: the outer state is in host memory anyway. Leave it out.")
    if config.overlap == "forward" and launch.flags["torch_compile"] not in (None, "false", "False"):
        warn(
            "overlap='forward' has no effect on a compiled model: the sync blocks. Set overlap='delayed' to hide it, "
            "or 'none' to say so."
        )
    if layout.num_replicas > 1 and launch.flags["max_steps"] > 0:
        text = never_due(config, 0, launch.flags["max_steps"])
        if text is not None:
            warn(text[0].upper() + text[1:])
