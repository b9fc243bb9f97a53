"""The Pareto set and the hypervolume, against definitions and areas worked out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
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


@given(POINTS)
def test_hypervolume_is_the_union_of_boxes(rows: list[tuple[int, ...]]) -> None:
    """On whole numbers the dominated volume is the number of unit cells that some row dominates."""
    width = len(rows[0])
    cells = itertools.product(range(6), repeat=width)
    counted = sum(any(all(a <= c for a, c in zip(row, cell, strict=True)) for row in rows) for cell in cells)
    reference = np.full(width, 6.0)
    assert pareto.hypervolume(np.array(rows, dtype=float), reference) == pytest.approx(counted)


def test_rows_beyond_the_reference_add_nothing() -> None:
    """Two by two, minus the corner that only the second row would fill, which lies outside."""
    points = np.array([[1.0, 1.0], [0.0, 4.0]])
    assert pareto.hypervolume(points, np.array([3.0, 3.0])) == 4.0
    assert pareto.hypervolume(points[1:], np.array([3.0, 3.0])) == 0.0


def test_the_history_never_falls_and_skips_trials_without_values() -> None:
    """Best 0, worst 10, reference 11: the box is 121; the shares are those of the rows so far."""
    points = np.array([[10.0, 0.0], [np.nan, np.nan], [0.0, 10.0], [5.0, 5.0], [6.0, 6.0]])
    shares = pareto.hypervolume_history(points)
    first, both = 1 * 11, 1 * 11 + 10 * 1
    corner = 11 * 1 + 1 * 11 - 1 * 1 + (10 - 5) * (10 - 5)
    assert both == 11 + 11 - 1
    assert shares * 121 == pytest.approx([first, first, both, corner, corner])


def test_a_history_without_a_value_or_with_one_is_defined() -> None:
    """Nothing measured is not a number; a single value fills the small box behind it."""
    assert np.isnan(pareto.hypervolume_history(np.full((2, 2), np.nan))).all()
    assert pareto.hypervolume_history(np.array([[3.0, 3.0]])).tolist() == [1.0]
