"""The plots of a search: the front of its objectives, and what each trial reached."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from harness.report.plots.panels import interval, mark_of, series_of
from harness.report.plots.style import Axes, Board, Look, Plot, Subject, line_handle, thousands
from harness.report.points import family, is_dense
from harness.report.search.words import View, front_title, history_title, views_of
from harness.search.outcome import Search
from harness.sweep.model import part_name

_FADED = 0.35
_WHISKER: dict[str, Any] = {"capsize": 2, "elinewidth": 0.9, "capthick": 0.9}
_LOST = "#D55E00"


def draw_search(search: Search, caption: str, folder: Path, tail: str) -> list[Plot]:
    """Draw the plots that a search supports into `folder/NAME{tail}.png`, in the order people read them."""
    if search.measured.empty:
        return []
    plots = []
    if len(search.settings.objectives) > 1:
        plots.append(front_plot(search, caption, folder / f"optimization_pareto{tail}.png"))
    plots.append(history_plot(search, caption, folder / f"optimization_progress{tail}.png"))
    return plots


def _series(lines: pd.DataFrame) -> Iterable[tuple[Look, pd.DataFrame]]:
    """The trials of each method and rule, with how they are drawn."""
    rules = [str(selection) or None for selection in lines["selection"]]
    dense = [is_dense(method, rule) for method, rule in zip(lines["method"], rules, strict=True)]
    return series_of(lines.assign(family=[family(rule) for rule in rules], is_dense=dense))


def front_plot(search: Search, caption: str, path: Path) -> Plot:
    """Every pair of objectives: trials with intervals, the front, the dense baselines."""
    views, good = views_of(search), search.measured
    pairs = list(itertools.combinations(views, 2))[:6]
    subject = Subject(search=part_name(search.part))
    board = Board([""] * len(pairs), columns=2, panel_inches=4.2, share_x=False, subject=subject)
    for axes, (up, across) in zip(board.axes, pairs, strict=True):
        if len(views) == 2:
            _step(axes, good[good["on_front"]], up, across)
        _front_panel(board, axes, search, up, across)
        if len(pairs) > 1:
            axes.set_xlabel(across.axis)
            axes.set_ylabel(up.axis)
    note = "Numbers: trials on the front, as in the table. Faded: another trial is at least as good in all. "
    if good[[f"{view.metric}_ci_low" for view in views]].notna().any().any():
        note += "Whiskers: 95 % intervals of the measurement; the front is that of the values alone. "
    missing = len(search.trials) - len(good)
    note += f"{missing} trials without a result within the limits are not drawn." if missing else ""
    names = {"x": views[1].axis, "y": views[0].axis} if len(pairs) == 1 else {}
    return board.save(path, front_title(search), caption, note=note, **names)


def _step(axes: Axes, best: pd.DataFrame, up: View, across: View) -> None:
    where: Literal["pre", "post"] = "post" if across.direction == "minimize" else "pre"
    best = best.sort_values(across.metric)
    x, y = best[across.metric] / across.scale, best[up.metric] / up.scale
    axes.step(x, y, where=where, color="#444444", linewidth=1, linestyle=":")


def _front_panel(board: Board, axes: Axes, search: Search, up: View, across: View) -> None:
    for style, group in _series(search.measured):
        for on_front, part in group.groupby("on_front"):
            strength = {"alpha": 1.0, "zorder": 3} if on_front else {"alpha": _FADED}
            _points(axes, part, up, across, style.points(**strength))
        board.legend(line_handle(style, linestyle=""), f"{style.label}, one trial")
    for style, group in _series(search.baselines):
        black = style.points(color="#111111", zorder=4)
        _points(axes, group, up, across, black)
        board.legend(line_handle(style, **black), f"{style.label}, baseline of a shape")
    lines = pd.concat([search.measured, search.baselines.assign(on_front=False, trial=0)])
    lines = lines.sort_values("on_front", ascending=False, kind="stable")
    x, y = (across.metric, across.scale), (up.metric, up.scale)
    texts = lines["trial"].where(lines["on_front"].astype(bool), "").astype(str)
    marks = zip(lines.iterrows(), texts, strict=True)
    board.label(axes, [mark_of(line, x, y, text) for (_, line), text in marks])
    axes.margins(0.07, 0.08)
    for axis, view in ((axes.xaxis, across), (axes.yaxis, up)):
        if view.metric == "tokens_per_s":
            thousands(axis)


def _points(axes: Axes, lines: pd.DataFrame, up: View, across: View, marks: dict[str, Any]) -> None:
    x, y = lines[across.metric] / across.scale, lines[up.metric] / up.scale
    high, wide = interval(lines, up.metric, up.scale), interval(lines, across.metric, across.scale)
    axes.errorbar(x, y, high, wide, **_WHISKER, **marks)


def history_plot(search: Search, caption: str, path: Path) -> Plot:
    """Every objective over the trials in the order of measuring, and the best value so far."""
    views = views_of(search)
    trials, subject = search.trials, Subject(search=part_name(search.part))
    board = Board([""] * len(views), columns=1, panel_inches=2.4, subject=subject)
    for axes, view in zip(board.axes, views, strict=True):
        for style, group in _series(search.measured):
            ends = interval(group, view.metric, view.scale)
            axes.errorbar(group["trial"], group[view.metric] / view.scale, ends, **_WHISKER, **style.points())
            board.legend(line_handle(style, linestyle=""), f"{style.label}, one trial")
        best = best_so_far(search, view) / view.scale
        (line,) = axes.step(trials["trial"], best, where="post", color="black", linewidth=1.6)
        lost = trials.loc[~trials["feasible"].astype(bool), "trial"]
        if not lost.empty:
            floor = axes.get_xaxis_transform()  # x in trials, y in parts of the panel
            (cross,) = axes.plot(lost, [0.03] * len(lost), "x", color=_LOST, transform=floor, clip_on=False)
            board.legend(cross, "no result within the limits")
        axes.set_xlim(0.5, len(trials) + 0.5)
        axes.locator_params(axis="x", integer=True)
        axes.set_ylabel(view.axis.replace(", ", ",\n"))
        if view.metric == "tokens_per_s":
            thousands(axes.yaxis)
    board.legend(line, "best so far")
    return board.save(path, history_title(search), caption, x="trial, in the order of measuring")


def best_so_far(search: Search, view: View) -> pd.Series:
    """After each trial, the best value of an objective among the feasible trials so far."""
    values = search.trials[view.metric].where(search.trials["feasible"].astype(bool)).ffill()
    return values.cummin() if view.direction == "minimize" else values.cummax()
