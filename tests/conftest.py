"""Test layers: unit (pure), dist (several ranks on threads or forked processes), launch (accelerate launch), gpu."""

from __future__ import annotations

import os

import torch

# Nothing here may reach a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

torch.set_num_threads(1)  # several ranks share few cores
