"""Every Optuna call lives here. A study is the sampler and the dashboard's view of a sweep part.

The rows are the truth: a study that is lost is made again from them, and nothing measured depends on it.
The default storage is a journal file, which several processes can share; SQLite is refused because its locks
break with more than one worker.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import Trial, TrialState, create_trial

from harness.metrics import METRICS
from harness.points import Point
from harness.spec import INTEGER_AXES, AxisValue, Objective, Part, Range, SpecError, Sweep, part_name
from harness.store import MEASURED

JOURNAL_NAME = "study.journal"
_GRID_OBJECTIVES: dict[str, tuple[str, ...]] = {
    "ffn_train": ("step_ms", "saved_activation_bytes_per_token"),
    "ffn_decode": ("latency_us",),
    "pretrain": ("tokens_per_s", "PEAK", "perplexity"),
}
_ATTRIBUTES = (
    "workload",
    "method",
    "selection",
    "k",
    "k_frac",
    "preset",
    "batch",
    "seq_len",
    "dtype",
    "seed",
)


def open_storage(folder: Path, url: str | None = None) -> BaseStorage:
    """The study's storage: the journal file of a results folder, or a database by URL.

    Raises SpecError for SQLite, naming the journal as what to use instead.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if url is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return JournalStorage(JournalFileBackend(str(folder / JOURNAL_NAME)))
    if url.startswith("sqlite"):
        raise SpecError(
            f"--storage {url}: SQLite cannot be shared by workers; leave --storage out to use the journal"
            " file, or name a PostgreSQL server (postgresql+psycopg://...)"
        )
    return RDBStorage(url)


def objectives(part: Part, device: str) -> list[Objective]:
    """What the study of a part looks at: the sweep's own objectives, or the workload's usual ones."""
    if part.optimize is not None:
        return part.optimize.objectives
    peak = "peak_allocated_bytes" if device == "cuda" else "peak_rss_over_start_bytes"
    names = [peak if name == "PEAK" else name for name in _GRID_OBJECTIVES[part.workload]]
    return [
        Objective(metric=name, direction="maximize" if METRICS[name].higher_is_better else "minimize")
        for name in names
    ]


class PartStudy:
    """The Optuna study of one part of a sweep."""

    def __init__(
        self, sweep: Sweep, part: Part, storage: BaseStorage, device: str, points: list[Point]
    ) -> None:
        self.part = part
        self._storage = storage
        self.objectives = objectives(part, device)
        self._distributions = _distributions(part, points)
        # Optuna refuses a study whose parameter space changed, so the space is part of the name.
        space = json.dumps(
            [sorted((name, repr(d)) for name, d in self._distributions.items()), str(self.objectives)]
        )
        self.name = f"{sweep.name}.{part_name(part)}.{hashlib.sha256(space.encode()).hexdigest()[:6]}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study = optuna.create_study(
                storage=storage,
                study_name=self.name,
                sampler=_sampler(part),
                directions=[objective.direction for objective in self.objectives],
                load_if_exists=True,
            )
            self._study.set_metric_names([objective.metric for objective in self.objectives])
        self._study_id = storage.get_study_id_from_name(self.name)

    def begin(self, point: Point) -> Trial:
        """A running trial that stands for a grid point."""
        template = create_trial(
            state=TrialState.RUNNING,
            params=self._parameters(point),
            distributions=self._distributions,
            user_attrs=_attributes(point),
        )
        return Trial(self._study, self._storage.create_new_trial(self._study_id, template_trial=template))

    def suggest(self) -> tuple[Trial, dict[str, AxisValue]]:
        """Ask the sampler for values of every axis (`mode: optimize`)."""
        trial = self._study.ask(self._distributions)
        assignment = {name: trial.params[name] for name in self._distributions}
        return trial, {name: _plain(value) for name, value in assignment.items()}

    def describe(self, trial: Trial, point: Point) -> None:
        """Give a suggested trial the flat attributes of its point."""
        for name, value in _attributes(point).items():
            trial.set_user_attr(name, value)

    def complete(self, trial: Trial, point: Point, rows: Iterable[Mapping[str, Any]]) -> None:
        """End a trial with what was measured; a point without its objectives is a failed trial.

        A trial that has ended already is left as it is.
        """
        if trial.user_attrs.get("status") is not None:
            return
        rows = list(rows)
        values, status, detail = self._outcome(rows)
        trial.set_user_attr("status", status)
        note = _note(point, rows, status, detail)
        trial.set_user_attr("note", note)
        if self.part.optimize is not None:
            for metric, limit in self.part.optimize.constraints.items():
                measured = _value(rows, metric)
                trial.set_constraint(metric, 1.0 if measured is None else measured - limit)
            trial.set_constraint("fits_memory", 1.0 if status == "oom" else -1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            from optuna_dashboard import save_note

            save_note(trial, note)
        if values is None:
            self._study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        else:
            self._study.tell(trial, values, skip_if_finished=True)

    def sync(self, finished: Mapping[str, list[dict[str, Any]]], points: Iterable[Point]) -> int:
        """Add trials for measured points the study does not know (a lost journal); returns how many."""
        known = {
            trial.user_attrs.get("point_key")
            for trial in self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        }
        missing = [point for point in points if point.key in finished and point.key not in known]
        for point in missing:
            self.complete(self.begin(point), point, finished[point.key])
        return len(missing)

    def fail_stale(self, live_keys: Iterable[str]) -> None:
        """End running trials that no living process works on."""
        live = set(live_keys)
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.user_attrs.get("point_key") not in live:
                self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def finished_trials(self) -> int:
        """How many trials have ended, in whatever state."""
        states = (TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED)
        return len(self._study.get_trials(deepcopy=False, states=states))

    def best(self) -> list[dict[str, Any]]:
        """The Pareto set (one trial for one objective): parameters, values and attributes."""
        return [
            {"number": t.number, "params": t.params, "values": t.values, "attributes": t.user_attrs}
            for t in self._study.best_trials
        ]

    def _parameters(self, point: Point) -> dict[str, Any]:
        values = {**point.to_dict(), "tokens": point.tokens, "selection": point.selection or "none"}
        return {name: values[name] for name in self._distributions}

    def _outcome(self, rows: list[Mapping[str, Any]]) -> tuple[list[float] | None, str, str]:
        if not rows:
            return None, "running", "another runner is measuring this point"
        statuses = [(row["status"], row["detail"]) for row in rows if row["status"] not in MEASURED]
        if statuses:
            return None, statuses[0][0], statuses[0][1] or ""
        values = [_value(rows, objective.metric) for objective in self.objectives]
        status = "unstable" if any(row["status"] == "unstable" for row in rows) else "ok"
        if any(value is None for value in values):
            return None, status, ""
        return [float(value) for value in values if value is not None], status, ""


def _distributions(part: Part, points: list[Point]) -> dict[str, BaseDistribution]:
    """The parameter space: the axes of an optimisation, or what varies over the points of a grid."""
    if part.mode == "optimize":
        return {name: _axis_distribution(name, axis) for name, axis in part.axes.items()}
    found: dict[str, list[Any]] = {}
    names = [name for name in part.axes if name != "k_frac"] + ["method", "selection"]
    if len(part.seeds) > 1:
        names.append("seed")
    for name in dict.fromkeys(names):
        for point in points:
            value = point.tokens if name == "tokens" else getattr(point, name)
            choice = "none" if value is None else value
            if choice not in found.setdefault(name, []):
                found[name].append(choice)
    return {name: CategoricalDistribution(choices) for name, choices in found.items()}


def _axis_distribution(name: str, axis: list[AxisValue] | Range) -> BaseDistribution:
    if isinstance(axis, list):
        return CategoricalDistribution(axis)
    if name in INTEGER_AXES:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log, step=int(axis.step or 1))
    return FloatDistribution(axis.low, axis.high, log=axis.log, step=axis.step)


def _sampler(part: Part) -> optuna.samplers.BaseSampler:
    if part.optimize is None:
        return optuna.samplers.RandomSampler(seed=0)
    kind, seed = part.optimize.sampler, part.optimize.seed
    if kind == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    if kind == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)


def _attributes(point: Point) -> dict[str, Any]:
    from moc.selection import parse_selection

    values = {**point.to_dict(), "k": point.d_ffn, "selection": point.selection or "none"}
    if point.selection is not None:
        try:
            values["k"] = parse_selection(point.selection).k(point.d_ffn)
        except ValueError:
            values["k"] = None  # does not fit this width: the point will be `unsupported`
    values["k_frac"] = None if values["k"] is None else round(values["k"] / point.d_ffn, 4)
    return {"point_key": point.key, **{name: values.get(name) for name in _ATTRIBUTES}}


def _value(rows: Iterable[Mapping[str, Any]], metric: str) -> float | None:
    return next((row["value"] for row in rows if row["metric"] == metric), None)


def _note(point: Point, rows: list[Mapping[str, Any]], status: str, detail: str) -> str:
    lines = [f"**{point.label}**: {status}" + (f" ({detail})" if detail else ""), ""]
    lines += ["| metric | value | unit |", "|---|--:|---|"]
    lines += [
        f"| {row['metric']} | {row['value']:,.6g} | {row['unit']} |"
        for row in rows
        if row["value"] is not None
    ]
    return "\n".join(lines)


def _plain(value: Any) -> AxisValue:
    return round(value, 6) if isinstance(value, float) else value


def serve_dashboard(folder: Path, url: str | None, host: str, port: int) -> None:
    """Serve optuna-dashboard on a sweep's storage until interrupted."""
    from optuna_dashboard import run_server

    run_server(open_storage(folder, url), host=host, port=port)
