"""Optuna's view of a sweep part. Only this file, `search`, `samplers` and `importances` call Optuna.

The rows are the truth: a study that is lost is made again from them, and nothing measured depends on it.
The default storage is a journal file, which several processes can share; SQLite is refused because its locks
break with more than one worker.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from harness.search.outcome import Outcome, Row, judge
from harness.search.samplers import make_pruner, make_sampler, space
from harness.store.rows import MEASURED, counts_over
from harness.sweep.catalog import PEAK, PEAK_METRIC, WORKLOADS
from harness.sweep.metrics import METRICS
from harness.sweep.model import Objective, Optimize, Part, Sweep, part_name, sweep_text
from harness.sweep.point import Point

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


def objectives(part: Part, device: str) -> list[Objective]:
    """What the study of a part looks at: the sweep's own objectives, or the workload's usual ones."""
    if part.optimize is not None:
        return part.optimize.objectives
    names = [PEAK_METRIC[device] if name == PEAK else name for name in WORKLOADS[part.workload].objectives]
    return [
        Objective(metric=name, direction="maximize" if METRICS[name].higher_is_better else "minimize")
        for name in names
    ]


class PartStudy:
    """The Optuna study of one part of a sweep: for a grid a view, one trial a point.

    `harness.search.proposals.SearchStudy` is the study of a part that is optimised.
    """

    def __init__(
        self,
        sweep: Sweep,
        part: Part,
        storage: BaseStorage,
        device: str,
        points: list[Point],
        data_ids: Mapping[int, str] | None = None,
    ) -> None:
        self.part = part
        self._storage = storage
        self._data_ids = dict(data_ids or {})
        self.objectives = objectives(part, device)
        self._distributions = space(part, points)
        self.name = f"{sweep.name}.{part_name(part)}.{self._space_id(device)}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study = optuna.create_study(
                storage=storage,
                study_name=self.name,
                sampler=make_sampler(part.optimize),
                pruner=make_pruner(part.optimize),
                directions=[objective.direction for objective in self.objectives],
                load_if_exists=True,
            )
            self._study.set_metric_names([objective.metric for objective in self.objectives])
        _label(self._study, sweep, part)
        self._study_id = storage.get_study_id_from_name(self.name)

    def begin(self, point: Point) -> Trial:
        """A running trial that stands for a measured or soon measured point."""
        values = {**point.to_dict(), "tokens": point.tokens, "selection": point.selection or "none"}
        return self._start({name: values[name] for name in self._distributions}, point)

    def complete(self, trial: Trial, point: Point, rows: Iterable[Row]) -> None:
        """End a trial with what was measured; a point without its objectives is a failed trial.

        A trial that has ended already is left as it is.
        """
        rows = list(rows)
        self._end(trial, point, rows, judge(Optimize(objectives=self.objectives), 1, rows))

    def sync(
        self, finished: Mapping[str, Sequence[Row]], points: Iterable[Point], held: Collection[str] = ()
    ) -> int:
        """End the trials of measured points, and make those that the study does not know, as after its loss;
        returns how many. Points that are `held` get a running trial."""
        shown: dict[str, str] = {}
        running = {}
        for trial in self._study.get_trials(deepcopy=False):
            key, status = trial.user_attrs.get("point_key", ""), trial.user_attrs.get("status")
            if trial.state == TrialState.RUNNING:
                running[key] = trial.number
            elif status not in (None, "running") and counts_over(status, shown.get(key)):
                shown[key] = status
        count = 0
        for point in points:
            rows, key = finished.get(point.key), point.key
            if rows and (key not in shown or _is_measured_at_last(rows, shown[key])):
                own = self._running(running[key]) if key in running else self.begin(point)
                self.complete(own, point, rows)
                count += 1
            elif key in held and key not in running and key not in shown:
                self.begin(point)
        return count

    def _running(self, number: int) -> Trial:
        return Trial(self._study, self._trial_id(number))

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)

    def lease_of(self, trial: Trial | FrozenTrial) -> str:
        """What its worker leases for as long as it works on a trial."""
        return f"trial:{self.name}:{trial.number}"

    def fail_stale(self, held: Callable[[], Collection[str]]) -> None:
        """End running trials that no living process works on; `held` says which leases there are."""
        for trial in self._stale(held):
            self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def _stale(self, held: Callable[[], Collection[str]]) -> list[FrozenTrial]:
        # First the trials, then the leases: whoever has begun one by then has leased it before.
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        live = set(held())
        return [
            trial
            for trial in running
            if live.isdisjoint((self.lease_of(trial), trial.user_attrs.get("point_key")))
        ]

    def finished_trials(self) -> int:
        """How many trials have ended with an outcome; one that was cut short does not count."""
        return len(self._ended())

    def best(self) -> list[dict[str, Any]]:
        """The Pareto set (one trial for one objective): parameters, values and attributes."""
        return [
            {"number": t.number, "params": t.params, "values": t.values, "attributes": t.user_attrs}
            for t in self._study.best_trials
        ]

    def _space_id(self, device: str) -> str:
        """Part of the study's name, since Optuna refuses a study whose parameter space changed."""
        space_ = [sorted((name, repr(d)) for name, d in self._distributions.items()), str(self.objectives)]
        return hashlib.sha256(json.dumps(space_).encode()).hexdigest()[:6]

    def _start(
        self, params: Mapping[str, Any], point: Point, system_attrs: dict[str, Any] | None = None
    ) -> Trial:
        template = create_trial(
            state=TrialState.RUNNING,
            params=dict(params),
            distributions=self._distributions,
            user_attrs=attributes(point),
            system_attrs=system_attrs,
        )
        return Trial(self._study, self._storage.create_new_trial(self._study_id, template_trial=template))

    def _end(self, trial: Trial, point: Point, rows: Sequence[Row], outcome: Outcome) -> None:
        if self._storage.get_trial(self._trial_id(trial.number)).state.is_finished():
            return
        try:
            trial.set_user_attr("status", outcome.status)
            if outcome.detail:
                trial.set_user_attr("detail", outcome.detail)
            write_note(trial, point, rows, outcome.status, outcome.detail)
            if outcome.values is None:
                self._study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            else:
                self._study.tell(trial, list(outcome.values), skip_if_finished=True)
        except optuna.exceptions.UpdateFinishedTrialError:
            return  # another runner ended it from the same rows

    def _ended(self) -> list[FrozenTrial]:
        return [
            trial
            for trial in self._study.get_trials(deepcopy=False)
            if trial.user_attrs.get("status") not in (None, "running") and trial.state.is_finished()
        ]


def _is_measured_at_last(rows: Sequence[Row], shown: str) -> bool:
    return rows[-1]["status"] in MEASURED and shown not in MEASURED


def attributes(point: Point) -> dict[str, Any]:
    """The flat attributes of a point's trial."""
    values = {**point.to_dict(), "selection": point.selection or "none"}
    with contextlib.suppress(ValueError):  # the rule does not fit this width: the point will be `unsupported`
        values |= {"k": point.k, "k_frac": round(point.k / point.d_ffn, 4)}
    return {"point_key": point.key, **{name: values.get(name) for name in _ATTRIBUTES}}


def write_note(trial: Trial, point: Point, rows: Sequence[Row], status: str, detail: str) -> None:
    """Say on the trial, for people, how it ended and what was measured."""
    lines = [f"**{point.label}**: {status}" + (f" ({detail})" if detail else ""), ""]
    lines += ["| metric | value | unit |", "|---|--:|---|"]
    lines += [
        f"| {row['metric']} | {_figures(row['value'])} | {row['unit']} |"
        for row in rows
        if row["value"] is not None
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        from optuna_dashboard import save_note

        save_note(trial, "\n".join(lines))


def _figures(value: float) -> str:
    """Six figures, and no exponent for a count of bytes."""
    return f"{value:,.0f}" if 1e6 <= abs(value) < 1e15 else f"{value:,.6g}"


def _label(study: optuna.Study, sweep: Sweep, part: Part) -> None:
    """Say what a study is of: the sweep file as its note, and in its attributes which part of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        from optuna_dashboard import get_note, save_note

        note = f"{sweep.description}\n\n```yaml\n{sweep_text(sweep)}```\n".lstrip()
        if get_note(study) != note:  # every runner and worker opens the study; one of them writes
            save_note(study, note)
    part_of = {"part": part_name(part), "workload": part.workload, "mode": part.mode, "sweep": sweep.name}
    for name, value in part_of.items():
        if study.user_attrs.get(name) != value:
            study.set_user_attr(name, value)
