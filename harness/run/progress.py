"""What a person sees while a sweep runs: a live display on a terminal, one line per point elsewhere."""

from __future__ import annotations

import threading

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from harness.run.supervise import Finished
from harness.store.files import MEASURED
from harness.sweep.catalog import WORKLOADS
from harness.sweep.metrics import METRICS
from harness.sweep.point import Point

SPEED_SECONDS = 24 * 3600.0  # of points that the time left is estimated from; rich's own 30 s hold none


class SweepProgress:
    """Counts points done, running and failed, estimates the time left and names the best so far."""

    def __init__(self, console: Console, total: int, already_done: int) -> None:
        self._console = console
        self._total = total
        self._done = already_done
        self._already = already_done
        self._failed = 0
        self._best: dict[str, tuple[float, str]] = {}
        self._running: dict[str, TaskID] = {}
        self._lock = threading.Lock()
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            speed_estimate_period=SPEED_SECONDS,
            disable=not console.is_terminal,
        )
        self._sweep = self._bar.add_task("points", total=total, completed=already_done, note="")

    def __enter__(self) -> SweepProgress:
        self._bar.start()
        if not self._console.is_terminal:
            self._console.print(f"{self._total} points, {self._already} already measured", highlight=False)
        return self

    def __exit__(self, *_error: object) -> None:
        self._bar.stop()

    def advance(self, point: Point, fraction: float, text: str) -> None:
        """A running point said how far it is."""
        with self._lock:
            if point.key not in self._running:
                self._running[point.key] = self._bar.add_task(point.label, total=100, note=text)
            self._bar.update(self._running[point.key], completed=round(100 * fraction), note=text)

    def expect(self, count: int) -> None:
        """More points than the sweep's own are measured: dense baselines of a search."""
        with self._lock:
            self._total += count
            self._bar.update(self._sweep, total=self._total)

    def skip(self, point: Point, text: str) -> None:
        """A point is answered without a measurement of its own; `text` says why."""
        with self._lock:
            self._done += 1
            self._bar.update(self._sweep, completed=self._done)
            self._console.print(f"\\[{self._done}/{self._total}] {point.label}: {text}", highlight=False)

    def finish(self, outcome: Finished) -> None:
        """A point ended, in whatever way."""
        with self._lock:
            self._done += 1
            good = outcome.status in MEASURED
            self._failed += not good and outcome.status != "unsupported"
            task = self._running.pop(outcome.point.key, None)
            if task is not None:
                self._bar.remove_task(task)
            metric = WORKLOADS[outcome.point.workload].primary_metric
            row = next(row for row in outcome.rows if row["metric"] == metric)
            if good:
                self._note_best(metric, row["value"], outcome.point)
                said = f"{row['value']:,.4g} {METRICS[metric].unit}"
            else:
                said = f"[bold]{outcome.status}[/bold]: {escape(row['detail'])}"
            note = f"failed {self._failed} · {self._best_text()}"
            self._bar.update(self._sweep, completed=self._done, note=note)
            count = f"[{self._done}/{self._total}]"
            self._console.print(f"\\{count} {outcome.point.label}: {said}", highlight=False)

    def _note_best(self, metric: str, value: float, point: Point) -> None:
        sign = 1.0 if METRICS[metric].higher_is_better else -1.0
        if metric not in self._best or sign * value > sign * self._best[metric][0]:
            self._best[metric] = (value, f"{point.method} {point.selection or ''}".strip())

    def _best_text(self) -> str:
        return " · ".join(
            f"best {value:,.4g} {METRICS[metric].unit} ({who})" for metric, (value, who) in self._best.items()
        )
