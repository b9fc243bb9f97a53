"""Where the workers of one sweep meet: rows, leases and studies in a results folder, or in a database."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from harness.search.storage import Storage, open_storage
from harness.store.files import RowStore, Store
from harness.store.leases import FileBook, LeaseBook


class Shared(NamedTuple):
    """All that several workers of one sweep share."""

    store: RowStore
    book: LeaseBook
    storage: Storage


def open_shared(folder: Path, sweep: str, url: str | None) -> Shared:
    """The shared state of the sweep of that name: in its results folder, or in the database at `url`.

    Raises UserError for a URL that several workers cannot share or that cannot be reached.
    """
    if url is None:
        return Shared(Store(folder), FileBook(folder), open_storage(folder))
    from harness.store.database import Database, DatabaseBook, DatabaseStore

    database = Database(url)
    with database.setting_up():  # Optuna makes its tables without asking whether another worker does
        storage = open_storage(folder, url)
    return Shared(DatabaseStore(database, sweep), DatabaseBook(database, sweep), storage)
