"""What the report says about a search: sentences, tables and plots, from the rows alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from harness.errors import SpecError
from harness.report import wording
from harness.report.plots.style import Plot
from harness.report.search.plots import draw_search
from harness.report.search.words import View, best_first, parameter_value, sentences, views_of
from harness.search.outcome import Search, pruned_trials, read_search
from harness.store.rows import MEASURED
from harness.sweep.load import parse_sweep
from harness.sweep.metrics import METRICS
from harness.sweep.model import Part, part_name

_Cell = Callable[[pd.Series], str]
_COLUMNS = {"k_frac": "K %", "preset": "model"}  # headings that are not the name of the axis


@dataclass(frozen=True)
class Section:
    """One search in the report. `tables` are a heading, a table of texts and a note (may be empty) each."""

    heading: str
    sentences: tuple[str, ...]
    plots: tuple[Plot, ...]
    tables: tuple[tuple[str, pd.DataFrame, str], ...]


def searched_parts(results_dir: Path) -> tuple[list[Part], str]:
    """The parts of a results folder's sweep that are searches, and a sentence if they cannot be known.

    A folder without a sweep file has no searches; one whose file cannot be read has none that is known.
    """
    path = results_dir / "sweep.yaml"
    if not path.exists():
        return [], ""
    try:
        sweep = parse_sweep(path.read_text(encoding="utf-8"), path.name, import_methods=False)
    except (OSError, UnicodeDecodeError, SpecError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return [], f"The sweep file cannot be read ({reason}), so a search in it is reported as a grid."
    return [part for part in sweep.parts if part.optimize is not None], ""


def split(parts: Sequence[Part], rows: pd.DataFrame) -> tuple[list[Search], pd.DataFrame]:
    """The searches that rows of one device hold, and the rows that belong to none."""
    searches, rest = [], rows
    for part in parts:
        search = read_search(part, rest)
        if search is not None:
            searches.append(search)
            rest = rest[~rest["point_key"].isin(search.keys)]
    return searches, rest


def search_sentences(results_dir: Path, search: Search) -> list[str]:
    """What a search found, for people; `results_dir` keeps which trainings were stopped early."""
    return sentences(search, pruned_trials(results_dir, search.part))


def search_section(search: Search, results_dir: Path, caption: str, tail: str) -> Section:
    """Sentences, tables and plots of a search; plots are drawn into `plots/` as `NAME{tail}.png`."""
    tables: list[tuple[str, pd.DataFrame, str]] = []
    good, views = search.measured, views_of(search)
    if not good.empty:
        best = best_first(good[good["on_front"]], views[0])
        heading = "Pareto set" if len(views) > 1 else "Best trial"
        dense = search.settings.baseline
        note = f"x {dense} and % against {dense}: against the dense baseline of the same shape, measured in"
        note += " this run. Parentheses: 95 % intervals of the measurement."
        tables.append((heading, _table(search, best), note))
    if not search.dense.empty:
        note = "front: no trial is as good in everything and better in something."
        tables.append(("Dense baselines", _table(search, search.dense.assign(trial=wording.DASH)), note))
    tables.append(("All trials", _table(search, search.trials), ""))
    return Section(
        heading=f"Search {part_name(search.part)}",
        sentences=tuple(search_sentences(results_dir, search)),
        plots=tuple(draw_search(search, caption, results_dir / "plots", tail)),
        tables=tuple(tables),
    )


def _table(search: Search, lines: pd.DataFrame) -> pd.DataFrame:
    """Trials as text: what they varied, what came out, and what they are to dense."""
    columns: dict[str, _Cell] = {"trial": lambda line: str(line["trial"])}
    if "method" not in search.varied and lines["method"].nunique() == 1:
        columns["method"] = lambda line: str(line["method"])
    for name in search.varied:
        columns[_COLUMNS.get(name, name)] = partial(parameter_value, name, digits=4)
    dense = search.settings.baseline
    for view in views_of(search):
        columns |= _objective_columns(view, dense)
    columns[f"x {dense}"] = lambda line: wording.ratio(line["speed_vs_dense"])
    columns["outcome"] = _outcome
    cells = [[form(line) for form in columns.values()] for _, line in lines.iterrows()]
    table = pd.DataFrame(cells, columns=list(columns))
    empty = [name for name in table if table[name].isin(["", wording.DASH]).all() and name != "trial"]
    if (table["trial"] == wording.DASH).all():
        empty.append("trial")
    return table.drop(columns=empty)


def _objective_columns(view: View, dense: str) -> dict[str, _Cell]:
    metric, in_bytes = view.metric, METRICS[view.metric].unit == "bytes"

    def cell(line: pd.Series) -> str:
        form = wording.size if in_bytes else partial(wording.number, digits=4)
        return wording.with_interval(line, metric, form)

    def against(line: pd.Series) -> str:
        return wording.signed(100 * (line[f"{metric}_vs_dense"] - 1), 1)

    name = view.plain if in_bytes else view.name
    return {name: cell, f"{name} against {dense} (%)": against}


def _outcome(line: pd.Series) -> str:
    if line["feasible"] and line["status"] == "ok":
        return "front" if line["on_front"] else ""
    if line["status"] in MEASURED:
        found = ["unstable"] if line["status"] == "unstable" else []
        return ", ".join([*found, *([f"beyond {line['broken']}"] if line["broken"] else [])])
    detail = " ".join(str(line["detail"]).split())
    return f"{line['status']}: {detail[:80]}" if detail else str(line["status"])
