"""EDiTConfig: every knob of the method, said once.

A field's `help` is its only description: `--help` of a script shows it, the README's table is made from it, and a test
fails when the two drift apart. The defaults are the paper's method (EDiT, arXiv 2412.07210), but for the outer
momentum: it warms up, and shrinks with the learning rate. Without that, runs of a few dozen syncs end at a higher loss
(examples/benchmarks/README.md).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_edit.bounds import check

CONFIG_ENV_VAR = "EDIT_CONFIG"

UNIFORM = {"weighting": "uniform", "anomaly_threshold": None, "max_pseudo_grad_norm": None}  # no penalty
AT_ONCE = {"outer_warmup_syncs": 0, "momentum_follows_lr": False}  # the outer momentum as it is, all the time
DILOCO = {**AT_ONCE, "outer_lr": 0.7, "outer_momentum": 0.9, **UNIFORM}
PRESETS: dict[str, dict[str, Any]] = {
    "edit": AT_ONCE,
    "a-edit": {**AT_ONCE, "sync_seconds": 600.0, "weighting": "norm"},
    "diloco": DILOCO,
    "streaming-diloco": {**DILOCO, "overlap": "delayed", "fragments": 4, "compression": "int4"},
    "co2": {**AT_ONCE, "outer_optimizer": "sgd", "outer_lr": 1.0, "outer_momentum": 0.2,
            "overlap": "delayed", **UNIFORM},
    "post-local-sgd": {"outer_optimizer": "none", **UNIFORM},
    "muon": {"outer_optimizer": "none", "sync_moments": "both"},
}  # fmt: skip


def _knob(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class EDiTConfig:
    """The settings of EDiT. `EDiTConfig()` is the paper's method with an outer momentum that warms up and cools down;
    `EDiTConfig.preset("edit")` leaves that out, and other names give the method's relatives.

    `warmup_steps` is also accepted and readable under that name; the field, and so the command-line flag, is
    `edit_warmup_steps`, because `--warmup_steps` belongs to `TrainingArguments` (the learning rate's warm-up) and one
    `HfArgumentParser` cannot hold it twice.

    Raises:
        ValueError: a value is out of range or two settings exclude each other; the text names the value, the rule
            and the way out.
    """

    _argument_group_name = "EDiT"  # HfArgumentParser's heading in --help

    num_replicas: int | None = _knob(
        None,
        "Number of replicas R. Unset: Accelerate's dp_replicate_size if given; else one per node; on a single node "
        "one per process without FSDP, one in all with FSDP.",
    )
    sync_interval: int = _knob(128, "Inner steps between two outer syncs (tau).")
    sync_interval_end: int | None = _knob(
        None,
        "tau at the end of the training (EDiTTrainer), to which it goes in a straight line over the steps. Unset: "
        "sync_interval all the time.",
    )
    sync_seconds: float | None = _knob(
        None, "Seconds that replicas train between two outer syncs (A-EDiT); takes the place of sync_interval."
    )
    edit_warmup_steps: int = _knob(
        0, "Synchronous steps first, with gradients averaged over all replicas. In Python also `warmup_steps`."
    )
    inner_lr_scale: float = _knob(
        1.0,
        "Learning rate of inner steps over the schedule's, which synchronous steps take. With AdamW replicas learn "
        "more at 1.4 behind some synchronous steps (edit_warmup_steps); without these they learn less, but for one "
        "fine-tuning of the largest of three models.",
    )
    outer_optimizer: str = _knob(
        "nesterov",
        'Outer optimizer: "nesterov", "sgd", "none" (take the average), or in Python a callable params -> '
        "torch.optim.Optimizer.",
    )
    outer_lr: float = _knob(0.8, "Learning rate of the outer optimizer.")
    outer_momentum: float = _knob(0.85, "Momentum of the outer optimizer.")
    outer_warmup_syncs: int = _knob(
        5,
        "Warms the outer momentum up: at sync k = 0, 1, ... it is min(outer_momentum, k / (k + this)), while outer_lr "
        "goes from 1 to its value. 0: both hold from the first sync, as in the paper.",
    )
    momentum_follows_lr: bool = _knob(
        True,
        "The outer momentum shrinks with the inner learning rate (as SlowMo's, arXiv 1910.00643), so that what was "
        "learnt at a high one does not carry a training too far at its end.",
    )
    anomaly_threshold: float | None = _knob(
        3.0,
        "A replica whose pseudo-gradient norm lies more than this many standard deviations above its moving mean is "
        "left out (delta). None or inf: only non-finite ones are.",
    )
    ema_alpha: float = _knob(0.02, "Weight of the newest norm in the moving mean and variance of the norms.")
    ema_warmup_syncs: int = _knob(10, "Norms that a detector must have seen before it may call one anomalous.")
    max_consecutive_anomalies: int = _knob(
        3, "A finite norm that is anomalous this many times in a row is the new normal: its detector restarts."
    )
    weighting: Literal["norm", "relative", "uniform", "steps"] = _knob(
        "norm",
        'Weights of the replicas: "norm" (softmax of minus the norm), "relative" (of minus the norm over their mean, '
        'for large units, where "norm" picks one replica), "uniform", "steps" (inner steps done).',
    )
    softmax_temperature: float = _knob(1.0, 'Temperature of the softmax of weighting="norm" and "relative".')
    max_pseudo_grad_norm: float | None = _knob(
        10.0, "Norm to which a unit's averaged pseudo-gradient is clipped (phi). None or inf: no clipping."
    )
    averaging: Literal["mean", "length"] = _knob(
        "mean",
        'How pseudo-gradients are averaged: "mean", or "length" (direction of the mean, length of the mean of their '
        "lengths, by unit: replicas that point different ways shorten the mean; at most times R).",
    )
    sync_moments: Literal["none", "first", "both"] = _knob(
        "none",
        "What of the inner optimizer (Adam, AdamW, SGD, Muon) is averaged at a sync, too, by the same weights: its "
        '"first" moments (a sync sends twice as much, fp32), "both" (three times), or "none".',
    )
    sync_moments_every: int = _knob(1, "Average these moments at every so many syncs of a unit.")
    overlap: Literal["none", "forward", "delayed"] = _knob(
        "forward",
        'What hides a sync: "none" (blocks), "forward" (layer by layer in the next forward pass), "delayed" (in the '
        "background, applied delay_steps later).",
    )
    delay_steps: int = _knob(
        4,
        'Inner steps between the start and the application of a sync with overlap="delayed"; with sync_seconds fewer '
        "where the next sync is due before. In learning, a step of delay costs about what two of sync_interval do.",
    )
    compression: Literal["none", "bf16", "int8", "int4"] = _knob(
        "none",
        'What a sync sends: "none" (fp32), "bf16" (half of the bytes), "int8" (0.254), "int4" (0.141). What the codes '
        "leave out is kept and sent later (error feedback), at 4 bytes of memory a parameter, 8 if delayed.",
    )
    fragments: int = _knob(
        1,
        "Parts in which the units are synced, one after the other and each once in sync_interval steps: the link's "
        "greatest load is about that much less. Evaluations and checkpoints sync all of them.",
    )
    units_in_flight: int = _knob(
        2,
        "Units (embeddings, blocks, head) whose all-reduce is under way at a time, and whose buffers the device holds "
        "for it. 2 keep the network busy while one is applied; 1 saves memory.",
    )
    tune: Literal["off", "advise", "auto"] = _knob(
        "off",
        'With "delayed": "auto" sets sync_interval, delay_steps and compression (never finer than yours) so that '
        'nothing waits for a sync and replicas learn most, from what syncs measure; "advise" only says.',
    )
    balance: bool = _knob(
        False,
        "Deal the rows of each batch out by the replicas' speeds (EDiTTrainer), so that steps take equally long and "
        "weights follow the rows. The job's batch stays; a rank computes at most its per_device_train_batch_size at a "
        "time.",
    )
    elastic: bool = _knob(
        False,
        "Each replica is a launch of its own (EDIT_REPLICA=0 ... num_replicas - 1), which may end and come back: the "
        "others train on, and it is healed at a sync. They find each other by a lighthouse "
        "(TORCHFT_LIGHTHOUSE=host:port).",
    )
    min_replicas: int = _knob(1, "Replicas that a sync needs with elastic; fewer wait.")
    heartbeat_seconds: float = _knob(
        5.0, "With elastic: a replica that shows no life for so long is gone. Give the lighthouse the same."
    )
    straggler_seconds: float = _knob(
        60.0,
        "With elastic: how long a sync waits for replicas that live and do not come; then they are left out of it.",
    )
    offload_outer_state: bool = _knob(False, "Keep anchor and outer momentum in (pinned) host memory between syncs.")
    sync_timeout_seconds: float = _knob(
        600.0,
        "Longest wait without progress in a sync before it fails with the names of the missing replicas. NCCL counts "
        "from a collective's start: there units_in_flight units must fit into it.",
    )
    loss_spike_threshold: float = _knob(
        6.0, "Standard deviations above the moving mean of a replica's loss that make a step's loss a spike."
    )
    on_loss_spike: Literal["log", "skip", "rollback", "stop"] = _knob(
        "log",
        'What a replica does at a spike: "log" it; "skip" the step; "rollback" to the last sync, and go on behind the '
        'batch; "stop" the training of all at the next sync. All but "log" wait for each step\'s loss.',
    )
    max_consecutive_spikes: int = _knob(
        3, "Spikes in a row that a replica responds to; then the loss is the new normal, or if not finite all stop."
    )

    def __post_init__(self) -> None:
        if self.tune is False:  # what YAML makes of off
            object.__setattr__(self, "tune", "off")
        check(self)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> EDiTConfig:
        """The configuration called `name`, with `overrides` on top.

        "edit" is the paper's method to the letter, "a-edit" its time-triggered form. The others have uniform weights
        and no penalty: "diloco" (arXiv 2311.08105) Nesterov 0.7/0.9; "streaming-diloco" (arXiv 2501.18512) that in four
        fragments, 4 bits (whole numbers with error feedback, not its floats) and delayed, where what is learnt
        meanwhile is kept as a whole, not mixed; "co2" (arXiv 2401.16265) an outer step that is one interval late, its
        outer state sharded as CO2*'s is, without staleness penalty and clipping of the momentum; "post-local-sgd"
        (arXiv 1808.07217) averages the parameters. "muon", for `hf_edit.muon` inside, is EDiT that takes the average
        (with the default outer step Muon learns less, examples/benchmarks/README.md) and averages the inner moments.
        """
        if name not in PRESETS:
            raise ValueError(f"preset {name!r}: one of {', '.join(map(repr, PRESETS))} is needed.")
        values = {**PRESETS[name], **overrides}
        if name == "co2":
            values.setdefault(
                "delay_steps", values.get("sync_interval", cls.sync_interval) // values.get("fragments", 1)
            )
        return cls(**values)

    @classmethod
    def load(cls, source: EDiTConfig | dict[str, Any] | str | os.PathLike[str] | None) -> EDiTConfig:
        """`source` as an EDiTConfig: one already, a dict, a YAML or JSON file, or None.

        None stands for the file named by the environment variable `EDIT_CONFIG`, else for the defaults.
        """
        if isinstance(source, cls):
            return source
        if source is None:
            source = os.environ.get(CONFIG_ENV_VAR) or {}
        where = ""
        if isinstance(source, str | os.PathLike):
            where = f" in {os.fspath(source)}"
            source = _read_mapping(Path(source))
        if not isinstance(source, dict):
            raise ValueError(
                f"edit_config={source!r}: an EDiTConfig, a dict, or a path to a YAML or JSON file is needed{where}."
            )
        allowed = [f.name for f in dataclasses.fields(cls)] + ["warmup_steps"]
        unknown = sorted(set(source) - set(allowed))
        if unknown:
            raise ValueError(f"Unknown EDiTConfig settings{where}: {unknown}. Known: {', '.join(sorted(allowed))}.")
        return cls(**source)

    def to_dict(self) -> dict[str, Any]:
        """Every setting by its name, a callable outer optimizer by its own; takes JSON."""
        values = dataclasses.asdict(self)
        if callable(values["outer_optimizer"]):
            values["outer_optimizer"] = getattr(values["outer_optimizer"], "__qualname__", "callable")
        return values

    @property
    def longest_wait_seconds(self) -> float:
        """For the others to come to a sync: with `sync_seconds` one whose training has ended waits for the next one."""
        return self.sync_timeout_seconds + (self.sync_seconds or 0.0)

    @property
    def warmup_steps(self) -> int:
        return self.edit_warmup_steps


def _accept_warmup_steps(init: Callable[..., None]) -> Callable[..., None]:
    def __init__(self: EDiTConfig, **settings: Any) -> None:
        if "warmup_steps" in settings:  # wins over edit_warmup_steps, which dataclasses.replace always passes
            settings["edit_warmup_steps"] = settings.pop("warmup_steps")
        init(self, **settings)

    __init__.__doc__ = init.__doc__
    return __init__


EDiTConfig.__init__ = _accept_warmup_steps(EDiTConfig.__init__)  # type: ignore[method-assign]


def _read_mapping(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"edit_config={os.fspath(path)!r}: no such file. Give a path to a YAML or JSON file.")
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            return json.loads(text)
        import yaml  # a dependency of transformers and accelerate

        return yaml.safe_load(text) or {}
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {error}") from error
