"""Append-only files of JSON lines: an append succeeds whole or not at all, and readers skip torn lines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

# How often a waiting process looks whether a lock is free; the library's own 50 ms is longer than an append.
LOCK_POLL_SECONDS = 0.003


def encode(items: Iterable[Mapping[str, Any]]) -> bytes:
    """One JSON line an item."""
    return "".join(json.dumps(dict(item), separators=(",", ":")) + "\n" for item in items).encode()


def decode(line: bytes) -> dict[str, Any] | None:
    """The item of a line; None for one that a crash cut short."""
    if not line.endswith(b"\n"):
        return None
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError, RecursionError):  # the last for a line nested without end
        return None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """All whole items of a file, none if it does not exist."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            item = decode(line)
            if item is not None:
                yield item


def append_lines(path: Path, items: Iterable[Mapping[str, Any]]) -> None:
    """Append items, after what a crash left of a last line is cut off. The caller holds a lock.

    Raises OSError if the disk refuses; the file is then as it was.
    """
    cut_partial_line(path)
    with path.open("ab") as file:
        append_whole(file.fileno(), encode(items))


def cut_partial_line(path: Path) -> None:
    """Cut off what a crash left of a last line, if it did and if there is a file. The caller holds a lock."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        if file.read() not in (b"", b"\n"):
            file.seek(0)
            os.ftruncate(file.fileno(), file.read().rfind(b"\n") + 1)


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
