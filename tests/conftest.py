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

# In tests/launch, what has launches of its own.
ALONE = {
    f"tests/launch/test_{name}.py"
    for name in ("check", "elastic", "examples", "losing", "recipes", "refusals", "report_page", "traffic")
}

torch.set_num_threads(1)  # several ranks share few cores


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n 3` one process runs what shares launches, one other launches, and one all other tests; so two cores have
    work while one of them waits."""
    from xdist.scheduler import LoadScopeScheduling

    class Layers(LoadScopeScheduling):
        # Overridden as xdist's own schedulers do (3.8), whose groups have no effect with pytest 9.2. If it moves, tests
        # are dealt out module by module.
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if not file.startswith("tests/launch/"):
                return "others"
            return "own launches" if file in ALONE else "shared launches"

    return Layers(config, log)
