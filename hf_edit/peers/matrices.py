"""Whole matrices of what a replica's ranks hold rows of: each rank gets one, and gives what it makes of it back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_edit.peers.faults import start


def rows_by_rank(rows: int, size: int) -> list[int]:
    """How torch's `Shard(0)` deals the rows of a matrix out.

    >>> rows_by_rank(10, 4), rows_by_rank(5, 4)
    ([3, 3, 3, 1], [2, 2, 1, 0])
    """
    each = -(-rows // size)
    return [max(0, min(each, rows - rank * each)) for rank in range(size)]


class Round:
    """At most as many matrices as the group has ranks. Rank i gets matrix i whole, and what it makes of that goes back
    to all, each its own rows. All ranks of the group make the same rounds in the same order.

    Args:
        parts: this rank's rows of each matrix, [r_i, n_i], all of one dtype; on its way at once.
        shapes: of the whole matrices.
        group: of the ranks that hold them.
    """

    def __init__(self, parts: Sequence[Tensor], shapes: Sequence[torch.Size], group: Any) -> None:
        self._group, self._shapes = group, list(shapes)
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        self._sent = [part.numel() for part in parts] + [0] * (size - len(parts))
        self._got = [0] * size
        self._own = self._shapes[rank] if rank < len(parts) else None
        if self._own is not None:
            self._got = [rows * self._own[1] for rows in rows_by_rank(self._own[0], size)]
        self._flat = torch.cat([part.reshape(-1) for part in parts])
        self._received, self._work = self._exchange(self._flat, self._sent, self._got)

    def whole(self) -> Tensor | None:
        """This rank's matrix, or None where there are more ranks than matrices."""
        self._work.wait()
        return None if self._own is None else self._received.view(self._own)

    def give_back(self, made: Tensor | None) -> None:
        """Sends what was made of it, of the same shape and dtype."""
        flat = self._received if made is None else made.reshape(-1)
        self._flat, self._work = self._exchange(flat, self._got, self._sent)

    def parts(self) -> list[Tensor]:
        """This rank's rows of what was made of each matrix."""
        self._work.wait()
        pieces = self._flat.split(self._sent)
        return [piece.view(-1, shape[1]) for piece, shape in zip(pieces, self._shapes, strict=False)]

    def _exchange(self, flat: Tensor, sent: list[int], got: list[int]) -> tuple[Tensor, Any]:
        received, width = flat.new_empty(sum(got)), flat.element_size()
        # As bytes, because not every backend knows every dtype.
        work = start(
            dist.all_to_all_single,
            received.view(torch.uint8),
            flat.contiguous().view(torch.uint8),
            group=self._group,
            output_split_sizes=[width * count for count in got],
            input_split_sizes=[width * count for count in sent],
        )
        return received, work
