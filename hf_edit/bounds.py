"""What EDiTConfig takes: the bounds of each setting, and which settings exclude each other.

Every refusal is a ValueError that names the value, the rule and the way out.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args, get_origin, get_type_hints

AT_LEAST = {
    **dict.fromkeys(
        ("sync_interval", "num_replicas", "min_replicas", "delay_steps", "fragments", "units_in_flight"), 1
    ),
    **dict.fromkeys(("max_consecutive_anomalies", "max_consecutive_spikes", "sync_moments_every"), 1),
    **dict.fromkeys(("edit_warmup_steps", "ema_warmup_syncs", "outer_warmup_syncs"), 0),
}
ABOVE_ZERO = (
    "anomaly_threshold", "softmax_temperature", "max_pseudo_grad_norm", "outer_lr", "inner_lr_scale",
    "sync_timeout_seconds", "loss_spike_threshold", "heartbeat_seconds", "straggler_seconds",
)  # fmt: skip
TRUE_OR_FALSE = ("balance", "elastic", "momentum_follows_lr", "offload_outer_state")
NOT_INFINITE = {
    "sync_timeout_seconds": "a replica that never comes must be noticed; give an end to it",
    "heartbeat_seconds": "a replica that is gone must be noticed; give an end to it",
    "outer_lr": "a finite number is needed",
    "inner_lr_scale": "a finite number is needed",
}
NONE_IS_OFF = {
    "anomaly_threshold": ", or None to turn the z-test off",
    "max_pseudo_grad_norm": ", or None to turn clipping off",
}


def check(config: Any) -> None:
    """Of an EDiTConfig; raises ValueError where a value is out of range, or two settings exclude each other."""
    for name, least in AT_LEAST.items():
        value = getattr(config, name)
        if not _is_int(value, least) and not (value is None and name == "num_replicas"):
            hint = " Give sync_interval=1 to sync after every step." if name == "sync_interval" else ""
            raise ValueError(f"{name}={value!r}: a whole number of at least {least} is needed.{hint}")
    for name in ABOVE_ZERO:
        value = getattr(config, name)
        if value is None and name in NONE_IS_OFF:
            continue
        if not _is_number(value) or not value > 0:
            raise ValueError(f"{name}={value!r}: a number above 0 is needed{NONE_IS_OFF.get(name, '')}.")
        if value == math.inf and name in NOT_INFINITE:
            raise ValueError(f"{name}=inf: {NOT_INFINITE[name]}.")
    if not _is_number(config.outer_momentum) or not 0 <= config.outer_momentum < 1:
        raise ValueError(f"outer_momentum={config.outer_momentum!r}: a number in [0, 1) is needed.")
    if not _is_number(config.ema_alpha) or not 0 < config.ema_alpha <= 1:
        raise ValueError(f"ema_alpha={config.ema_alpha!r}: a number in (0, 1] is needed.")
    for name, choices in _choices(type(config)).items():
        value = getattr(config, name)
        if value not in choices and not (name == "outer_optimizer" and callable(value)):
            also = ", or a callable params -> torch.optim.Optimizer" if name == "outer_optimizer" else ""
            raise ValueError(f"{name}={value!r}: one of {', '.join(map(repr, choices))}{also} is needed.")
    for name in TRUE_OR_FALSE:
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"{name}={getattr(config, name)!r}: true or false is needed.")
    _check_triggers(config)
    _check_companions(config)
    if config.elastic:
        _check_elastic(config)


def _check_companions(config: Any) -> None:
    if config.tune != "off" and (config.overlap != "delayed" or config.sync_seconds is not None):
        raise ValueError(
            f"tune={config.tune!r} with overlap={config.overlap!r}, sync_seconds={config.sync_seconds}: it looks for "
            "an interval in steps that hides delayed syncs. Set overlap='delayed' and leave out sync_seconds."
        )
    if config.balance and config.sync_seconds is not None:
        raise ValueError(
            f"balance=True and sync_seconds={config.sync_seconds}: the one gives slow replicas fewer rows, the other "
            "fewer steps. Leave one of them out."
        )


def _check_elastic(config: Any) -> None:
    """What couples replicas, or needs all of them at one moment, cannot be had where each may be away."""
    if config.num_replicas is None or config.num_replicas < 2 or config.min_replicas > config.num_replicas:
        raise ValueError(
            f"elastic=True with num_replicas={config.num_replicas}, min_replicas={config.min_replicas}: each launch is "
            "one replica and must be told of how many it is. Set num_replicas to at least 2, and min_replicas to "
            "at most that."
        )
    if config.overlap == "forward":
        raise ValueError(
            'elastic=True with overlap="forward": it writes unit by unit, and a sync that fails halfway could not '
            'be taken back. Set overlap="delayed", or "none".'
        )
    wrong = {
        "edit_warmup_steps": config.edit_warmup_steps > 0, "fragments": config.fragments > 1, "balance": config.balance,
        "tune": config.tune != "off", "outer_optimizer": callable(config.outer_optimizer),
    }  # fmt: skip
    for name in (name for name, given in wrong.items() if given):
        raise ValueError(
            f"elastic=True with {name}={getattr(config, name)!r}, which counts on all replicas being here, "
            f"or on state that cannot be sent. Leave {name} out."
        )


def _choices(kind: type) -> dict[str, tuple[str, ...]]:
    """What the settings take that are one of a few words."""
    literals = {name: get_args(hint) for name, hint in get_type_hints(kind).items() if get_origin(hint) is Literal}
    return {"outer_optimizer": ("nesterov", "sgd", "none"), **literals}


def _check_triggers(config: Any) -> None:
    if config.sync_interval_end is not None:
        _check_interval_end(config, config.sync_interval_end)
    if config.sync_seconds is None:
        parts = config.fragments
        if config.sync_interval % parts:
            raise ValueError(
                f"fragments={parts} does not divide sync_interval={config.sync_interval}: a fragment is synced every "
                f"sync_interval / fragments inner steps. Set sync_interval to a multiple of {parts}."
            )
        steps = config.sync_interval // parts
        if config.overlap == "delayed" and config.delay_steps > steps:
            share = "" if parts == 1 else f" / fragments={parts} = {steps}"
            raise ValueError(
                f"delay_steps={config.delay_steps}, but a sync begins every sync_interval={config.sync_interval}"
                f"{share} inner steps: a delayed one must be applied by then. Set delay_steps to at most {steps}."
            )
        return
    if not _is_number(config.sync_seconds) or not 0 < config.sync_seconds < math.inf:
        raise ValueError(f"sync_seconds={config.sync_seconds!r}: a number of seconds above 0 is needed.")
    if config.sync_interval != type(config).sync_interval:
        raise ValueError(
            f"sync_interval={config.sync_interval} and sync_seconds={config.sync_seconds} are both set, but a sync has "
            "one trigger. Leave out sync_seconds to sync by steps, or sync_interval to sync by time (A-EDiT)."
        )


def _check_interval_end(config: Any, end: int) -> None:
    least = config.delay_steps * config.fragments if config.overlap == "delayed" else config.fragments
    if not _is_int(end, at_least=1) or end < least:
        raise ValueError(
            f"sync_interval_end={end!r}: a whole number of at least {least} is needed (fragments, times delay_steps"
            " of delayed syncs)."
        )
    if config.sync_seconds is not None or config.tune == "auto":
        raise ValueError(
            f"sync_interval_end={end} with sync_seconds={config.sync_seconds}, tune={config.tune!r}: the interval has "
            "one master. Leave the others out."
        )


def _is_int(value: Any, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
