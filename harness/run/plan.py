"""The work that is left of a sweep, given the rows there are; nothing here runs anything."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from harness.sweep.catalog import FIELD, WORKLOADS, AxisValue
from harness.sweep.grid import expand, make_point
from harness.sweep.model import Part, Range, Sweep
from harness.sweep.point import Point, group_points
from moc.methods import get_method

_MOST_CORNERS = 1000  # of a search that are looked at
# What `--retry` measures again.
RETRY: dict[str, tuple[str, ...]] = {
    "none": (),
    "failed": ("crashed", "timeout", "wrong"),
    "oom": ("oom",),
    "all": ("crashed", "timeout", "wrong", "oom", "unsupported"),
}


@dataclass(frozen=True)
class Unit:
    """The smallest thing a worker takes: a point, or the missing points of a group with their companions.

    Companions are dense points already measured: they run again beside the new ones, because a speed-up is
    a paired ratio, but their rows are not kept twice.
    """

    part: Part
    points: tuple[Point, ...]
    companions: tuple[Point, ...] = ()

    @property
    def keys(self) -> list[str]:
        """The points it will leave rows for."""
        return [point.key for point in self.points]


def is_missing(point: Point, status: Mapping[tuple[str, str], str], device_name: str, retry: str) -> bool:
    """Whether a run measures this point: never tried on this device, or tried and asked for by `retry`."""
    known = status.get((device_name, point.key))
    return known is None or known in RETRY[retry]


def units(part: Part, points: list[Point], missing: list[Point]) -> list[Unit]:
    """The work that measures `missing`, in order; `points` are all points of the part."""
    if not WORKLOADS[part.workload].grouped:
        return [Unit(part, (point,)) for point in missing]
    wanted = {point.key for point in missing}
    work = []
    for group in group_points(points):
        fresh = tuple(point for point in group if point.key in wanted)
        if fresh:
            dense = tuple(p for p in group if p.key not in wanted and get_method(p.method).is_dense)
            work.append(Unit(part, fresh, dense))
    return work


def grid_points(sweep: Sweep, data_ids: Mapping[int, str] | None = None) -> list[tuple[Part, list[Point]]]:
    """Every grid point of a sweep by part; an optimisation has no list of points beforehand."""
    return [(part, expand(part, data_ids) if part.mode == "grid" else []) for part in sweep.parts]


def largest_points(part: Part, data_ids: Mapping[int, str] | None = None) -> list[Point]:
    """The most work a search can propose: every number at its highest, for each combination of names."""
    choices: list[list[AxisValue]] = []
    for name, axis in part.axes.items():
        if isinstance(axis, Range):
            choices.append([int(axis.high) if FIELD[name].type is int else axis.high])
        else:
            numbers = [value for value in axis if not isinstance(value, str)]
            choices.append([max(numbers)] if len(numbers) == len(axis) else axis)
    combinations = itertools.islice(itertools.product(*choices), _MOST_CORNERS)
    points = [
        make_point(part, dict(zip(part.axes, values, strict=True)), part.seeds[0], data_ids)
        for values in combinations
    ]
    return list({point.key: point for point in points}.values())
