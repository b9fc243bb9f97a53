"""The study of a search: it proposes points, records what was measured, and gives trainings up.

    while (proposal := search.propose()) is not None:
        ...measure proposal.baselines and proposal.points...
        search.settle(proposal, rows_by_point_key)

A study that was lost takes its trials from the rows (`restore`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import Trial, TrialState

from harness.errors import SpecError, near_miss
from harness.search.outcome import INFEASIBLE, Row, TrialOutcome, against_dense, outcome_of, trials_of
from harness.search.samplers import RUNGS, generation_attributes, space
from harness.search.study import PartStudy, attributes, has_outcome, write_note
from harness.store.rows import MEASURED
from harness.sweep.catalog import AxisValue
from harness.sweep.grid import baseline_of, make_point, point_of_row
from harness.sweep.model import Part, Range, Sweep, part_name
from harness.sweep.point import Point


@dataclass
class Proposal:
    """A trial of a search and what is measured for it: a point per seed, and the dense baseline of each.

    `pruned` says that its training was given up, now or in an earlier trial: nothing is left to measure.
    """

    trial: Trial
    points: tuple[Point, ...]
    baselines: tuple[Point, ...]
    pruned: bool = False


class SearchStudy:
    """The study of a part with `mode: optimize`, which proposes trials and ends them."""

    def __init__(
        self,
        sweep: Sweep,
        part: Part,
        storage: BaseStorage,
        device: str,
        data_ids: Mapping[int, str] | None = None,
    ) -> None:
        assert part.optimize is not None
        self._part = part
        self._settings = part.optimize
        self._data_ids = dict(data_ids or {})
        self.study = PartStudy(sweep, part, storage, device, space(part, []), self._data_ids)

    def propose(self) -> Proposal | None:
        """The next trial; None once `n_trials` have ended or are running, here or in other workers."""
        if self._taken() >= self._settings.n_trials:
            return None
        trial = self.study.ask()
        if self._taken(before=trial.number) >= self._settings.n_trials:
            self.study.optuna.tell(trial, state=TrialState.FAIL)  # another worker took the last one meanwhile
            return None
        assignment = {name: self._plain(name, trial.params[name]) for name in self.study.distributions}
        points = self._points(assignment)
        proposal = Proposal(trial, points, self._points(baseline_of(self._part, assignment)))
        for name, value in attributes(points[0]).items():
            trial.set_user_attr(name, value)
        # What is measured for it, for whoever has to end it from the rows.
        trial.set_user_attr("needs", sorted({point.key for point in (*points, *proposal.baselines)}))
        self._recall_pruned(proposal)
        return proposal

    def note_progress(
        self, proposal: Proposal, point: Point, percent: int, values: Mapping[str, float]
    ) -> bool:
        """Take in what a training has reached after `percent` of its tokens; True if it should be given up.

        `values` are its metrics by name. Only the first seed is judged, and only at `RUNGS`: what it
        survived, the other seeds need not.
        """
        metric = self.study.objectives[0].metric
        if len(self.study.objectives) > 1 or point.key != proposal.points[0].key:
            return False
        if percent not in RUNGS or metric not in values:
            return False
        if percent not in self.reached(proposal):  # a second attempt tells it again
            proposal.trial.report(values[metric], percent)
        proposal.pruned = proposal.pruned or proposal.trial.should_prune()
        return proposal.pruned

    def reached(self, proposal: Proposal) -> dict[int, float]:
        """The objective of a training by percent of its tokens, as far as it got."""
        return dict(self.study.trials()[proposal.trial.number].intermediate_values)

    def settle(self, proposal: Proposal, rows: Mapping[str, Sequence[Row]]) -> str:
        """End a proposal's trial from the rows known by point key; returns its status.

        A training that was given up is a pruned trial and has no rows: it is no measurement. Raises
        SpecError if the search asks for a metric that the workload does not measure.
        """
        own = [row for point in proposal.points for row in rows.get(point.key, ())]
        dense = [row for point in proposal.baselines for row in rows.get(point.key, ())]
        if proposal.pruned and not own:
            return self._prune(proposal)
        outcome = self._outcome(own)
        self._end(proposal.trial, proposal.points[0], own, dense, outcome)
        if outcome.missing and not self._measured_once():
            measured = sorted({str(row["metric"]) for row in own if row["value"] is not None})
            raise SpecError(
                f"optimize: {part_name(self._part)} does not measure {outcome.missing[0]} here"
                f"{near_miss(outcome.missing[0], measured)}"
            )
        return outcome.status

    def restore(self, finished: Mapping[str, Sequence[Row]]) -> int:
        """Add the trials that the rows tell of, if the study has none that ended; returns how many."""
        if self.study.ended():
            return 0
        found, baselines = trials_of(self._part, finished, self._data_ids)
        count = 0
        for assignment, own_points in found[: self._settings.n_trials]:
            first = own_points[0]
            rows = [row for point in own_points for row in finished.get(point.key, ())]
            dense = [row for key in baselines[first.key] for row in finished.get(key, ())]
            outcome = self._outcome(rows)
            if outcome.status != "running":
                trial = self.study.start(assignment, first, generation_attributes(self._settings, count))
                self._end(trial, first, rows, dense, outcome)
                count += 1
        return count

    def adopt(self, held: Callable[[], Collection[str]], finished: Mapping[str, Sequence[Row]]) -> None:
        """End running trials that no living process works on from their rows, where those are all there.

        A runner that dies between the rows and the study leaves such trials.
        """
        for trial in self.study.stale(held):
            rows = list(finished.get(str(trial.user_attrs.get("point_key")), ()))
            point = point_of_row(self._part, rows[0]) if rows else None
            if point is None:
                continue
            seeds = [dataclasses.replace(point, seed=seed) for seed in self._part.seeds]
            rows = [row for each in seeds for row in finished.get(each.key, ())]
            outcome = self._outcome(rows)
            if outcome.status != "running":
                others = set(trial.user_attrs.get("needs", ())) - {each.key for each in seeds}
                dense = [row for key in sorted(others) for row in finished.get(key, ())]
                self._end(self.study.running(trial.number), seeds[0], rows, dense, outcome)

    def _plain(self, name: str, value: AxisValue) -> AxisValue:
        """A sampled value as people write it: four digits say all a learning rate has to say."""
        axis = self._part.axes[name]
        if isinstance(axis, Range) and isinstance(value, float):
            return min(max(float(f"{value:.4g}"), axis.low), axis.high)
        return value

    def _points(self, assignment: Mapping[str, AxisValue]) -> tuple[Point, ...]:
        return tuple(make_point(self._part, assignment, seed, self._data_ids) for seed in self._part.seeds)

    def _outcome(self, rows: Sequence[Row]) -> TrialOutcome:
        return outcome_of(self._settings, len(self._part.seeds), rows)

    def _recall_pruned(self, proposal: Proposal) -> None:
        for other in self.study.trials(TrialState.PRUNED):
            if other.user_attrs.get("point_key") == proposal.points[0].key:
                for step, value in other.intermediate_values.items():
                    proposal.trial.report(value, step)
                proposal.pruned = True
                return

    def _prune(self, proposal: Proposal) -> str:
        trial = proposal.trial
        trial.set_user_attr("status", "pruned")
        percent = max(self.reached(proposal), default=0)
        write_note(trial, proposal.points[0], [], "pruned", f"given up at {percent} % of its tokens")
        self.study.optuna.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
        return "pruned"

    def _end(
        self, trial: Trial, point: Point, rows: Sequence[Row], dense: Sequence[Row], outcome: TrialOutcome
    ) -> None:
        """End a trial with its constraints and what it is to dense.

        A point that cannot be measured for a reason of its own (out of memory, unsupported, wrong, over time)
        is a complete trial with the worst value there is that breaks a constraint: samplers never look at
        failed trials, and would propose it again.
        """
        worst = tuple(math.inf if o.direction == "minimize" else -math.inf for o in self.study.objectives)
        try:
            for name, ratio in against_dense(self._settings, rows, dense).items():
                trial.set_user_attr(name, ratio)
            for name, excess in outcome.violations.items():
                trial.set_constraint(name, excess)
        except UpdateFinishedTrialError:
            return  # another runner ended it from the same rows
        if outcome.status in INFEASIBLE:
            outcome = dataclasses.replace(outcome, values=worst)
        self.study.end(trial, point, rows, outcome)

    def _taken(self, before: int | None = None) -> int:
        """Trials, of those with a lower number than `before`, that have an outcome or may get one."""
        return sum(
            trial.state == TrialState.RUNNING or has_outcome(trial)
            for trial in self.study.trials()
            if before is None or trial.number < before
        )

    def _measured_once(self) -> bool:
        trials = self.study.trials(TrialState.COMPLETE)
        return any(trial.user_attrs.get("status") in MEASURED for trial in trials)
