"""Who reads which rows, whatever the shares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler

from hf_edit.peers.layout import Layout
from hf_edit.trainer.balance import UnevenBatchSampler, _cut, _num_rows

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
