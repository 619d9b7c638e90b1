"""Test layers: unit (pure), dist (several ranks on threads or forked processes), launch (accelerate launch), gpu."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Nothing here may reach a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

torch.set_num_threads(1)  # several ranks share few cores


@pytest.hookimpl(tryfirst=True)  # pytest-xdist looks for the groups in this hook, too
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `-n 2 --dist loadgroup`: launches, which share processes, beside all other tests."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            launched = Path(__file__).parent / "launch" in item.path.parents
            item.add_marker(pytest.mark.xdist_group("launch" if launched else "others"))
