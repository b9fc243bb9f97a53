"""Assignments and points of a search: each K is one point, rows lead back to axes, mistakes are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from optimize_surface import TRADE_OFF, answer, k_frac, open_search, trade_off

from harness.errors import SpecError
from harness.search.outcome import outcome_of, pruned_trials, read_search, record_pruned
from harness.store.files import Store
from harness.store.frames import read_rows
from harness.sweep.grid import assignment_of, baseline_of, make_point, point_of_row
from harness.sweep.load import load_sweep, parse_sweep
from harness.sweep.model import Part

PRESETS = TRADE_OFF.replace("preset: 1m, ", "").replace("axes:", "axes:\n  preset: [1m, 4m]")


def part_of(text: str) -> Part:
    """The only part of a sweep."""
    return parse_sweep(text, "s.yaml").parts[0]


@pytest.mark.parametrize(("preset", "d_ffn"), [("1m", 384), ("7b", 11008), ("paper-1b", 5461)])
def test_every_sampled_fraction_of_the_same_k_is_the_same_point(preset: str, d_ffn: int) -> None:
    """A range of K gives as many points as there are channels to keep, under short names."""
    part = part_of(TRADE_OFF.replace("preset: 1m", f"preset: {preset}"))
    for k in (d_ffn // 20 + 1, d_ffn // 7, round(0.1875 * d_ffn)):
        points = {
            make_point(
                part, {"k_frac": (k + off) / d_ffn, "lr": 1e-3, "batch": 4, "method": "moc_reference"}, 0
            )
            for off in (-0.49, 0.0, 0.2, 0.49)
        }
        (point,) = points
        assert round(k_frac(point) * d_ffn) == k
        assert len(str(point.selection)) <= len("topk:0.123456")
    values = {"k_frac": 0.18749, "lr": 1e-3, "batch": 4, "method": "moc_reference"}
    assert (
        make_point(part_of(TRADE_OFF), values, 0).selection == "topk:0.1875"
    )  # 72 of 384, the name people use


def test_listed_fractions_keep_their_spelling() -> None:
    """A person's fraction stays as written, the same for every width, so that sizes compare."""
    part = part_of(PRESETS.replace("k_frac: {low: 0.05, high: 0.5}", "k_frac: [0.125, 0.1875]"))
    chosen = {
        make_point(
            part, {"preset": p, "k_frac": 0.1875, "lr": 1e-3, "batch": 4, "method": "moc_reference"}, 0
        )
        for p in ("1m", "4m")
    }
    assert {point.selection for point in chosen} == {"topk:0.1875"}


@pytest.mark.parametrize("preset", ["1m", "4m"])
@pytest.mark.parametrize("k", [0.05, 0.1234, 0.5])
def test_a_row_leads_back_to_the_axes_it_was_made_from(tmp_path: Path, preset: str, k: float) -> None:
    """Point from row, assignment from point: what is made of it again is the very same point."""
    part = part_of(PRESETS)
    values = {"preset": preset, "k_frac": k, "lr": 0.00123, "batch": 8, "method": "moc_reference"}
    point = make_point(part, values, 0, {512: "abc"})
    Store(tmp_path).append(trade_off(point))
    row = read_rows(tmp_path).iloc[0]
    assert point_of_row(part, row) == point
    found = assignment_of(part, point, {512: "abc"})
    assert found is not None
    assert {name: found[name] for name in ("preset", "lr", "batch", "method")} == {
        name: values[name] for name in ("preset", "lr", "batch", "method")
    }
    assert make_point(part, found, 0, {512: "abc"}) == point
    assert assignment_of(part, point, {512: "other text"}) is None


def test_a_k_that_a_grid_spelled_otherwise_belongs_to_the_search() -> None:
    """The same number of channels as a count or a shorter fraction; another number of them does not."""
    values = {"k_frac": 0.1875, "lr": 1e-3, "batch": 8, "method": "moc_reference"}
    point = make_point(part_of(TRADE_OFF), values, 0)
    for spelled, known in (
        ("topk:72", True),
        ("topk:0.188", True),
        ("topk_abs:72", False),
        ("topk:9", False),
    ):
        found = assignment_of(part_of(TRADE_OFF), dataclasses.replace(point, selection=spelled))
        assert (found is not None) == known, spelled


@pytest.mark.parametrize(
    ("old", "new"),
    [("batch: [4, 8, 16]", "batch: [4]"), ("high: 0.5}", "high: 0.2}"), ("seq_len: 64", "seq_len: 32")],
)
def test_a_point_outside_the_space_has_no_assignment(old: str, new: str) -> None:
    """Another choice, another range or another fixed value: the point is none of this search."""
    values = {"k_frac": 0.4, "lr": 1e-3, "batch": 8, "method": "moc_reference"}
    point = make_point(part_of(TRADE_OFF), values, 0)
    assert assignment_of(part_of(TRADE_OFF), point) is not None
    assert assignment_of(part_of(TRADE_OFF.replace(old, new)), point) is None


@pytest.mark.parametrize(
    ("axis", "rate"),
    [
        ("{low: 1.0e-4, high: 1.0e-2, log: true}", 1e-3),
        ("{low: 1.0, high: 3.0}", 2.0),
        ("[4.0, 1.0, 2.0]", 2.0),
    ],
)
def test_the_baseline_of_a_shape_has_the_middle_learning_rate(axis: str, rate: float) -> None:
    """Geometric middle of a logarithmic range, arithmetic of a plain one, the middle of a list."""
    part = part_of(TRADE_OFF.replace("{low: 1.0e-4, high: 1.0e-2, log: true}", axis))
    shared = baseline_of(part, {"k_frac": 0.1, "lr": 99.0, "batch": 8, "method": "moc_reference"})
    assert (shared["lr"], shared["method"], shared["batch"]) == (rate, "dense", 8)
    assert make_point(part, shared, 0).selection is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "metric: perplexity",
            "metric: perplexitty",
            "optimize.objectives[0].metric is 'perplexitty'; did you",
        ),
        (
            "metric: tokens_per_s",
            "metric: perplexity",
            "optimize.objectives[1].metric is 'perplexity' a second",
        ),
        (
            "n_trials: 60",
            "baseline: dens",
            "optimize.baseline is 'dens', not a dense method; did you mean dense",
        ),
        ("n_trials: 60", "baseline: act_prune", "optimize.baseline is 'act_prune', not a dense method"),
        (
            "n_trials: 60",
            "pruner: median",
            "optimize.pruner is 'median' with 2 objectives; only a study with one",
        ),
        (
            "n_trials: 60",
            "constraints: {perplexity: 0}",
            "optimize.constraints.perplexity is 0; it should be",
        ),
        (
            "batch: [4, 8, 16]",
            "batch: [4, 8, 512]",
            "axes reach 32,768 tokens a step, but train_tokens 8,192 is",
        ),
        ("high: 0.5}", "high: 1.5}", "axes.k_frac.high is 1.5; a fraction of the channels is at most 1"),
        ("log: true}", "log: true, step: 0.1}", "axes.lr has log and step; Optuna takes one of the two"),
        ("[4, 8, 16]", "{low: 4.5, high: 8}", "axes.batch.low is 4.5; batch is a whole number"),
        ("optimize:", "exclude: [{batch: 4}]\noptimize:", "exclude is for grids; narrow the axes"),
        ("optimize:", "seeds: [1, 1]\noptimize:", "seeds has a seed twice; give each once"),
    ],
)
def test_a_search_that_cannot_run_is_one_line(old: str, new: str, message: str) -> None:
    """Found when the file is read, not after hours of measuring."""
    assert old in TRADE_OFF
    with pytest.raises(SpecError) as caught:
        parse_sweep(TRADE_OFF.replace(old, new, 1), "s.yaml")
    assert str(caught.value).startswith(f"s.yaml: {message}")
    assert "\n" not in str(caught.value)


def test_a_pruner_needs_an_objective_that_is_known_before_the_end() -> None:
    """Throughput is no reason to give a training up."""
    text = TRADE_OFF.replace("{metric: perplexity, direction: minimize}, ", "") + "  pruner: hyperband\n"
    with pytest.raises(
        SpecError, match="tokens_per_s of pretrain is known only at the end; pretrain with one"
    ):
        parse_sweep(text, "s.yaml")


def test_a_search_needs_something_to_vary() -> None:
    """One value for every axis is a point, not a space."""
    text = TRADE_OFF.replace("{low: 0.05, high: 0.5}", "[0.5]").replace("[4, 8, 16]", "[4]")
    with pytest.raises(SpecError, match="axes hold one value each"):
        parse_sweep(text.replace("{low: 1.0e-4, high: 1.0e-2, log: true}", "[0.001]"), "s.yaml")


def test_the_newest_measured_attempt_counts() -> None:
    """A crash before or after it changes nothing; two seeds need both."""
    part = part_of(TRADE_OFF)
    assert part.optimize is not None
    point = make_point(part, {"k_frac": 0.4, "lr": 1e-3, "batch": 8, "method": "moc_reference"}, 0)
    good = trade_off(point)
    crash = [{**good[-1], "run_id": "r2", "status": "crashed", "detail": "x", "value": None}]
    for rows in (good, crash + good, good + crash):
        outcome = outcome_of(part.optimize, 1, rows)
        assert (outcome.status, outcome.feasible) == ("ok", True)
    assert outcome_of(part.optimize, 1, crash).status == "crashed"
    later = [{**crash[0], "run_id": "r3", "status": "oom"}]
    assert outcome_of(part.optimize, 1, crash + later).status == "oom"
    assert outcome_of(part.optimize, 1, later + crash).status == "crashed"
    assert outcome_of(part.optimize, 2, good).status == "running"
    assert outcome_of(part.optimize, 1, []).status == "running"


def test_the_table_of_a_search_agrees_with_its_study(tmp_path: Path) -> None:
    """Read from the rows alone: the same trials in the same order, the same Pareto set, the same ratios, and
    baselines that are no trials."""
    text = TRADE_OFF.replace("n_trials: 60", "n_trials: 20")
    study, sweep = open_search(text)
    rows: dict = {}
    keys = []
    while (proposal := study.propose()) is not None:
        answer(study, proposal, rows=rows)
        keys.append(proposal.points[0].key)
    store = Store(tmp_path)
    for batch in rows.values():
        store.append(batch)
    search = read_search(sweep.parts[0], read_rows(tmp_path))
    assert search is not None
    assert search.trials["point_key"].tolist() == keys
    best = {trial.user_attrs["point_key"]: trial for trial in study.study.optuna.best_trials}
    front = search.trials[search.trials["on_front"]]
    assert set(front["point_key"]) == set(best)
    for _, line in front.iterrows():
        trial = best[line["point_key"]]
        assert [line["perplexity"], line["tokens_per_s"]] == trial.values
        assert line["speed_vs_dense"] == pytest.approx(trial.user_attrs["speed_vs_dense"])
    assert sorted(search.dense["batch"]) == [4, 8, 16]
    assert set(search.dense["lr"]) == {1e-3}
    assert search.keys == set(rows)
    other = part_of(text.replace("seq_len: 64", "seq_len: 32"))
    assert read_search(other, read_rows(tmp_path)) is None


def test_given_up_trainings_are_counted_by_part_and_leave_no_checkpoints(tmp_path: Path) -> None:
    """One line each, beside the rows; what was saved of the training goes."""
    part = part_of(TRADE_OFF)
    point = make_point(part, {"k_frac": 0.4, "lr": 1e-3, "batch": 8, "method": "moc_reference"}, 0)
    saved = tmp_path / "checkpoints" / point.key
    saved.mkdir(parents=True)
    record_pruned(tmp_path, part, point, {25: 99.0})
    record_pruned(tmp_path, part, point, {50: 98.0})
    assert pruned_trials(tmp_path, part) == 2
    assert pruned_trials(tmp_path, part.model_copy(update={"name": "other"})) == 0
    assert not saved.exists()


def test_the_committed_search_is_small_and_has_two_objectives() -> None:
    """The sweep whose report is in the repository: 30 trials of the 4m model."""
    part = load_sweep(Path("sweeps/optimize_4m.yaml")).parts[0]
    assert part.optimize is not None
    assert part.optimize.n_trials == 30
    assert len(part.optimize.objectives) == 2
