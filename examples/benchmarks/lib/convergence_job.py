"""One training of the convergence benchmark: which method, what goes wrong in it, and what its ranks get."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

GROWING = {"sync_interval": 4, "sync_interval_end": 28}  # 46 syncs in 576 steps, where one of 16 steps has 36

# Each method: an EDiTConfig preset, None for the defaults but without momentum_follows_lr, which most runs here were
# made before (the defaults are "edit-follows-lr"), and what differs from it. "sync" is the plain Trainer over
# all ranks; "sync-same-time" too, with as many steps, and a schedule over these, as it has time for in EDiT's.
METHODS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "sync": (None, {"num_replicas": 1}),
    "sync-same-time": (None, {"num_replicas": 1}),
    "post-local-sgd": ("post-local-sgd", {}),
    "diloco": ("diloco", {}),
    "edit": (None, {}),
    "edit-paper-outer": ("edit", {}),
    "a-edit": (None, {}),  # with sync_seconds in the place of sync_interval
    "edit-delayed": (None, {"overlap": "delayed"}),
    "edit-bf16": (None, {"compression": "bf16"}),
    "edit-int8": (None, {"compression": "int8"}),
    "edit-int4": (None, {"compression": "int4"}),
    "edit-fragments": (None, {"fragments": 4}),
    "co2": ("co2", {}),
    "streaming-diloco": ("streaming-diloco", {}),
    "edit-moments": (None, {"sync_moments": "both"}),
    "edit-first-moments": (None, {"sync_moments": "first"}),
    "edit-moments-4": (None, {"sync_moments": "both", "sync_moments_every": 4}),
    "edit-follows-lr": (None, {"momentum_follows_lr": True}),
    "edit-moments-follows-lr": (None, {"sync_moments": "both", "momentum_follows_lr": True}),
    "edit-growing": (None, {"momentum_follows_lr": True, **GROWING}),
    "edit-inner-1.4": (None, {"momentum_follows_lr": True, "inner_lr_scale": 1.4}),
    "edit-inner-2": (None, {"momentum_follows_lr": True, "inner_lr_scale": 2.0}),
    "edit-moments-inner-1.4": (
        None,
        {"sync_moments": "both", "momentum_follows_lr": True, "inner_lr_scale": 1.4},
    ),
    "edit-moments-inner-2": (None, {"sync_moments": "both", "momentum_follows_lr": True, "inner_lr_scale": 2.0}),
    "edit-delayed-follows-lr": (None, {"overlap": "delayed", "momentum_follows_lr": True}),
    "edit-delayed-2": (None, {"overlap": "delayed", "delay_steps": 2, "momentum_follows_lr": True}),
    "edit-delayed-1-int8": (
        None,
        {"overlap": "delayed", "delay_steps": 1, "compression": "int8", "momentum_follows_lr": True},
    ),
    "edit-delayed-moments-follows-lr": (
        None,
        {"sync_moments": "both", "momentum_follows_lr": True, "overlap": "delayed"},
    ),
    "edit-delayed-moments-inner-1.4": (
        None,
        {"sync_moments": "both", "momentum_follows_lr": True, "inner_lr_scale": 1.4, "overlap": "delayed"},
    ),
    "edit-balance": (None, {"balance": True, "momentum_follows_lr": True}),  # one replica is four times slower
    "edit-length": (None, {"averaging": "length"}),
    "edit-shrinking": (None, {"sync_interval": 24, "sync_interval_end": 8}),
    "average-moments": ("post-local-sgd", {"sync_moments": "both"}),
    "edit-muon": ("muon", {}),
    "edit-muon-growing": ("muon", GROWING),
    "edit-muon-delayed": ("muon", {"overlap": "delayed"}),
    "average-length": ("post-local-sgd", {"averaging": "length"}),
    "edit-no-elimination": (None, {"anomaly_threshold": None}),
    "edit-no-weighting": (None, {"weighting": "uniform"}),
    "edit-no-clipping": (None, {"max_pseudo_grad_norm": None}),
    "edit-skip": (None, {"on_loss_spike": "skip"}),
    "edit-rollback": (None, {"on_loss_spike": "rollback"}),
    "edit-stop": (None, {"on_loss_spike": "stop"}),
    "edit-skip-64": (None, {"on_loss_spike": "skip", "max_consecutive_spikes": 64}),
}
COMPARED = ("sync", "post-local-sgd", "diloco", "edit", "edit-paper-outer", "edit-delayed", "a-edit")
ABLATED = ("sync", "diloco", "edit", "edit-no-elimination", "edit-no-weighting", "edit-no-clipping")
COMPRESSED = ("edit", "edit-bf16", "edit-int8", "edit-int4", "edit-fragments")
RESPONSES = ("edit-skip", "edit-rollback", "edit-stop", "edit-skip-64")  # without a fault they are edit
BY_TIME = ("a-edit",)
UNEVEN = ("edit-balance",)  # whose last replica is four times slower
SYNCHRONOUS = ("sync", "sync-same-time")

# What each scenario does to the last replica, or to all: random bytes for text, null bytes as of a file that was lost
# and only has its length, labels in a wrong order, a learning rate that is too high, or a loss that is NaN once.
SCENARIOS = {
    "clean": "nothing goes wrong",
    "corrupt": "one replica reads random bytes",
    "zeros": "one replica reads null bytes",
    "labels": "one replica's labels are shuffled",
    "spike": "one replica's learning rate is too high",
    "spike-all": "every replica's learning rate is too high",
    "nan": "the loss of one step of one replica is NaN",
}
ON_ONE_REPLICA = ("corrupt", "zeros", "labels", "spike", "nan")


def default_methods(scenario: str) -> tuple[str, ...]:
    """What is compared when nothing goes wrong, and what the penalty's parts do when something does."""
    return COMPARED if scenario == "clean" else ABLATED


def applies(scenario: str, method: str) -> bool:
    """False where all replicas share one learning rate, so that it cannot be too high on one alone."""
    return not (scenario == "spike" and method in SYNCHRONOUS)


def fault_steps(scenario: str, text_steps: int, rate_steps: int) -> int:
    """How many steps go wrong."""
    return 1 if scenario == "nan" else rate_steps if scenario.startswith("spike") else text_steps


@dataclass(frozen=True)
class Job:
    """What every rank of one training gets.

    Args:
        sync_seconds: between the syncs of a method that syncs by time; None: by steps.
        batch: sequences of one rank in a step.
        block: bytes of a sequence.
        warmup: synchronous steps first.
        fault_first, fault_steps: the first step that goes wrong, counted from 0, and how many do.
        fault_factor: by which the learning rate is multiplied then.
        sharded: FSDP2 over the ranks of a replica.
        report: file for the figures.
        optimizer: inside; "adamw" or "muon".
        base: folder of the model to begin with; None: a new one.
        lora: train adapters of it alone.
        save_to: folder for the model at the end.
        bf16: bf16 autocast and torch.compile.
    """

    method: str
    scenario: str
    seed: int
    num_replicas: int
    sharded: bool
    steps: int
    tau: int
    sync_seconds: float | None
    warmup: int
    batch: int
    block: int
    hidden_size: int
    layers: int
    learning_rate: float
    evaluations: int
    validation_blocks: int
    fault_first: int
    fault_steps: int
    fault_factor: float
    train_file: str | None
    validation_file: str | None
    report: str
    optimizer: str = "adamw"
    base: str | None = None
    lora: bool = False
    save_to: str | None = None
    bf16: bool = False

    @property
    def num_units(self) -> int:
        """Embeddings, each block, final norm with the head."""
        return self.layers + 2

    @property
    def edit_settings(self) -> tuple[str | None, dict[str, Any]]:
        """An EDiTConfig preset's name or None, and the settings on top of it."""
        preset, settings = METHODS[self.method]
        trigger = {"sync_interval": self.tau} if self.sync_seconds is None else {"sync_seconds": self.sync_seconds}
        before = {} if preset else {"momentum_follows_lr": False}
        common = {"num_replicas": self.num_replicas, **trigger, "edit_warmup_steps": self.warmup}
        return preset, {**before, **common, **settings}

    @property
    def eval_steps(self) -> int:
        """Steps between evaluations: a multiple of tau, so that they fall on syncs if the warm-up is one, too.

        With tau 16 and 640 steps, 8 evaluations are 80 steps apart.
        """
        return max(round(self.steps / self.evaluations / self.tau), 1) * self.tau

    def is_faulty(self, step: int, replica: int) -> bool:
        """True if something goes wrong on `replica` in `step`, counted from 0."""
        if self.scenario == "clean" or not self.fault_first <= step < self.fault_first + self.fault_steps:
            return False
        return self.scenario not in ON_ONE_REPLICA or replica == self.num_replicas - 1

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        return cls(**json.loads(text))
