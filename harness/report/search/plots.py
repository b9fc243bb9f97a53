"""The plots of a search: the front of its objectives, and what each trial reached."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from harness.report.plots.style import (
    Axes,
    Board,
    Look,
    Mark,
    Plot,
    Subject,
    handle,
    line_handle,
    look,
    thousands,
    whole_numbers,
)
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


def _subject(search: Search) -> Subject:
    return Subject(search=part_name(search.part))


def _look(line: pd.Series) -> Look:
    method, selection = str(line["method"]), str(line["selection"]) or None
    return look(method, family(selection), dense=is_dense(method, selection))


def _marks(style: Look, **changes: Any) -> dict[str, Any]:
    """A marker without a line; a hexagon for a dense method, which has no K."""
    if style.marker:
        return style.marks(**{"linestyle": "", "markersize": 6, **changes})
    hexagon = {"marker": "h", "markersize": 9, "linestyle": "", "markeredgecolor": "white"}
    return {"color": style.color, **hexagon, **changes}


def front_plot(search: Search, caption: str, path: Path) -> Plot:
    """Every pair of objectives: trials with intervals, the front, the dense baselines."""
    views, good = views_of(search), search.measured
    pairs = list(itertools.combinations(views, 2))[:6]
    board = Board(
        [""] * len(pairs),
        columns=min(2, len(pairs)),
        panel_inches=4.2,
        share_x=False,
        subject=_subject(search),
    )
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
    for _, line in search.measured.sort_values("on_front").iterrows():
        style = _look(line)
        _point(axes, line, up, across, _marks(style, alpha=1.0 if line["on_front"] else _FADED))
        board.legend(line_handle(style, linestyle="", markersize=6), f"{style.label}, one trial")
    for _, line in search.baselines.iterrows():
        black = _marks(_look(line), color="#111111")
        _point(axes, line, up, across, {"zorder": 4, **black})
        board.legend(handle(**black), f"{_look(line).label}, baseline of a shape")
    lines = pd.concat([search.measured, search.baselines.assign(on_front=False)])
    lines = lines.sort_values("on_front", ascending=False, kind="stable")
    board.label(axes, [_mark(line, up, across) for _, line in lines.iterrows()])
    axes.margins(0.07, 0.08)
    for axis, view in ((axes.xaxis, across), (axes.yaxis, up)):
        if view.metric == "tokens_per_s":
            thousands(axis)


def _point(axes: Axes, line: pd.Series, up: View, across: View, marks: dict[str, Any]) -> None:
    x, y = line[across.metric] / across.scale, line[up.metric] / up.scale
    axes.errorbar([x], [y], _interval(line, up), _interval(line, across), **_WHISKER, **marks)


def _interval(line: pd.Series, view: View) -> list[list[float]] | None:
    low, high = line[f"{view.metric}_ci_low"], line[f"{view.metric}_ci_high"]
    if math.isnan(low) or math.isnan(high):
        return None
    value = line[view.metric]
    return [[max(0.0, value - low) / view.scale], [max(0.0, high - value) / view.scale]]


def _mark(line: pd.Series, up: View, across: View) -> Mark:
    y = line[up.metric] / up.scale
    ((below,), (above,)) = _interval(line, up) or [[0.0], [0.0]]
    text = str(line["trial"]) if line["on_front"] else ""
    return Mark(line[across.metric] / across.scale, y, y - below, y + above, text)


def history_plot(search: Search, caption: str, path: Path) -> Plot:
    """Every objective over the trials in the order of measuring, and the best value so far."""
    views = views_of(search)
    trials = search.trials
    board = Board([""] * len(views), columns=1, panel_inches=2.4, subject=_subject(search))
    for axes, view in zip(board.axes, views, strict=True):
        for _, line in search.measured.iterrows():
            style = _look(line)
            value, ends = line[view.metric] / view.scale, _interval(line, view)
            axes.errorbar([line["trial"]], [value], ends, **_WHISKER, **_marks(style))
            board.legend(line_handle(style, linestyle="", markersize=6), f"{style.label}, one trial")
        best = best_so_far(search, view) / view.scale
        axes.step(trials["trial"], best, where="post", color="black", linewidth=1.6)
        lost = trials.loc[~trials["feasible"].astype(bool), "trial"]
        if not lost.empty:
            floor = axes.get_xaxis_transform()  # x in trials, y in parts of the panel
            axes.plot(lost, [0.03] * len(lost), "x", color=_LOST, transform=floor, clip_on=False)
            board.legend(handle(color=_LOST, marker="x", linestyle=""), "no result within the limits")
        axes.set_xlim(0.5, len(trials) + 0.5)
        whole_numbers(axes.xaxis)
        axes.set_ylabel(view.axis.replace(", ", ",\n"))
        if view.metric == "tokens_per_s":
            thousands(axes.yaxis)
    board.legend(handle(color="black", linewidth=1.6), "best so far")
    return board.save(path, history_title(search), caption, x="trial, in the order of measuring")


def best_so_far(search: Search, view: View) -> pd.Series:
    """After each trial, the best value of an objective among the feasible trials so far."""
    values = search.trials[view.metric].where(search.trials["feasible"].astype(bool)).ffill()
    return values.cummin() if view.direction == "minimize" else values.cummax()
