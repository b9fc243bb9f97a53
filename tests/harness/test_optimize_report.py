"""What the report says about a search: claims that follow from its rows, and no others."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from optimize_surface import TRADE_OFF, Measure, answer, k_frac, open_search, trade_off
from PIL import Image
from rows import rows_of

from harness.report.build import read_results, write_report
from harness.report.search.section import search_section
from harness.report.search.words import (
    best_sentence,
    dense_sentence,
    history,
    importance_title,
    progress_title,
    scope_sentence,
)
from harness.search.importances import MIN_TRIALS, importances
from harness.search.outcome import Search, read_search, record_pruned
from harness.store.files import Store
from harness.store.frames import read_rows
from harness.sweep.model import sweep_text
from harness.sweep.point import Point

SHORT = TRADE_OFF.replace("n_trials: 60", "n_trials: 24")
SINGLE = SHORT.replace(", {metric: tokens_per_s, direction: maximize}", "")
RANDOM = TRADE_OFF.replace("sampler: tpe", "sampler: random")


def searched(folder: Path, text: str = SHORT, measure: Measure = trade_off) -> Search:
    """The search of a results folder that a whole run of the sweep leaves."""
    study, sweep = open_search(text)
    rows: dict[str, list[dict[str, Any]]] = {}
    while (proposal := study.propose()) is not None:
        answer(study, proposal, measure, rows)
    store = Store(folder)
    for batch in rows.values():
        store.append(batch)
    (folder / "sweep.yaml").write_text(sweep_text(sweep))
    search = read_search(sweep.parts[0], read_rows(folder))
    assert search is not None
    return search


def with_dense(perplexity: float, speed: float) -> Measure:
    """The surface, with every dense point at one place."""

    def measure(point: Point) -> list[dict[str, Any]]:
        if point.method == "dense":
            return rows_of(point, {"perplexity": perplexity, "tokens_per_s": speed})
        return trade_off(point)

    return measure


def test_planted_parameters_are_found_important(tmp_path: Path) -> None:
    """Perplexity that depends on the learning rate alone and a speed that depends on the batch alone give
    those two the large share, beyond what resampling leaves any other."""

    def planted(point: Point) -> list[dict[str, Any]]:
        rate = math.log10((point.lr or 1) / 1e-3)
        return rows_of(point, {"perplexity": 20 + rate**2, "tokens_per_s": 100.0 * point.batch})

    search = searched(tmp_path, RANDOM, planted)
    shares = importances(search)
    for metric, parameter in (("perplexity", "lr"), ("tokens_per_s", "batch")):
        own = shares[shares["objective"] == metric].set_index("parameter")
        assert own["share"].idxmax() == parameter
        assert own.loc[parameter, "share"] > 0.6
        assert own["share"].sum() == pytest.approx(1.0)
        assert (own["low"] <= own["high"]).all()
        assert own.loc[parameter, "low"] > own["share"].drop(parameter).max()
    assert importance_title(search, shares) == (
        "Learning rate decides most about validation perplexity; batch decides most about tokens/s trained"
    )


def test_importance_that_is_not_clear_is_not_claimed(tmp_path: Path) -> None:
    """Where no parameter matters the title says so; a handful of trials has no importances at all."""

    def noise(point: Point) -> list[dict[str, Any]]:
        chance = int(point.key, 16) % 1000
        return rows_of(point, {"perplexity": 20.0 + chance, "tokens_per_s": 1.0 + chance * 7 % 1000})

    search = searched(tmp_path / "a", RANDOM.replace("n_trials: 60", "n_trials: 20"), noise)
    assert "not clear from so few trials" in importance_title(search, importances(search))
    few = searched(tmp_path / "b", RANDOM.replace("n_trials: 60", f"n_trials: {MIN_TRIALS - 1}"))
    assert importances(few).empty


def test_the_scope_counts_every_trial_and_how_it_ended(tmp_path: Path) -> None:
    """Measured, beyond a limit, out of memory: they add up to the trials."""

    def mixed(point: Point) -> list[dict[str, Any]]:
        return rows_of(point, {}, status="oom") if point.batch == 16 else trade_off(point)

    search = searched(tmp_path, SHORT + "  constraints: {perplexity: 24}\n", mixed)
    trials = search.trials
    lost = int((trials["status"] == "oom").sum())
    beyond = int((trials["perplexity"] > 24).sum())
    assert lost > 0
    assert beyond > 0
    assert scope_sentence(search, 0) == (
        "A search by TPE over K, learning rate and batch for least validation perplexity and most tokens/s "
        f"trained: 24 trials, of which {24 - lost - beyond} measured, {beyond} beyond a limit and {lost} out "
        "of memory."
    )


def test_the_front_is_compared_with_dense_in_numbers(tmp_path: Path) -> None:
    """Ratios span the trials of the front; a dense point that is better in everything beats them all, one
    that is slow and bad none; both are said."""
    strong = searched(tmp_path / "a", SHORT, with_dense(15.0, 2000.0))
    count = int(strong.trials["on_front"].sum())
    said = dense_sentence(strong)
    assert f"{count} of the {count} trials on the front are beaten by a baseline in everything" in said
    assert "and 3 of the baselines by no trial" in said
    ratios = strong.trials.loc[strong.trials["on_front"], "tokens_per_s"] / 2000
    assert f"{ratios.min():.2f}x to {ratios.max():.2f}x its speed (unpaired" in said
    assert "trained at learning rate 0.001, the middle of the range" in said
    weak = dense_sentence(searched(tmp_path / "b", SHORT, with_dense(99.0, 1.0)))
    assert "0 of the" in weak
    assert "and 0 of the baselines by no trial" in weak


def test_a_search_without_dense_says_that_it_cannot_judge(tmp_path: Path) -> None:
    """No baseline, no claim."""
    search = searched(
        tmp_path, SHORT, lambda p: rows_of(p, {}, "crashed") if p.method == "dense" else trade_off(p)
    )
    assert dense_sentence(search).startswith("No dense baseline was measured")


def test_one_objective_has_a_best_trial_and_no_front(tmp_path: Path) -> None:
    """The best trial is the smallest value, the progress line the running minimum; there is no front."""
    search = searched(tmp_path, SINGLE)
    best = search.trials.loc[search.trials["perplexity"].idxmin()]
    assert best_sentence(search).startswith(f"Best is trial {best['trial']}, with ")
    assert history(search).tolist() == search.trials["perplexity"].cummin().tolist()
    assert progress_title(search) == f"The best trial came as number {best['trial']} of 24 with a row"
    section = search_section(search, tmp_path, "caption", "")
    assert [plot.name for plot in section.plots] == [
        "optimization_progress",
        "optimization_importances",
        "optimization_parameters",
    ]
    assert section.tables[0][0] == "Best trial"
    assert section.tables[0][1]["trial"].tolist() == [str(best["trial"])]


def test_a_search_at_rest_and_one_still_growing_are_told_apart(tmp_path: Path) -> None:
    """150 trials of TPE have come to rest on this surface; of nine the last three moved the front."""
    assert progress_title(searched(tmp_path / "a", TRADE_OFF.replace("60", "150"))).startswith(
        "The front had come to rest"
    )
    assert progress_title(searched(tmp_path / "b", TRADE_OFF.replace("60", "9"))).startswith(
        "The front was still growing"
    )


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_plots_and_tables_of_any_number_of_objectives_are_written(tmp_path: Path, objectives: int) -> None:
    """Every picture is a readable PNG of the report's width, and Markdown links to each."""
    text = {
        1: SINGLE,
        2: SHORT,
        3: SHORT.replace(
            "objectives: [", "objectives: [{metric: peak_rss_over_start_bytes, direction: minimize}, "
        ),
    }[objectives]
    searched(tmp_path, text)
    written = write_report(read_results(tmp_path))
    pictures = [path for path in written if path.suffix == ".png"]
    assert len(pictures) == (3 if objectives == 1 else 4)
    report = (tmp_path / "report.md").read_text()
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.width == 1350
        assert f"(plots/{path.name})" in report
    assert report.count("| moc_reference |") >= 24


def test_a_search_that_measured_nothing_still_has_a_report(tmp_path: Path) -> None:
    """All out of memory: the table says so trial by trial, nothing is drawn, no best trial is named."""
    search = searched(tmp_path, SHORT, lambda point: rows_of(point, {}, status="oom"))
    section = search_section(search, tmp_path, "caption", "")
    assert section.plots == ()
    assert "there is no best one" in " ".join(section.sentences)
    (name, table, _), *_ = [item for item in section.tables if item[0] == "All trials"]
    assert (name, len(table)) == ("All trials", len(search.trials))
    assert set(table["outcome"]) == {"oom: because"}


def test_given_up_trainings_are_told_in_the_report(tmp_path: Path) -> None:
    """They have no rows, so they come from their own file, with the rule that stopped them."""
    search = searched(tmp_path, SINGLE + "  pruner: median\n")
    point = Point(**{**TINY, "selection": f"topk:{k_frac(Point(**TINY)):.1f}"})
    record_pruned(tmp_path, search.part, point, {50: 99.0})
    section = search_section(search, tmp_path, "caption", "")
    assert "1 given up early by the median rule (they have no row)" in section.sentences[0]


TINY: dict[str, Any] = {
    "workload": "pretrain", "method": "moc_reference", "selection": "topk:0.5", "preset": None, "d_model": 8,
    "d_ffn": 16, "n_layers": 1, "batch": 1, "seq_len": 8, "dtype": "fp32", "seed": 0,
}  # fmt: skip
