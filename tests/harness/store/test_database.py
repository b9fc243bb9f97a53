"""Rows and leases in a real PostgreSQL server, by the same rules as in a results folder."""

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from rows import rows_of, train_point

from harness.errors import UserError
from harness.run.shared import open_shared
from harness.soak.postgres import NoPostgresError, PrivatePostgres
from harness.store.database import Database, DatabaseBook, DatabaseStore
from harness.store.files import RowStore, Store, copy_rows
from harness.store.frames import read_samples
from harness.store.leases import Claims, FileBook, LeaseBook

VALUES = {"forward_ms": 0.1 + 0.2, "step_ms": 2.0}
KEY = train_point().key


@pytest.fixture(scope="module")
def server() -> Iterator[PrivatePostgres]:
    """A PostgreSQL server of this module's own, in a short path (a socket's name is at most 107 bytes)."""
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        Path(folder).chmod(0o755)  # the server is another user where tests run as root
        try:
            private = PrivatePostgres(Path(folder) / "server")
        except NoPostgresError as error:
            if "CI" in os.environ:  # there it is installed: a test that is skipped would hide that it is not
                raise
            pytest.skip(str(error))
        with private:
            yield private


@pytest.fixture
def database(server: PrivatePostgres) -> Iterator[Database]:
    """Connections to the server, given back at the end."""
    opened = Database(server.url)
    yield opened
    opened.close()


Opener = Callable[[], RowStore]


@pytest.fixture(params=["folder", "database"])
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    """Opens one and the same store again and again, each time as another worker would."""
    if request.param == "folder":
        return lambda: Store(tmp_path)
    database = request.getfixturevalue("database")
    return lambda: DatabaseStore(database, request.node.name)


def test_rows_come_back_as_they_were_written(opener: Opener) -> None:
    """Every column, value, sample and log survives, bit for bit; other points are not in the answer."""
    rows = rows_of(train_point("moc_reference", "topk:0.25"), VALUES)
    samples = [{"run_id": "r1", "point_key": rows[0]["point_key"], "metric": "m", "x": [0], "value": [0.3]}]
    assert opener().append(rows, samples)
    failure = rows_of(train_point(), {}, status="crashed", run_id="r2")
    assert opener().append(failure, log="the end\nof it")
    assert [tuple(batch) for batch in opener().batches()] == [
        (rows, samples, ""),
        (failure, [], "the end\nof it"),
    ]
    assert opener().current("D", [KEY]) == {KEY: failure}
    assert set(opener().current("D")) == {KEY, rows[0]["point_key"]}
    assert opener().current("another device") == {}


def test_a_point_is_measured_once_on_a_device(opener: Opener) -> None:
    """A second measurement is refused, a late failure too; another device has its own."""
    assert opener().append(rows_of(train_point(), VALUES, status="unstable"))
    assert not opener().append(rows_of(train_point(), VALUES, run_id="r2"))
    assert not opener().append(rows_of(train_point(), {}, status="oom", run_id="r3"))
    assert opener().append(rows_of(train_point(), VALUES, run_id="r4", device="other"))
    assert opener().finished() == {("D", KEY): "unstable", ("other", KEY): "ok"}
    assert len(list(opener().batches())) == 2


def test_failures_are_kept_until_a_measurement_counts_over_them(opener: Opener) -> None:
    """The newest failure counts, each only once, and then the first success."""
    for run, status in (("r1", "crashed"), ("r2", "oom"), ("r2", "oom")):
        opener().append(rows_of(train_point(), {}, status=status, run_id=run))
        assert opener().finished([KEY]) == {("D", KEY): status}
    assert len(list(opener().batches())) == 2
    assert opener().append(rows_of(train_point(), VALUES, run_id="r3"))
    assert opener().finished([KEY, "unknown"]) == {("D", KEY): "ok"}
    assert [row["run_id"] for row in opener().current("D")[KEY]] == ["r3", "r3"]


def test_of_many_that_append_a_point_at_once_one_succeeds(opener: Opener) -> None:
    """Twelve threads, each a worker of its own, measure the same three points: three outcomes are kept."""
    kept: list[int] = []

    def work(number: int) -> None:
        store, run = opener(), f"w{number}"
        points = {seed: rows_of(train_point(seed=seed), VALUES, run_id=run) for seed in range(3)}
        kept.extend(seed for seed, rows in points.items() if store.append(rows))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(kept) == [0, 1, 2]
    assert len(list(opener().batches())) == 3


def test_rows_outside_the_schema_are_refused(opener: Opener) -> None:
    """A point without its primary metric is refused wherever it is brought."""
    with pytest.raises(ValueError, match="needs exactly one step_ms row"):
        opener().append(rows_of(train_point(), {"forward_ms": 1.0}))
    assert opener().finished() == {}


def test_an_environment_is_kept_once(opener: Opener) -> None:
    """The same environment from many trials is one record."""
    for env_id in ("a", "b", "a"):
        opener().append_environment({"env_id": env_id, "torch": "2"})
    assert [record["env_id"] for record in opener().environments()] == ["a", "b"]


def test_everything_can_be_brought_from_one_store_to_the_other_and_back(
    database: Database, tmp_path: Path
) -> None:
    """A folder's rows, samples, logs and environments go to a database and from there to another folder,
    the second time nothing."""
    here, there, back = Store(tmp_path / "a"), DatabaseStore(database, "both"), Store(tmp_path / "b")
    samples = [{"run_id": "r1", "point_key": KEY, "metric": "step_ms", "x": [0, 1], "value": [2.0, 3.0]}]
    here.append(rows_of(train_point(), VALUES), samples)
    here.append(rows_of(train_point(seed=1), {}, status="oom", run_id="r2"), log="no \0 more")
    here.append_environment({"env_id": "a"})
    assert [copy_rows(here, there), copy_rows(here, there)] == [2, 0]
    assert [copy_rows(there, back), copy_rows(there, back)] == [2, 0]
    assert (back.path).read_bytes() == (here.path).read_bytes()
    assert read_samples(back.folder)["value"].tolist() == [2.0, 3.0]
    assert [batch.log for batch in back.batches()] == ["", "no  more"]
    assert list(back.environments()) == [{"env_id": "a"}]


def test_everything_is_read_however_many_pages_it_takes(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With pages of two, five outcomes come in order, each once."""
    monkeypatch.setattr("harness.store.database.PAGE", 2)
    store = DatabaseStore(database, "pages")
    for seed in range(5):
        store.append(rows_of(train_point(seed=seed), VALUES))
    assert [batch.rows[0]["seed"] for batch in store.batches()] == [0, 1, 2, 3, 4]


def test_two_sweeps_in_one_database_do_not_see_each_other(database: Database) -> None:
    """Rows and leases belong to the sweep of their name."""
    one, other = DatabaseStore(database, "one"), DatabaseStore(database, "other")
    assert one.append(rows_of(train_point(), VALUES))
    assert other.finished() == {}
    assert other.append(rows_of(train_point(), VALUES))
    with contextlib.closing(Claims(DatabaseBook(database, "one"))) as claims:
        assert claims.take(["a"])
        assert Claims(DatabaseBook(database, "other")).held() == set()


@pytest.fixture(params=["folder", "database"])
def book(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], LeaseBook]:
    """Opens one and the same book again and again."""
    if request.param == "folder":
        return lambda: FileBook(tmp_path)
    database = request.getfixturevalue("database")
    return lambda: DatabaseBook(database, request.node.name)


def test_leases_are_given_to_one_at_a_time(book: Callable[[], LeaseBook]) -> None:
    """Eight workers take and give back the same two points: never two hold one, and all get their turns."""
    holding: list[int] = []
    most: list[int] = []

    def work() -> None:
        mine = Claims(book(), beat_seconds=0.01)
        turns = 0
        while turns < 5:
            if mine.take(["a", "b"]):
                holding.append(1)
                most.append(len(holding))
                holding.pop()
                mine.release(["a", "b"])
                turns += 1
        mine.close()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 40
    assert Claims(book()).held() == set()


def test_a_server_that_restarts_is_waited_for(
    server: PrivatePostgres, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Stopped as by a power cut in the middle of an append: one line says that the append waits, it goes
    through once the server is back, and what was committed before is still there."""
    store, claims = DatabaseStore(database, "restart"), Claims(DatabaseBook(database, "restart"))
    assert store.append(rows_of(train_point(), VALUES))
    server.stop()
    appended: list[bool] = []
    writer = threading.Thread(
        target=lambda: appended.append(store.append(rows_of(train_point(seed=1), VALUES, run_id="r2")))
    )
    writer.start()
    while writer.is_alive() and not caplog.messages:
        time.sleep(0.01)
    server.start()
    writer.join()
    assert appended == [True]
    assert [text.partition(": ")[0] for text in caplog.messages] == [
        f"{database.shown} is away; waiting up to 120 s"
    ]
    assert claims.take(["a"])
    assert len(store.finished()) == 2
    claims.close()


def test_a_server_that_stays_away_is_an_error_that_names_it(
    server: PrivatePostgres, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its patience an operation raises an OSError, as a full disk would."""
    store = DatabaseStore(database, "away")
    monkeypatch.setattr("harness.store.database.PATIENCE_SECONDS", 0.0)
    server.stop()
    try:
        with pytest.raises(ConnectionError, match="postgresql\\+psycopg://postgres@/postgres"):
            store.finished()
    finally:
        server.start()


@pytest.mark.parametrize(
    ("state", "reason"), [("57014", "a statement that is cancelled"), ("53100", "a disk that is full")]
)
def test_what_a_new_connection_cannot_mend_is_raised_at_once(
    database: Database, monkeypatch: pytest.MonkeyPatch, state: str, reason: str
) -> None:
    """The server refuses the statement: executing it again would end the same."""

    def waits(seconds: float) -> None:
        raise AssertionError(f"waited {seconds} s for {reason}")

    monkeypatch.setattr("harness.store.database.time.sleep", waits)
    raises = f"do $$ begin raise exception '{reason}' using errcode = '{state}'; end $$"
    with pytest.raises(OSError, match=f"postgres@/postgres.*: {reason}"):
        database.run(sa.text(raises))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite:///x.db", "SQLite cannot be shared by workers; leave --storage out to use the journal file"),
        ("mysql://u:secret@h/d", r"--storage mysql://u:\*\*\*@h/d: rows of several workers need PostgreSQL"),
        ("what is this", "--storage: not a database URL; valid: postgresql\\+psycopg://"),
        (
            "postgresql+pg8000://h/d",
            "the driver pg8000 is not installed; pip install 'mocbench\\[postgres\\]'",
        ),
        ("postgresql+psycopg://u:secret@/d?host=/nowhere", r"--storage postgresql\+psycopg://u:\*\*\*@/d"),
    ],
)
def test_a_storage_that_cannot_be_shared_is_refused_in_one_line(
    tmp_path: Path, url: str, message: str
) -> None:
    """The message says what would be valid, and never a password."""
    with pytest.raises(UserError, match=message) as refused:
        open_shared(tmp_path, "s", url)
    assert "\n" not in str(refused.value)
    assert "secret" not in str(refused.value)
