"""Who a process is: one that has ended is told from one that lives, also when its id is used again."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path


def identity(pid: int | None = None) -> str:
    """A name for a living process, this one by default, that no other process ever gets."""
    pid = os.getpid() if pid is None else pid
    return f"{_place()}/{pid}/{process_start(pid)}"


def is_gone(name: str) -> bool:
    """Whether the process of that name has ended; False for one that cannot be seen from here."""
    place, _, rest = name.partition("/")
    pid, _, born = rest.partition("/")
    return place == _place() and process_start(int(pid)) != born


def process_start(pid: int) -> str | None:
    """When a process began, in ticks since its machine's boot; None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[19] if fields[0] != "Z" else None


def environments() -> Iterator[tuple[int, list[bytes]]]:
    """Process id and environment, as NAME=VALUE, of every living process that may be looked at."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            yield int(path.parent.name), path.read_bytes().split(b"\0")


@functools.cache
def _place() -> str:
    """What process ids mean something in: this boot of this machine, and this container."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{os.readlink('/proc/self/ns/pid')}"
