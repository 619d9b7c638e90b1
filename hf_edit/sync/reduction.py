"""How the members' weighed pseudo-gradients of a unit are summed: as they are, or as codes with error feedback."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from hf_edit.method.compression import Codec, chunk_size
from hf_edit.method.penalty import weighed
from hf_edit.peers.group import Conversation
from hf_edit.sync.measure import Scratch

PIECE = 8 << 20  # numbers that go together, so that one piece is on its way while another one is encoded


class Sum(Protocol):
    """A sum under way. All members call its methods, of all units, in the same order."""

    def advance(self) -> None:
        """Sends what can be sent only after others have come; may wait for them."""
        ...

    def wait(self) -> Tensor:
        """The sum [n] fp32, equal on all members; on CUDA the current stream waits for it."""
        ...

    def keep(self) -> None:
        """The sync was committed: what has changed in the reduction is to stay."""
        ...


@dataclass
class Reduction:
    """Sums over the members, unit by unit: as they are, or with a `codec` as codes.

    Then each member owns a chunk of the unit: it gets the others' codes of it (all-to-all), sums in fp32, and sends
    codes of the sum to all (all-gather). What a member's codes leave out, and those of the sum that it owns, is its
    residual, which it adds to what it sends in the next sync that it weighs anything in. So nothing of what was learnt
    is lost, and no residual depends on who owned what.

    `residuals` are of each unit [n] fp32; none before the first codec.
    """

    peers: Conversation
    codec: Codec | None = None
    residuals: list[Tensor] = field(default_factory=list)

    @property
    def stages(self) -> int:
        """Exchanges of a sum that follow one another."""
        return 1 if self.codec is None else 2

    def start(self, unit: int, delta: Tensor, weight: float, members: Sequence[int], scratch: Scratch | None) -> Sum:
        """Starts the sum of each member's `weight` times its pseudo-gradient `delta` [n].

        Args:
            scratch: where buffers come from if `delta` is needed again; None: it can be used up.
        """
        if self.codec is None:
            return _WholeSum(self, unit, delta, weight, scratch)
        return _CompressedSum(self, self.codec, unit, delta, weight, members, scratch)


class _WholeSum:
    def __init__(self, owner: Reduction, unit: int, delta: Tensor, weight: float, scratch: Scratch | None) -> None:
        out = delta if scratch is None else scratch.take(delta)
        self._left: Tensor | None = None  # by codes that were in use before; it goes now
        if owner.residuals and weight != 0.0:
            self._left = owner.residuals[unit]
            torch.add(self._left.to(delta.device, non_blocking=True), delta, alpha=weight, out=out)
        else:
            weighed(delta, weight, out=out)
        self._sum, self._work = out, owner.peers.all_reduce([out])

    def advance(self) -> None:
        """There is one exchange alone."""

    def wait(self) -> Tensor:
        self._work.wait()
        return self._sum

    def keep(self) -> None:
        if self._left is not None:  # in order behind the copy that may still read it
            self._left.copy_(torch.zeros_like(self._sum), non_blocking=True)


class _CompressedSum:
    def __init__(
        self, owner: Reduction, codec: Codec, unit: int, delta: Tensor, weight: float, members: Sequence[int],
        scratch: Scratch | None,
    ) -> None:  # fmt: skip
        self._residuals, self._unit, self._scratch = owner.residuals, unit, scratch
        residual = owner.residuals[unit].to(delta.device, non_blocking=True)
        # What is to be sent, and bit by bit becomes the residual after it.
        self._rest = delta if scratch is None else scratch.take(delta)
        if weight == 0.0:  # it sends nothing, and what it has kept waits for a sync that it takes part in
            self._rest.copy_(residual)
        else:
            torch.add(residual, delta, alpha=weight, out=self._rest)
        own = members.index(owner.peers.replica)
        self._pieces = [
            _Piece(owner.peers, codec, rest, own, len(members), weight != 0.0) for rest in self._rest.split(PIECE)
        ]
        self._advanced = False

    def advance(self) -> None:
        for piece in () if self._advanced else self._pieces:
            piece.sum_chunk()
        self._advanced = True

    def wait(self) -> Tensor:
        self.advance()
        total = torch.empty_like(self._rest) if self._scratch is None else self._scratch.take(self._rest)
        for piece, out in zip(self._pieces, total.split(PIECE), strict=True):
            piece.take_sum(out)
        return total

    def keep(self) -> None:
        residual = self._residuals[self._unit]
        if residual.device != self._rest.device:
            residual.copy_(self._rest, non_blocking=True)
            return
        self._residuals[self._unit] = self._rest
        if self._scratch is not None:
            self._scratch.give(residual)


class _Piece:
    """What of a unit goes together.

    Args:
        rest: [n], what this member sends; its codes are taken off.
        speaks: False: zeros are sent.
    """

    def __init__(
        self, peers: Conversation, codec: Codec, rest: Tensor, own: int, num_members: int, speaks: bool
    ) -> None:
        self._peers, self._codec, self._own = peers, codec, own
        self._chunk = chunk_size(len(rest), num_members, codec.block)
        self._chunks = _chunks(rest, self._chunk, num_members)
        num_bytes = codec.num_bytes(self._chunk)
        sent = torch.zeros(num_members, num_bytes, dtype=torch.uint8, device=rest.device)
        for chunk, message in zip(self._chunks, sent, strict=True):
            if speaks:
                codec.encode(chunk, message)
        self._received = torch.empty_like(sent)
        self._work = peers.all_to_all(self._received, sent)

    def sum_chunk(self) -> None:
        self._work.wait()
        mine = self._chunks[self._own]
        total = torch.zeros_like(mine)
        for message in self._received:
            self._codec.decode(message, total, add=True)
        sent = torch.zeros_like(self._received[0])
        self._codec.encode(total, sent)
        mine.add_(total)
        self._work = self._peers.all_gather(self._received, sent)

    def take_sum(self, out: Tensor) -> None:
        self._work.wait()
        for chunk, message in zip(_chunks(out, self._chunk, len(self._received)), self._received, strict=True):
            self._codec.decode(message, chunk)


def _chunks(values: Tensor, size: int, count: int) -> list[Tensor]:
    """`count` pieces of `size`, of which the last ones are what is left."""
    return [values[i * size : (i + 1) * size] for i in range(count)]
