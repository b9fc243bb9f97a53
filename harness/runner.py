"""Runs a sweep: what is missing is measured, what is there is left alone, and tables follow the rows."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from optuna.trial import Trial
from rich.console import Console

from harness.claims import Claims
from harness.grid import make_point
from harness.job import Job
from harness.measure.environment import device_name
from harness.plan import GROUPED_WORKLOADS, Unit, grid_points, is_missing, prepare_data, units
from harness.points import Point
from harness.progress import SweepProgress
from harness.spec import Part, SpecError, Sweep
from harness.store import MEASURED, Store, export, read_raw
from harness.study import PartStudy, open_storage
from harness.worker import Finished, Listener, new_run_id, run_job


@dataclass(frozen=True)
class RunOptions:
    """What the command line decides about a run; none of it changes what a point is."""

    results: Path = Path("results")
    device: str = "cpu"
    workers: int | None = None  # None: one per GPU, one on a CPU
    retry: str = "none"
    storage: str | None = None
    command: str = "mocbench run"


@dataclass
class Summary:
    """How a run ended."""

    folder: Path
    total: int = 0
    already_done: int = 0
    statuses: dict[str, int] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        """Points of this run without a measured value, apart from unsupported ones."""
        return sum(n for status, n in self.statuses.items() if status not in (*MEASURED, "unsupported"))


def run_sweep(sweep: Sweep, options: RunOptions, console: Console) -> Summary:
    """Measure every missing point of a sweep and write its tables under `options.results / sweep.name`.

    Raises SpecError if the sweep cannot be started, OSError if rows cannot be written.
    """
    folder = options.results / sweep.name
    if folder.is_symlink() or not folder.resolve().is_relative_to(options.results.resolve()):
        raise SpecError(f"{folder} is a link or lies outside {options.results}; name a sweep that does not")
    folder.mkdir(parents=True, exist_ok=True)
    data_ids = prepare_data(sweep, lambda text: console.print(text, highlight=False))
    (folder / "sweep.yaml").write_text(sweep_text(sweep), encoding="utf-8")
    (folder / "command.txt").write_text(options.command + "\n", encoding="utf-8")
    try:
        return _Run(sweep, options, folder, data_ids, console).run()
    finally:
        if (folder / "rows.jsonl").exists():
            export(folder)


def sweep_text(sweep: Sweep) -> str:
    """The sweep as YAML that `load_sweep` reads back, with what was left out spelled as its default."""
    return yaml.safe_dump(sweep.model_dump(mode="json", exclude_none=True), sort_keys=False, width=110)


def worker_environments(device: str, workers: int | None) -> list[dict[str, str]]:
    """What each worker's children get: one GPU each, or an equal share of the CPU's cores."""
    if device != "cuda":
        count = workers or 1
        return [{"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}] * count
    import torch

    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names: Sequence[str] = listed.split(",") if listed else [str(i) for i in range(torch.cuda.device_count())]
    return [{"CUDA_VISIBLE_DEVICES": name} for name in list(names)[: workers or len(names)]]


class _Run:
    """State shared by the worker threads of one run."""

    def __init__(
        self, sweep: Sweep, options: RunOptions, folder: Path, data_ids: dict[int, str], console: Console
    ) -> None:
        self._sweep = sweep
        self._options = options
        self._folder = folder
        self._data_ids = data_ids
        self._console = console
        self._device_name = device_name(options.device)
        self._store = Store(folder)
        self._claims = Claims(folder)
        self._storage = open_storage(folder, options.storage)
        self._environments = worker_environments(options.device, options.workers)
        self._lock = threading.Lock()  # guards the studies and the summary
        self._errors: list[BaseException] = []
        self._summary = Summary(folder)

    def run(self) -> Summary:
        """Start one thread a worker and wait for all of them."""
        work: queue.SimpleQueue[tuple[PartStudy, Unit | None]] = queue.SimpleQueue()
        status = self._store.finished()
        for part, points in grid_points(self._sweep, self._data_ids):
            study = self._open_study(part, points)
            if part.optimize is not None:
                left = max(0, part.optimize.n_trials - study.finished_trials())
                self._summary.total += part.optimize.n_trials
                self._summary.already_done += part.optimize.n_trials - left
                for _ in range(left):
                    work.put((study, None))
                continue
            missing = [point for point in points if self._is_missing(point, status)]
            self._summary.total += len(points)
            self._summary.already_done += len(points) - len(missing)
            for unit in units(part, points, missing):
                work.put((study, unit))
        self._progress = SweepProgress(self._console, self._summary.total, self._summary.already_done)
        with self._progress:
            threads = [
                threading.Thread(target=self._work, args=(work, environment), daemon=True)
                for environment in self._environments
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if self._errors:
            raise self._errors[0]
        return self._summary

    def _open_study(self, part: Part, points: list[Point]) -> PartStudy:
        study = PartStudy(self._sweep, part, self._storage, self._options.device, points)
        study.sync(self._rows_by_key(), points)
        study.fail_stale(self._claims.held())
        return study

    def _work(
        self, work: queue.SimpleQueue[tuple[PartStudy, Unit | None]], environment: dict[str, str]
    ) -> None:
        try:
            while not self._errors:
                try:
                    study, unit = work.get_nowait()
                except queue.Empty:
                    return
                if unit is None:
                    self._optimize_once(study, environment)
                else:
                    self._run_unit(study, unit, environment)
        except BaseException as error:  # handed to the main thread, which raises it
            self._errors.append(error)

    def _run_unit(
        self,
        study: PartStudy,
        unit: Unit,
        environment: dict[str, str],
        trials: dict[str, Trial] | None = None,
    ) -> None:
        """Measure a unit unless somebody else has it. `trials` says which trial stands for which point;
        None makes one for each."""
        if not self._claims.take(unit.keys):
            return
        try:
            known = self._store.finished()
            points = tuple(p for p in unit.points if self._is_missing(p, known))
            if not points:
                return
            if trials is None:
                with self._lock:
                    trials = {point.key: study.begin(point) for point in points}
            kept = {point.key for point in points}
            job = Job(
                sweep=self._sweep.name,
                run_id=new_run_id(),
                attempt=1,
                points=(*unit.companions, *points),
                measure=unit.part.measure.settings(),
                device=self._options.device,
                work_dir=str(self._folder / "checkpoints"),
                data=self._sweep.data,
            )
            listener = Listener(
                finished=lambda outcome: self._finished(study, kept, trials, outcome),
                samples=lambda item: self._store.append_samples([item]),
                environment=self._store.append_environment,
                progress=self._progress.advance,
            )
            run_job(
                job,
                self._folder,
                unit.part.limits,
                listener,
                device_name=self._device_name,
                environment=environment,
            )
        finally:
            self._claims.release(unit.keys)

    def _finished(
        self, study: PartStudy, kept: set[str], trials: dict[str, Trial], outcome: Finished
    ) -> None:
        key = outcome.point.key
        if key not in kept:
            return  # a companion: measured before, here only to be compared with
        self._store.append(outcome.rows, replace=self._options.retry != "none")
        with self._lock:
            if key in trials:
                study.complete(trials[key], outcome.point, outcome.rows)
            self._summary.statuses[outcome.status] = self._summary.statuses.get(outcome.status, 0) + 1
        self._progress.finish(outcome)

    def _is_missing(self, point: Point, known: dict[tuple[str, str], str]) -> bool:
        return is_missing(point, known, self._device_name, self._options.retry)

    def _optimize_once(self, study: PartStudy, environment: dict[str, str]) -> None:
        """One trial of an optimisation: a suggested point and, for its shape, the dense baseline."""
        part = study.part
        assert part.optimize is not None
        with self._lock:
            trial, assignment = study.suggest()
            point = make_point(part, assignment, part.seeds[0], self._data_ids)
            study.describe(trial, point)
        dense = make_point(
            part, {**assignment, "method": part.optimize.baseline}, part.seeds[0], self._data_ids
        )
        if self._is_missing(dense, self._store.finished()) and dense.key != point.key:
            self._run_unit(study, Unit(part, (dense,)), environment, trials={})
        if self._is_missing(point, self._store.finished()):
            companions = (dense,) if part.workload in GROUPED_WORKLOADS and dense.key != point.key else ()
            self._run_unit(study, Unit(part, (point,), companions), environment, trials={point.key: trial})
        # A point proposed before, or measured by another runner meanwhile, is answered from its rows.
        with self._lock:
            study.complete(trial, point, self._rows_by_key().get(point.key, []))

    def _rows_by_key(self) -> dict[str, list[dict[str, Any]]]:
        rows: dict[str, list[dict[str, Any]]] = {}
        for row in read_raw(self._store.path):
            if row["device_name"] == self._device_name:
                rows.setdefault(row["point_key"], []).append(row)
        return rows
