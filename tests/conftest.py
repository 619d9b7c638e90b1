"""Test layers: unit (pure), dist (several ranks on threads or forked processes), launch (accelerate launch), gpu."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

# Nothing here may reach a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

torch.set_num_threads(1)  # several ranks share few cores


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n 2` one process runs the launches, which share processes and often wait, and one all other tests."""
    from xdist.scheduler import LoadScopeScheduling

    class Layers(LoadScopeScheduling):
        # Overridden as xdist's own schedulers do (3.8), whose groups have no effect with pytest 9.2. If it moves, tests
        # are dealt out module by module.
        def _split_scope(self, nodeid: str) -> str:
            return "launch" if nodeid.startswith("tests/launch/") else "others"

    return Layers(config, log)
