"""Settings that find themselves at work: what they are is in tests/unit/method/test_tuning.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_edit.config import EDiTConfig
from hf_edit.method.tuning import Tuned
from tests.dist.test_by_time import Replica
from tests.dist.test_checkpoints import Trained, differing
from tests.dist.threads import run_ranks


class OnALink(Replica):
    """A step takes 1 s, and a sync `network` seconds for its 4 bytes a number, or as much less as it sends."""

    def __init__(self, rank: int, network: float, **settings: Any) -> None:
        shared = dict(overlap="delayed", sync_interval=32, delay_steps=4, weighting="uniform", tune="auto")
        super().__init__(rank, 2, step_seconds=1.0, gradient=1.0, **{**shared, **settings})
        self.network = network
        peers = self.engine.peers
        peers.all_reduce = self._slowed(peers.all_reduce, 1.0)  # type: ignore[method-assign]
        # For one number a block of codes goes out: taken for as many bytes as it would be in a large tensor.
        peers.all_to_all = self._slowed(peers.all_to_all, 0.25)  # type: ignore[attr-defined]

    def beside(self, job: Any) -> Any:
        """While the network is at work, the training's time goes on by itself."""
        before, result = self.now, super().beside(job)
        self.now = before
        return result

    def _slowed(self, call: Callable[..., Any], share: float) -> Callable[..., Any]:
        def slowed(*tensors: Any) -> Any:
            self.now += share * self.network
            return call(*tensors)

        return slowed


@pytest.mark.parametrize(
    ("network", "changed_at", "settings"),
    [
        (2.0, 4, Tuned(16, 4, "none")),  # shorter once three measurements say so: of syncs 1 to 3, told at 2 to 4
        (40.0, 2, Tuned(16, 14, "int8")),  # at once: 40 s would take 51 steps, a quarter 14
    ],
)
def test_all_ranks_change_at_the_same_sync(network: float, changed_at: int, settings: Tuned) -> None:
    def body(rank: int) -> Any:
        replica = OnALink(rank, network)
        for _ in range(200):
            replica.step()
        engine = replica.engine
        engine.flush()
        records = engine.sync.take_records()
        notes = [record.sync for record in records if record.note]
        assert notes[0] == changed_at, [record.note for record in records]
        assert "was 32, 4, none" in records[changed_at - 1].note
        assert records[0].settings == {"sync_interval": 32.0, "delay_steps": 4.0, "bytes_per_parameter": 4.0}
        assert engine.schedule.sync_interval == records[-1].settings["sync_interval"]
        steps = [float(record.plan.tallies["interval_steps"][0]) for record in records]
        assert steps[:changed_at] == [32.0] * changed_at
        return engine.tuning.settings, steps, replica.value

    one, other = run_ranks(2, body)
    assert one == other
    assert one[0] == settings
    assert set(one[1][changed_at:-1]) == {16.0}
    assert one[2] == pytest.approx(-200.0, rel=0.01), "each step has moved the parameter by 1"


def test_advice_changes_nothing_and_is_said_once() -> None:
    def body(rank: int) -> Any:
        replica = OnALink(rank, 40.0, tune="advise")
        for _ in range(200):
            replica.step()
        return replica.engine.tuning.settings, [r.note for r in replica.engine.sync.take_records() if r.note]

    for settings, notes in run_ranks(2, body):
        assert settings == Tuned(32, 4, "none")
        assert len(notes) == 1
        assert notes[0].startswith("advised: a step takes 1 s and a sync as int8 10.2 s of the network")


AUTO = dict(overlap="delayed", delay_steps=1, sync_interval=2, tune="auto", weighting="uniform")


def saved_with_other_settings(folder: Path) -> Trained:
    """Of step 12, for five of which it had the configuration's."""
    one = Trained(2, "adam", **AUTO)
    one.train(0, 5)
    one.engine.flush()
    one.engine.tuning._hold(Tuned(3, 2, "int4"))
    one.train(5, 12)
    one.engine.flush()
    one.save(folder, step=12)
    return one


def test_it_goes_on_from_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With codes that the configuration does not name, and so with residuals."""

    def body(rank: int) -> Any:
        # A clock that stands still gives nothing to be tuned by.
        monkeypatch.setattr(Trained, "clock", staticmethod(lambda: 0.0))
        one = saved_with_other_settings(tmp_path / "saved")
        other = Trained(2, "adam", **AUTO)
        other.load(tmp_path / "saved")
        assert other.engine.tuning.settings == one.engine.tuning.settings
        assert other.engine.schedule.sync_interval == one.engine.schedule.sync_interval
        at_once = differing(one.state(), other.state())
        one.train(12, 14)
        other.train(12, 14)
        return at_once, differing(one.state(), other.state()), torch.stack(
            [residual.abs().sum() for residual in other.engine.sync.reduction.residuals]
        ).min().item() > 0  # fmt: skip

    assert run_ranks(2, body) == [([], [], True)] * 2


@pytest.mark.parametrize("changed", [dict(tune="advise"), dict(sync_interval=4), dict(compression="bf16")])
def test_a_run_that_is_set_otherwise_begins_with_its_own_settings(changed: dict[str, Any], tmp_path: Path) -> None:
    def body(rank: int) -> Any:
        saved_with_other_settings(tmp_path / "saved")
        other = Trained(2, "adam", **{**AUTO, **changed})
        other.load(tmp_path / "saved")
        tuning = other.engine.tuning
        return tuning.settings == tuning._tuner.wanted, tuning._tuner.history

    assert run_ranks(2, body) == [(True, [])] * 2


def test_what_cannot_be_tuned_is_refused() -> None:
    with pytest.raises(ValueError, match="tune='auto' with overlap='forward'"):
        EDiTConfig(tune="auto")
    with pytest.raises(ValueError, match="tune='advise' with overlap='delayed', sync_seconds=3"):
        EDiTConfig(tune="advise", overlap="delayed", sync_seconds=3.0)
