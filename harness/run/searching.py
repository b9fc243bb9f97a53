"""Runs a search: each trial is a proposal's points, one per seed, and the dense baseline of each."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from harness.run.plan import Unit
from harness.run.progress import SweepProgress
from harness.run.supervise import Stop
from harness.search.outcome import record_pruned
from harness.search.proposals import Proposal, SearchStudy
from harness.search.storage import Storage
from harness.store.files import RowStore
from harness.store.leases import Claims
from harness.store.rows import MEASURED
from harness.sweep.catalog import WORKLOADS
from harness.sweep.model import Part, Sweep
from harness.sweep.point import Point


class Runner(Protocol):
    """What a search uses of the run it belongs to."""

    folder: Path
    device_name: str
    store: RowStore
    claims: Claims
    lock: threading.Lock  # guards the studies and the summary
    progress: SweepProgress

    def is_missing(self, point: Point, known: dict[tuple[str, str], str]) -> bool:
        """Whether the run measures the point; `known` has the status of points by device and key."""

    def run_unit(self, unit: Unit, environment: dict[str, str], stop: Stop | None = None) -> None:
        """Measure a unit, or wait until the worker that holds it has measured it."""


class SearchRun:
    """The search of one part, shared by the worker threads of a process."""

    def __init__(
        self,
        sweep: Sweep,
        part: Part,
        storage: Storage,
        device: str,
        data_ids: Mapping[int, str],
        run: Runner,
    ) -> None:
        assert part.optimize is not None
        self._n_trials = part.optimize.n_trials
        self._part = part
        self._search = SearchStudy(sweep, part, storage, device, data_ids)
        self._run = run

    def open(self, rows: dict[str, list[dict[str, Any]]]) -> int:
        """Bring the study up to date with `rows` by point key; returns how many trials are left."""
        with self._alone():  # or two that start at once would both bring back a lost study's trials
            self._search.adopt(self._run.claims.held, rows)
            self._search.restore(rows)
            self._search.study.fail_stale(self._run.claims.held)
        return max(0, self._n_trials - len(self._search.study.ended()))

    def is_done(self, take_over: bool) -> bool:
        """Whether the search has all its trials; with `take_over`, those of dead workers are ended first."""
        with self._alone(), self._run.lock:
            if take_over:
                self._search.adopt(self._run.claims.held, self._rows())
                self._search.study.fail_stale(self._run.claims.held)
            return len(self._search.study.ended()) >= self._n_trials

    def run_trial(self, environment: dict[str, str]) -> bool:
        """Measure one trial. Returns False if other workers hold the last trials."""
        with self._alone():
            with self._run.lock:
                proposal = self._search.propose()
            if proposal is None:
                return False
            lease = [self._search.study.lease_of(proposal.trial)]
            self._run.claims.take(lease)
        try:
            self._measure(proposal, environment)
        finally:
            self._run.claims.release(lease)
        return True

    def _measure(self, proposal: Proposal, environment: dict[str, str]) -> None:
        run, part = self._run, self._part

        def stop(point: Point, percent: int, values: dict[str, float]) -> bool:
            with run.lock:
                return self._search.note_progress(proposal, point, percent, values)

        lost = "given up before" if proposal.pruned else ""  # why nothing more of the trial is measured
        for point, dense in zip(proposal.points, proposal.baselines, strict=True):
            has_baseline = dense.key != point.key
            if has_baseline and not lost and run.is_missing(dense, run.store.finished([dense.key])):
                run.progress.expect(1)
                run.run_unit(Unit(part, (dense,)), environment)
            if lost or not run.is_missing(point, run.store.finished([point.key])):
                run.progress.skip(point, lost or "measured before")
                continue
            companions = (dense,) if has_baseline and WORKLOADS[part.workload].grouped else ()
            run.run_unit(Unit(part, (point,), companions), environment, stop)
            if proposal.pruned:
                lost = "given up: worse than the others at the same share of its tokens"
                run.progress.skip(point, lost)
            elif run.store.finished([point.key]).get((run.device_name, point.key)) not in MEASURED:
                lost = "left out: another seed of the trial failed"
        # A point proposed before, or measured by another runner meanwhile, is answered from its rows.
        with run.lock:
            status = self._search.settle(proposal, self._rows())
            if status == "pruned":
                record_pruned(run.folder, part, proposal.points[0], self._search.reached(proposal))

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        return self._run.claims.alone(f"study:{self._search.study.name}")

    def _rows(self) -> dict[str, list[dict[str, Any]]]:
        return self._run.store.current(self._run.device_name)
