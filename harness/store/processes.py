"""Which process is which: one that has ended is told from one that lives, even if its id is used again."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path


def identity(pid: int | None = None) -> str:
    """A name for a living process, this one by default, that no other process ever gets."""
    pid = os.getpid() if pid is None else pid
    return f"{_machine()}/{pid}/{process_start(pid)}"


def is_gone(name: str) -> bool:
    """Whether the process of that name has ended; False for one of another machine or container."""
    machine, _, rest = name.partition("/")
    pid, _, born = rest.partition("/")
    return machine == _machine() and process_start(int(pid)) != born


def process_start(pid: int) -> str | None:
    """When a process began, in ticks since its machine's boot; None if it is gone.

    psutil's `create_time` is a time of day: it would change for a living process when the clock is set.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[19] if fields[0] != "Z" else None


def with_variable(name: str) -> Iterator[tuple[int, str]]:
    """Process id and value, of every process of this user that has `name` in its environment."""
    import psutil  # here: a trial imports this module before it forks, and does not need it

    for process in psutil.process_iter(["environ"]):
        value = (process.info["environ"] or {}).get(name)
        if value is not None:
            yield process.pid, value


@functools.cache
def _machine() -> str:
    """Within what process ids are unique: this boot of this machine, and this container."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{os.readlink('/proc/self/ns/pid')}"
