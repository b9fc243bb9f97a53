"""Several objectives at once: which measurements no other one beats.

Everything here minimises; `losses` turns the objectives of a sweep into that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def losses(values: ArrayLike, directions: Sequence[str]) -> NDArray[np.float64]:
    """Objective values [n, m] with those to `maximize` negated, so that less is better in every column."""
    signs = np.array([-1.0 if direction == "maximize" else 1.0 for direction in directions])
    return np.asarray(values, dtype=np.float64).reshape(-1, len(signs)) * signs


def dominated(points: NDArray[np.float64], by: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which rows of `points` some row of `by` beats: as good everywhere, better somewhere."""
    as_good = (by[:, None, :] <= points[None, :, :]).all(axis=2)
    better = (by[:, None, :] < points[None, :, :]).any(axis=2)
    return np.asarray((as_good & better).any(axis=0))


def front(points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which rows of [n, m] no other row dominates; of equal rows all stay."""
    return np.asarray(~dominated(points, points))
