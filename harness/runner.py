"""Runs a sweep: what is missing is measured, what is there is left alone, and tables follow the rows.

Any number of processes may run or work on one sweep at once. Each goes through all that is missing, leases
what it takes, and comes back to what others hold until that is measured or they are gone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.exceptions import StorageInternalError
from rich.console import Console

from harness.executors import MEANWHILE_SECONDS, run_on_ray, worker_environments
from harness.guard import end_orphans
from harness.measure.environment import device_name
from harness.plan import Unit, grid_points, is_missing, prepare_data, units
from harness.progress import SweepProgress
from harness.search.mirror import Mirror
from harness.search.outcome import INFEASIBLE, record_pruned
from harness.search.proposals import Proposal, SearchStudy
from harness.shared import Shared, open_shared
from harness.store.files import RowStore, Store, copy_rows
from harness.store.folders import results_folder
from harness.store.frames import export
from harness.store.leases import Claims
from harness.store.rows import MEASURED
from harness.sweep.catalog import GROUPED_WORKLOADS
from harness.sweep.model import Part, Sweep, sweep_text
from harness.sweep.point import Point
from harness.work import WAIT_SECONDS, Work
from harness.worker import TRIAL_COMMAND, Finished, Listener, Stop, new_run_id, run_job
from harness.workloads.job import Job

# A trial that fails with less left on the disk has failed for that: the point is measured when there is room.
LEAST_FREE_BYTES = 2**20


@dataclass(frozen=True)
class RunOptions:
    """What the command line decides about a run; none of it changes what a point is."""

    results: Path = Path("results")
    device: str = "cpu"
    workers: int | None = None  # None: one per GPU, one on a CPU
    retry: str = "none"
    storage: str | None = None  # where rows and leases of several hosts meet; None: the results folder
    executor: str = "local"
    command: str = "mocbench run"
    trial_command: tuple[str, ...] = TRIAL_COMMAND


@dataclass
class Summary:
    """How a run ended."""

    folder: Path
    total: int = 0
    already_done: int = 0
    statuses: dict[str, int] = field(default_factory=dict)

    def count(self, status: str) -> None:
        """One point more of this run that ended so."""
        self.statuses[status] = self.statuses.get(status, 0) + 1

    @property
    def failed(self) -> int:
        """Points of this run without a measured value, apart from unsupported ones."""
        return sum(n for status, n in self.statuses.items() if status not in (*MEASURED, "unsupported"))


def run_sweep(sweep: Sweep, options: RunOptions, console: Console) -> Summary:
    """Measure every missing point of a sweep and write its tables under `options.results / sweep.name`.

    Raises SpecError if the sweep cannot be started, OSError if rows cannot be written.
    """
    folder = results_folder(options.results, sweep.name)
    folder.mkdir(parents=True, exist_ok=True)
    data_ids = prepare_data(sweep, lambda text: console.print(text, highlight=False))
    (folder / "sweep.yaml").write_text(sweep_text(sweep), encoding="utf-8")
    (folder / "command.txt").write_text(options.command + "\n", encoding="utf-8")
    shared = open_shared(folder, sweep.name, options.storage)
    if options.storage is not None:
        copy_rows(Store(folder), shared.store)  # what was measured here before is not measured again
    claims = Claims(shared.book)
    try:
        mirror = Mirror(sweep, grid_points(sweep, data_ids), shared, claims, options.device)
        if options.executor == "ray":
            return _run_on_ray(sweep, options, folder, shared.store, mirror, console)
        return _Run(sweep, options, folder, data_ids, shared, claims, console).run(mirror.update)
    finally:
        claims.close()
        if options.storage is not None:
            copy_rows(shared.store, Store(folder))
        if (folder / "rows.jsonl").exists():
            export(folder)


def run_worker(sweep: Sweep, options: RunOptions, console: Console) -> Summary:
    """Help to measure a sweep, until nothing of it is left; tables and studies of grids are for `run_sweep`.

    Raises SpecError if it cannot be started, OSError if rows cannot be written.
    """
    folder = results_folder(options.results, sweep.name)
    folder.mkdir(parents=True, exist_ok=True)
    data_ids = prepare_data(sweep, lambda text: console.print(text, highlight=False))
    shared = open_shared(folder, sweep.name, options.storage)
    claims = Claims(shared.book)
    try:
        return _Run(sweep, options, folder, data_ids, shared, claims, console).run(lambda: None)
    finally:
        claims.close()


def _run_on_ray(
    sweep: Sweep, options: RunOptions, folder: Path, store: RowStore, mirror: Mirror, console: Console
) -> Summary:
    before = store.finished()
    run_on_ray(sweep, options, console, mirror.update)
    mirror.update()
    after = store.finished()
    summary = Summary(folder, total=len(after), already_done=len(before))
    for at, status in after.items():
        if before.get(at) != status:
            summary.count(status)
    return summary


class _Run:
    """State shared by the worker threads of one process."""

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
        self._folder = folder
        self._data_ids = data_ids
        self._console = console
        self._device_name = device_name(options.device)
        self._store = shared.store
        self._claims = claims
        self._storage = shared.storage
        self._environments = worker_environments(options.device, options.workers)
        self._lock = threading.Lock()  # guards the studies and the summary
        self._summary = Summary(folder)
        # Outcomes that were on record when this process started: what `retry` asks for, it asks of these.
        self._old_runs: set[str] = set()

    def run(self, meanwhile: Callable[[], object]) -> Summary:
        """Start one thread a worker and wait for all of them; `meanwhile` is called again and again, and once
        at the end."""
        end_orphans()
        work: Work[SearchStudy | Unit] = Work()
        status = self._store.finished()
        rows = self._rows_by_key()
        self._old_runs = {own[-1]["run_id"] for own in rows.values()}
        for part, points in grid_points(self._sweep, self._data_ids):
            if part.optimize is not None:
                study = self._open_search(part, rows)
                left = max(0, part.optimize.n_trials - study.finished_trials())
                self._summary.total += part.optimize.n_trials * len(part.seeds)
                self._summary.already_done += (part.optimize.n_trials - left) * len(part.seeds)
                for _ in self._environments[:left]:
                    work.add(study)
                continue
            missing = [point for point in points if self._is_missing(point, status)]
            self._summary.total += len(points)
            self._summary.already_done += len(points) - len(missing)
            for unit in units(part, points, missing):
                work.add(unit)
        self._progress = SweepProgress(self._console, self._summary.total, self._summary.already_done)
        with self._progress:
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

    def _open_search(self, part: Part, rows: dict[str, list[dict[str, Any]]]) -> SearchStudy:
        study = SearchStudy(self._sweep, part, self._storage, self._options.device, [], self._data_ids)
        with self._alone(study):  # or two that start at once would both bring back a lost study's trials
            study.adopt(self._claims.held, rows)
            study.sync(rows)
            study.fail_stale(self._claims.held)
        return study

    def _alone(self, study: SearchStudy) -> contextlib.AbstractContextManager[None]:
        return self._claims.alone(f"study:{study.name}")

    def _work(self, work: Work[SearchStudy | Unit], environment: dict[str, str]) -> None:
        try:
            for item in work:
                if isinstance(item, SearchStudy):
                    took_one = self._optimize_once(item, environment)
                    if not self._is_searched(item, take_over=not took_one):
                        work.put_back(item, wait=not took_one)
                elif not self._try_unit(item, environment):
                    work.put_back(item, wait=True)
        except StorageInternalError as error:
            work.fail(ConnectionError(f"the storage of the studies: {error}"))
        except BaseException as error:  # handed to the main thread, which raises it
            work.fail(error)

    def _is_searched(self, study: SearchStudy, take_over: bool) -> bool:
        """Whether a search has all its trials; with `take_over`, those of dead workers are ended first."""
        assert study.part.optimize is not None
        with self._alone(study), self._lock:
            if take_over:
                study.adopt(self._claims.held, self._rows_by_key())
                study.fail_stale(self._claims.held)
            return study.finished_trials() >= study.part.optimize.n_trials

    def _run_unit(self, unit: Unit, environment: dict[str, str], stop: Stop | None = None) -> None:
        """Measure a unit, or wait until whoever has it has measured it."""
        while not self._try_unit(unit, environment, stop):
            time.sleep(WAIT_SECONDS)

    def _try_unit(self, unit: Unit, environment: dict[str, str], stop: Stop | None = None) -> bool:
        """Measure a unit; False if somebody else has it. `stop` is asked about a training's progress."""
        leases = [f"{key}@{self._device_name}" for key in unit.keys]
        if self._unmeasured(unit)[0] and not self._claims.take(leases):
            return False
        try:
            # Again: somebody may have measured it before giving it back.
            points, elsewhere = self._unmeasured(unit)
            for point, status in elsewhere:
                with self._lock:
                    self._summary.count(status)
                self._progress.skip(point, f"{status}, by another worker")
            if points:
                self._measure(unit, points, environment, stop)
        finally:
            self._claims.release(leases)
        return True

    def _measure(
        self, unit: Unit, points: tuple[Point, ...], environment: dict[str, str], stop: Stop | None
    ) -> None:
        job = Job(
            sweep=self._sweep.name,
            run_id=new_run_id(),
            attempt=1,
            points=(*unit.companions, *points),
            measure=unit.part.measure,
            device=self._options.device,
            work_dir=str(self._folder / "checkpoints"),
            data=self._sweep.data,
        )
        listener = Listener(
            finished=lambda outcome: self._finished(unit.part, points, outcome),
            environment=self._store.append_environment,
            progress=self._progress.advance,
            stop=stop,
        )
        run_job(
            job,
            self._folder,
            unit.part.limits,
            listener,
            device_name=self._device_name,
            environment=environment,
            command=self._options.trial_command,
        )

    def _finished(self, part: Part, points: tuple[Point, ...], outcome: Finished) -> None:
        if outcome.point not in points:
            return  # a companion: measured before, here only to be compared with
        if outcome.status == "crashed" and shutil.disk_usage(self._folder).free < LEAST_FREE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder))
        self._store.append(outcome.rows, outcome.samples, outcome.log_tail)
        # A search goes to the edge of what can be measured on purpose: that is no failure of the run.
        if part.optimize is None or outcome.status not in INFEASIBLE:
            with self._lock:
                self._summary.count(outcome.status)
        self._progress.finish(outcome)

    def _is_missing(self, point: Point, known: dict[tuple[str, str], str]) -> bool:
        return is_missing(point, known, self._device_name, self._options.retry)

    def _unmeasured(self, unit: Unit) -> tuple[tuple[Point, ...], list[tuple[Point, str]]]:
        """Points of a unit without an outcome, or with an old one that `retry` wants to see again; and the
        others with their status: other workers have measured them meanwhile."""
        known = self._store.finished(unit.keys)
        left = [point for point in unit.points if self._is_missing(point, known)]
        if left and self._options.retry != "none":
            rows = self._store.current(self._device_name, unit.keys)
            left = [p for p in left if p.key not in rows or rows[p.key][-1]["run_id"] in self._old_runs]
        others = [(p, known[self._device_name, p.key]) for p in unit.points if p not in left]
        return tuple(left), others

    def _optimize_once(self, study: SearchStudy, environment: dict[str, str]) -> bool:
        """One trial of a search: its points, one per seed, and the dense baseline of each.

        Returns False if other workers have the last trials in hand.
        """
        with self._alone(study):
            with self._lock:
                proposal = study.propose()
            if proposal is None:
                return False
            lease = [study.lease_of(proposal.trial)]
            self._claims.take(lease)
        try:
            self._measure_proposal(study, proposal, environment)
        finally:
            self._claims.release(lease)
        return True

    def _measure_proposal(self, study: SearchStudy, proposal: Proposal, environment: dict[str, str]) -> None:
        part = study.part

        def stop(point: Point, percent: int, values: dict[str, float]) -> bool:
            with self._lock:
                return study.note_progress(proposal, point, percent, values)

        lost = "given up before" if proposal.pruned else ""  # why nothing more of the trial is measured
        for point, dense in zip(proposal.points, proposal.baselines, strict=True):
            rival = dense.key != point.key
            if rival and not lost and self._is_missing(dense, self._store.finished([dense.key])):
                self._progress.expect(1)
                self._run_unit(Unit(part, (dense,)), environment)
            if lost or not self._is_missing(point, self._store.finished([point.key])):
                self._progress.skip(point, lost or "measured before")
                continue
            companions = (dense,) if rival and part.workload in GROUPED_WORKLOADS else ()
            self._run_unit(Unit(part, (point,), companions), environment, stop)
            if proposal.pruned:
                lost = "given up: worse than the others at the same place"
                self._progress.skip(point, lost)
            elif self._store.finished([point.key]).get((self._device_name, point.key)) not in MEASURED:
                lost = "left out: another seed of the trial failed"
        # A point proposed before, or measured by another runner meanwhile, is answered from its rows.
        with self._lock:
            status = study.settle(proposal, self._rows_by_key())
            if status == "pruned":
                record_pruned(self._folder, part, proposal.points[0], study.reached(proposal))

    def _rows_by_key(self) -> dict[str, list[dict[str, Any]]]:
        return self._store.current(self._device_name)
