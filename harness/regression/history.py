"""`mocbench history`: each benchmark over the runs of `make bench` that are kept, and where it changed.

Runs are grouped by machine, from the record that each file holds. `ruptures` (PELT, Killick et al. 2012)
finds where a series changes: it cuts the series into the levels that explain it best, with a penalty for each
level. The cost sums distances from a level's median, not their squares, and a level has at least two runs, so
one bad run is no change.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import UserError
from harness.measure.stats import median
from harness.regression.compare.stored import RECORD
from harness.regression.compare.verdict import RULES
from harness.report.plots.style import Board, handle

MIN_LEVEL = 2  # runs
# Least scatter that is assumed of a run's median, as a share; a series may be smoother by chance.
_LEAST_SCATTER = 0.003
# Penalty of one more level, in units of log(runs) times the scatter. The Bayesian information criterion gives
# 1 for this cost; twice that gives fewer and surer changes.
_PENALTY = 2.0
_MACHINE = ("device", "device_name", "gpu_id", "cpu_cores", "os")
_SOFTWARE = ("torch", "triton", "cuda", "driver", "python")


@dataclass(frozen=True)
class BenchRun:
    """One run of `make bench`."""

    path: Path
    when: datetime.datetime  # of the run
    revision: str
    environment: Mapping[str, Any]
    medians_ms: Mapping[str, float]  # by benchmark

    @property
    def machine(self) -> str:
        """An id of the machine, whatever versions of software it had."""
        text = json.dumps([self.environment.get(name) for name in _MACHINE])
        return hashlib.sha256(text.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class ChangePoint:
    """From this run on a benchmark takes another time."""

    benchmark: str
    run: BenchRun
    before_ms: float
    after_ms: float
    software: tuple[str, ...]  # that changed with it

    @property
    def share(self) -> float:
        """0.03 is 3 % slower."""
        return self.after_ms / self.before_ms - 1

    def line(self) -> str:
        """One line of the summary."""
        times = f"{self.before_ms:.4g} to {self.after_ms:.4g} ms"
        also = f"; with it changed {', '.join(self.software)}" if self.software else ""
        when = self.run.when.date().isoformat()
        change = f"{100 * self.share:+.1f} % from {self.run.revision} ({when}) on"
        return f"{self.benchmark}: {change}, {times}{also}"


def write_history(storage: Path, output: Path) -> list[str]:
    """Draw every machine's benchmarks from the files below `storage` into `output`; what to tell people.

    Raises UserError if there is no file of `make bench`.
    """
    runs = read_runs(storage)
    if not runs:
        raise UserError(f"{storage}: holds no run; `make bench` keeps one there")
    lines, told = ["# Benchmarks over time", ""], []
    output.mkdir(parents=True, exist_ok=True)
    for machine in dict.fromkeys(run.machine for run in runs):
        own = [run for run in runs if run.machine == machine]
        changes = change_points(own)
        name = own[-1].environment["device_name"]
        picture = output / f"history-{machine}.png"
        _plot(own, changes, picture)
        told += [f"{name}: {len(own)} runs, {len(changes)} changes", *(change.line() for change in changes)]
        lines += [f"## {name}", "", f"{len(own)} runs on machine {machine}.", ""]
        lines += [f"- {change.line()}" for change in changes] or ["No change."]
        lines += ["", f"![benchmarks over time]({picture.name})", ""]
    summary = output / "history.md"
    summary.write_text("\n".join(lines), encoding="utf-8")
    return [*told, f"wrote {summary}"]


def read_runs(storage: Path) -> list[BenchRun]:
    """Every run below `storage` that says what machine it ran on, oldest first."""
    runs = []
    for path in sorted(storage.rglob("*.json")):
        file = json.loads(path.read_text(encoding="utf-8"))
        if RECORD not in file.get("machine_info", {}):
            continue
        commit = file["commit_info"]
        medians = {
            benchmark["extra_info"]["benchmark"]: 1e3 * benchmark["stats"]["median"]
            for benchmark in file["benchmarks"]
        }
        revision = str(commit["id"])[:8] + ("+" if commit.get("dirty") else "")
        when = datetime.datetime.fromisoformat(file["datetime"])
        runs.append(BenchRun(path, when, revision, file["machine_info"][RECORD], medians))
    return sorted(runs, key=lambda run: run.when)


def change_points(runs: Sequence[BenchRun]) -> list[ChangePoint]:
    """Changes of each benchmark over the runs of one machine, beyond the limit of `mocbench compare`."""
    limit = RULES[runs[-1].environment["device"]].limit
    found = []
    for name in _names(runs):
        own = [run for run in runs if name in run.medians_ms]
        times = [run.medians_ms[name] for run in own]
        ends = [0, *levels(times), len(times)]
        heights = [median(times[start:end]) for start, end in itertools.pairwise(ends)]
        for place, (before, after) in zip(ends[1:-1], itertools.pairwise(heights), strict=True):
            software = _changed(own[place - 1].environment, own[place].environment)
            change = ChangePoint(name, own[place], before, after, software)
            if abs(math.log1p(change.share)) > math.log1p(limit):
                found.append(change)
    return found


def levels(times: Sequence[float]) -> list[int]:
    """Where a series of times jumps to another level: the index of the first time of each later level."""
    if len(times) < 2 * MIN_LEVEL:
        return []
    import ruptures

    signal = np.log(np.asarray(times, dtype=np.float64))
    # From differences, so that the jumps that are looked for do not count as scatter.
    steps = np.diff(signal)
    scatter = max(_LEAST_SCATTER, 1.4826 * float(np.median(np.abs(steps - np.median(steps)))) / math.sqrt(2))
    penalty = _PENALTY * math.log(len(signal)) * scatter
    search = ruptures.Pelt(model="l1", min_size=MIN_LEVEL, jump=1).fit(signal.reshape(-1, 1))
    return [int(end) for end in search.predict(pen=penalty)[:-1]]


def _names(runs: Sequence[BenchRun]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.medians_ms))


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    names = [name for name in _SOFTWARE if before.get(name) != after.get(name)]
    return tuple(f"{name} {before.get(name)} to {after.get(name)}" for name in names)


def _plot(runs: Sequence[BenchRun], changes: Sequence[ChangePoint], path: Path) -> None:
    names = _names(runs)
    own_changes = {name: [change for change in changes if change.benchmark == name] for name in names}
    titles = [
        ", ".join([name, *(f"{100 * c.share:+.1f} % at {c.run.revision}" for c in own_changes[name])])
        for name in names
    ]
    board = Board(titles, columns=2, panel_inches=1.7)
    places = {run.path: place for place, run in enumerate(runs)}
    for axes, name in zip(board.axes, names, strict=True):
        own = [run for run in runs if name in run.medians_ms]
        times = [run.medians_ms[name] for run in own]
        x = [places[run.path] for run in own]
        axes.plot(x, times, color="#0072B2", marker="o", markersize=4, linewidth=1)
        for change in own_changes[name]:
            colour = "#D55E00" if change.share > 0 else "#009E73"
            axes.axvline(places[change.run.path] - 0.5, color=colour, linewidth=1.2)
        axes.set_ylim(0.97 * min(times), 1.03 * max(times))
        marked = x[:: max(1, len(x) // 6)]
        axes.set_xticks(marked, [runs[place].revision for place in marked], rotation=30, fontsize=7)
    if changes:
        board.legend(handle(color="#D55E00"), "slower from here on")
        board.legend(handle(color="#009E73"), "faster from here on")
    slower = sum(change.share > 0 for change in changes)
    title = f"Changes over {len(runs)} runs: {slower} for the worse, {len(changes) - slower} for the better"
    environment = runs[-1].environment
    caption = f"{environment['device_name']}, last with torch {environment['torch']}; mocbench history"
    note = "Dot: median of a run of `make bench`; the axis does not begin at zero."
    board.save(path, title, caption, x="revision, in the order of the runs", y="median, ms", note=note)
