"""Codes against the numbers themselves: the stated error, block by block, whatever the numbers are."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from torch import Tensor

from hf_edit.method.compression import CODECS, TINY, Halves, Integers, bytes_per_element, chunk_size

NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100)
KINDS = st.sampled_from(sorted(CODECS))


def there_and_back(kind: str, values: Tensor) -> tuple[Tensor, Tensor]:
    """What the codes say, and what they have left out."""
    codec, rest = CODECS[kind], values.clone()
    message = torch.full((codec.num_bytes(chunk_size(len(values), 1, codec.block)),), 255, dtype=torch.uint8)
    codec.encode(rest, message)
    codec.decode(message, out := torch.empty_like(values))
    codec.decode(message, doubled := out.clone(), add=True)
    assert torch.equal(doubled, out + out) or not values.isfinite().all()
    return out, rest


def bound(kind: str, values: Tensor) -> Tensor:
    """Of the error of each number, as the codecs' docstrings state it."""
    codec = CODECS[kind]
    if isinstance(codec, Halves):
        return values.abs() / 256 + TINY
    assert isinstance(codec, Integers)
    padded = torch.nn.functional.pad(values, (0, -len(values) % codec.block)).view(-1, codec.block)
    greatest = padded.abs().amax(1, keepdim=True).expand_as(padded).reshape(-1)[: len(values)]
    scale = greatest / codec.levels
    return torch.where(greatest < codec.levels * TINY, greatest, scale / 2 * (1 + 1e-5))


@settings(max_examples=300, deadline=None)
@given(kind=KINDS, values=st.integers(1, 700).flatmap(lambda n: arrays("float32", n, elements=NUMBERS)))
def test_the_error_is_as_stated_and_is_what_stays_behind(kind: str, values: Any) -> None:
    numbers = torch.from_numpy(values)
    out, rest = there_and_back(kind, numbers)
    assert bool(((out - numbers).abs() <= bound(kind, numbers)).all())
    assert torch.equal(rest, numbers - out)


@pytest.mark.parametrize("kind", sorted(CODECS))
def test_special_blocks(kind: str) -> None:
    """Zeros, a constant, one outlier, what is too small for a scale, the greatest; in a row, so each by itself."""
    block, out_of_256 = 256, torch.zeros(256)
    out_of_256[17] = 1e6
    rows = [torch.zeros(block), torch.full((block,), 0.37), out_of_256 + 1e-3, torch.full((block,), TINY),
            torch.full((block,), 1e-42), torch.full((block,), 3e38)]  # fmt: skip
    numbers = torch.cat(rows)
    out, rest = there_and_back(kind, numbers)
    assert torch.equal(out[:block], torch.zeros(block))
    assert bool(((out - numbers).abs() <= bound(kind, numbers)).all())
    assert out[2 * block + 17] == pytest.approx(1e6, rel=4e-3)
    assert torch.equal(out + rest, numbers)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_block_that_is_not_finite_is_nan_and_the_others_are_not(kind: str, broken: float) -> None:
    block = CODECS[kind].block
    numbers = torch.ones(3 * block)
    numbers[block + 1] = broken
    out, _ = there_and_back(kind, numbers)
    assert out.isnan().nonzero().flatten().tolist() == list(range(block, 2 * block))


@pytest.mark.parametrize("kind", sorted(CODECS))
def test_what_is_left_out_goes_into_the_next(kind: str) -> None:
    """After 100 syncs of the same small number beside a large one all but one step of it has come through."""
    numbers = torch.full((64,), 1e-3)
    numbers[0] = 1.0
    rest, total = torch.zeros(64), torch.zeros(64, dtype=torch.float64)
    for _ in range(100):
        out, rest = there_and_back(kind, numbers + rest)
        total += out
    assert (total - 100 * numbers.double()).abs().max() <= bound(kind, numbers).max() * 1.1


def test_messages_are_as_small_as_promised() -> None:
    assert bytes_per_element("int8") / 4 <= 0.27
    assert bytes_per_element("int4") / 4 <= 0.15
    assert [chunk_size(n, 4, 64) for n in (1, 256, 257)] == [64, 64, 128]


def test_strides_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    for kind in CODECS:
        whole = there_and_back(kind, numbers)
        with monkeypatch.context() as patch:
            patch.setattr("hf_edit.method.compression.STRIDE", 512)
            assert all(torch.equal(a, b) for a, b in zip(whole, there_and_back(kind, numbers), strict=True))
