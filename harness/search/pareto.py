"""Several objectives at once: which measurements no other one beats, and how much of the plane they cover.

Everything here minimises; `losses` turns the objectives of a sweep into that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

# The reference point of a hypervolume lies this share of the measured range behind the worst value, so that
# the ends of a front count too.
REFERENCE_MARGIN = 0.1


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


def hypervolume(points: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
    """Volume of what the rows of [n, m] dominate, up to a reference point [m]; rows beyond it add nothing.

    Exact, by slicing along the last objective (While et al., "A faster algorithm for calculating
    hypervolume", 2006): n^(m-1) steps, meant for hundreds of points and a few objectives.
    """
    inside = points[(points < reference).all(axis=1)]
    return _sliced(inside[front(inside)], reference) if len(inside) else 0.0


def _sliced(points: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
    if points.shape[1] == 1:
        return float(reference[0] - points.min())
    ordered = points[np.argsort(points[:, -1], kind="stable")]
    ends = [*ordered[1:, -1], reference[-1]]
    volume = 0.0
    for count, (start, end) in enumerate(zip(ordered[:, -1], ends, strict=True), start=1):
        if end > start:
            below = ordered[:count, :-1]
            volume += float(end - start) * _sliced(below[front(below)], reference[:-1])
    return volume


def reference_box(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The best value of each objective, and the reference point a little behind the worst of each."""
    best, worst = points.min(axis=0), points.max(axis=0)
    room = np.where(worst > best, worst - best, np.maximum(np.abs(worst), 1.0))
    return best, worst + REFERENCE_MARGIN * room


def hypervolume_history(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of the box between best and reference that the first 1, 2, ..., n rows of [n, m] dominate.

    A row of NaN (a trial without values) adds nothing. All NaN without a measured row.
    """
    measured = np.asarray(~np.isnan(points).any(axis=1))
    if not measured.any():
        return np.full(len(points), np.nan)
    best, reference = reference_box(points[measured])
    whole = float(np.prod(reference - best))
    shares = np.zeros(len(points))
    for count in range(1, len(points) + 1):
        known = points[:count][measured[:count]]
        shares[count - 1] = hypervolume(known, reference) / whole if len(known) else 0.0
    return shares
