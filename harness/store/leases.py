"""Leases on points: any number of workers share a sweep, and a worker that dies blocks no point.

A lease names the process that holds it. It ends when the holder releases it, when the holder has ended (which
only processes of the same machine can see), or when the holder sends no heartbeat for `LEASE_SECONDS`. A
heartbeat increments a counter; an observer measures with its own monotonic clock how long ago it saw the
counter change. Clocks of two machines are never compared, so a clock that is wrong or jumps neither ends a
lease nor keeps one alive.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import filelock

from harness.store.lines import LOCK_POLL_SECONDS
from harness.store.processes import identity, is_gone

T = TypeVar("T")
BEAT_SECONDS = 5.0
# Twelve missed beats: longer than a stalled file server or a database that restarts.
LEASE_SECONDS = 60.0
ALONE_POLL_SECONDS = 0.05


@dataclass
class Leases:
    """The state that all workers of a sweep share: which owner holds what, and each owner's heartbeat."""

    holders: dict[str, str] = field(default_factory=dict)  # name of the lease -> owner
    beats: dict[str, int] = field(default_factory=dict)  # owner -> counter


class LeaseBook(Protocol):
    """Where the leases of one sweep are kept: a file in the results folder, or tables of a database."""

    def edit(self, change: Callable[[Leases], T]) -> T:
        """Let `change` read and change the leases while nobody else does, keep them, return what it returns.

        `change` may be called again where it is unknown whether its changes were kept. Raises OSError if
        they cannot be.
        """


class FileBook(LeaseBook):
    """The `LeaseBook` of a results folder: `claims.json` under a file lock."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "claims.json"
        self._lock = filelock.FileLock(str(folder / "claims.lock"))

    def edit(self, change: Callable[[Leases], T]) -> T:
        with self._lock.acquire(poll_interval=LOCK_POLL_SECONDS):
            before = self._read()
            leases = Leases(**json.loads(before))
            result = change(leases)
            after = json.dumps({"holders": leases.holders, "beats": leases.beats})
            if after != before:
                temporary = self._path.with_suffix(".tmp")
                temporary.write_text(after, encoding="utf-8")
                temporary.replace(self._path)
            return result

    def _read(self) -> str:
        try:
            text = self._path.read_text(encoding="utf-8")
            Leases(**json.loads(text))
        except (FileNotFoundError, ValueError, TypeError):
            return "{}"  # lost or unreadable: every living owner writes its leases again with its next beat
        return text


class Claims:
    """This process's leases in one sweep.

    A lease is named after what it protects, such as a point key, followed by `@` and the device where each
    device measures the point. `lease_seconds` is how long an owner's counter may stand still before its
    leases are free.
    """

    def __init__(
        self, book: LeaseBook, *, beat_seconds: float = BEAT_SECONDS, lease_seconds: float = LEASE_SECONDS
    ) -> None:
        self._book = book
        self._beat_seconds = beat_seconds
        self._lease_seconds = lease_seconds
        self._me = f"{socket.gethostname()} {identity()} {uuid.uuid4().hex[:8]}"
        self._mine: set[str] = set()
        self._seen: dict[str, tuple[int, float]] = {}  # owner -> its counter, and when it was first seen so
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None
        self._one_at_a_time = threading.Lock()

    def take(self, names: Iterable[str]) -> bool:
        """Lease all of `names` for this process, or none and return False if a living one holds any."""
        names = set(names)

        def change(leases: Leases) -> bool:
            self._drop_stale(leases)
            others = {name for name, owner in leases.holders.items() if owner != self._me}
            if names & (others | self._mine):
                return False
            leases.holders.update(dict.fromkeys(names, self._me))
            leases.beats.setdefault(self._me, 0)
            return True

        with self._one_at_a_time:
            if not self._book.edit(change):
                return False
            self._mine |= names
            if self._heart is None:
                self._heart = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)
                self._heart.start()
        return True

    def release(self, names: Iterable[str]) -> None:
        """Give leases back; those that this process does not hold are ignored."""
        names = set(names)

        def change(leases: Leases) -> None:
            for name in names:
                if leases.holders.get(name) == self._me:
                    del leases.holders[name]

        with self._one_at_a_time:
            self._mine -= names
            self._book.edit(change)

    def held(self) -> set[str]:
        """Names of all leases of living processes, without what follows the `@`."""

        def change(leases: Leases) -> set[str]:
            self._drop_stale(leases)
            return {name.partition("@")[0] for name in leases.holders}

        with self._one_at_a_time:
            return self._book.edit(change)

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """A mutual exclusion by name: wait until no other worker is inside, then keep others out."""
        while not self.take([name]):
            time.sleep(ALONE_POLL_SECONDS)
        try:
            yield
        finally:
            self.release([name])

    def close(self) -> None:
        """Give everything back and stop the heart."""
        self._stop.set()
        with self._one_at_a_time:
            self._mine.clear()
            self._book.edit(lambda leases: _drop(leases, {self._me}))

    def _beat_on(self) -> None:
        while not self._stop.wait(self._beat_seconds):
            with self._one_at_a_time:
                if self._stop.is_set():
                    return
                # A full disk, or a database that is away: others may take over; this owner keeps trying.
                try:
                    self._book.edit(self._beat)
                except OSError as error:
                    logging.getLogger(__name__).warning("no heartbeat: %s", error)

    def _beat(self, leases: Leases) -> None:
        leases.beats[self._me] = leases.beats.get(self._me, 0) + 1
        for name in self._mine - leases.holders.keys():  # the book was lost, or this owner taken for dead
            leases.holders[name] = self._me
        for name in [name for name, owner in leases.holders.items() if owner == self._me]:
            if name not in self._mine:  # it could not be given back at the time
                del leases.holders[name]

    def _drop_stale(self, leases: Leases) -> None:
        now = time.monotonic()
        stale = set()
        for owner in {*leases.beats, *leases.holders.values()} - {self._me}:
            beat = leases.beats.get(owner, 0)
            if self._seen.get(owner, (-1, now))[0] != beat:
                self._seen[owner] = (beat, now)
            if is_gone(owner.split(" ")[1]) or now - self._seen[owner][1] > self._lease_seconds:
                stale.add(owner)
        _drop(leases, stale)


def _drop(leases: Leases, owners: set[str]) -> None:
    for owner in owners:
        leases.beats.pop(owner, None)
    for name in [name for name, owner in leases.holders.items() if owner in owners]:
        del leases.holders[name]
