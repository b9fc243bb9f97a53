"""Rows of a results folder as pandas tables, and the files exported from them."""

from __future__ import annotations

from pathlib import Path

import filelock
import pandas as pd

from harness.store.lines import read_lines
from harness.store.rows import COLUMN_TYPES, COLUMNS, outcomes_that_count, whole_batches
from harness.sweep.catalog import FIELDS, WORKLOADS
from harness.sweep.metrics import METRICS

_DTYPES = {int: "Int64", float: "Float64", bool: "boolean"}  # nullable: a missing number stays missing


def typed(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with nullable column types, so that a missing number stays missing."""
    return rows.astype({name: _DTYPES[kind] for name, kind in COLUMN_TYPES.items() if kind in _DTYPES})


# What tells points of one sweep apart for people, in the order wide.csv shows it.
_FIELDS = tuple(field.name for field in FIELDS)
POINT_COLUMNS = ("device_name", *_FIELDS, "point_key", "status", "detail", "started_at")


def read_rows(folder: Path) -> pd.DataFrame:
    """Current rows of a results folder: one batch per device and point, the newest measured one.

    Falls back to `rows.parquet` where only the tables were kept. Columns are `COLUMNS` with nullable types.
    """
    path = folder / "rows.jsonl"
    if not path.exists() and (folder / "rows.parquet").exists():
        return typed(pd.read_parquet(folder / "rows.parquet").reindex(columns=list(COLUMNS)))
    current = outcomes_that_count(whole_batches(read_lines(path)))
    kept = [row for batch in current.values() for row in batch]
    return typed(pd.DataFrame(kept, columns=list(COLUMNS)))


SAMPLE_COLUMNS = ("run_id", "point_key", "metric", "x", "value")


def read_samples(folder: Path) -> pd.DataFrame:
    """Raw samples, one line each, with the columns `SAMPLE_COLUMNS`."""
    columns = list(SAMPLE_COLUMNS)
    path = folder / "samples.jsonl"
    if not path.exists():
        parquet = folder / "samples.parquet"
        return pd.read_parquet(parquet) if parquet.exists() else pd.DataFrame(columns=columns)
    frames = [pd.DataFrame(item, columns=columns) for item in read_lines(path) if item["value"]]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


def wide(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per point: what it is, its status, a column per metric and its interval where it has one."""
    if rows.empty:
        return pd.DataFrame(columns=list(POINT_COLUMNS))
    keys = ["device_name", "point_key"]
    primary = rows[rows["metric"] == rows["workload"].map(lambda name: WORKLOADS[name].primary_metric)]
    table = primary[list(POINT_COLUMNS)].drop_duplicates(keys).set_index(keys)
    order = [name for name in METRICS if name in set(rows["metric"])]
    for metric in order:
        chosen = rows[rows["metric"] == metric].drop_duplicates(keys).set_index(keys)
        table[metric] = chosen["value"]
        for bound in ("ci_low", "ci_high"):
            if chosen[bound].notna().any():
                table[f"{metric}_{bound}"] = chosen[bound]
    table = table.reset_index()
    rest = [name for name in table.columns if name not in POINT_COLUMNS]
    return table[[*POINT_COLUMNS, *rest]]


def export(folder: Path) -> list[Path]:
    """Write rows.parquet, rows.csv, wide.csv and samples.parquet from the rows; returns what was written."""
    with filelock.FileLock(str(folder / "export.lock")):  # two runners may come to their ends together
        rows, samples = read_rows(folder), read_samples(folder)
        tables = {"rows.parquet": rows, "rows.csv": rows, "wide.csv": wide(rows)}
        if not samples.empty:
            tables["samples.parquet"] = samples
        return [_replace(folder / name, table) for name, table in tables.items()]


def _replace(path: Path, table: pd.DataFrame) -> Path:
    temporary = path.with_name(path.name + ".tmp")
    write = table.to_csv if path.suffix == ".csv" else table.to_parquet
    try:
        write(temporary, index=False)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)
    return path
