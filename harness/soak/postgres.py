"""A PostgreSQL server of one's own, in a folder, for as long as it is needed: for the soak run and for tests.

The server's programs are those of the machine (Debian package `postgresql`); it listens on a socket in the
folder alone. PostgreSQL refuses to run as root: there it runs as the user `postgres`.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from pathlib import Path


class NoPostgresError(OSError):
    """The machine has no PostgreSQL server to start."""


class PrivatePostgres:
    """A server that runs from `with` to its end.

        with PrivatePostgres(folder) as server:
            ...server.url...

    Raises NoPostgresError if none is installed, subprocess.CalledProcessError if it does not start.
    """

    def __init__(self, folder: Path) -> None:
        """`folder` must not exist yet; it is made."""
        self._programs = _programs()
        self._folder = folder
        self._data = folder / "data"
        self._user = "postgres" if os.geteuid() == 0 else None
        self.url = f"postgresql+psycopg://postgres@/postgres?host={folder}"

    def __enter__(self) -> PrivatePostgres:
        self._folder.mkdir(mode=0o755)
        if self._user is not None:
            owner = pwd.getpwnam(self._user)
            os.chown(self._folder, owner.pw_uid, owner.pw_gid)
        self._run("initdb", "--username=postgres", "--auth=trust", "--no-sync", f"--pgdata={self._data}")
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and wait until it answers."""
        options = f"-c listen_addresses='' -c unix_socket_directories='{self._folder}' -c max_connections=300"
        log = f"--log={self._folder / 'log'}"
        self._run("pg_ctl", "start", "--wait", f"--pgdata={self._data}", log, f"--options={options}")

    def stop(self) -> None:
        """Stop the server at once, as a power cut would: what was committed stays."""
        self._run("pg_ctl", "stop", "--mode=immediate", "--wait", f"--pgdata={self._data}")

    def _run(self, program: str, *arguments: str) -> None:
        # Output to a file: the server would inherit a pipe and keep it open.
        with (self._folder / "programs.log").open("ab") as log:
            subprocess.run(
                [self._programs / program, *arguments],
                user=self._user,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=True,
            )


def _programs() -> Path:
    """Where initdb and pg_ctl are; Debian keeps them off the path. Raises NoPostgresError."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3]))
    found = shutil.which("initdb") or (str(debian[-1]) if debian else None)
    if found is None:
        raise NoPostgresError("no PostgreSQL server here; Debian: apt-get install postgresql")
    return Path(found).resolve().parent
