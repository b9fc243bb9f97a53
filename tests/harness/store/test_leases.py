"""Leases: two living workers never hold the same point, a dead or silent one holds nothing."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.store.leases import Claims, FileBook, Leases, T
from harness.store.processes import process_start

HOLD = """
import sys; from pathlib import Path; from harness.store.leases import Claims, FileBook
print(Claims(FileBook(Path(sys.argv[1]))).take(sys.argv[2:]), flush=True); sys.stdin.read()
"""


def claims(folder: Path) -> Claims:
    """This process's claims in a folder, whose hearts beat too rarely to matter in a test."""
    return Claims(FileBook(folder), beat_seconds=1000)


@contextlib.contextmanager
def holder(folder: Path, *keys: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that has taken `keys` and lives until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *keys],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_living_holder_keeps_a_point_and_a_dead_one_does_not(tmp_path: Path) -> None:
    """While the other process lives its point is refused; once it is killed the point is free at once."""
    mine = claims(tmp_path)
    with holder(tmp_path, "a", "b"):
        assert not mine.take(["b", "c"])
        assert mine.held() == {"a", "b"}
        assert mine.take(["c"])
    assert mine.take(["a", "b"])


def test_two_threads_of_a_process_do_not_share_a_point(tmp_path: Path) -> None:
    """What this process holds it cannot take again, through the same claims or others."""
    mine = claims(tmp_path)
    assert mine.take(["a"])
    assert not mine.take(["a"])
    assert not claims(tmp_path).take(["a"])


def test_a_reused_process_id_is_not_the_holder(tmp_path: Path) -> None:
    """A lease whose process id now belongs to a younger process is stale."""
    mine = claims(tmp_path)
    assert mine.take(["a"])
    path = tmp_path / "claims.json"
    born = process_start(os.getpid())
    path.write_text(path.read_text().replace(f"/{born} ", f"/{int(str(born)) - 1} "))
    assert claims(tmp_path).held() == set()


def test_releasing_frees_just_the_named_points(tmp_path: Path) -> None:
    """Giving one lease back keeps the others; closing gives back all."""
    mine = claims(tmp_path)
    mine.take(["a", "b"])
    mine.release(["a", "unknown"])
    assert mine.held() == {"b"}
    mine.close()
    assert claims(tmp_path).held() == set()
    assert json.loads((tmp_path / "claims.json").read_text()) == {"holders": {}, "beats": {}}


def test_places_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """The same point can be measured on two kinds of device at once; it counts as held on either."""
    assert claims(tmp_path).take(["a@this device"])
    other = claims(tmp_path)
    assert other.take(["a@that device", "b@that device"])
    assert not other.take(["a@this device"])
    assert other.held() == {"a", "b"}


def test_what_is_done_alone_is_done_by_one_at_a_time(tmp_path: Path) -> None:
    """Four threads, each with claims of its own, never meet inside."""
    inside: list[int] = []
    most: list[int] = []

    def go() -> None:
        mine = claims(tmp_path)
        for _ in range(5):
            with mine.alone("study"):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 20


class SharedBook:
    """A book in memory, as a database that two hosts share would be; one that fails while `broken`."""

    def __init__(self) -> None:
        self.leases = Leases()
        self.broken = False

    def edit(self, change: Callable[[Leases], T]) -> T:
        """See `LeaseBook`."""
        if self.broken:
            raise ConnectionError("away")
        return change(self.leases)

    def move_to_another_host(self) -> None:
        """Make every owner one whose process this host cannot see."""
        for owner in list(self.leases.beats):
            abroad = "elsewhere another-boot:pid:[1]/" + owner.partition("/")[2]
            self.leases.beats[abroad] = self.leases.beats.pop(owner)
            for name, held_by in self.leases.holders.items():
                if held_by == owner:
                    self.leases.holders[name] = abroad

    def beat(self) -> None:
        """All hearts beat once."""
        for owner in self.leases.beats:
            self.leases.beats[owner] += 1


def test_a_holder_on_another_host_is_believed_while_its_heart_beats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its points are free once its counter stood still for longer than a lease by the observer's own clock,
    counted from the last beat that was seen."""
    book, now = SharedBook(), [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert Claims(book, beat_seconds=1000).take(["a"])
    book.move_to_another_host()
    mine = Claims(book, beat_seconds=1000, lease_seconds=60)
    assert not mine.take(["a"])
    for _ in range(5):
        now[0] += 59
        book.beat()
        assert not mine.take(["a"])
    now[0] += 59
    assert not mine.take(["a"])
    now[0] += 2
    assert mine.take(["a"])
    assert set(book.leases.holders.values()) == set(book.leases.beats)


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of day leaps by ten years in both directions: the lease stays while its holder beats."""
    book = SharedBook()
    assert Claims(book, beat_seconds=1000).take(["a"])
    book.move_to_another_host()
    mine = Claims(book, beat_seconds=1000)
    real = time.time
    for years in (10, -10):
        monkeypatch.setattr(time, "time", lambda years=years: real() + years * 3.2e7)
        assert not mine.take(["a"])
        assert mine.held() == {"a"}


def test_the_heart_beats_by_itself_and_survives_a_book_that_is_away(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The counter rises without any call, stops while the book fails, and rises again after; leases that were
    lost meanwhile are written again, and one that could not be given back is given back."""
    book = SharedBook()
    mine = Claims(book, beat_seconds=0.01)
    mine.take(["a", "b"])
    (me,) = book.leases.beats

    def wait_for(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline

    wait_for(lambda: book.leases.beats[me] >= 3)
    book.broken = True
    with pytest.raises(ConnectionError):
        mine.release(["b"])
    wait_for(lambda: "no heartbeat: away" in caplog.text)
    book.leases.holders.pop("a")
    book.broken = False
    wait_for(lambda: book.leases.holders == {"a": me})
    mine.close()
    assert book.leases == Leases()


def test_a_lost_book_is_written_again_by_those_who_live(tmp_path: Path) -> None:
    """Whatever happens to the file, a holder's next beat brings its leases back."""
    mine = Claims(FileBook(tmp_path), beat_seconds=0.01)
    mine.take(["a"])
    (tmp_path / "claims.json").write_text("{half a li")
    other = claims(tmp_path)
    deadline = time.monotonic() + 10
    while other.held() != {"a"}:
        assert time.monotonic() < deadline
    mine.close()


def test_a_finished_process_has_no_start() -> None:
    """The start time of a process that is gone is None."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert process_start(process.pid) is None
