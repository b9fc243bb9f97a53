"""Who is working on what: leases in the results folder, so that two runners on one sweep share its points.

A lease names host, process and the process's start time; it is stale once that process is gone, whatever the
clock says, so a killed runner blocks nothing.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Collection
from pathlib import Path
from typing import Any

import filelock


class Claims:
    """Leases on points, in `claims.json` under a file lock."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "claims.json"
        self._lock = filelock.FileLock(str(folder / "claims.lock"))
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "born": process_start(os.getpid())}

    def take(self, keys: Collection[str]) -> bool:
        """Lease all of `keys` for this process; False, and none of them, if a living process holds one."""
        with self._lock:
            leases = self._living()
            if not leases.keys().isdisjoint(keys):
                return False
            self._write({**leases, **dict.fromkeys(keys, self._me)})
            return True

    def release(self, keys: Collection[str]) -> None:
        """Give leases back; unknown keys are ignored."""
        with self._lock:
            self._write({key: lease for key, lease in self._living().items() if key not in keys})

    def held(self) -> set[str]:
        """Points some living process works on."""
        with self._lock:
            return set(self._living())

    def _living(self) -> dict[str, Any]:
        return {key: lease for key, lease in self._read().items() if _alive(lease)}

    def _read(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self._path.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError):
            return {}

    def _write(self, leases: dict[str, Any]) -> None:
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(leases), encoding="utf-8")
        temporary.replace(self._path)


def process_start(pid: int) -> str | None:
    """When a process began, in ticks since boot, with the boot's id; None if it is gone (or not Linux)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return f"{boot}:{fields[19]}" if fields[0] != "Z" else None


def _alive(lease: dict[str, Any]) -> bool:
    if lease["host"] != socket.gethostname():
        return True
    if lease["born"] is None:
        try:
            os.kill(lease["pid"], 0)
        except OSError:
            return False
        return True
    return process_start(lease["pid"]) == lease["born"]
