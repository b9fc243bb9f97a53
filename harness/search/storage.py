"""Where Optuna keeps studies: a journal file that several processes share, or a database."""

from __future__ import annotations

import re
from pathlib import Path

import filelock
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.exc import SQLAlchemyError

from harness.errors import UserError
from harness.search import quiet
from harness.store.lines import LOCK_POLL_SECONDS, cut_partial_line

JOURNAL_NAME = "study.journal"
Storage = BaseStorage
StorageError = StorageInternalError  # the storage of the studies cannot be reached


class JournalLock:
    """The lock of a journal's writers, which dies with its holder.

    Optuna's own is a link that a killed process leaves behind, for the next one to wait on. A killed process
    can also leave half a line, after which nobody could read the journal: the next writer cuts it off.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = filelock.FileLock(f"{path}.lock")

    def acquire(self) -> bool:
        """Wait for the lock; always True."""
        self._lock.acquire(poll_interval=LOCK_POLL_SECONDS)
        cut_partial_line(self._path)
        return True

    def release(self) -> None:
        """Let the next one write."""
        self._lock.release()


def open_storage(folder: Path, url: str | None = None) -> Storage:
    """The study's storage: the journal file of a results folder, or a database by URL.

    Raises UserError for SQLite, naming the journal as what to use instead, and for a database that is not
    there.
    """
    if url is None:
        with quiet():
            path = folder / JOURNAL_NAME
            # Optuna asks for its abstract lock, which it does not export; these two methods are all of it.
            return JournalStorage(JournalFileBackend(str(path), JournalLock(path)))  # type: ignore[arg-type]
    if url.startswith("sqlite"):
        raise UserError(
            f"--storage {url}: SQLite cannot be shared by workers; leave --storage out to use the journal"
            " file, or name a PostgreSQL server (postgresql+psycopg://...)"
        )
    try:
        return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})  # the server may have been restarted
    except (SQLAlchemyError, ImportError) as error:
        shown = re.sub(r"(?<=:)[^:/@]+(?=@)", "***", url)
        raise UserError(f"--storage {shown}: {str(error).partition(chr(10))[0]}") from error
