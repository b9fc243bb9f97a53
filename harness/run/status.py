"""What of a sweep is measured, what failed and what is missing, by device, as `mocbench status` prints it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from harness.errors import UserError
from harness.run.plan import grid_points
from harness.store.files import failure_log
from harness.store.frames import read_rows
from harness.store.rows import MEASURED, is_primary
from harness.sweep.model import Sweep
from harness.sweep.point import Point

LOG_LINES = 3  # of the up to forty that are kept of a failure
MISSING_LINES = 20  # points listed for each device
_COUNTED = ("measured", "failed", "unsupported", "missing")


def print_status(sweep: Sweep, folder: Path, console: Console) -> None:
    """Print the counts of each device and workload, each failure, and the points that are missing.

    Raises UserError if nothing is measured yet.
    """
    kept = any((folder / name).exists() for name in ("rows.jsonl", "rows.parquet"))
    records = cast(list[dict[str, Any]], read_rows(folder).to_dict("records")) if kept else []
    outcomes = [row for row in records if is_primary(row)]
    if not outcomes:
        raise UserError(f"{folder}: nothing is measured yet; run the sweep first")
    points = [point for _, own in grid_points(sweep, _data_ids(outcomes)) for point in own]
    by_device: dict[str, dict[str, str]] = {}
    for row in outcomes:
        by_device.setdefault(row["device_name"], {})[row["point_key"]] = _kind(row["status"])
    table = Table("device", "workload", *_COUNTED, title=str(folder))
    for device_name, kinds in by_device.items():
        for workload in dict.fromkeys(point.workload for point in points):
            own = [point for point in points if point.workload == workload]
            count = Counter(kinds.get(point.key, "missing") for point in own)
            table.add_row(device_name, workload, *(str(count[kind]) for kind in _COUNTED))
    console.print(table)
    for row in outcomes:
        if row["status"] != "ok":
            _print_failure(row, folder, console)
    for device_name, kinds in by_device.items():
        _print_missing(device_name, kinds, points, console)


def _kind(status: str) -> str:
    if status in MEASURED:
        return "measured"
    return status if status == "unsupported" else "failed"


def _data_ids(outcomes: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """The newest text on record by vocabulary size; it stands for the text of the sweep."""
    return {int(row["vocab_size"]): row["data_id"] for row in outcomes if isinstance(row["data_id"], str)}


def _print_failure(row: Mapping[str, Any], folder: Path, console: Console) -> None:
    console.print(f"{row['status']}: {_label(row)}: {row['detail']}", highlight=False, soft_wrap=True)
    log = failure_log(folder, row)
    if log.exists():
        console.print(f"  from {log}:", highlight=False, soft_wrap=True)
        for line in log.read_text(encoding="utf-8").splitlines()[-LOG_LINES:]:
            console.print(f"  | {line}", highlight=False, soft_wrap=True)


def _print_missing(device_name: str, kinds: Mapping[str, str], points: list[Point], console: Console) -> None:
    missing = [point.label for point in points if point.key not in kinds]
    if len(missing) > MISSING_LINES:
        missing[MISSING_LINES:] = [f"{len(missing) - MISSING_LINES} more points"]
    for label in missing:
        console.print(f"missing on {device_name}: {label}", highlight=False, soft_wrap=True)
    others = len(kinds.keys() - {point.key for point in points})
    if others:
        said = "1 point on record is" if others == 1 else f"{others} points on record are"
        console.print(
            f"{device_name}: {said} not in the sweep's grids (from a search, or an earlier sweep file)",
            highlight=False,
            soft_wrap=True,
        )


def _label(row: Mapping[str, Any]) -> str:
    """What `Point.label` says, from a row."""
    size = row["preset"] if isinstance(row["preset"], str) else f"{row['d_model']}x{row['d_ffn']}"
    rule = f" {row['selection']}" if isinstance(row["selection"], str) else ""
    return (
        f"{row['workload']} {size} {row['batch']}x{row['seq_len']} {row['method']}{rule} seed {row['seed']}"
    )
