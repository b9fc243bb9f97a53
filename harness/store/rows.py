"""Rows: their columns, what makes the rows of a point whole, and which outcome of a point counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from harness.sweep.catalog import FIELDS, WORKLOADS
from harness.sweep.metrics import METRICS, STATUSES

R = TypeVar("R", bound=Mapping[str, Any])  # a row
# Columns of a row before and after those of its point.
_RUN = {"schema_version": int, "sweep": str, "point_key": str, "run_id": str, "attempt": int}
_METRIC = {"metric": str, "unit": str, "higher_is_better": bool}
_VALUE = {"value": float, "ci_low": float, "ci_high": float, "n_samples": int, "statistic": str}
_OUTCOME = {"status": str, "detail": str}
_MACHINE = {"device_name": str, "sm_clock_mhz": float, "throttled": bool, "env_id": str, "started_at": str}
_POINT = {field.name: field.type for field in FIELDS}
COLUMN_TYPES: dict[str, type] = {**_RUN, **_POINT, **_METRIC, **_VALUE, **_OUTCOME, **_MACHINE}
COLUMNS: tuple[str, ...] = tuple(COLUMN_TYPES)
DevicePoint = tuple[str, str]  # device_name, point_key
BatchKey = tuple[str, int, str, str]  # run_id, attempt, device_name, point_key
# A measured value stands behind these; the others are outcomes without one.
MEASURED = ("ok", "unstable")


def device_point(row: Mapping[str, Any]) -> DevicePoint:
    """Which point on which device a row is about."""
    return row["device_name"], row["point_key"]


def batch_key(row: Mapping[str, Any]) -> BatchKey:
    """Which outcome a row belongs to."""
    return row["run_id"], row["attempt"], row["device_name"], row["point_key"]


def is_primary(row: Mapping[str, Any]) -> bool:
    """Whether a row is the one that is written last and makes its point whole."""
    return bool(row["metric"] == WORKLOADS[row["workload"]].primary_metric)


def counts_over(new: str, old: str | None) -> bool:
    """Whether an outcome is shown in place of an earlier one: a failure never hides a measurement."""
    return old not in MEASURED or new in MEASURED


def outcomes_that_count(batches: Iterable[list[R]]) -> dict[DevicePoint, list[R]]:
    """The rows that count of each point on each device, from its outcomes in the order they were finished."""
    found: dict[DevicePoint, list[R]] = {}
    for batch in batches:
        known = found.get(device_point(batch[-1]))
        if counts_over(batch[-1]["status"], known[-1]["status"] if known else None):
            found[device_point(batch[-1])] = batch
    return found


def whole_batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The rows of each whole outcome in the order they were finished, without pieces of cut-short points."""
    open_batches: dict[BatchKey, list[dict[str, Any]]] = {}
    for row in rows:
        open_batches.setdefault(batch_key(row), []).append(row)
        if is_primary(row):
            yield open_batches.pop(batch_key(row))


def checked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their columns in order and the primary metric last.

    Raises ValueError if they are not one whole point of the schema.
    """
    if not rows or len({row["point_key"] for row in rows}) != 1:
        raise ValueError("rows of exactly one point are appended together")
    primary = WORKLOADS[rows[0]["workload"]].primary_metric
    for row in rows:
        if row["metric"] not in METRICS:
            raise ValueError(f"metric {row['metric']!r} is not in harness.sweep.metrics.METRICS")
        if row["status"] not in STATUSES:
            raise ValueError(f"status {row['status']!r} is not one of {', '.join(STATUSES)}")
        if set(row) != set(COLUMNS):
            raise ValueError(f"row has other columns than the schema: {sorted(set(row) ^ set(COLUMNS))}")
    last = [row for row in rows if row["metric"] == primary]
    if len(last) != 1:
        raise ValueError(f"a {rows[0]['workload']} point needs exactly one {primary} row, it has {len(last)}")
    rows = [*(row for row in rows if row is not last[0]), *last]
    return [{name: row[name] for name in COLUMNS} for row in rows]
