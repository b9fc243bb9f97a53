"""What the report says about a search: sentences, tables and plots, from the rows alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from harness.errors import SpecError
from harness.report import wording
from harness.report.plots.style import Plot
from harness.report.search.plots import draw_search
from harness.report.search.words import parameter_name, sentences, view_of
from harness.search.importances import importances
from harness.search.outcome import Search, pruned_trials, read_search
from harness.sweep.load import parse_sweep
from harness.sweep.metrics import METRICS
from harness.sweep.model import Objective, Part, part_name

_Cell = Callable[[pd.Series], str]


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
    """What a search found, for people; `results_dir` says how many trainings were given up."""
    return sentences(search, pruned_trials(results_dir, search.part), importances(search))


def search_section(search: Search, results_dir: Path, caption: str, tail: str) -> Section:
    """Sentences, tables and plots of a search; plots are drawn into `plots/` as `NAME{tail}.png`."""
    shares = importances(search)
    pruned = pruned_trials(results_dir, search.part)
    plots = draw_search(search, shares, caption, results_dir / "plots", tail)
    objectives = search.settings.objectives
    good = search.measured
    tables: list[tuple[str, pd.DataFrame, str]] = []
    if not good.empty:
        best = good[good["on_front"]].sort_values(
            objectives[0].metric, ascending=objectives[0].direction == "minimize"
        )
        heading = "Pareto set" if len(objectives) > 1 else "Best trial"
        tables.append((heading, _table(search, best), _ratio_note(search)))
    if not search.dense.empty:
        dense = search.dense.assign(trial=wording.DASH)
        note = "front: no trial is as good in everything and better in something."
        tables.append(("Dense baselines", _table(search, dense), note))
    if not shares.empty:
        tables.append(("Parameter importances", _importance_table(search, shares), ""))
    tables.append(("All trials", _table(search, search.trials), ""))
    return Section(
        f"Search {part_name(search.part)}",
        tuple(sentences(search, pruned, shares)),
        tuple(plots),
        tuple(tables),
    )


def _ratio_note(search: Search) -> str:
    return (
        f"x {search.settings.baseline} and % against {search.settings.baseline}: against the dense baseline "
        "of the same shape, measured in this run. Parentheses: 95 % intervals of the measurement."
    )


def _table(search: Search, lines: pd.DataFrame) -> pd.DataFrame:
    """Trials as text: what they varied, what came out, and what they are to dense."""
    columns: dict[str, _Cell] = {"trial": lambda line: str(line["trial"])}
    for name in search.varied:
        columns[_column(name)] = _parameter(name)
    if "method" not in search.varied and lines["method"].nunique() == 1:
        columns = {"trial": columns.pop("trial"), "method": lambda line: str(line["method"]), **columns}
    for objective in search.settings.objectives:
        columns |= _objective_columns(search, objective)
    dense = search.settings.baseline
    columns[f"x {dense}"] = lambda line: wording.ratio(line["speed_vs_dense"])
    columns["outcome"] = _outcome
    cells = [[form(line) for form in columns.values()] for _, line in lines.iterrows()]
    table = pd.DataFrame(cells, columns=list(columns))
    empty = [name for name in table if table[name].isin(["", wording.DASH]).all() and name != "trial"]
    if (table["trial"] == wording.DASH).all():
        empty.append("trial")
    return table.drop(columns=empty)


def _column(name: str) -> str:
    return {"k_frac": "K %", "lr": "lr", "preset": "model"}.get(name, name)


def _parameter(name: str) -> _Cell:
    def cell(line: pd.Series) -> str:
        if name == "k_frac":
            return f"{line['k_pct']:.4g}"
        if name == "selection":
            return str(line["selection"]) or wording.DASH
        value = line[name]
        return value if isinstance(value, str) else f"{float(value):.4g}"

    return cell


def _objective_columns(search: Search, objective: Objective) -> dict[str, _Cell]:
    metric = objective.metric
    view = view_of(objective, search.measured[metric] if len(search.measured) else search.trials[metric])

    def form(value: float) -> str:
        return wording.size(value) if METRICS[metric].unit == "bytes" else wording.number(value, 4)

    def cell(line: pd.Series) -> str:
        low, high = line[f"{metric}_ci_low"], line[f"{metric}_ci_high"]
        if line[metric] != line[metric] or low != low:
            return form(line[metric])
        return f"{form(line[metric])} ({form(low)}{wording.DASH}{form(high)})"

    def against(line: pd.Series) -> str:
        return wording.signed(100 * (line[f"{metric}_vs_dense"] - 1), 1)

    name = view.plain if METRICS[metric].unit == "bytes" else view.name
    return {name: cell, f"{name} against {search.settings.baseline} (%)": against}


def _outcome(line: pd.Series) -> str:
    if line["feasible"] and line["status"] == "ok":
        return "front" if line["on_front"] else ""
    if line["status"] in ("ok", "unstable"):
        beyond = f"beyond {line['broken']}" if line["broken"] else ""
        return ", ".join(word for word in ("unstable" * (line["status"] == "unstable"), beyond) if word)
    detail = " ".join(str(line["detail"]).split())
    return f"{line['status']}: {detail[:80]}" if detail else str(line["status"])


def _importance_table(search: Search, shares: pd.DataFrame) -> pd.DataFrame:
    lines = []
    for objective in search.settings.objectives:
        own = shares[shares["objective"] == objective.metric]
        name = view_of(objective, search.measured[objective.metric]).name
        lines += [
            [
                name,
                parameter_name(line["parameter"]),
                f"{100 * line['share']:.0f}",
                f"{100 * line['low']:.0f}{wording.DASH}{100 * line['high']:.0f}",
            ]
            for _, line in own.iterrows()
        ]
    return pd.DataFrame(lines, columns=["objective", "parameter", "share %", "95 % range"])
