"""Rows and leases of a sweep in PostgreSQL, for workers on any number of hosts.

The tables hold what a results folder holds, by the same rules: `DatabaseStore` is a
`harness.store.files.RowStore`, `DatabaseBook` a `harness.store.leases.LeaseBook`. A unique index guarantees
that a point is measured once. Workers wait up to `PATIENCE_SECONDS` for a server that restarts.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from harness.errors import UserError
from harness.store.files import Batch, RowStore
from harness.store.leases import LeaseBook, Leases
from harness.store.rows import MEASURED, DevicePoint, checked, counts_over, outcomes_that_count

T = TypeVar("T")
logger = logging.getLogger(__name__)
PATIENCE_SECONDS = 120.0
# Outcomes in one query when all are read: their samples can be large.
PAGE = 200
# The longest pause of a worker after another has changed the leases between its read and its write.
CONFLICT_SECONDS = 0.02

_metadata = sa.MetaData()
_points = sa.Table(
    "mocbench_points",
    _metadata,
    sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
    *(sa.Column(name, sa.Text, nullable=False) for name in ("sweep", "device_name", "point_key", "run_id")),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("rows", sa.JSON, nullable=False),  # as they stand in rows.jsonl
    sa.Column("samples", sa.JSON, nullable=False),
    sa.Column("log", sa.Text, nullable=False),
    sa.Column("written_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
    sa.UniqueConstraint("sweep", "point_key", "device_name", "run_id", "attempt"),
)
sa.Index(
    "mocbench_measured_once",
    _points.c.sweep,
    _points.c.point_key,
    _points.c.device_name,
    unique=True,
    postgresql_where=_points.c.status.in_(MEASURED),
)
_environments = sa.Table(
    "mocbench_environments",
    _metadata,
    sa.Column("sweep", sa.Text, primary_key=True),
    sa.Column("env_id", sa.Text, primary_key=True),
    sa.Column("record", sa.JSON, nullable=False),
)
# One row for each sweep; a write replaces it if its version is still the one that was read.
_leases = sa.Table(
    "mocbench_leases",
    _metadata,
    sa.Column("sweep", sa.Text, primary_key=True),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("holders", sa.JSON, nullable=False),
    sa.Column("beats", sa.JSON, nullable=False),
)


class Database:
    """A PostgreSQL database with the tables of this module in it.

    Raises UserError for a URL that is no PostgreSQL database, and for one that cannot be reached.
    """

    def __init__(self, url: str) -> None:
        self._engine = _engine(url)
        self._is_away = False  # its connections fail, and the log says so
        try:
            with self.setting_up() as connection:
                _metadata.create_all(connection)
        except sa.exc.DBAPIError as error:
            reason = str(error.orig).strip().partition("\n")[0]
            raise UserError(f"--storage {self.shown}: {reason}") from error

    @property
    def shown(self) -> str:
        """The URL without its password."""
        return self._engine.url.render_as_string(hide_password=True)

    @contextlib.contextmanager
    def setting_up(self) -> Iterator[sa.Connection]:
        """A transaction in which one process at a time creates what is missing."""
        with self._engine.execution_options(isolation_level="READ COMMITTED").begin() as connection:
            key = sa.func.hashtextextended("mocbench schema", 0)
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(key)))
            yield connection

    def run(self, statement: sa.Executable) -> Sequence[Any]:
        """Execute one statement as a transaction of its own and return its rows.

        If the connection is lost, the statement is executed again for up to `PATIENCE_SECONDS`, so it must
        have the same effect when it is executed twice. Raises OSError if the server refuses the statement
        (a full disk, a cancelled statement), and ConnectionError, which is one, if it stays away.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        pause = 0.05
        while True:
            try:
                with self._engine.connect() as connection:
                    result = connection.execute(statement)
                    rows = result.all() if result.returns_rows else []
                self._is_away = False
                return rows
            except (sa.exc.OperationalError, sa.exc.InterfaceError) as error:
                if not _is_connection_lost(error):
                    raise OSError(f"{self.shown}: {error.orig}") from error
                if time.monotonic() > deadline:
                    raise ConnectionError(f"{self.shown}: {error.orig}") from error
                if not self._is_away:  # said once for all statements that wait
                    self._is_away = True
                    reason = str(error.orig).strip().partition("\n")[0]
                    logger.warning(
                        "%s is away; waiting up to %.0f s: %s", self.shown, PATIENCE_SECONDS, reason
                    )
            time.sleep(pause)
            pause = min(2 * pause, 2.0)

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()


class DatabaseStore(RowStore):
    """The `RowStore` of one sweep in a database."""

    def __init__(self, database: Database, sweep: str) -> None:
        self._database = database
        self._sweep = sweep
        self._known_environments: set[str] = set()

    def append(
        self, rows: list[dict[str, Any]], samples: Sequence[Mapping[str, Any]] = (), log: str = ""
    ) -> bool:
        rows = checked(rows)
        last = rows[-1]
        values = {
            "sweep": self._sweep,
            **{name: last[name] for name in ("device_name", "point_key", "run_id", "attempt", "status")},
            "rows": rows,
            "samples": [dict(item) for item in samples],
            "log": log.replace("\0", ""),  # a byte that PostgreSQL's text cannot hold
        }
        columns = [_points.c[name] for name in values]
        measured = sa.exists().where(
            _points.c.sweep == self._sweep,
            _points.c.point_key == last["point_key"],
            _points.c.device_name == last["device_name"],
            _points.c.status.in_(MEASURED),
        )
        row = sa.select(*(sa.cast(values[column.name], column.type) for column in columns)).where(~measured)
        statement = insert(_points).from_select(columns, row).on_conflict_do_nothing()
        return bool(self._database.run(statement.returning(_points.c.id)))

    def append_environment(self, record: Mapping[str, Any]) -> None:
        if record["env_id"] in self._known_environments:
            return
        values = {"sweep": self._sweep, "env_id": record["env_id"], "record": dict(record)}
        self._database.run(insert(_environments).values(**values).on_conflict_do_nothing())
        self._known_environments.add(record["env_id"])

    def finished(self, keys: Collection[str] | None = None) -> dict[DevicePoint, str]:
        columns = (_points.c.device_name, _points.c.point_key, _points.c.status)
        status: dict[DevicePoint, str] = {}
        for device_name, point_key, new in self._select(columns, keys):
            if counts_over(new, status.get((device_name, point_key))):
                status[device_name, point_key] = new
        return status

    def current(
        self, device_name: str, keys: Collection[str] | None = None
    ) -> dict[str, list[dict[str, Any]]]:
        own = self._select((_points.c.rows,), keys, _points.c.device_name == device_name)
        return {key: rows for (_, key), rows in outcomes_that_count(rows for (rows,) in own).items()}

    def batches(self) -> Iterator[Batch]:
        columns = (_points.c.id, _points.c.rows, _points.c.samples, _points.c.log)
        last = 0
        while page := self._select(columns, condition=_points.c.id > last, limit=PAGE):
            for last, rows, samples, log in page:  # noqa: B007 - `last` is for the next page
                yield Batch(rows, samples, log)

    def environments(self) -> Iterator[dict[str, Any]]:
        query = sa.select(_environments.c.record).where(_environments.c.sweep == self._sweep)
        return (record for (record,) in self._database.run(query))

    def _select(
        self,
        columns: Sequence[sa.Column[Any]],
        keys: Collection[str] | None = None,
        condition: sa.ColumnElement[bool] | None = None,
        limit: int | None = None,
    ) -> Sequence[Any]:
        query = sa.select(*columns).where(_points.c.sweep == self._sweep).order_by(_points.c.id).limit(limit)
        if keys is not None:
            query = query.where(_points.c.point_key.in_(list(keys)))
        if condition is not None:
            query = query.where(condition)
        return self._database.run(query)


class DatabaseBook(LeaseBook):
    """The `LeaseBook` of one sweep in a database.

    Updates are optimistic: a worker whose version is out of date reads again. No lock is held, so a worker
    that is killed at any moment blocks nobody.
    """

    def __init__(self, database: Database, sweep: str) -> None:
        self._database = database
        first = insert(_leases).values(sweep=sweep, version=0, holders={}, beats={})
        database.run(first.on_conflict_do_nothing())
        self._read = sa.select(_leases.c.version, _leases.c.holders, _leases.c.beats).where(
            _leases.c.sweep == sweep
        )
        self._write = sa.update(_leases).where(_leases.c.sweep == sweep).returning(_leases.c.version)

    def edit(self, change: Callable[[Leases], T]) -> T:
        while True:
            ((version, holders, beats),) = self._database.run(self._read)
            leases = Leases(dict(holders), dict(beats))
            result = change(leases)
            if (leases.holders, leases.beats) == (holders, beats):
                return result
            new = {"version": version + 1, "holders": leases.holders, "beats": leases.beats}
            if self._database.run(self._write.where(_leases.c.version == version).values(**new)):
                return result
            time.sleep(random.uniform(0, CONFLICT_SECONDS))


def _is_connection_lost(error: sa.exc.DBAPIError) -> bool:
    """Whether a new connection can mend the error.

    By SQLSTATE (appendix A of PostgreSQL's manual): connection exceptions, a server that shuts down or starts
    up, too many connections. An attempt to connect that fails has none.
    """
    state = getattr(error.orig, "sqlstate", None)
    if error.connection_invalidated or (state is None and isinstance(error, sa.exc.OperationalError)):
        return True
    return state is not None and state.startswith(("08", "57P", "53300"))


def _engine(url: str) -> sa.Engine:
    example = "postgresql+psycopg://user@host/database"
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError as error:
        raise UserError(f"--storage: not a database URL; valid: {example}") from error
    shown = parsed.render_as_string(hide_password=True)
    if parsed.get_backend_name() == "sqlite":
        raise UserError(
            f"--storage {shown}: SQLite cannot be shared by workers; leave --storage out to use the journal"
            f" file, or name a PostgreSQL server ({example})"
        )
    if parsed.get_backend_name() != "postgresql":
        raise UserError(f"--storage {shown}: rows of several workers need PostgreSQL; valid: {example}")
    try:
        # Every statement is a transaction of its own: one trip to the server, not four.
        return sa.create_engine(parsed, isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": 10})
    except ImportError as error:
        raise UserError(
            f"--storage {shown}: the driver {parsed.get_driver_name()} is not installed; pip install"
            f" 'mocbench[postgres]' brings psycopg, for {example}"
        ) from error
