"""A search as its rows tell it: how each trial came out, and all trials of a part as one table.

The study and the report judge a trial by the same function, so that a report made without the study agrees
with it.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import filelock
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.search import pareto
from harness.store.lines import append_lines, read_lines
from harness.store.rows import MEASURED, BatchKey, batch_key, outcomes_that_count
from harness.sweep.grid import assignment_of, baseline_of, make_point, point_of_row
from harness.sweep.metrics import METRICS
from harness.sweep.model import Optimize, Part, part_name
from harness.sweep.point import Point

Row = Mapping[str, Any]

# Outcomes that lie in the point itself, by the constraint they break: the sampler must keep away from there.
# A crash is none of them: it says nothing about the points around it.
INFEASIBLE = {"oom": "fits_memory", "unsupported": "supported", "wrong": "correct", "timeout": "in_time"}
_TIMES = ("tokens_per_s", "step_ms", "latency_us")
_PAIRED = "speedup_vs_best_dense"
# One line per training that was given up: it is no measurement and has no row.
PRUNED_FILE = "pruned.jsonl"


@dataclass(frozen=True)
class TrialOutcome:
    """How a trial came out. `values` are the objectives, means over the seeds; None where one is unknown.

    `violations` is by constraint how far beyond its limit the trial is, relative to the limit: above 0 is
    infeasible. `missing` names the metrics asked for that no row of a finished measurement has.
    """

    status: str
    detail: str = ""
    values: tuple[float, ...] | None = None
    violations: Mapping[str, float] = dataclasses.field(default_factory=dict)
    missing: tuple[str, ...] = ()

    @property
    def feasible(self) -> bool:
        """Measured, and within every limit."""
        return self.values is not None and all(excess <= 0 for excess in self.violations.values())


def outcome_of(search: Optimize, seeds: int, rows: Iterable[Row]) -> TrialOutcome:
    """How a trial came out, from the rows of its points, one point per seed.

    Older attempts may be among the rows. `running` means that some point has no rows yet.
    """
    batches = list(current(rows).values())
    failed = [row for batch in batches for row in batch if row["status"] not in MEASURED]
    failed.sort(key=lambda row: row["status"] not in INFEASIBLE)
    if failed:
        status = str(failed[0]["status"])
        broken = {INFEASIBLE[status]: 1.0} if status in INFEASIBLE else {}
        return TrialOutcome(status, str(failed[0]["detail"] or ""), violations=broken)
    if len(batches) < seeds:
        return TrialOutcome("running", "another runner is measuring this point")
    status = "unstable" if any(r["status"] == "unstable" for b in batches for r in b) else "ok"
    wanted = [objective.metric for objective in search.objectives]
    means = {name: _mean(batches, name) for name in (*wanted, *search.constraints)}
    missing = tuple(name for name, value in means.items() if value is None)
    violations = {
        name: 1.0 if (value := means[name]) is None else _excess(name, value, limit)
        for name, limit in search.constraints.items()
    }
    known = [value for name in wanted if (value := means[name]) is not None]
    values = tuple(known) if len(known) == len(wanted) else None
    return TrialOutcome(status, "", values, {"fits_memory": -1.0, **violations}, missing)


def current(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each point's newest measured attempt, or its newest one if none was measured, by key."""
    attempts: dict[BatchKey, list[Row]] = {}
    for row in rows:
        attempts.setdefault(batch_key(row), []).append(row)
    return {key: batch for (_, key), batch in outcomes_that_count(attempts.values()).items()}


def _excess(metric: str, value: float, limit: float) -> float:
    return 1 - value / limit if METRICS[metric].higher_is_better else value / limit - 1


def _value(batch: Iterable[Row], metric: str) -> float | None:
    found = next((row["value"] for row in batch if row["metric"] == metric), None)
    return None if found is None or pd.isna(found) else float(found)


def _mean(batches: Sequence[Iterable[Row]], metric: str) -> float | None:
    found = [value for batch in batches if (value := _value(batch, metric)) is not None]
    return sum(found) / len(found) if found and len(found) == len(batches) else None


def against_dense(
    search: Optimize, rows: Iterable[Row], dense_rows: Iterable[Row]
) -> dict[str, float | bool]:
    """What a trial is to the dense baseline of its shape, seed by seed, as means of ratios.

    `speed_vs_dense` is the paired ratio where both took turns in one process (`speed_paired`), else the
    quotient of two measurements; `METRIC_vs_dense` is value over dense value for every other objective.
    What was not measured on both sides is left out.
    """
    mine = {batch[0]["seed"]: batch for batch in current(rows).values()}
    dense = {batch[0]["seed"]: batch for batch in current(dense_rows).values()}
    found: dict[str, float | bool] = {}
    paired = _mean(list(mine.values()), _PAIRED)
    if paired is not None:
        found |= {"speed_vs_dense": paired, "speed_paired": True}
    pairs = [(batch, dense[seed]) for seed, batch in mine.items() if seed in dense]
    if not pairs or len(pairs) < len(mine):
        return found
    for metric in dict.fromkeys((*(objective.metric for objective in search.objectives), *_TIMES)):
        over = [(_value(batch, metric), _value(other, metric)) for batch, other in pairs]
        ratios = [a / b for a, b in over if a is not None and b]
        if len(ratios) < len(pairs):
            continue
        mean = sum(ratios) / len(ratios)
        if metric not in _TIMES:
            found[f"{metric}_vs_dense"] = mean
        elif "speed_vs_dense" not in found:
            speed = mean if METRICS[metric].higher_is_better else 1 / mean
            found |= {"speed_vs_dense": speed, "speed_paired": False}
    return found


@dataclass(frozen=True)
class Search:
    """One part's search on one device.

    `trials` has a line per trial in the order they were measured: `trial` (from 1), the axes, `label`,
    `status`, `detail`, `broken` (violated constraints, as text), `feasible`, `on_front`, a column per
    objective with `_ci_low` and `_ci_high`, and the ratios of `against_dense`. `dense` has the baselines
    alike, `on_front` if no trial beats them. `keys` are the points of both.
    """

    part: Part
    trials: pd.DataFrame
    dense: pd.DataFrame
    keys: frozenset[str]

    @property
    def settings(self) -> Optimize:
        """The `optimize` section."""
        assert self.part.optimize is not None
        return self.part.optimize

    @property
    def varied(self) -> list[str]:
        """The axes that have more than one value to take."""
        axes = self.part.axes
        return [name for name, axis in axes.items() if not isinstance(axis, list) or len(set(axis)) > 1]

    @property
    def measured(self) -> pd.DataFrame:
        """The feasible trials."""
        return self.trials[self.trials["feasible"].astype(bool)]

    @property
    def baselines(self) -> pd.DataFrame:
        """The measured dense baselines, within every limit."""
        return self.dense[self.dense["feasible"].astype(bool)]


def losses_of(search: Optimize, lines: pd.DataFrame) -> NDArray[np.float64]:
    """The objectives of lines of a search's table, [n, m], less is better."""
    metrics = [objective.metric for objective in search.objectives]
    directions = [objective.direction for objective in search.objectives]
    return pareto.losses(lines[metrics].to_numpy(dtype=float), directions)


def read_search(part: Part, rows: pd.DataFrame) -> Search | None:
    """The search of a part among the current rows of one device; None if no row belongs to it."""
    assert part.optimize is not None
    by_point: dict[str, list[Row]] = {}
    for record in cast(list[Row], rows.to_dict("records")):
        by_point.setdefault(str(record["point_key"]), []).append(record)
    found, baselines = trials_of(part, by_point)
    lines: list[dict[str, Any]] = []
    dense_lines: dict[str, dict[str, Any]] = {}
    for assignment, points in found:
        own = [row for point in points for row in by_point.get(point.key, [])]
        dense_rows = [row for key in baselines[points[0].key] for row in by_point.get(key, [])]
        lines.append(_line(part, assignment, points[0], own, dense_rows))
        if dense_rows:
            shape = point_of_row(part, dense_rows[0])
            assert shape is not None
            line = _line(part, baseline_of(part, assignment), shape, dense_rows, [])
            dense_lines.setdefault(shape.key, line)
    if not lines:
        return None
    trials = pd.DataFrame(lines)
    trials.insert(0, "trial", range(1, len(trials) + 1))
    dense = pd.DataFrame(list(dense_lines.values()), columns=list(lines[0]))
    trials["on_front"], dense["on_front"] = False, False
    good, good_dense = trials[trials["feasible"]], dense[dense["feasible"].astype(bool)]
    values = losses_of(part.optimize, good)
    trials.loc[good.index[pareto.front(values)], "on_front"] = True
    beaten = pareto.dominated(losses_of(part.optimize, good_dense), values)
    dense.loc[good_dense.index[~beaten], "on_front"] = True
    keys = {point.key for _, points in found for point in points}
    keys |= {key for each in baselines.values() for key in each if key in by_point}
    return Search(part, trials, dense, frozenset(keys))


def trials_of(
    part: Part, by_point: Mapping[str, Sequence[Row]], data_ids: Mapping[int, str] | None = None
) -> tuple[list[tuple[dict[str, Any], list[Point]]], dict[str, list[str]]]:
    """The trials that rows know of, in order, and the keys of each one's baselines by its first point's key.

    A trial is an assignment and its points, one per seed. A dense point that stands as the baseline of
    another trial is not taken for a trial, even where the axes would allow it. Without `data_ids` the text a
    row names is taken as the text of the sweep.
    """
    found: dict[str, tuple[dict[str, Any], list[Point]]] = {}
    baselines: dict[str, list[str]] = {}
    for batch in by_point.values():
        row = batch[0]
        if row["workload"] != part.workload or row["seed"] not in part.seeds:
            continue
        point = point_of_row(part, row)
        if point is None:
            continue
        ids = data_ids
        if ids is None:
            ids = {point.vocab_size: point.data_id} if point.vocab_size and point.data_id else {}
        assignment = assignment_of(part, point, ids)
        if assignment is None:
            continue
        points = [dataclasses.replace(point, seed=seed) for seed in part.seeds]
        shared = baseline_of(part, assignment)
        found.setdefault(points[0].key, (dict(assignment), points))
        baselines[points[0].key] = [make_point(part, shared, seed, ids).key for seed in part.seeds]
    of_others = {key for first, keys in baselines.items() for key in keys if first not in keys}
    return [trial for first, trial in found.items() if first not in of_others], baselines


def _line(
    part: Part, assignment: Mapping[str, Any], point: Point, rows: list[Row], dense_rows: list[Row]
) -> dict[str, Any]:
    assert part.optimize is not None
    outcome = outcome_of(part.optimize, len(part.seeds), rows)
    values = outcome.values or (math.nan,) * len(part.optimize.objectives)
    broken = [name for name, excess in outcome.violations.items() if excess > 0]
    line: dict[str, Any] = {
        **assignment,
        **{"method": point.method, "selection": point.selection or "", "point_key": point.key},
        **{"k_pct": 100 * (point.k_frac or math.nan), "lr": point.lr, "tokens": point.tokens},
        **{"status": outcome.status, "detail": outcome.detail, "broken": ", ".join(broken)},
        **{"feasible": outcome.feasible, "speed_vs_dense": math.nan, "speed_paired": False},
        "started_at": next((row["started_at"] for row in rows), ""),
    }
    for objective, value in zip(part.optimize.objectives, values, strict=True):
        metric = objective.metric
        line[metric] = value
        line[f"{metric}_ci_low"], line[f"{metric}_ci_high"] = _interval(metric, rows)
        line.setdefault(f"{metric}_vs_dense", math.nan)
    return {**line, **against_dense(part.optimize, rows, dense_rows)}


def _interval(metric: str, rows: list[Row]) -> tuple[float, float]:
    """The measured interval of a single seed; several seeds have none that is worth drawing."""
    own = [row for row in rows if row["metric"] == metric]
    if len(own) != 1 or own[0]["metric"] not in METRICS or pd.isna(own[0]["ci_low"]):
        return math.nan, math.nan
    return float(own[0]["ci_low"]), float(own[0]["ci_high"])


def record_pruned(folder: Path, part: Part, point: Point, reached: Mapping[int, float]) -> None:
    """Remember a training that was given up, and its objective by percent of its tokens, for the report.

    Its checkpoints go: nobody will take it up again.
    """
    shutil.rmtree(folder / "checkpoints" / point.key, ignore_errors=True)
    item = {"part": part_name(part), "point": point.to_dict(), "reached": reached}
    with filelock.FileLock(str(folder / "pruned.lock")):
        append_lines(folder / PRUNED_FILE, [item])


def pruned_trials(folder: Path, part: Part) -> int:
    """How many trials of a part were given up before their end."""
    return sum(item["part"] == part_name(part) for item in read_lines(folder / PRUNED_FILE))
