"""EDiT for Hugging Face: replicas train alone between outer syncs (arXiv 2412.07210).

The names below are loaded on first use, so that `import hf_edit` costs no more than `import torch`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_edit.config import EDiTConfig as EDiTConfig
    from hf_edit.optim.muon import MuonAdamW as MuonAdamW
    from hf_edit.optim.muon import muon as muon
    from hf_edit.telemetry.logs import EDiTStats as EDiTStats
    from hf_edit.trainer.loop import EDiT as EDiT
    from hf_edit.trainer.trainer import EDiTMixin as EDiTMixin
    from hf_edit.trainer.trainer import EDiTTrainer as EDiTTrainer

__version__ = "0.1.0"
__all__ = ["EDiT", "EDiTConfig", "EDiTMixin", "EDiTStats", "EDiTTrainer", "MuonAdamW", "muon"]

_HOMES = {
    "EDiT": "hf_edit.trainer.loop",
    "EDiTConfig": "hf_edit.config",
    "EDiTMixin": "hf_edit.trainer.trainer",
    "EDiTStats": "hf_edit.telemetry.logs",
    "EDiTTrainer": "hf_edit.trainer.trainer",
    "MuonAdamW": "hf_edit.optim.muon",
    "muon": "hf_edit.optim.muon",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_edit' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
