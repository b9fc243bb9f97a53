"""The Pareto set, against its definition."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from harness.search import pareto

POINTS = st.integers(1, 3).flatmap(
    lambda m: st.lists(st.tuples(*[st.integers(0, 5)] * m), min_size=1, max_size=7)
)


def test_maximised_objectives_are_turned_around() -> None:
    """Less is better in every column of losses."""
    found = pareto.losses([[3.0, 100.0], [2.0, 50.0]], ["minimize", "maximize"])
    assert found.tolist() == [[3.0, -100.0], [2.0, -50.0]]


@given(POINTS)
def test_a_row_is_on_the_front_if_no_other_is_as_good_everywhere_and_better_somewhere(
    rows: list[tuple[int, ...]],
) -> None:
    """The definition, pair by pair."""
    expected = [
        not any(all(a <= b for a, b in zip(other, row, strict=True)) and other != row for other in rows)
        for row in rows
    ]
    assert pareto.front(np.array(rows, dtype=float)).tolist() == expected
