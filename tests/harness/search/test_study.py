"""The study of a search: what it tells the sampler, when it ends, and how it comes back after a loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from optimize_surface import TRADE_OFF, Measure, answer, k_frac, open_search, search_all, trade_off
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from rows import rows_of

from harness.errors import SpecError
from harness.search.proposals import SearchStudy
from harness.search.storage import open_storage
from harness.sweep.point import Point

SHORT = TRADE_OFF.replace("n_trials: 60", "n_trials: 12")
SINGLE = SHORT.replace(", {metric: tokens_per_s, direction: maximize}", "")
Rows = dict[str, list[dict[str, Any]]]


def trials_of(study: SearchStudy, storage: Any) -> list[optuna.trial.FrozenTrial]:
    """All trials of a study as the storage has them."""
    return optuna.load_study(study_name=study.study.name, storage=storage).trials


def tight(point: Point) -> list[dict[str, Any]]:
    """The surface, where a batch of 16 does not fit in memory."""
    return rows_of(point, {}, status="oom") if point.batch == 16 else trade_off(point)


def run(
    study: SearchStudy, count: int, rows: Rows | None = None, measure: Measure = trade_off
) -> list[Point]:
    """Propose and answer `count` trials."""
    points = []
    for _ in range(count):
        proposal = study.propose()
        assert proposal is not None
        answer(study, proposal, measure, rows)
        points.append(proposal.points[0])
    return points


def test_a_search_ends_after_its_trials_and_every_proposal_lies_in_the_space() -> None:
    """Exactly `n_trials` proposals come; K, learning rate and batch are inside, and floats are short."""
    _, points = search_all(SHORT)
    assert len(points) == 12
    for point in points:
        assert 0.045 <= k_frac(point) <= 0.505
        assert point.lr is not None
        assert 1e-4 <= point.lr <= 1e-2
        assert len(f"{point.lr:.12g}".lstrip("0.").replace("e-05", "")) <= 5
        assert point.batch in (4, 8, 16)


def test_points_that_cannot_be_measured_are_complete_infeasible_and_worst() -> None:
    """Out of memory, unsupported, wrong and timeout break a constraint of their own and carry the worst value
    there is; a crash is a failed trial without constraints."""
    storage = InMemoryStorage()
    study, _ = open_search(SHORT, storage)
    broken = {"oom": "fits_memory", "unsupported": "supported", "wrong": "correct", "timeout": "in_time"}
    for status in (*broken, "crashed"):
        proposal = study.propose()
        assert proposal is not None
        assert (
            answer(study, proposal, lambda point, status=status: rows_of(point, {}, status=status)) == status
        )
    *infeasible, crashed = trials_of(study, storage)
    assert [trial.values for trial in infeasible] == [[float("inf"), float("-inf")]] * 4
    assert [trial.constraints for trial in infeasible] == [{name: 1.0} for name in broken.values()]
    assert (crashed.state, crashed.constraints) == (TrialState.FAIL, {})
    assert study.study.optuna.best_trials == []
    assert infeasible[0].user_attrs["detail"] == "because"


def test_a_limit_is_a_constraint_relative_to_the_limit_in_the_metrics_own_direction() -> None:
    """At most for perplexity, at least for tokens/s; above 0 means beyond."""
    storage = InMemoryStorage()
    text = SHORT + "  constraints: {perplexity: 40, tokens_per_s: 2000}\n"
    study, _ = open_search(text, storage)
    proposal = study.propose()
    assert proposal is not None
    answer(study, proposal, lambda point: rows_of(point, {"perplexity": 30.0, "tokens_per_s": 500.0}))
    (trial,) = trials_of(study, storage)
    assert trial.constraints == {
        "fits_memory": -1.0,
        "perplexity": 30 / 40 - 1,
        "tokens_per_s": 1 - 500 / 2000,
    }


def test_each_trial_carries_its_ratio_to_the_dense_point_of_its_shape() -> None:
    """Trials of one shape share one baseline, whatever their K and learning rate; ratios are value over
    dense value."""
    storage = InMemoryStorage()
    study, _ = open_search(SHORT.replace("[4, 8, 16]", "[8]"), storage)
    proposals = []
    for _ in range(3):
        proposal = study.propose()
        assert proposal is not None
        proposals.append(proposal)
        answer(study, proposal)
    baselines = {proposal.baselines[0] for proposal in proposals}
    (dense,) = baselines
    assert (dense.method, dense.selection, dense.lr, dense.batch) == ("dense", None, 1e-3, 8)
    values = {row["metric"]: row["value"] for row in trade_off(dense)}
    for trial, proposal in zip(trials_of(study, storage), proposals, strict=True):
        own = {row["metric"]: row["value"] for row in trade_off(proposal.points[0])}
        said = trial.user_attrs
        assert said["speed_vs_dense"] == pytest.approx(own["tokens_per_s"] / values["tokens_per_s"])
        assert said["speed_paired"] is False
        assert said["perplexity_vs_dense"] == pytest.approx(own["perplexity"] / values["perplexity"])


def test_a_paired_ratio_comes_before_a_quotient() -> None:
    """Where the trial was timed beside dense in one process, that ratio is the speed against dense."""
    text = (
        SHORT.replace("workload: pretrain", "workload: ffn_train")
        .replace("  lr: {low: 1.0e-4, high: 1.0e-2, log: true}\n", "")
        .replace(", train_tokens: 8192, eval_tokens: 1024, vocab_size: 512", "")
        .replace("perplexity, direction: minimize", "step_ms, direction: minimize")
        .replace("tokens_per_s, direction: maximize", "saved_activation_bytes_per_token, direction: minimize")
    )
    storage = InMemoryStorage()
    study, _ = open_search(text, storage)
    proposal = study.propose()
    assert proposal is not None

    def measure(point: Point) -> list[dict[str, Any]]:
        ratio = 1.0 if point.method == "dense" else 0.8
        values = {"saved_activation_bytes_per_token": 100.0 * ratio, "speedup_vs_best_dense": ratio}
        return rows_of(point, {**values, "step_ms": 2.0})

    answer(study, proposal, measure)
    (trial,) = trials_of(study, storage)
    assert (trial.user_attrs["speed_vs_dense"], trial.user_attrs["speed_paired"]) == (0.8, True)
    assert trial.user_attrs["saved_activation_bytes_per_token_vs_dense"] == pytest.approx(0.8)


def test_several_seeds_are_measured_for_each_trial_and_averaged() -> None:
    """A trial has a point per seed, the same seeds for all trials, and its objectives are their means; it is
    not over before every seed is measured."""
    storage = InMemoryStorage()
    study, _ = open_search(SHORT + "seeds: [3, 5]\n", storage)
    proposal = study.propose()
    assert proposal is not None
    assert [point.seed for point in proposal.points] == [3, 5]
    assert [point.seed for point in proposal.baselines] == [3, 5]
    first, second = proposal.points

    def measure(point: Point) -> list[dict[str, Any]]:
        return rows_of(point, {"perplexity": 10.0 + point.seed, "tokens_per_s": 100.0 * point.seed})

    answer(study, proposal, measure)
    other = study.propose()
    assert other is not None
    assert study.settle(other, {other.points[0].key: measure(other.points[0])}) == "running"
    ended, unfinished = trials_of(study, storage)
    assert ended.values == [14.0, 400.0]
    assert unfinished.state == TrialState.FAIL
    assert len(study.study.ended()) == 1
    assert first.key != second.key


def test_workers_of_one_study_never_draw_the_same_and_stop_together(tmp_path: Path) -> None:
    """Two workers with the same sweep, taking turns on one journal, draw different points from the very
    first, and end with `n_trials` trials between them."""
    workers = [open_search(SHORT, open_storage(tmp_path))[0] for _ in range(2)]
    points: list[Point] = []
    for turn in range(12):
        points += run(workers[turn % 2], 1)
    assert len({point.key for point in points}) == 12
    assert [worker.propose() for worker in workers] == [None, None]


def test_a_worker_that_comes_last_takes_no_trial_beyond_the_budget() -> None:
    """While eleven trials are done and one is running elsewhere, nothing is left to propose."""
    storage = InMemoryStorage()
    study, _ = open_search(SHORT, storage)
    run(study, 11)
    running = study.propose()
    assert running is not None
    assert open_search(SHORT, storage)[0].propose() is None
    answer(study, running)
    assert len(study.study.ended()) == 12


def test_of_two_workers_that_take_the_last_trial_at_once_one_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a worker's look at the budget and its trial another one takes the last: it stands back."""
    storage = InMemoryStorage()
    slow, quick = (open_search(SHORT, storage)[0] for _ in range(2))
    run(slow, 11)
    ask, taken = slow.study.ask, []

    def ask_late() -> optuna.trial.Trial:
        taken.append(quick.propose())
        return ask()

    monkeypatch.setattr(slow.study, "ask", ask_late)
    assert slow.propose() is None
    assert taken[0] is not None
    answer(quick, taken[0])
    assert len(quick.study.ended()) == 12


def test_a_search_made_again_breeds_from_what_it_found() -> None:
    """NSGA-II draws its next generation from the trials that came back, not at random: batches that were
    always out of memory are rare in it."""
    drawn: list[Point] = []
    for seed in range(30):
        text = TRADE_OFF.replace("sampler: tpe", f"sampler: nsga2\n  seed: {seed}")
        rows: Rows = {}
        run(open_search(text)[0], 40, rows, tight)
        again, _ = open_search(text)
        again.restore(rows)
        drawn += run(again, 4, measure=tight)
    assert sum(point.batch == 16 for point in drawn) <= 24  # of 120; by chance 40


def test_the_same_seed_draws_the_same_points_and_another_seed_others() -> None:
    """A search can be repeated; its seed is the sampler's."""
    first, again = (search_all(SHORT)[1] for _ in range(2))
    other = search_all(SHORT.replace("sampler: tpe", "sampler: tpe\n  seed: 1"))[1]
    assert [point.key for point in first] == [point.key for point in again]
    assert {point.key for point in first}.isdisjoint(point.key for point in other)


def test_an_interrupted_search_goes_on_with_what_is_left(tmp_path: Path) -> None:
    """After a kill in the middle of a trial, the next run makes the remaining trials, other points than
    before, and the trial that was cut short does not count."""
    study, _ = open_search(SHORT, open_storage(tmp_path))
    rows: Rows = {}
    before = run(study, 5, rows)
    assert study.propose() is not None  # and the process is gone
    again, _ = open_search(SHORT, open_storage(tmp_path))
    again.adopt(set, rows)
    assert again.restore(rows) == 0
    again.study.fail_stale(set)
    assert len(again.study.ended()) == 5
    after = run(again, 7, rows)
    assert again.propose() is None
    assert {point.key for point in before}.isdisjoint(point.key for point in after)


def test_a_trial_whose_rows_are_there_is_ended_from_them(tmp_path: Path) -> None:
    """A runner that died between writing rows and telling the study loses nothing; while the
    trial is in somebody's hands it is left alone."""
    storage = open_storage(tmp_path)
    study, _ = open_search(SHORT, storage)
    proposal = study.propose()
    assert proposal is not None
    points = (*proposal.points, *proposal.baselines)
    rows = {point.key: trade_off(point) for point in points}
    again, _ = open_search(SHORT, open_storage(tmp_path))
    again.adopt(lambda: {study.study.lease_of(proposal.trial)}, rows)
    again.study.fail_stale(lambda: {study.study.lease_of(proposal.trial)})
    assert [trial.state for trial in trials_of(again, storage)] == [TrialState.RUNNING]
    again.adopt(set, rows)
    (trial,) = trials_of(again, storage)
    assert trial.state == TrialState.COMPLETE
    assert "speed_vs_dense" in trial.user_attrs
    assert study.settle(proposal, rows) == "ok"  # the first runner was slow, not dead: nothing breaks
    assert len(study.study.ended()) == 1


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_a_lost_journal_is_made_again_from_the_rows_alone(sampler: str) -> None:
    """Trials, values, constraints and ratios are as before, and the sampler goes on from them: it keeps away
    from what ran out of memory before."""
    text = TRADE_OFF.replace("sampler: tpe", f"sampler: {sampler}")
    rows: Rows = {}
    storage, fresh = InMemoryStorage(), InMemoryStorage()
    study, _ = open_search(text, storage)

    run(study, 40, rows, tight)
    again, _ = open_search(text, fresh)
    assert again.study.name == study.study.name
    distinct = {trial.user_attrs["point_key"]: trial for trial in trials_of(study, storage)}
    assert again.restore(rows) == len(distinct)
    assert again.restore(rows) == 0
    for trial in trials_of(again, fresh):
        old = distinct[trial.user_attrs["point_key"]]
        assert trial.values == old.values
        assert trial.constraints == old.constraints
        assert trial.params["lr"] == pytest.approx(old.params["lr"], rel=1e-3)
        assert trial.params["k_frac"] == pytest.approx(old.params["k_frac"], abs=0.5 / 384 + 5e-5)
        ratios = {name: value for name, value in old.user_attrs.items() if name.endswith("_vs_dense")}
        assert {name: trial.user_attrs[name] for name in ratios} == pytest.approx(ratios)
    left = 60 - len(distinct)
    later = run(again, left, measure=tight)
    assert again.propose() is None
    assert sum(point.batch == 16 for point in later) <= left / 6  # by chance a third


def test_changed_limits_or_data_make_a_new_study_from_the_same_rows() -> None:
    """Another limit judges the old measurements again; another text takes none of them."""
    rows: Rows = {}
    study, _ = open_search(SHORT)
    run(study, 6, rows)
    storage = InMemoryStorage()
    limited, _ = open_search(SHORT + "  constraints: {tokens_per_s: 1e9}\n", storage)
    assert limited.study.name != study.study.name
    assert limited.restore(rows) == 6
    assert all(trial.constraints["tokens_per_s"] > 0 for trial in trials_of(limited, storage))
    budget = SHORT.replace("train_tokens: 8192", "train_tokens: 16384")
    assert open_search(budget)[0].restore(rows) == 0


def test_dense_among_the_methods_is_a_trial_and_a_baseline_is_not() -> None:
    """With dense in the space, a dense point that was measured only to compare with is no trial after a loss
    of the journal."""
    text = SHORT.replace("method: [moc_reference]", "method: [dense, moc_reference]")
    rows: Rows = {}
    study, _ = open_search(text)
    points = run(study, 8, rows)
    assert {point.method for point in points} == {"dense", "moc_reference"}
    assert len(rows) > 8
    again, _ = open_search(text)
    assert again.restore(rows) == 8


def test_a_metric_that_is_never_measured_is_refused_at_once() -> None:
    """One finished trial without it is enough to say so, with what is measured instead."""
    text = SHORT.replace("tokens_per_s, direction: maximize", "peak_allocated_bytes, direction: minimize")
    study, _ = open_search(text)
    proposal = study.propose()
    assert proposal is not None
    with pytest.raises(
        SpecError,
        match="optimize: pretrain does not measure peak_allocated_bytes here; valid:"
        " peak_rss_over_start_bytes, perplexity, tokens_per_s",
    ):
        answer(study, proposal)


def test_a_bad_training_is_given_up_and_leaves_no_measurement() -> None:
    """With the median rule, a training that is worse than the others at half-time is pruned, not before; its
    trial keeps the partial values and is no best trial."""
    storage = InMemoryStorage()
    text = SINGLE + "  pruner: median\n"
    study, _ = open_search(text, storage)
    for number in range(8):
        proposal = study.propose()
        assert proposal is not None
        point = proposal.points[0]
        level = 90.0 if number == 7 else 30.0 + number
        stopped = [
            percent
            for percent in (25, 50, 75)
            if study.note_progress(proposal, point, percent, {"perplexity": level - percent / 10})
        ]
        if number < 7:
            assert not (stopped and number < 3)
            if not stopped:
                answer(study, proposal)
            else:
                study.settle(proposal, {})
            continue
        assert stopped[0] == 50
        assert study.settle(proposal, {}) == "pruned"
        assert study.reached(proposal)[50] == 85.0
    last = trials_of(study, storage)[-1]
    assert last.state == TrialState.PRUNED
    assert last.user_attrs["status"] == "pruned"
    assert all(trial.number != last.number for trial in study.study.optuna.best_trials)
    assert len(study.study.ended()) == 8


def test_a_pruned_point_proposed_again_is_pruned_without_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second trial of the point is ended from the partial values of the first."""
    storage = InMemoryStorage()
    text = SINGLE + "  pruner: median\n"
    study, _ = open_search(text, storage)
    proposal = study.propose()
    assert proposal is not None
    proposal.pruned = study.note_progress(proposal, proposal.points[0], 25, {"perplexity": 99.0}) or True
    assert study.settle(proposal, {}) == "pruned"
    monkeypatch.setattr(study, "_points", lambda assignment: proposal.points)
    second = study.propose()
    assert second is not None
    assert second.pruned
    assert study.settle(second, {}) == "pruned"
    assert trials_of(study, storage)[1].intermediate_values == {25: 99.0}


def test_hyperband_prunes_by_percent_of_the_training() -> None:
    """Of two dozen trainings that order themselves from the start, Hyperband gives up some, and never the
    best one so far."""
    text = SINGLE.replace("n_trials: 12", "n_trials: 40") + "  pruner: hyperband\n"
    study, _ = open_search(text)
    best = float("inf")
    pruned = 0
    for number in range(40):
        proposal = study.propose()
        assert proposal is not None
        level = 20.0 + (number * 7) % 40
        asked = [
            study.note_progress(proposal, proposal.points[0], percent, {"perplexity": level})
            for percent in (25, 50, 75)
        ]
        if any(asked):
            pruned += 1
            assert level > best
            assert study.settle(proposal, {}) == "pruned"
        else:
            best = min(best, level)
            values = {"perplexity": level, "tokens_per_s": 1.0}
            answer(study, proposal, lambda point, values=values: rows_of(point, values))
    assert 5 <= pruned <= 30


def test_progress_of_several_objectives_or_other_seeds_prunes_nothing() -> None:
    """Optuna cannot prune for several objectives, and a further seed is measured to its end."""
    study, _ = open_search(SHORT)
    proposal = study.propose()
    assert proposal is not None
    assert not study.note_progress(proposal, proposal.points[0], 25, {"perplexity": 1e9})
    study, _ = open_search(SINGLE + "  pruner: median\nseeds: [0, 1]\n")
    proposal = study.propose()
    assert proposal is not None
    assert not study.note_progress(proposal, proposal.points[1], 25, {"perplexity": 1e9})
    assert study.reached(proposal) == {}
