"""Workers of this machine: threads that take points, lease them and run them in child processes."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from harness.measure.environment import device_name
from harness.run.guard import end_orphans
from harness.run.options import MEANWHILE_SECONDS, RunOptions, Summary, worker_environments
from harness.run.plan import Unit, grid_points, is_missing, units
from harness.run.progress import SweepProgress
from harness.run.queue import WAIT_SECONDS, Work
from harness.run.searching import SearchRun
from harness.run.shared import Shared, open_shared
from harness.run.supervise import Finished, Listener, Stop, new_run_id, run_job
from harness.run.text import prepare_data
from harness.search.outcome import INFEASIBLE
from harness.search.storage import StorageError
from harness.store.folders import results_folder
from harness.store.leases import Claims
from harness.sweep.catalog import WORKLOADS
from harness.sweep.model import Part, Sweep
from harness.sweep.point import Point
from harness.sweep.support import unsupported_reason
from harness.workloads.job import Job
from harness.workloads.reporter import make_row

# A trial that fails with less left on the disk has failed for that: the point is measured when there is room.
LEAST_FREE_BYTES = 2**20


def run_worker(sweep: Sweep, options: RunOptions, console: Console) -> Summary:
    """Help to measure a sweep, until nothing of it is left; tables and studies of grids are for `run_sweep`.

    Raises UserError if it cannot be started, OSError if rows cannot be written.
    """
    folder = results_folder(options.results, sweep.name)
    folder.mkdir(parents=True, exist_ok=True)
    data_ids = prepare_data(sweep, lambda text: console.print(text, highlight=False))
    shared = open_shared(folder, sweep.name, options.storage)
    claims = Claims(shared.book)
    try:
        return LocalRun(sweep, options, folder, data_ids, shared, claims, console).run(lambda: None)
    finally:
        claims.close()


class LocalRun:
    """State shared by the worker threads of one process: the `searching.Runner` of its searches."""

    def __init__(
        self,
        sweep: Sweep,
        options: RunOptions,
        folder: Path,
        data_ids: dict[int, str],
        shared: Shared,
        claims: Claims,
        console: Console,
    ) -> None:
        self._sweep = sweep
        self._options = options
        self.folder = folder
        self._data_ids = data_ids
        self._console = console
        self.device_name = device_name(options.device)
        self.store = shared.store
        self.claims = claims
        self._storage = shared.storage
        self._environments = worker_environments(options.device, options.workers)
        self.lock = threading.Lock()  # guards the studies and the summary
        self._summary = Summary(folder)
        # Outcomes that were on record when this process started: what `retry` asks for, it asks of these.
        self._old_runs: set[str] = set()

    def run(self, meanwhile: Callable[[], object]) -> Summary:
        """Start one thread a worker and wait for all of them; `meanwhile` is called again and again, and once
        at the end."""
        end_orphans()
        work: Work[SearchRun | Unit] = Work()
        status = self.store.finished()
        rows = self.store.current(self.device_name)
        self._old_runs = {own[-1]["run_id"] for own in rows.values()}
        for part, points in grid_points(self._sweep, self._data_ids):
            if part.optimize is not None:
                search = SearchRun(
                    self._sweep, part, self._storage, self._options.device, self._data_ids, self
                )
                left = search.open(rows)
                self._summary.total += part.optimize.n_trials * len(part.seeds)
                self._summary.already_done += (part.optimize.n_trials - left) * len(part.seeds)
                for _ in self._environments[:left]:
                    work.add(search)
                continue
            missing = [point for point in points if self.is_missing(point, status)]
            self._summary.total += len(points)
            self._summary.already_done += len(points) - len(missing)
            for unit in units(part, points, missing):
                work.add(unit)
        self.progress = SweepProgress(self._console, self._summary.total, self._summary.already_done)
        with self.progress:
            threads = [
                threading.Thread(target=self._work, args=(work, environment), daemon=True)
                for environment in self._environments
            ]
            for thread in threads:
                thread.start()
            while alive := [thread for thread in threads if thread.is_alive()]:
                meanwhile()
                alive[0].join(MEANWHILE_SECONDS)
            meanwhile()
        work.raise_error()
        return self._summary

    def _work(self, work: Work[SearchRun | Unit], environment: dict[str, str]) -> None:
        try:
            for item in work:
                if isinstance(item, SearchRun):
                    took_one = item.run_trial(environment)
                    if not item.is_done(take_over=not took_one):
                        work.put_back(item, wait=not took_one)
                elif not self._try_unit(item, environment):
                    work.put_back(item, wait=True)
        except StorageError as error:
            work.fail(ConnectionError(f"the storage of the studies: {error}"))
        except BaseException as error:  # handed to the main thread, which raises it
            work.fail(error)

    def run_unit(self, unit: Unit, environment: dict[str, str], stop: Stop | None = None) -> None:
        """Measure a unit, or wait until whoever has it has measured it."""
        while not self._try_unit(unit, environment, stop):
            time.sleep(WAIT_SECONDS)

    def _try_unit(self, unit: Unit, environment: dict[str, str], stop: Stop | None = None) -> bool:
        """Measure a unit; False if somebody else has it. `stop` is asked about a training's progress."""
        leases = [f"{key}@{self.device_name}" for key in unit.keys]
        if self._unmeasured(unit)[0] and not self.claims.take(leases):
            return False
        try:
            # Again: somebody may have measured it before giving it back.
            points, elsewhere = self._unmeasured(unit)
            for point, status in elsewhere:
                with self.lock:
                    self._summary.count(status)
                self.progress.skip(point, f"{status}, by another worker")
            if points:
                self._measure(unit, points, environment, stop)
        finally:
            self.claims.release(leases)
        return True

    def _measure(
        self, unit: Unit, points: tuple[Point, ...], environment: dict[str, str], stop: Stop | None
    ) -> None:
        job = self._job(unit, points)
        supported = []
        for point in job.points:
            reason = unsupported_reason(point, job.device)
            if reason is None:
                supported.append(point)
            else:
                self._finished(unit.part, points, self._unsupported(job, point, reason))
        if not any(point in supported for point in points):
            return
        listener = Listener(
            finished=lambda outcome: self._finished(unit.part, points, outcome),
            environment=self.store.append_environment,
            progress=self.progress.advance,
            stop=stop,
        )
        run_job(
            dataclasses.replace(job, points=tuple(supported)),
            self.folder,
            unit.part.limits,
            listener,
            device_name=self.device_name,
            environment=environment,
            command=self._options.trial_command,
        )

    def _job(self, unit: Unit, points: tuple[Point, ...]) -> Job:
        return Job(
            sweep=self._sweep.name,
            run_id=new_run_id(),
            attempt=1,
            points=(*unit.companions, *points),
            measure=unit.part.measure,
            device=self._options.device,
            work_dir=str(self.folder / "checkpoints"),
            data=self._sweep.data,
        )

    def _unsupported(self, job: Job, point: Point, reason: str) -> Finished:
        """The outcome of a point that no process is started for."""
        metric, name = WORKLOADS[point.workload].primary_metric, self.device_name
        row = make_row(job, point, metric, "unsupported", reason, device_name=name, env_id=None)
        return Finished(point, "unsupported", [row])

    def _finished(self, part: Part, points: tuple[Point, ...], outcome: Finished) -> None:
        if outcome.point not in points:
            return  # a companion: measured before, here only to be compared with
        if outcome.status == "crashed" and shutil.disk_usage(self.folder).free < LEAST_FREE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder))
        self.store.append(outcome.rows, outcome.samples, outcome.log_tail)
        # A search goes to the edge of what can be measured on purpose: that is no failure of the run.
        if part.optimize is None or outcome.status not in INFEASIBLE:
            with self.lock:
                self._summary.count(outcome.status)
        self.progress.finish(outcome)

    def is_missing(self, point: Point, known: dict[tuple[str, str], str]) -> bool:
        """Whether this run measures the point; `known` has the status of points by device and key."""
        return is_missing(point, known, self.device_name, self._options.retry)

    def _unmeasured(self, unit: Unit) -> tuple[tuple[Point, ...], list[tuple[Point, str]]]:
        """Points of a unit without an outcome, or with an old one that `retry` wants to see again; and the
        others with their status: other workers have measured them meanwhile."""
        known = self.store.finished(unit.keys)
        left = [point for point in unit.points if self.is_missing(point, known)]
        if left and self._options.retry != "none":
            rows = self.store.current(self.device_name, unit.keys)
            left = [p for p in left if p.key not in rows or rows[p.key][-1]["run_id"] in self._old_runs]
        others = [(p, known[self.device_name, p.key]) for p in unit.points if p not in left]
        return tuple(left), others
