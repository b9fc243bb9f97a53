"""The Optuna studies of a sweep, one for each part.

A study is made from the rows: one that is lost is made again, and nothing measured depends on it. Studies are
kept in a journal file that several processes share, or in a database; SQLite is refused, because its locks
fail with more than one worker.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from harness.search import quiet
from harness.search.outcome import Row, TrialOutcome, outcome_of
from harness.search.samplers import make_pruner, make_sampler, space
from harness.store.rows import MEASURED, counts_over
from harness.sweep.catalog import PEAK, PEAK_METRIC, WORKLOADS
from harness.sweep.metrics import METRICS
from harness.sweep.model import Objective, Optimize, Part, Sweep, part_name, sweep_text
from harness.sweep.point import Point


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
    """The Optuna study of one part of a sweep: it begins trials and ends them with what was measured.

    `GridStudy` and `harness.search.proposals.SearchStudy` decide which trials there are.
    """

    def __init__(
        self,
        sweep: Sweep,
        part: Part,
        storage: BaseStorage,
        device: str,
        distributions: Mapping[str, BaseDistribution],
        data_ids: Mapping[int, str] | None = None,
    ) -> None:
        self.part = part
        self.objectives = objectives(part, device)
        self.distributions = dict(distributions)
        self.name = f"{sweep.name}.{part_name(part)}.{self._space_id(device, data_ids or {})}"
        with quiet():
            self.optuna = optuna.create_study(
                storage=storage,
                study_name=self.name,
                pruner=make_pruner(part.optimize),
                directions=[objective.direction for objective in self.objectives],
                load_if_exists=True,
            )
            self.optuna.set_metric_names([objective.metric for objective in self.objectives])
        _label(self.optuna, sweep, part)
        self._storage = storage
        self._study_id = storage.get_study_id_from_name(self.name)

    def start(
        self, params: Mapping[str, Any], point: Point, system_attrs: dict[str, Any] | None = None
    ) -> Trial:
        """A running trial with these parameters; `point` gives its attributes."""
        template = create_trial(
            state=TrialState.RUNNING,
            params=dict(params),
            distributions=self.distributions,
            user_attrs=attributes(point),
            system_attrs=system_attrs,
        )
        return Trial(self.optuna, self._storage.create_new_trial(self._study_id, template_trial=template))

    def ask(self) -> Trial:
        """A trial of a search with the parameters that its sampler chooses.

        The sampler is made afresh, since its seed is the trial's own. The caller holds the lock of the study,
        so the number of the trial is the number of trials there are.
        """
        assert self.part.optimize is not None
        self.optuna.sampler = make_sampler(self.part.optimize, len(self.trials()))
        return self.optuna.ask(self.distributions)

    def end(self, trial: Trial, point: Point, rows: Sequence[Row], outcome: TrialOutcome) -> None:
        """End a trial with its outcome; one that has ended already is left as it is."""
        if self.trials()[trial.number].state.is_finished():
            return
        try:
            trial.set_user_attr("status", outcome.status)
            if outcome.detail:
                trial.set_user_attr("detail", outcome.detail)
            write_note(trial, point, rows, outcome.status, outcome.detail)
            if outcome.values is None:
                self.optuna.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            else:
                self.optuna.tell(trial, list(outcome.values), skip_if_finished=True)
        except optuna.exceptions.UpdateFinishedTrialError:
            return  # another runner ended it from the same rows

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """The trials in any of these states; all without one."""
        return self.optuna.get_trials(deepcopy=False, states=states or None)

    def running(self, number: int) -> Trial:
        """The running trial of that number."""
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        return Trial(self.optuna, trial_id)

    def ended(self) -> list[FrozenTrial]:
        """The trials that have ended with an outcome; one that was cut short has none."""
        return [trial for trial in self.trials() if trial.state.is_finished() and has_outcome(trial)]

    def lease_of(self, trial: Trial | FrozenTrial) -> str:
        """The lease that a worker holds while it works on a trial."""
        return f"trial:{self.name}:{trial.number}"

    def stale(self, held: Callable[[], Collection[str]]) -> list[FrozenTrial]:
        """Running trials that no living process works on; `held` returns the leases there are."""
        # First the trials, then the leases: a worker leases a trial right after it has begun it.
        running = self.trials(TrialState.RUNNING)
        live = set(held())
        leases = {t.number: (self.lease_of(t), t.user_attrs.get("point_key")) for t in running}
        return [trial for trial in running if live.isdisjoint(leases[trial.number])]

    def fail_stale(self, held: Callable[[], Collection[str]]) -> None:
        """End the `stale` trials as failed."""
        for trial in self.stale(held):
            self.optuna.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def _space_id(self, device: str, data_ids: Mapping[int, str]) -> str:
        """Part of the study's name: Optuna refuses a study whose parameter space has changed.

        A search also depends on what it holds fixed: with other text, seeds or limits its older trials would
        mislead the sampler. The new study takes from the rows what still holds.
        """
        space_ = [sorted((name, repr(d)) for name, d in self.distributions.items()), str(self.objectives)]
        text = hashlib.sha256(json.dumps(space_).encode()).hexdigest()[:6]
        if self.part.optimize is None:
            return text
        fixed = sorted((name, str(value)) for name, value in self.part.fixed.items())
        limits = sorted(self.part.optimize.constraints.items())
        more = [fixed, limits, sorted(self.part.seeds), sorted(data_ids.values()), device]
        return hashlib.sha256((text + json.dumps(more)).encode()).hexdigest()[:6]


class GridStudy:
    """The study of a grid: one trial for each point, made from the rows."""

    def __init__(
        self, sweep: Sweep, part: Part, storage: BaseStorage, device: str, points: Sequence[Point]
    ) -> None:
        self.study = PartStudy(sweep, part, storage, device, space(part, points))

    def begin(self, point: Point) -> Trial:
        """A running trial for a point that is measured or soon will be."""
        values = {**point.to_dict(), "tokens": point.tokens, "selection": point.selection or "none"}
        return self.study.start({name: values[name] for name in self.study.distributions}, point)

    def complete(self, trial: Trial, point: Point, rows: Iterable[Row]) -> None:
        """End a trial with what was measured; a point without its objectives is a failed trial."""
        rows = list(rows)
        outcome = outcome_of(Optimize(objectives=self.study.objectives), 1, rows)
        self.study.end(trial, point, rows, outcome)

    def sync(
        self, finished: Mapping[str, Sequence[Row]], points: Iterable[Point], held: Collection[str] = ()
    ) -> int:
        """End the trials of measured points, and add those that the study lacks, as after its loss; returns
        how many. Points that are `held` get a running trial."""
        shown: dict[str, str] = {}
        running = {}
        for trial in self.study.trials():
            key, status = trial.user_attrs.get("point_key", ""), str(trial.user_attrs.get("status"))
            if trial.state == TrialState.RUNNING:
                running[key] = trial.number
            elif has_outcome(trial) and counts_over(status, shown.get(key)):
                shown[key] = status
        count = 0
        for point in points:
            rows, key = finished.get(point.key), point.key
            if rows and (key not in shown or _is_measured_at_last(rows, shown[key])):
                own = self.study.running(running[key]) if key in running else self.begin(point)
                self.complete(own, point, rows)
                count += 1
            elif key in held and key not in running and key not in shown:
                self.begin(point)
        return count


def has_outcome(trial: FrozenTrial) -> bool:
    """Whether a trial says how it came out; one that was cut short does not."""
    return trial.user_attrs.get("status") not in (None, "running")


def _is_measured_at_last(rows: Sequence[Row], shown: str) -> bool:
    return rows[-1]["status"] in MEASURED and shown not in MEASURED


def attributes(point: Point) -> dict[str, Any]:
    """The flat attributes of a point's trial."""
    known = {name: value for name, value in point.columns.items() if value is not None}
    return {"point_key": point.key, "selection": "none", **known}


def write_note(trial: Trial, point: Point, rows: Sequence[Row], status: str, detail: str) -> None:
    """Say on the trial, for people, how it ended and what was measured."""
    lines = [f"**{point.label}**: {status}" + (f" ({detail})" if detail else ""), ""]
    lines += ["| metric | value | unit |", "|---|--:|---|"]
    known = (row for row in rows if row["value"] is not None)
    lines += [f"| {row['metric']} | {_figures(row['value'])} | {row['unit']} |" for row in known]
    with quiet():
        from optuna_dashboard import save_note

        save_note(trial, "\n".join(lines))


def _figures(value: float) -> str:
    """Six figures, and no exponent for a count of bytes."""
    return f"{value:,.0f}" if 1e6 <= abs(value) < 1e15 else f"{value:,.6g}"


def _label(study: optuna.Study, sweep: Sweep, part: Part) -> None:
    """Say what a study is of: the sweep file as its note, and in its attributes which part of it."""
    with quiet():
        from optuna_dashboard import get_note, save_note

        note = f"{sweep.description}\n\n```yaml\n{sweep_text(sweep)}```\n".lstrip()
        if get_note(study) != note:  # every runner and worker opens the study; one of them writes
            save_note(study, note)
    part_of = {"part": part_name(part), "workload": part.workload, "mode": part.mode, "sweep": sweep.name}
    for name, value in part_of.items():
        if study.user_attrs.get(name) != value:
            study.set_user_attr(name, value)
