"""The rows of a sweep: append-only JSON lines that survive a kill, exported as tidy tables.

`rows.jsonl` is the truth. A point is written in one piece under a file lock and synced to disk, with the row
of its workload's primary metric last: a point without that row was cut short by a crash and does not count.
Everything else in the folder can be made again from it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import pandas as pd

from harness.metrics import METRICS, PRIMARY_METRIC, STATUSES

COLUMNS: tuple[str, ...] = (
    *("schema_version", "sweep", "point_key", "run_id", "attempt", "seed"),
    *("workload", "method", "selection", "preset", "d_model", "d_ffn", "n_layers", "n_heads", "k", "k_frac"),
    *("batch", "seq_len", "tokens", "train_tokens", "eval_tokens", "vocab_size", "lr", "data_id"),
    *("dtype", "timing_mode"),
    *("metric", "unit", "higher_is_better", "value", "ci_low", "ci_high", "n_samples", "statistic"),
    *("status", "detail"),
    *("device_name", "sm_clock_mhz", "throttled", "env_id", "started_at"),
)
_INTEGERS = (
    *(
        "schema_version",
        "attempt",
        "seed",
        "d_model",
        "d_ffn",
        "n_layers",
        "n_heads",
        "k",
        "batch",
        "seq_len",
    ),
    *("tokens", "train_tokens", "eval_tokens", "vocab_size", "n_samples"),
)
_FLOATS = ("k_frac", "lr", "value", "ci_low", "ci_high", "sm_clock_mhz")
_BOOLEANS = ("higher_is_better", "throttled")
# A measured value stands behind these; the others are outcomes without one.
MEASURED = ("ok", "unstable")
# What tells points of one sweep apart for people, in the order wide.csv shows it.
POINT_COLUMNS: tuple[str, ...] = (
    *("device_name", "workload", "preset", "d_model", "d_ffn", "n_layers", "batch", "seq_len", "tokens"),
    *(
        "method",
        "selection",
        "k",
        "k_frac",
        "dtype",
        "timing_mode",
        "train_tokens",
        "vocab_size",
        "lr",
        "seed",
    ),
    *("point_key", "status", "detail", "started_at"),
)


class Store:
    """Appends finished points to the rows of one results folder; safe for several processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "rows.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(str(folder / "rows.lock"))

    def append(self, rows: list[dict[str, Any]], *, replace: bool = False) -> bool:
        """Make one point's rows durable; returns False if the point is already measured on that device.

        `replace` measures again on purpose: the newer rows are then the ones tables show. Raises ValueError
        if the rows are not one whole point, OSError if the disk refuses (nothing half-written is left).
        """
        rows = _checked(rows)
        payload = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows).encode()
        with self._lock:
            key = (rows[0]["device_name"], rows[0]["point_key"])
            if not replace and finished(read_raw(self.path)).get(key) in MEASURED:
                return False
            with self.path.open("ab") as file:
                _cut_torn_point(file.fileno(), self.path)
                append_whole(file.fileno(), payload)
        return True

    def append_samples(self, samples: list[dict[str, Any]]) -> None:
        """Keep raw samples: each has run_id, point_key, metric, x and value (two lists of one length)."""
        if samples:
            payload = "".join(json.dumps(item, separators=(",", ":")) + "\n" for item in samples).encode()
            self._append_line_file("samples.jsonl", payload)

    def append_environment(self, record: Mapping[str, Any]) -> None:
        """Keep an environment record once; `env_id` joins it to rows."""
        with self._lock:
            known = {item["env_id"] for item in _json_lines(self.folder / "environments.jsonl")}
        if record["env_id"] not in known:
            self._append_line_file("environments.jsonl", (json.dumps(dict(record)) + "\n").encode())

    def finished(self) -> dict[tuple[str, str], str]:
        """Status of every point by (device_name, point_key)."""
        with self._lock:
            return finished(read_raw(self.path))

    def _append_line_file(self, name: str, payload: bytes) -> None:
        with self._lock, (self.folder / name).open("ab") as file:
            _cut_partial_line(file.fileno(), self.folder / name)
            append_whole(file.fileno(), payload)


def append_whole(descriptor: int, payload: bytes) -> None:
    """Write all of `payload` at the end of the file and sync it.

    Raises OSError if the disk refuses; the file is then as it was.
    """
    size = os.fstat(descriptor).st_size
    try:
        view = memoryview(payload)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def read_raw(path: Path) -> list[dict[str, Any]]:
    """Rows of whole points in the order they were written; pieces of cut-short points are left out."""
    batches: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    whole: list[dict[str, Any]] = []
    for row in _json_lines(path):
        key = (row["run_id"], row["attempt"], row["point_key"])
        batches.setdefault(key, []).append(row)
        if row["metric"] == PRIMARY_METRIC[row["workload"]]:
            whole.extend(batches.pop(key))
    return whole


def finished(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], str]:
    """Status by (device_name, point_key): the newest measured outcome, else the newest failure."""
    status: dict[tuple[str, str], str] = {}
    for row in rows:
        if row["metric"] != PRIMARY_METRIC[row["workload"]]:
            continue
        key = (row["device_name"], row["point_key"])
        if status.get(key) not in MEASURED or row["status"] in MEASURED:
            status[key] = row["status"]
    return status


def read_rows(folder: Path) -> pd.DataFrame:
    """Current rows of a results folder: one batch per device and point, the newest measured one.

    Falls back to `rows.parquet` where only the tables were kept. Columns are `COLUMNS` with nullable types.
    """
    path = folder / "rows.jsonl"
    if not path.exists() and (folder / "rows.parquet").exists():
        return _typed(pd.read_parquet(folder / "rows.parquet"))
    newest: dict[tuple[str, str], tuple[str, int]] = {}
    measured: set[tuple[str, str]] = set()
    rows = read_raw(path)
    for row in rows:
        key = (row["device_name"], row["point_key"])
        if row["metric"] == PRIMARY_METRIC[row["workload"]]:
            good = row["status"] in MEASURED
            if good or key not in measured:
                newest[key] = (row["run_id"], row["attempt"])
            if good:
                measured.add(key)
    kept = [
        row
        for row in rows
        if newest[(row["device_name"], row["point_key"])] == (row["run_id"], row["attempt"])
    ]
    return _typed(pd.DataFrame(kept, columns=list(COLUMNS)))


def read_samples(folder: Path) -> pd.DataFrame:
    """Raw samples, one line each: run_id, point_key, metric, x, value."""
    columns = ["run_id", "point_key", "metric", "x", "value"]
    path = folder / "samples.jsonl"
    if not path.exists():
        parquet = folder / "samples.parquet"
        return pd.read_parquet(parquet) if parquet.exists() else pd.DataFrame(columns=columns)
    frames = [
        pd.DataFrame({**item, "x": item["x"], "value": item["value"]}, columns=columns)
        for item in _json_lines(path)
        if item["value"]
    ]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


def wide(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per point: what it is, its status, a column per metric and its interval where it has one."""
    if rows.empty:
        return pd.DataFrame(columns=list(POINT_COLUMNS))
    keys = ["device_name", "point_key"]
    primary = rows[rows["metric"] == rows["workload"].map(PRIMARY_METRIC)]
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
    rows = read_rows(folder)
    samples = read_samples(folder)
    written = [
        _replace(folder / "rows.parquet", lambda path: rows.to_parquet(path, index=False)),
        _replace(folder / "rows.csv", lambda path: rows.to_csv(path, index=False)),
        _replace(folder / "wide.csv", lambda path: wide(rows).to_csv(path, index=False)),
    ]
    if not samples.empty:
        written.append(
            _replace(folder / "samples.parquet", lambda path: samples.to_parquet(path, index=False))
        )
    return written


def _replace(path: Path, write: Any) -> Path:
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    temporary.replace(path)
    return path


def _checked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not rows or len({row["point_key"] for row in rows}) != 1:
        raise ValueError("rows of exactly one point are appended together")
    primary = PRIMARY_METRIC[rows[0]["workload"]]
    for row in rows:
        if row["metric"] not in METRICS:
            raise ValueError(f"metric {row['metric']!r} is not in harness.metrics.METRICS")
        if row["status"] not in STATUSES:
            raise ValueError(f"status {row['status']!r} is not one of {', '.join(STATUSES)}")
        if set(row) != set(COLUMNS):
            raise ValueError(f"row has other columns than the schema: {sorted(set(row) ^ set(COLUMNS))}")
    last = [row for row in rows if row["metric"] == primary]
    if len(last) != 1:
        raise ValueError(f"a {rows[0]['workload']} point needs exactly one {primary} row, it has {len(last)}")
    return [{name: row[name] for name in COLUMNS} for row in rows if row is not last[0]] + [
        {name: last[0][name] for name in COLUMNS}
    ]


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_bytes().split(b"\n"):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError:
                continue  # a line cut short by a crash; its point is measured again


def _cut_partial_line(descriptor: int, path: Path) -> None:
    """Drop a last line that a crash left without its newline, so the next one starts on its own line."""
    if not _last_line(path).endswith(b"\n"):
        os.ftruncate(descriptor, path.read_bytes().rfind(b"\n") + 1)


def _cut_torn_point(descriptor: int, path: Path) -> None:
    """Move what a crash left of a point that was being written out of the way, to `rows.torn`."""
    if _ends_point(_last_line(path)):
        return
    keep = 0
    offset = 0
    for line in path.read_bytes().splitlines(keepends=True):
        offset += len(line)
        if _ends_point(line):
            keep = offset
    with path.with_name("rows.torn").open("ab") as torn:
        append_whole(torn.fileno(), path.read_bytes()[keep:])
    os.ftruncate(descriptor, keep)


def _last_line(path: Path, window: int = 65536) -> bytes:
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - window))
        text = file.read()
    return text[text.rfind(b"\n", 0, -1) + 1 :]


def _ends_point(line: bytes) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return bool(row["metric"] == PRIMARY_METRIC[row["workload"]])


def _typed(rows: pd.DataFrame) -> pd.DataFrame:
    types = {
        **dict.fromkeys(_INTEGERS, "Int64"),
        **dict.fromkeys(_FLOATS, "Float64"),
        **dict.fromkeys(_BOOLEANS, "boolean"),
    }
    return rows.astype(types)
