"""What the report says about a search: claims that follow from its rows, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from optimize_surface import TRADE_OFF, Measure, answer, k_frac, open_search, trade_off
from PIL import Image
from rows import rows_of

from harness.report import wording
from harness.report.build import read_results, write_report
from harness.report.search.plots import best_so_far
from harness.report.search.section import search_section
from harness.report.search.words import (
    best_sentence,
    dense_sentence,
    history_title,
    k_sentence,
    scope_sentence,
    views_of,
)
from harness.search.outcome import Search, read_search, record_pruned
from harness.store.files import Store
from harness.store.frames import read_rows
from harness.sweep.model import sweep_text
from harness.sweep.point import Point

SHORT = TRADE_OFF.replace("n_trials: 60", "n_trials: 24")
SINGLE = SHORT.replace(", {metric: tokens_per_s, direction: maximize}", "")


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
    assert f"Of the {count} trials on the front, {count} are beaten in everything by one of the 3" in said
    assert "3 of the baselines are beaten by no trial" in said
    ratios = strong.trials.loc[strong.trials["on_front"], "tokens_per_s"] / 2000
    assert f"{ratios.min():.2f}x to {ratios.max():.2f}x its speed (unpaired" in said
    assert "trained at learning rate 0.001, the middle of the range" in said
    weak = dense_sentence(searched(tmp_path / "b", SHORT, with_dense(99.0, 1.0)))
    assert "trials on the front, 0 are beaten in everything" in weak
    assert "0 of the baselines are beaten by no trial" in weak


def test_a_search_without_dense_says_that_it_cannot_judge(tmp_path: Path) -> None:
    """No baseline, no claim."""
    search = searched(
        tmp_path, SHORT, lambda p: rows_of(p, {}, "crashed") if p.method == "dense" else trade_off(p)
    )
    assert dense_sentence(search).startswith("No dense baseline was measured")


def test_one_objective_has_a_best_trial_and_no_front(tmp_path: Path) -> None:
    """The best trial is the smallest value; there is no front."""
    search = searched(tmp_path, SINGLE)
    best = search.trials.loc[search.trials["perplexity"].idxmin()]
    assert best_sentence(search).startswith(f"The best is trial {best['trial']}, with ")
    assert history_title(search) == f"The best trial is number {best['trial']} of 24"
    section = search_section(search, tmp_path, "caption", "")
    assert [plot.name for plot in section.plots] == ["optimization_progress"]
    assert section.tables[0][0] == "Best trial"
    assert section.tables[0][1]["trial"].tolist() == [str(best["trial"])]


def test_the_title_over_trials_counts_how_late_the_front_was_found(tmp_path: Path) -> None:
    """Of nine trials the last three are late; the title says how many of them are on the front."""
    search = searched(tmp_path, TRADE_OFF.replace("60", "9"))
    on_front = search.trials.loc[search.trials["on_front"], "trial"]
    assert history_title(search) == (
        f"{int((on_front > 6).sum())} of the {len(on_front)} trials on the front are among the last 3 of 9"
        " trials"
    )


def test_the_k_of_the_front_is_said_beside_all_k_that_were_measured(tmp_path: Path) -> None:
    """Smallest and largest K of both, in percent; without an axis over K there is no such sentence."""
    search = searched(tmp_path)
    good = search.measured
    best, tried = (
        f"{wording.percent(k.min())} to {wording.percent(k.max())}"
        for k in (good.loc[good["on_front"], "k_pct"], good["k_pct"])
    )
    assert k_sentence(search) == (
        f"The trials on the front have K = {best}; the measured trials have K = {tried}."
    )


def test_the_line_over_trials_is_the_best_value_so_far(tmp_path: Path) -> None:
    """A running minimum or maximum over the trials within their limits."""
    search = searched(tmp_path)
    for view in views_of(search):
        values = search.trials[view.metric]
        expected = values.cummin() if view.direction == "minimize" else values.cummax()
        assert best_so_far(search, view).tolist() == expected.tolist()


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
    names = ["optimization_pareto", "optimization_progress"]
    assert [path.stem for path in pictures] == names[objectives == 1 :]
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
    assert "there is no best trial" in " ".join(section.sentences)
    (name, table, _), *_ = [item for item in section.tables if item[0] == "All trials"]
    assert (name, len(table)) == ("All trials", len(search.trials))
    assert set(table["outcome"]) == {"oom: because"}


def test_trainings_stopped_early_are_told_in_the_report(tmp_path: Path) -> None:
    """They have no rows, so they come from their own file, with the rule that stopped them."""
    search = searched(tmp_path, SINGLE + "  pruner: median\n")
    point = Point(**{**TINY, "selection": f"topk:{k_frac(Point(**TINY)):.1f}"})
    record_pruned(tmp_path, search.part, point, {50: 99.0})
    section = search_section(search, tmp_path, "caption", "")
    assert "1 stopped early by the median rule (they have no row)" in section.sentences[0]


TINY: dict[str, Any] = {
    "workload": "pretrain",
    "method": "moc_reference",
    "selection": "topk:0.5",
    "preset": None,
    "d_model": 8,
    "d_ffn": 16,
    "n_layers": 1,
    "batch": 1,
    "seq_len": 8,
    "dtype": "fp32",
    "seed": 0,
}
