from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from hf_edit.method.balance import Balance, deal, longest


@settings(max_examples=100, deadline=None)
@given(st.integers(3, 12), st.lists(st.floats(0.1, 10.0), min_size=2, max_size=3))
def test_no_other_deal_ends_earlier(rows: int, speeds: list[float]) -> None:
    dealt = deal(rows, speeds)
    assert sum(dealt) == rows
    assert min(dealt) >= 1
    others = (split for split in itertools.product(range(1, rows + 1), repeat=len(speeds)) if sum(split) == rows)
    assert longest(dealt, speeds) == pytest.approx(min(longest(split, speeds) for split in others))


def test_it_comes_to_rest_and_follows_a_change() -> None:
    """A host of a quarter of the speed, with 0.1 s of a step that no row takes; then the other one slows down."""
    balance = Balance([16, 16])

    def interval(speeds: tuple[float, float]) -> list[int] | None:
        seconds = [8 * (0.1 + share / speed) for share, speed in zip(balance.shares, speeds, strict=True)]
        return balance.look([8.0 * share for share in balance.shares], seconds)

    course = [interval((16.0, 4.0)) for _ in range(12)]
    assert course[0] is not None
    assert course[-6:] == [None] * 6
    seconds = [0.1 + share / speed for share, speed in zip(balance.shares, (16.0, 4.0), strict=True)]
    assert max(seconds) < 1.1 * sum(seconds) / 2
    course = [interval((4.0, 4.0)) for _ in range(12)]
    assert balance.shares == [16, 16]
    assert course[-4:] == [None] * 4


def test_noise_moves_no_row() -> None:
    balance = Balance([8, 8])
    assert all(
        balance.look([16.0, 16.0], [1.0 + 0.02 * (number % 2), 1.0 + 0.02 * ((number + 1) % 2)]) is None
        for number in range(20)
    )


def test_who_measured_nothing_says_nothing() -> None:
    balance = Balance([8, 8])
    assert balance.look([16.0, 0.0], [1.0, 1.0]) is None
    assert balance.look([16.0, 16.0], [1.0, 0.0]) is None
    assert balance.speeds == []
