"""What `mocbench plan` prints: every point with its status, predicted memory and duration; nothing runs.

It reads the sweep, the rows under the results folder and the index of the token cache, and writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pandas as pd
from rich.console import Console
from rich.table import Table

from harness.forecast.duration import START_SECONDS, Duration, History
from harness.forecast.memory import Peak, device_bytes, predict_peak
from harness.measure.environment import device_name
from harness.report import wording
from harness.run.plan import grid_points, is_missing, largest_points, units
from harness.run.text import describe_source, find_data
from harness.store.folders import results_folder
from harness.store.frames import read_rows
from harness.store.rows import COLUMNS, is_primary
from harness.sweep.catalog import PEAK_METRIC, WORKLOADS
from harness.sweep.model import Part, Sweep
from harness.sweep.point import Point
from harness.sweep.support import unsupported_reason
from moc.methods import get_method

_CLOSE = 0.9  # of the device's memory: from here on a prediction is worth a warning


@dataclass(frozen=True)
class Line:
    """One point of the plan."""

    point: Point
    status: str  # of its rows; `missing` if it has none
    fresh: bool  # a run measures it
    unsupported: str | None
    peak: Peak | None
    measured_bytes: float | None  # the peak in its rows
    duration: Duration | None  # None: unknown


class Plan:
    """A sweep against what is measured under `results` on a device of this machine."""

    def __init__(self, sweep: Sweep, results: Path, device: str, retry: str) -> None:
        """Raises UserError if the sweep's text cannot be used or its folder holds links."""
        self.device = device
        self.device_name = device_name(device)
        self.limit = device_bytes(device)
        ids = find_data(sweep)
        folder = results_folder(results, sweep.name)
        self.history = History(_all_rows(results), self.device_name)
        known = _statuses(folder)
        self.parts: list[tuple[Part, list[Line]]] = []
        self.searches: list[tuple[Part, list[Line]]] = []  # with the largest points each may propose
        self.processes = 0
        self.unprepared = False
        for part, points in grid_points(sweep, ids):
            if part.optimize is not None:
                largest = [self._line(part, point, {}, retry) for point in largest_points(part, ids)]
                self.searches.append((part, largest))
                continue
            lines = [self._line(part, point, known, retry) for point in points]
            self.parts.append((part, _corrected(lines)))
            self.processes += len(units(part, points, [line.point for line in lines if line.fresh]))
            self.unprepared |= any(WORKLOADS[p.workload].reads_text and p.data_id is None for p in points)

    def _line(self, part: Part, point: Point, known: Mapping[tuple[str, str], str], retry: str) -> Line:
        reason = unsupported_reason(point, self.device)
        return Line(
            point=point,
            status=known.get((self.device_name, point.key), "missing"),
            fresh=is_missing(point, known, self.device_name, retry),
            unsupported=reason,
            peak=None if reason else predict_peak(point, self.device, self.history.saved_bytes(point)),
            measured_bytes=self.history.metric(point.key, PEAK_METRIC[self.device]),
            duration=None if reason else self.history.estimate(part, point),
        )


def print_plan(sweep: Sweep, plan: Plan, title: str, console: Console) -> None:
    """The table of points and, below it, what they add up to."""
    table = Table("workload", "point", "status", "peak memory", "duration", title=title)
    for part, largest in plan.searches:
        table.add_row(part.workload, *_search_cells(part, largest, plan))
    for part, lines in plan.parts:
        for line in lines:
            status = f"unsupported: {line.unsupported}" if line.unsupported else line.status
            fit = _fit(line, plan.limit)
            cells = (f"{status}, {fit}" if fit else status, _memory(line), _duration(line, plan.limit))
            table.add_row(part.workload, line.point.label, *cells)
    console.print(table)
    lines = [line for _, lines in plan.parts for line in lines]
    for sentence in _summary(sweep, plan, lines):
        console.print(sentence, highlight=False, soft_wrap=True)


def _search_cells(part: Part, largest: list[Line], plan: Plan) -> tuple[str, str, str, str]:
    """What is known of a search beforehand: its size, and bounds from the largest points it may propose."""
    assert part.optimize is not None
    seeds = f" of {len(part.seeds)} seeds" if len(part.seeds) > 1 else ""
    proposed = f"{part.optimize.n_trials} trials{seeds} by {part.optimize.sampler}"
    possible = [line for line in largest if not line.unsupported]
    peaks = [line.peak.row_bytes for line in possible if line.peak is not None]
    full = any(_fills(line, plan.limit) for line in possible)
    status = "sampled, its largest point is predicted out of memory" if full else "sampled"
    seconds = [line.duration.seconds for line in possible if line.duration is not None]
    if len(seconds) < len(possible) or not seconds:
        longest = "unknown"
    else:
        each = max(seconds) + START_SECONDS[plan.device]
        longest = f"about {duration(each * part.optimize.n_trials * len(part.seeds))}, without baselines"
    return proposed, status, f"at most {wording.size(max(peaks))}" if peaks else "", longest


def _summary(sweep: Sweep, plan: Plan, lines: list[Line]) -> list[str]:
    fresh = [line for line in lines if line.fresh]
    said = [f"{len(lines)} points, {len(fresh)} to measure"]
    if plan.searches:
        said.append(f"{len(plan.searches)} searches apart, whose points are chosen as they run")
    if plan.unprepared:
        said.append(
            f"the text ({describe_source(sweep.data)}) is not tokenised yet, so whether its points are"
            " measured is not known: all of them count as missing; the run prepares it first"
        )
    full = [line for line in fresh if _fills(line, plan.limit)]
    running = [line for line in fresh if not line.unsupported and not _fills(line, plan.limit)]
    known = [line.duration.seconds for line in running if line.duration is not None]
    if known:
        total = sum(known) + START_SECONDS[plan.device] * plan.processes
        unknown = len(running) - len(known)
        more = f", and {unknown} points of unknown duration" if unknown else ""
        said.append(f"about {duration(total)} for one worker, {plan.processes} processes{more}")
    elif running:
        said.append(f"duration unknown: none of these methods is measured on {plan.device_name} yet")
    count = f"{len(full)} of them are" if full else "none of them is"
    if fresh:
        said.append(f"{count} predicted to run out of the {wording.size(plan.limit)} of {plan.device_name}")
    for workload in dict.fromkeys(line.point.workload for line in lines):
        own = [line for line in lines if line.point.workload == workload]
        known_peaks = [(line.peak.row_bytes, line.measured_bytes) for line in own if line.peak is not None]
        errors = [100 * (predicted / measured - 1) for predicted, measured in known_peaks if measured]
        if errors:
            low, high = wording.signed(min(errors), 1), wording.signed(max(errors), 1)
            said.append(
                f"memory formula against {len(errors)} measured peaks of {workload}: {low} to {high} %"
            )
    return said


def duration(seconds: float) -> str:
    """A length of time for people: 45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _fills(line: Line, limit: float) -> bool:
    """Whether a point is predicted to need more than `limit` bytes."""
    return line.peak is not None and line.peak.process_bytes > limit


def _fit(line: Line, limit: float) -> str:
    """What the prediction says about a point that is still to be measured."""
    if not line.fresh:
        return ""
    if _fills(line, limit):
        return "predicted out of memory"
    return "predicted close to out of memory" if _fills(line, _CLOSE * limit) else ""


def _memory(line: Line) -> str:
    if line.measured_bytes is not None:
        against = "" if line.peak is None else f", formula {wording.size(line.peak.row_bytes)}"
        return f"{wording.size(line.measured_bytes)} measured{against}"
    if line.peak is None:
        return ""
    return f"{wording.size(line.peak.row_bytes)}{' if it saves what dense does' if line.peak.assumed else ''}"


def _duration(line: Line, limit: float) -> str:
    if not line.fresh or line.unsupported or _fills(line, limit):
        return ""
    if line.duration is None:
        return "unknown"
    return f"{duration(line.duration.seconds)}{', scaled' if line.duration.scaled else ''}"


def _corrected(lines: list[Line]) -> list[Line]:
    """Predictions of unmeasured points, corrected by a measured method of the same setting, dense if any."""
    measured: dict[tuple[Any, ...], tuple[Peak, float]] = {}
    for line in sorted(lines, key=lambda line: not get_method(line.point.method).is_dense):
        if line.peak is not None and line.measured_bytes is not None:
            measured.setdefault(line.point.group_key, (line.peak, line.measured_bytes))
    corrected = []
    for line in lines:
        other = measured.get(line.point.group_key)
        if other is not None and line.peak is not None and line.measured_bytes is None:
            line = replace(line, peak=line.peak.corrected_by(*other))
        corrected.append(line)
    return corrected


def _statuses(folder: Path) -> dict[tuple[str, str], str]:
    """Status of every measured or failed point by (device_name, point_key)."""
    if not folder.exists():
        return {}
    records = cast(list[dict[str, Any]], read_rows(folder).to_dict("records"))
    return {(row["device_name"], row["point_key"]): row["status"] for row in records if is_primary(row)}


def _all_rows(results: Path) -> pd.DataFrame:
    """Rows of every sweep under the results folder."""
    frames = [read_rows(folder) for folder in sorted(results.glob("*/"))]
    frames = [frame for frame in frames if not frame.empty]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(COLUMNS))
