"""Runs jobs in child processes: spawn, watch, time out, classify, and run the rest of a group again.

Whatever a trial does (crash, hang, run out of memory, kill itself) ends as a row with a status; a group that
loses one member goes on without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.job import Job, write_job
from harness.metrics import PRIMARY_METRIC
from harness.points import Point
from harness.spec import Limits
from harness.trial import EXIT_OOM, PARENT_VARIABLE, make_row, output_path

POLL_SECONDS = 0.1
LOG_TAIL_LINES = 40
RETRIED = ("crashed", "timeout")


@dataclass(frozen=True)
class Finished:
    """One point's outcome as it comes out of a trial process."""

    point: Point
    status: str
    rows: list[dict[str, Any]]
    log_tail: str = ""


@dataclass(frozen=True)
class Listener:
    """What the runner wants to hear while a job runs; called from the thread that runs the job."""

    finished: Callable[[Finished], None]
    samples: Callable[[dict[str, Any]], None]
    environment: Callable[[dict[str, Any]], None]
    progress: Callable[[Point, float, str], None]


def new_run_id() -> str:
    """A fresh id for one process's worth of rows."""
    return time.strftime("%Y%m%dT%H%M%S", time.gmtime()) + "-" + uuid.uuid4().hex[:8]


def run_job(
    job: Job,
    folder: Path,
    limits: Limits,
    listener: Listener,
    *,
    device_name: str,
    environment: dict[str, str],
) -> None:
    """Run every point of a job, in as many processes as it takes; each point is reported exactly once.

    `folder` is the results folder (job files and logs go to `folder/jobs`). `environment` is added to the
    child's (which GPU it sees, how many threads it takes). `device_name` stands in rows of a process that
    died before it could say what it runs on.
    """
    waiting = list(job.points)
    attempts: dict[str, int] = {}
    while waiting:
        current = dataclasses.replace(
            job,
            run_id=new_run_id(),
            attempt=max(attempts.get(point.key, 1) for point in waiting),
            points=tuple(waiting),
        )
        process = _Trial(current, folder, limits, listener, device_name, environment)
        failed = process.run()
        waiting = [point for point in waiting if point.key not in process.finished]
        if failed is None:
            continue
        attempt = attempts.get(failed.point.key, 1)
        if failed.status in RETRIED and attempt <= limits.retries:
            attempts[failed.point.key] = attempt + 1
        else:
            listener.finished(failed)
            waiting = [point for point in waiting if point.key != failed.point.key]


class _Trial:
    """One child process and what it has said so far."""

    def __init__(
        self,
        job: Job,
        folder: Path,
        limits: Limits,
        listener: Listener,
        device_name: str,
        environment: dict[str, str],
    ) -> None:
        self._job = job
        self._limits = limits
        self._listener = listener
        self._path = folder / "jobs" / f"{job.run_id}.json"
        self._log = self._path.with_suffix(".log")
        self._environment = environment
        self._points = {point.key: point for point in job.points}
        self._current: Point = job.points[0]
        self._conditions: dict[str, Any] = {"device_name": device_name, "env_id": None}
        self._offset = 0
        self._deadline = time.monotonic() + limits.trial_seconds
        self._failed: Finished | None = None
        self.finished: set[str] = set()

    def run(self) -> Finished | None:
        """Run to the end of the process. Returns the point that failed with it, if one did."""
        write_job(self._job, self._path)
        oom_kills = _oom_kills()
        own = {PARENT_VARIABLE: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        with self._log.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "harness.trial", str(self._path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **own, **self._environment},
                start_new_session=True,
            )
            try:
                verdict = self._watch(process)
            finally:
                _kill_group(process)
        self._read_events()
        if self._failed is not None:
            return self._failed
        missing = len(self._points) - len(self.finished)
        if verdict is None and process.returncode == 0 and not missing:
            return None
        if process.returncode == EXIT_OOM and self._current.key in self.finished:
            return None  # it has said which point ran out of memory; the rest runs in a fresh process
        status, detail = verdict or _classify(process.returncode, _oom_kills() - oom_kills)
        if self._current.key in self.finished:  # it died between points: blame the next one in line
            self._current = next(p for key, p in self._points.items() if key not in self.finished)
        row = make_row(
            self._job,
            self._current,
            PRIMARY_METRIC[self._current.workload],
            status,
            detail,
            **self._conditions,
        )
        return Finished(self._current, status, [row], self._log_tail())

    def _watch(self, process: subprocess.Popen[bytes]) -> tuple[str, str] | None:
        """Wait for the process; returns a status and reason if it had to be killed."""
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=POLL_SECONDS)
                return None
            self._read_events()
            if time.monotonic() > self._deadline:
                return "timeout", f"longer than limits.trial_seconds = {self._limits.trial_seconds:g}"
            limit = self._limits.memory_bytes
            if limit is not None and (used := _group_memory(process.pid)) > limit:
                return (
                    "oom",
                    f"resident {used / 1e9:.2f} GB is over limits.memory_bytes = {limit / 1e9:.2f} GB",
                )

    def _read_events(self) -> None:
        path = output_path(self._path)
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole, newline, _ = text.rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        for line in whole.split(b"\n"):
            if line.strip():
                self._handle(json.loads(line))

    def _handle(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "environment":
            self._conditions["env_id"] = event["record"]["env_id"]
            self._conditions["device_name"] = event["record"]["device_name"]
            self._listener.environment(event["record"])
        elif kind == "samples":
            self._listener.samples({name: value for name, value in event.items() if name != "event"})
        else:
            point = self._points[event["point_key"]]
            if kind == "start":
                self._current = point
                self._deadline = time.monotonic() + self._limits.trial_seconds
            elif kind == "progress":
                self._listener.progress(point, event["fraction"], event["text"])
            elif kind == "finish":
                self._deadline = time.monotonic() + self._limits.trial_seconds
                outcome = Finished(point, event["status"], event["rows"])
                if event["status"] == "crashed":
                    self._failed = dataclasses.replace(outcome, log_tail=self._log_tail())
                else:
                    self.finished.add(point.key)
                    self._listener.finished(outcome)

    def _log_tail(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-LOG_TAIL_LINES:])


def _classify(returncode: int, oom_kills: int) -> tuple[str, str]:
    if returncode == EXIT_OOM:
        return "oom", "out of memory"
    if returncode == -signal.SIGKILL and oom_kills > 0:
        return "oom", "killed by the kernel's out-of-memory killer"
    if returncode < 0:
        return "crashed", f"killed by signal {signal.Signals(-returncode).name}"
    return "crashed", f"process ended with exit code {returncode} before the point was finished"


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End the child and everything it started, and wait until it is gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _group_memory(group: int) -> int:
    """Resident bytes of all processes of a process group (Linux; 0 elsewhere)."""
    total = 0
    page = os.sysconf("SC_PAGE_SIZE")
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                total += int(fields[21]) * page
    return total


def _oom_kills() -> int:
    """How many processes the kernel has killed for memory since boot (Linux; 0 elsewhere)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
