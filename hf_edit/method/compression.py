"""Codes for fp32 numbers, block by block, and the sizes of both; pure.

What a code leaves out is not lost: it stays behind as the error, which goes into the next sync (error feedback, as in
1-bit SGD and EF-SGD, arXiv 1901.09847).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

STRIDE = 1 << 17  # numbers that a CPU encodes at a time: what stays in its cache
TINY = torch.finfo(torch.float32).tiny


class Codec(Protocol):
    """Flat fp32 numbers [n] to bytes and back. `block` numbers have a scale of their own; a message is of whole blocks,
    of which the last may be used in part."""

    @property
    def block(self) -> int: ...

    def num_bytes(self, numbers: int) -> int:
        """Of the message for so many numbers, a multiple of `block`."""
        ...

    def encode(self, values: Tensor, message: Tensor) -> None:
        """Writes `values` [n] into `message`, uint8 [num_bytes], and leaves in `values` what the codes leave out."""
        ...

    def decode(self, message: Tensor, out: Tensor, add: bool = False) -> None:
        """`out` [n] becomes the first n numbers of `message`, or they are added to it."""
        ...


@dataclass(frozen=True)
class Integers:
    """Whole numbers of 8 or 4 bits, and for each block an fp32 scale: its greatest absolute value / 127, or / 7.

    Error of a number: at most scale / 2, beside fp32's rounding. A block whose greatest absolute value is below 127
    times the smallest normal number is taken for zeros; one with a NaN or inf is NaN as a whole, never a wrong number.

    >>> values, message = torch.tensor([1.0, -0.5, 0.3]), torch.empty(8, dtype=torch.uint8)
    >>> Integers(8, block=4).encode(values, message)
    >>> Integers(8, block=4).decode(message, out := torch.empty(3))
    >>> out, values              # of a scale of 1 / 127
    (tensor([ 1.0000, -0.5039,  0.2992]), tensor([0.0000, 0.0039, 0.0008]))
    """

    bits: int
    block: int

    @property
    def levels(self) -> int:
        return (1 << self.bits - 1) - 1

    def num_bytes(self, numbers: int) -> int:
        return numbers * self.bits // 8 + numbers // self.block * 4

    def encode(self, values: Tensor, message: Tensor) -> None:
        codes, scales = self._parts(message)
        for start, end in _strides(values):
            piece = values[start:end]
            blocks = _whole_blocks(piece, self.block)
            scale = blocks.abs().amax(1, keepdim=True).div_(self.levels)
            scale = torch.where(scale < TINY, 0.0, scale.where(scale.isfinite(), math.nan))
            places = slice(start // self.block, start // self.block + len(blocks))
            scales[places] = scale[:, 0]
            numbers = torch.mul(blocks, torch.where(scale == 0, 0.0, 1 / scale)).round_()
            self._pack(numbers, codes[places])
            numbers.mul_(scale)
            piece.sub_(numbers.view(-1)[: len(piece)])

    def decode(self, message: Tensor, out: Tensor, add: bool = False) -> None:
        codes, scales = self._parts(message)
        for start, end in _strides(out):
            piece = out[start:end]
            places = slice(start // self.block, start // self.block + -(-len(piece) // self.block))
            numbers = self._unpack(codes[places]).mul_(scales[places, None]).view(-1)[: len(piece)]
            if add:
                piece.add_(numbers)
            else:
                piece.copy_(numbers)

    def _parts(self, message: Tensor) -> tuple[Tensor, Tensor]:
        """The codes, a row for each block, and the blocks' scales."""
        width = self.block * self.bits // 8
        cut = len(message) // (width + 4) * width
        return message[:cut].view(-1, width), message[cut:].view(torch.float32)

    def _pack(self, numbers: Tensor, codes: Tensor) -> None:
        if self.bits == 8:
            codes.view(torch.int8).copy_(numbers)
        else:  # a block's first half and its second, each number + 8, in one byte
            first, second = numbers.chunk(2, dim=1)
            codes.copy_(torch.add(first, second, alpha=16).add_(8 * 17))

    def _unpack(self, codes: Tensor) -> Tensor:
        if self.bits == 8:
            return codes.view(torch.int8).float()
        numbers = torch.empty(len(codes), self.block, device=codes.device)
        numbers[:, : self.block // 2] = codes & 15
        numbers[:, self.block // 2 :] = codes >> 4
        return numbers.sub_(8)


@dataclass(frozen=True)
class Halves:
    """bf16. Error of a number: at most 1/256 of it, beside what is smaller than any normal number."""

    block: int = 1

    def num_bytes(self, numbers: int) -> int:
        return 2 * numbers

    def encode(self, values: Tensor, message: Tensor) -> None:
        codes = message.view(torch.bfloat16)[: len(values)]
        values.sub_(codes.copy_(values))

    def decode(self, message: Tensor, out: Tensor, add: bool = False) -> None:
        codes = message.view(torch.bfloat16)[: len(out)]
        if add:
            out.add_(codes)
        else:
            out.copy_(codes)


CODECS: dict[str, Codec] = {"bf16": Halves(), "int8": Integers(8, block=256), "int4": Integers(4, block=64)}


def bytes_per_element(compression: str) -> float:
    """That a sync's messages have for a number of the model.

    >>> [bytes_per_element(kind) for kind in ("none", "bf16", "int8", "int4")]
    [4.0, 2.0, 1.015625, 0.5625]
    """
    codec = CODECS.get(compression)
    return 4.0 if codec is None else codec.num_bytes(codec.block) / codec.block


def chunk_size(numbers: int, members: int, block: int) -> int:
    """Of the equal chunks, of whole blocks, in which `members` share the sum of so many numbers; the last ones may be
    used in part or not at all.

    >>> chunk_size(1000, 2, 256), chunk_size(100, 3, 64)
    (512, 64)
    """
    return -(-numbers // (block * members)) * block


def _strides(values: Tensor) -> Iterator[tuple[int, int]]:
    stride = max(1, len(values)) if values.is_cuda else STRIDE
    for start in range(0, len(values), stride):
        yield start, min(start + stride, len(values))


def _whole_blocks(piece: Tensor, block: int) -> Tensor:
    if len(piece) % block:
        piece = torch.nn.functional.pad(piece, (0, -len(piece) % block))
    return piece.view(-1, block)
