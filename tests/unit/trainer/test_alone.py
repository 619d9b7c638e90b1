"""`EDiT` in one process: nothing to sync, and the same checkpoints as with several replicas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hf_edit import EDiT, EDiTConfig
from hf_edit.checkpoint.manifest import Manifest, problem


def test_one_replica_saves_and_loads_in_the_common_format(tmp_path: Path) -> None:
    def loop() -> tuple[EDiT, nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        accelerator = EDiT.accelerator(config, cpu=True)
        model, optimizer = accelerator.prepare(net := nn.Linear(3, 2), torch.optim.Adam(net.parameters()))
        return EDiT(accelerator, model, optimizer, config), model, optimizer

    def train(edit: EDiT, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for step in range(steps):
            model(torch.full((1, 3), float(step))).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            edit.step()

    config = EDiTConfig(num_replicas=1)
    edit, model, optimizer = loop()
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer.optimizer, factor=1.0)  # type: ignore[attr-defined]
    train(edit, model, optimizer, 4)
    edit.save(tmp_path / "saved", scheduler=scheduler)
    assert problem(tmp_path / "saved", trainer=False) is None
    assert Manifest.read(tmp_path / "saved").parts == [0]
    train(edit, model, optimizer, 3)
    assert edit.progress == 7

    other, resumed, resumed_optimizer = loop()
    assert other.load(tmp_path / "saved", scheduler=scheduler) == 4
    assert other.progress == 4
    train(other, resumed, resumed_optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"was saved without \['ema'\]; it keeps \['scheduler'\]"):
        other.load(tmp_path / "saved", ema=scheduler)
    with pytest.raises(ValueError, match="it has no edit/"):
        other.load(tmp_path)
