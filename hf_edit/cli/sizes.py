"""How large a model is: its units, what a sync of them sends, and what EDiT keeps of them in memory."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hf_edit.cli.job import MOMENTS
from hf_edit.config import EDiTConfig
from hf_edit.sync.units import find_units


def model_config(source: str) -> Any:
    """The transformers configuration in a folder or config.json, in the local cache, or the default of a model type.

    Raises:
        ValueError: none of these; nothing is downloaded.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if source in CONFIG_MAPPING and not Path(source).exists():
        return AutoConfig.for_model(source)
    try:
        return AutoConfig.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model {source}: there is no configuration of transformers in it, and none of this name in the local "
            "cache. Give a folder or a config.json (nothing is downloaded), or --parameters 1.1b."
        ) from error


def build_model(config: Any) -> nn.Module:
    """The model of a configuration, untrained: of the architecture that it names, else a language model or a base."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        if (kind := getattr(transformers, name, None)) is not None:
            model: nn.Module = kind(config)
            return model
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    made: nn.Module = auto.from_config(config)
    return made


def unit_sizes(model: nn.Module) -> list[int]:
    """Trained parameters of each unit."""
    return [sum(param.numel() for param in unit.params) for unit in find_units(model)]


def keeps_momentum(config: EDiTConfig) -> bool:
    """True if there is an outer momentum beside the anchor."""
    return config.outer_optimizer != "none" and config.outer_momentum > 0


def moments(config: EDiTConfig) -> int:
    """Moments of the inner optimizer that a sync averages, too; fp32, whatever the codes."""
    return MOMENTS.index(config.sync_moments)


def memory_bytes(config: EDiTConfig, sizes: Sequence[int], num_ranks: int, pinned: bool = False) -> dict[str, float]:
    """What EDiT holds on a rank beside the training's own: its state always, buffers during a sync.

    Args:
        sizes: trained parameters of each unit.
        num_ranks: of a replica, over which they are sharded.
        pinned: what is in host memory is, as for CUDA, each tensor rounded up to a power of two (torch 2.13).
    """
    whole, largest = 4 * sum(sizes) / num_ranks, 4 * max(sizes) / num_ranks
    in_host = whole
    if pinned:
        in_host = sum(float(1 << (math.ceil(4 * size / num_ranks) - 1).bit_length()) for size in sizes)
    # A residual is kept, and the next one beside the sum until a sync is applied; "auto" may come to codes at any time.
    coded = config.compression != "none" or config.tune == "auto"
    at_a_time = config.units_in_flight + coded
    flying = 4 * max(sum(sizes[i : i + at_a_time]) for i in range(len(sizes))) / num_ranks
    kept = 1 + keeps_momentum(config)
    more = coded + moments(config)
    at_begin = (2 + moments(config)) * largest  # what is read, and is on its way to the host
    buffers = {"none": whole * (1 + more), "forward": flying * (1 + more), "delayed": at_begin}[config.overlap]
    if config.offload_outer_state:  # comes to the device for a unit's step
        buffers += kept * largest
    state = kept + (coded and config.overlap != "delayed")
    host = (2 + 2 * more) * in_host if config.overlap == "delayed" else 0.0
    return {"state": state * (in_host if config.offload_outer_state else whole), "buffers": buffers, "host": host}


def amount(text: str) -> int:
    """
    >>> amount("1.1b"), amount("350M"), amount("2097152")
    (1100000000, 350000000, 2097152)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmbt]?)", text.lower().replace("_", ""))
    number = round(float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[found[2]]) if found else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a number of parameters such as 350m or 1.1b is needed")
    return number


def show_bytes(number: float) -> str:
    """
    >>> show_bytes(4.4e9), show_bytes(36.5e6), show_bytes(1.2e13)
    ('4.4 GB', '36.5 MB', '12 TB')
    """
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"


def show_count(number: int) -> str:
    """
    >>> show_count(1_100_048_384), show_count(70_000_000_000), show_count(124_400)
    ('1.1 billion', '70 billion', '0.1244 million')
    """
    return f"{number / 1e9:.4g} billion" if number >= 1e9 else f"{number / 1e6:.4g} million"


def show_rate(bits_per_second: float) -> str:
    """
    >>> show_rate(9.4e9), show_rate(93_210_000)
    ('9.4 Gbit/s', '93.2 Mbit/s')
    """
    scale, unit = (1e9, "Gbit/s") if bits_per_second >= 1e9 else (1e6, "Mbit/s")
    return f"{bits_per_second / scale:.3g} {unit}"
