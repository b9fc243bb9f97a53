"""Runs jobs in child processes: spawn, watch, time out, classify, and run the rest of a group again.

Whatever a trial does (crash, hang, run out of memory, kill itself) ends as a row with a status; a group that
loses one member goes on without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.run.guard import GuardedProcess
from harness.run.trial import EXIT_OOM, TRIAL_COMMAND, output_path
from harness.sweep.catalog import WORKLOADS
from harness.sweep.model import Limits
from harness.sweep.point import Point
from harness.workloads import events
from harness.workloads.job import Job, write_job
from harness.workloads.reporter import make_row

POLL_SECONDS = 0.1
LOG_TAIL_LINES = 40
LOG_TAIL_BYTES = 16384  # a progress bar that never ends its line can be long
RETRIED = ("crashed", "timeout")
# A failure whose log says more than its row.
LOGGED = ("crashed", "timeout", "oom", "wrong")


@dataclass(frozen=True)
class Finished:
    """One point's outcome as it comes out of a trial process, with the raw samples behind its rows and, if it
    failed, the end of the process's log."""

    point: Point
    status: str
    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]] = field(default_factory=list)
    log_tail: str = ""


# Asked with what a training has reached after a percentage of its tokens; True ends it without a row.
Stop = Callable[[Point, int, dict[str, float]], bool]


@dataclass(frozen=True)
class Listener:
    """What the runner wants to hear while a job runs; called from the thread that runs the job."""

    finished: Callable[[Finished], None]
    environment: Callable[[dict[str, Any]], None]
    progress: Callable[[Point, float, str], None]
    stop: Stop | None = None


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
    command: Sequence[str] = TRIAL_COMMAND,
) -> None:
    """Run every point of a job, in as many processes as it takes; each point is reported exactly once, apart
    from one that the listener stops.

    `folder` is the results folder (job files and logs go to `folder/jobs`). `environment` is added to the
    child's (which GPU it sees, how many threads it takes). `device_name` stands in rows of a process that
    died before it could say what it runs on. `command` is what runs a job file.
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
        process = _Trial(current, folder, limits, listener, device_name)
        failed = process.run(command, environment)
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

    def __init__(self, job: Job, folder: Path, limits: Limits, listener: Listener, device_name: str) -> None:
        self._job = job
        self._limits = limits
        self._listener = listener
        self._path = folder / "jobs" / f"{job.run_id}.json"
        self._log = self._path.with_suffix(".log")
        self._points = {point.key: point for point in job.points}
        self._current: Point = job.points[0]
        self._machine: dict[str, Any] = {"device_name": device_name, "env_id": None}
        self._offset = 0
        self._deadline = time.monotonic() + limits.trial_seconds
        self._failed: Finished | None = None
        self._samples: dict[str, list[dict[str, Any]]] = {}
        self._stopped = False  # a pruner ended the training
        self.finished: set[str] = set()

    def run(self, command: Sequence[str], environment: dict[str, str]) -> Finished | None:
        """Run to the end of the process. Returns the point that failed with it, if one did."""
        write_job(self._job, self._path)
        oom_kills = _oom_kills()
        with self._log.open("wb") as log:
            process = GuardedProcess(
                [*command, str(self._path)], log, {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
            )
            try:
                verdict = self._watch(process)
            finally:
                returncode = process.end()
        self._read_events()
        if self._stopped:
            self.finished.add(self._current.key)  # there is nothing to keep of it, and nothing to run again
            return None
        if self._failed is not None:
            return self._failed
        if len(self.finished) == len(self._points):
            return None  # all is said, however the process went down after that
        if self._current.key in self.finished:
            # It ended between two points, which is no point's fault: the rest runs in a fresh process.
            return None
        status, detail = verdict or _classify(returncode, _oom_kills() - oom_kills)
        metric = WORKLOADS[self._current.workload].primary_metric
        row = make_row(self._job, self._current, metric, status, detail, **self._machine)
        return self._outcome(self._current, status, [row])

    def _watch(self, process: GuardedProcess) -> tuple[str, str] | None:
        """Wait for the process; returns a status and reason if it has to be killed."""
        while not process.wait(POLL_SECONDS):
            self._read_events()
            if self._stopped:
                return None
            if time.monotonic() > self._deadline:
                return "timeout", f"longer than limits.trial_seconds = {self._limits.trial_seconds:g}"
            limit = self._limits.memory_bytes
            if limit is not None and (used := process.memory_bytes()) > limit:
                return (
                    "oom",
                    f"resident {used / 1e9:.2f} GB is over limits.memory_bytes = {limit / 1e9:.2f} GB",
                )
        return None

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
            event = events.parse_event(line)
            if event is not None:
                self._handle(event)

    def _handle(self, event: events.Event) -> None:
        match event:
            case events.Environment(record=record):
                self._machine = {name: record[name] for name in ("device_name", "env_id")}
                self._listener.environment(record)
            case events.Samples(point_key=key):
                self._samples.setdefault(key, []).append(event.model_dump(exclude={"event"}))
            case events.Start(point_key=key):
                self._current = self._points[key]
                self._deadline = time.monotonic() + self._limits.trial_seconds
            case events.Progress(point_key=key, fraction=fraction, text=text):
                self._listener.progress(self._points[key], fraction, text)
            case events.Intermediate(point_key=key, percent=percent, values=values):
                stop = self._listener.stop
                self._stopped |= stop is not None and stop(self._points[key], percent, values)
            case events.Finish(point_key=key, status=status, rows=rows):
                self._finish(self._outcome(self._points[key], status, rows))

    def _finish(self, outcome: Finished) -> None:
        self._deadline = time.monotonic() + self._limits.trial_seconds
        if outcome.status == "crashed":
            self._failed = outcome
        else:
            self.finished.add(outcome.point.key)
            self._listener.finished(outcome)

    def _outcome(self, point: Point, status: str, rows: list[dict[str, Any]]) -> Finished:
        log = self._log_tail() if status in LOGGED else ""
        return Finished(point, status, rows, self._samples.pop(point.key, []), log)

    def _log_tail(self) -> str:
        with self._log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            lines = log.read().decode("utf-8", errors="replace").splitlines()
        return "\n".join(lines[-LOG_TAIL_LINES:])


def _classify(returncode: int, oom_kills: int) -> tuple[str, str]:
    if returncode == EXIT_OOM:
        return "oom", "out of memory"
    if returncode == -signal.SIGKILL and oom_kills > 0:
        return "oom", "killed by the kernel's out-of-memory killer"
    if returncode < 0:
        return "crashed", f"killed by signal {signal.Signals(-returncode).name}"
    return "crashed", f"process ended with exit code {returncode} before the point was finished"


def _oom_kills() -> int:
    """How many processes the kernel has killed for memory in this process's cgroup, or since boot where the
    cgroup does not say (Linux; 0 elsewhere)."""
    for path in (*_cgroup_counters(), Path("/proc/vmstat")):
        with contextlib.suppress(OSError):
            for line in path.read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0


def _cgroup_counters() -> list[Path]:
    """Where this process's memory cgroup counts kills: version 2 first, then version 1."""
    with contextlib.suppress(OSError):
        groups = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
        root = Path("/sys/fs/cgroup")
        return [
            root / groups.get("", "/").lstrip("/") / "memory.events",
            root / "memory" / groups.get("memory", "/").lstrip("/") / "memory.oom_control",
        ]
    return []
