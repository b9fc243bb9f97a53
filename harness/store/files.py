"""The rows of a sweep as append-only JSON lines that survive a kill.

The rows of a point are appended together under a file lock and synced to disk, the row of the primary metric
last: a point without that row was cut short by a crash and does not count. All other files of a results
folder can be made again from `rows.jsonl`, `samples.jsonl` and `environments.jsonl`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, TypeVar

import filelock

from harness.store.lines import LOCK_POLL_SECONDS, append_lines, append_whole, decode, encode, read_lines
from harness.store.rows import (
    MEASURED,
    BatchKey,
    DevicePoint,
    batch_key,
    checked,
    counts_over,
    device_point,
    is_primary,
    whole_batches,
)

T = TypeVar("T")


class Batch(NamedTuple):
    """One outcome of one point, written in one piece: its rows, the raw samples behind them (each with
    run_id, point_key, metric, x and value) and, for a failure, the end of its process's log."""

    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    log: str

    @property
    def key(self) -> BatchKey:
        """What names it: run, attempt, device and point."""
        return batch_key(self.rows[0])


class RowStore(Protocol):
    """Where the rows of one sweep come together: a results folder, or tables in a database.

    However many processes append, a point is measured once on a device: the first whole outcome with a
    measured value stays, and a failure can be followed by another attempt but hides nothing.
    """

    def append(
        self, rows: list[dict[str, Any]], samples: Sequence[Mapping[str, Any]] = (), log: str = ""
    ) -> bool:
        """Make one point's outcome durable; False if the point is already measured on that device, or this
        very outcome is already there. Raises ValueError if the rows are not one whole point, OSError if
        they cannot be written (nothing half-written counts)."""

    def append_environment(self, record: Mapping[str, Any]) -> None:
        """Keep an environment record once; `env_id` joins it to rows."""

    def finished(self, keys: Collection[str] | None = None) -> dict[DevicePoint, str]:
        """Status by (device_name, point_key), of all points or of those in `keys`."""

    def current(
        self, device_name: str, keys: Collection[str] | None = None
    ) -> dict[str, list[dict[str, Any]]]:
        """The rows that count of each point on a device, by point_key: the measured outcome, else the newest
        failure."""

    def batches(self) -> Iterator[Batch]:
        """Everything that was written, in order."""

    def environments(self) -> Iterator[dict[str, Any]]:
        """Every environment record."""


class Store(RowStore):
    """The `RowStore` of a results folder; safe for several processes, on one host or on a shared folder.

    It remembers what it has read and up to which byte, so an append costs what others have appended since,
    not the length of the file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "rows.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._file_lock = filelock.FileLock(str(folder / "rows.lock"))
        self._seen = _Seen()
        self._environments: set[str] = set()

    def append(
        self, rows: list[dict[str, Any]], samples: Sequence[Mapping[str, Any]] = (), log: str = ""
    ) -> bool:
        batch = Batch(checked(rows), [], log)
        with self._lock(), self.path.open("a+b") as file:
            self._seen.catch_up(file)
            if batch.key in self._seen.batches or self._seen.status.get(device_point(rows[0])) in MEASURED:
                return False
            if samples:
                append_lines(self.folder / "samples.jsonl", samples)
            if log:
                path = failure_log(self.folder, batch.rows[0])
                path.parent.mkdir(exist_ok=True)
                path.write_text(log + "\n", encoding="utf-8")
            self._seen.cut_torn(file, self.folder / "rows.torn")
            append_whole(file.fileno(), encode(batch.rows))
        return True

    def append_environment(self, record: Mapping[str, Any]) -> None:
        if record["env_id"] in self._environments:
            return
        with self._lock():
            self._environments |= {item["env_id"] for item in self.environments()}
            if record["env_id"] not in self._environments:
                append_lines(self.folder / "environments.jsonl", [record])
                self._environments.add(record["env_id"])

    def finished(self, keys: Collection[str] | None = None) -> dict[DevicePoint, str]:
        with self._lock():
            self._catch_up()
            return dict(self._seen.of(self._seen.status, keys))

    def current(
        self, device_name: str, keys: Collection[str] | None = None
    ) -> dict[str, list[dict[str, Any]]]:
        found = {}
        with self._lock():
            self._catch_up()
            spans = self._seen.of(self._seen.spans, keys)
            wanted = {point_key: span for (device, point_key), span in spans if device == device_name}
            if wanted:
                with self.path.open("rb") as file:
                    for key, (start, end, batch) in wanted.items():
                        file.seek(start)
                        rows = [decode(line) for line in file.read(end - start).splitlines(keepends=True)]
                        found[key] = [row for row in rows if row is not None and batch_key(row) == batch]
        return found

    def batches(self) -> Iterator[Batch]:
        samples: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for item in read_lines(self.folder / "samples.jsonl"):
            samples.setdefault((item["run_id"], item["point_key"]), []).append(item)
        for rows in whole_batches(read_lines(self.path)):
            log = failure_log(self.folder, rows[0])
            text = log.read_text(encoding="utf-8").removesuffix("\n") if log.exists() else ""
            yield Batch(rows, samples.get((rows[0]["run_id"], rows[0]["point_key"]), []), text)

    def environments(self) -> Iterator[dict[str, Any]]:
        return iter(read_environments(self.folder).values())

    def _lock(self) -> contextlib.AbstractContextManager[Any]:
        return self._file_lock.acquire(poll_interval=LOCK_POLL_SECONDS)

    def _catch_up(self) -> None:
        if not self.path.exists():
            self._seen = _Seen()
            return
        with self.path.open("rb") as file:
            self._seen.catch_up(file)


class _Seen:
    """An index of rows.jsonl: every whole point in it up to the byte `end`."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self.end = 0
        self.status: dict[DevicePoint, str] = {}
        self.spans: dict[DevicePoint, tuple[int, int, BatchKey]] = {}
        self.batches: set[BatchKey] = set()
        self.devices: set[str] = set()
        self._file = (0, 0)
        self._last_line = b""

    def catch_up(self, file: IO[bytes]) -> None:
        """Read what has been appended since; all of the file if it was replaced."""
        now = os.fstat(file.fileno())
        file.seek(max(0, self.end - len(self._last_line)))
        same = self._file == (now.st_dev, now.st_ino) and file.read(len(self._last_line)) == self._last_line
        if not same:
            self._forget()
            self._file = (now.st_dev, now.st_ino)
        file.seek(self.end)
        offset = self.end
        starts: dict[BatchKey, int] = {}  # of points whose last row has not come yet
        for line in file:
            row = decode(line)
            if row is not None:
                key = batch_key(row)
                start = starts.setdefault(key, offset)
                if is_primary(row):
                    self.end, self._last_line = offset + len(line), line
                    self._learn(row, start, key)
                    del starts[key]
            offset += len(line)

    def of(
        self, known: Mapping[DevicePoint, T], keys: Collection[str] | None
    ) -> Iterator[tuple[DevicePoint, T]]:
        """What is known of the points in `keys`, looked up one by one."""
        if keys is None:
            yield from known.items()
            return
        for at in ((device, key) for device in self.devices for key in keys):
            if at in known:
                yield at, known[at]

    def cut_torn(self, file: IO[bytes], torn: Path) -> None:
        """Move the rows of a point that a crash cut short to the file `torn`. Call `catch_up` first."""
        file.seek(self.end)
        rest = file.read()
        if rest:
            with torn.open("ab") as kept:
                append_whole(kept.fileno(), rest)
            os.ftruncate(file.fileno(), self.end)

    def _learn(self, primary: Mapping[str, Any], start: int, key: BatchKey) -> None:
        self.batches.add(key)
        at = device_point(primary)
        self.devices.add(at[0])
        if counts_over(primary["status"], self.status.get(at)):
            self.status[at] = primary["status"]
            self.spans[at] = (start, self.end, key)


def read_environments(folder: Path) -> dict[str, dict[str, Any]]:
    """Environment records of a results folder by `env_id`; a line that a crash cut short is left out."""
    records = read_lines(folder / "environments.jsonl")
    return {str(record["env_id"]): record for record in records if "env_id" in record}


def copy_rows(source: RowStore, target: RowStore) -> int:
    """Copy what `target` lacks from `source`; returns the number of outcomes copied."""
    for record in source.environments():
        target.append_environment(record)
    there = {at for at, status in target.finished().items() if status in MEASURED}
    news = (batch for batch in source.batches() if device_point(batch.rows[0]) not in there)
    return sum(target.append(batch.rows, batch.samples, batch.log) for batch in news)


def failure_log(folder: Path, row: Mapping[str, Any]) -> Path:
    """Where the end of the log of a failed point is kept."""
    return folder / "failures" / f"{row['run_id']}-{row['point_key']}.log"
