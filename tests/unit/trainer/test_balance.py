"""Who reads which rows, whatever the shares."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor
from torch.utils.data import BatchSampler, SequentialSampler

from hf_edit.method.balance import Balance
from hf_edit.peers.layout import Layout
from hf_edit.trainer.balance import TrainerBalance, UnevenBatchSampler, _cut, _num_rows

LAYOUT = Layout(2, 2, 0)
Plan = list[tuple[tuple[int, int], list[int]]]


def dealt(num_rows: int, plan: Plan, drop_last: bool = False, epoch: int = 0) -> list[list[list[int]]]:
    """The batches of each rank, as Accelerate takes them."""
    found = []
    for rank in range(4):
        inner = BatchSampler(SequentialSampler(range(num_rows)), 3, drop_last)
        uneven = UnevenBatchSampler(inner, LAYOUT, plan)
        uneven.set_epoch(epoch)
        shard: Any = BatchSamplerShard(inner, 4, rank)
        shard.batch_sampler, shard.batch_size, shard.even_batches = uneven, None, False
        batches = list(shard)
        assert len(shard) == len(batches)
        found.append(batches)
    return found


@pytest.mark.parametrize("num_rows", [24, 30, 7, 5])
@pytest.mark.parametrize("drop_last", [False, True])
def test_equal_shares_are_accelerates(num_rows: int, drop_last: bool) -> None:
    usual = [
        list(BatchSamplerShard(BatchSampler(SequentialSampler(range(num_rows)), 3, drop_last), 4, rank))
        for rank in range(4)
    ]
    assert dealt(num_rows, [((0, 0), [3, 3])], drop_last) == usual


def test_shares_hold_from_their_batch_on() -> None:
    plan: Plan = [((0, 0), [3, 3]), ((0, 1), [5, 1]), ((1, 0), [2, 4])]
    ranks = dealt(36, plan)
    assert [[len(batch) for batch in rank] for rank in ranks] == [[3, 5, 5], [3, 5, 5], [3, 1, 1], [3, 1, 1]]
    assert sorted(row for rank in ranks for batch in rank for row in batch) == list(range(36))
    assert [[len(batch) for batch in rank] for rank in dealt(36, plan, epoch=1)] == [[2] * 3] * 2 + [[4] * 3] * 2


def test_batches_are_cut_by_rows() -> None:
    batch = {"input_ids": torch.arange(10).view(5, 2), "names": list("abcde"), "scale": torch.tensor(2.0), "kind": "x"}
    assert _num_rows(batch) == 5
    piece = {name: _cut(value, 3, 6, 5) for name, value in batch.items()}
    assert piece["input_ids"].tolist() == [[6, 7], [8, 9]]
    assert piece["names"] == ["d", "e"]
    assert (float(piece["scale"]), piece["kind"]) == (2.0, "x")
    with pytest.raises(ValueError, match=r"tensors of \[1, 5\] rows"):
        _num_rows({**batch, "packed": torch.zeros(1, 10)})


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


class MeanTrainer:
    """What a Trainer does whose loss is a mean over labels: 0/0 where there is none."""

    def __init__(self) -> None:
        self.model, self.current_gradient_accumulation_steps = Net(), 2
        self.seen: list[int] = []
        self.accelerator = self

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Tensor:
        self.seen.append(len(inputs["x"]))
        logits = model(inputs["x"])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), inputs["labels"].flatten(), ignore_index=-100)
        loss = loss / self.current_gradient_accumulation_steps
        (0 * logits.sum() if self.without else loss).backward()
        return loss.detach()

    without = False

    @contextlib.contextmanager
    def without_gradient(self, model: Any) -> Iterator[None]:
        self.without = True
        yield
        self.without = False


class InPieces(TrainerBalance, MeanTrainer):
    _loss_shifts_labels = False

    def __init__(self, size: int, rows: int) -> None:
        MeanTrainer.__init__(self)
        self._balance, self._plan = Balance([rows]), [((0, 0), [rows])]
        self.edit_layout, self._train_batch_size = Layout(1, 1, 0), size
        self._engine = SimpleNamespace(warming_up=False)


@pytest.mark.parametrize("labels", ["all", "some", "none of a piece", "of rows"])
def test_a_share_in_pieces_is_its_whole(labels: str) -> None:
    """Its loss and its gradient, also where a piece has fewer labels than another, or none at all."""
    x, target = torch.randn(7, 3, 4), torch.randint(5, (7, 3))
    if labels == "some":
        target[0, 1:] = target[4] = target[6, 0] = -100
    elif labels == "none of a piece":
        target[3:6] = -100
    elif labels == "of rows":
        x, target = x[:, 0], target[:, 0]
    plain, pieces = MeanTrainer(), InPieces(3, 7)
    expected = plain.training_step(plain.model, {"x": x, "labels": target}, None)
    found = pieces._step_in_pieces(pieces.model, {"x": x, "labels": target}, None)
    assert pieces.seen == [2, 2, 3]
    assert pieces.current_gradient_accumulation_steps == 2
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(pieces.model.head.weight.grad, plain.model.head.weight.grad)
