"""The plots of a search: its front, how it got there, what decided, and where the good values lie."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from harness.report.plots.style import Board, Look, Mark, Plot, Subject, line_handle, look
from harness.report.points import family, is_dense
from harness.report.search.words import (
    View,
    history,
    importance_title,
    parameter_axis,
    parameter_name,
    pareto_title,
    progress_title,
    slices_title,
    view_of,
)
from harness.search.outcome import Search
from harness.sweep.model import Range, part_name

PLOT_NAMES = (
    "optimization_pareto",
    "optimization_progress",
    "optimization_importances",
    "optimization_parameters",
)
_FADED = 0.35
_WHISKER: dict[str, Any] = {"capsize": 2, "elinewidth": 0.9, "capthick": 0.9}


def draw_search(search: Search, shares: pd.DataFrame, caption: str, folder: Path, tail: str) -> list[Plot]:
    """Draw the plots that a search supports into `folder/NAME{tail}.png`, in the order people read them.

    `shares` are its importances (`harness.search.importances`), perhaps none.
    """
    if search.measured.empty:
        return []
    objectives = search.settings.objectives
    views = [view_of(objective, search.measured[objective.metric]) for objective in objectives]
    plots = []
    if len(views) > 1:
        plots.append(pareto_plot(search, views, caption, folder / f"optimization_pareto{tail}.png"))
    plots.append(progress_plot(search, views, caption, folder / f"optimization_progress{tail}.png"))
    if not shares.empty:
        path = folder / f"optimization_importances{tail}.png"
        plots.append(importance_plot(search, views, shares, caption, path))
    plots.append(slices_plot(search, views, shares, caption, folder / f"optimization_parameters{tail}.png"))
    return plots


def _subject(search: Search) -> Subject:
    return Subject(search=part_name(search.part))


def _look(line: pd.Series) -> Look:
    method, selection = str(line["method"]), str(line["selection"]) or None
    return look(method, family(selection), dense=is_dense(method, selection))


def _marks(style: Look, **changes: Any) -> dict[str, Any]:
    """Marks without a line; a dense method is a hexagon here, where K means nothing."""
    if style.marker:
        return style.marks(**{"linestyle": "", "markersize": 6, **changes})
    hexagon = {"marker": "h", "markersize": 9, "linestyle": "", "markeredgecolor": "white"}
    return {"color": style.color, **hexagon, **changes}


def pareto_plot(search: Search, views: list[View], caption: str, path: Path) -> Plot:
    """Every pair of objectives: trials with intervals, the front, the dense baselines."""
    pairs = list(itertools.combinations(range(len(views)), 2))[:6]
    board = Board(
        [""] * len(pairs),
        columns=min(2, len(pairs)),
        panel_inches=4.2,
        share_x=False,
        subject=_subject(search),
    )
    good, dense = search.measured, search.baselines
    for axes, (first, second) in zip(board.axes, pairs, strict=True):
        up, across = views[first], views[second]
        if len(views) == 2:
            best = good[good["on_front"]].sort_values(across.metric)
            where: Literal["pre", "post"] = "post" if across.direction == "minimize" else "pre"
            axes.step(
                best[across.metric] / across.scale, best[up.metric] / up.scale, where=where,
                color="#444444", linewidth=1, linestyle=":",
            )  # fmt: skip
        for _, line in good.sort_values("on_front").iterrows():
            style = _look(line)
            clear = 1.0 if line["on_front"] else _FADED
            _point(axes, line, up, across, {"alpha": clear, **_marks(style)})
            board.legend(line_handle(style, linestyle="", markersize=6), f"{style.label}, a trial each")
        for _, line in dense.iterrows():
            style = _look(line)
            _point(axes, line, up, across, {"zorder": 4, **_marks(style, color="#111111")})
            handle = Line2D([], [], **_marks(style, color="#111111"))
            board.legend(handle, f"{style.label} baseline of a shape")
        names = good[good["on_front"]]
        marks = [_mark(line, up, across, str(line["trial"])) for _, line in names.iterrows()]
        others = pd.concat([good[~good["on_front"]], dense])
        board.label(axes, marks + [_mark(line, up, across, "") for _, line in others.iterrows()])
        axes.margins(0.07, 0.08)
        for axis, view in ((axes.xaxis, across), (axes.yaxis, up)):
            if view.metric == "tokens_per_s":
                axis.set_major_formatter(EngFormatter(sep=""))
        if len(pairs) > 1:
            axes.set_xlabel(across.axis)
            axes.set_ylabel(up.axis)
    note = "Numbers: trials on the front, as in the table. Faded: another trial is at least as good in all. "
    if good[[f"{view.metric}_ci_low" for view in views]].notna().any().any():
        note += "Whiskers: 95 % intervals of the measurement; better and worse go by the values alone. "
    missing = len(search.trials) - len(good)
    note += f"{missing} trials without a result within the limits are not drawn." if missing else ""
    names_once = {"x": views[1].axis, "y": views[0].axis} if len(pairs) == 1 else {}
    return board.save(path, pareto_title(search), caption, note=note, **names_once)


def _point(axes: Axes, line: pd.Series, up: View, across: View, marks: dict[str, Any]) -> None:
    axes.errorbar(
        [line[across.metric] / across.scale], [line[up.metric] / up.scale],
        yerr=_interval(line, up), xerr=_interval(line, across), **_WHISKER, **marks,
    )  # fmt: skip


def _interval(line: pd.Series, view: View) -> list[list[float]] | None:
    low, high = line[f"{view.metric}_ci_low"], line[f"{view.metric}_ci_high"]
    if low != low or high != high:
        return None
    value = line[view.metric]
    return [[max(0.0, value - low) / view.scale], [max(0.0, high - value) / view.scale]]


def _mark(line: pd.Series, up: View, across: View, words: str) -> Mark:
    y = line[up.metric] / up.scale
    ends = _interval(line, up) or [[0.0], [0.0]]
    return Mark(line[across.metric] / across.scale, y, y - ends[0][0], y + ends[1][0], words)


def progress_plot(search: Search, views: list[View], caption: str, path: Path) -> Plot:
    """Hypervolume over trials, or every value and the best so far of a single objective."""
    values = history(search)
    numbers = search.trials["trial"].to_numpy()
    board = Board([""], columns=1, panel_inches=3.0, subject=_subject(search))
    axes = board.axes[0]
    scale = views[0].scale if len(views) == 1 else 1.0
    axes.step(numbers, values / scale, where="post", color="black", linewidth=1.6)
    failed = search.trials[~search.trials["feasible"]]
    if len(views) == 1:
        for _, line in search.measured.iterrows():
            value, ends = line[views[0].metric] / scale, _interval(line, views[0])
            axes.errorbar([line["trial"]], [value], yerr=ends, **_WHISKER, **_marks(_look(line)))
            board.legend(
                line_handle(_look(line), linestyle="", markersize=6), f"{_look(line).label}, a trial"
            )
        board.legend(Line2D([], [], color="black", linewidth=1.6), "best so far")
        name, note = views[0].axis, ""
    else:
        axes.plot(numbers, values, color="black", marker="o", markersize=4, linestyle="")
        axes.set_ylim(0, 100)
        name = "hypervolume (% of the box)"
        note = (
            "The box: from the best measured value of each objective to one a tenth of the range behind the "
            "worst. A point alone in its best corner would be 100 %. "
        )
    if not failed.empty:
        floor = axes.get_xaxis_transform()  # x in trials, y in parts of the panel
        axes.plot(failed["trial"], [0.03] * len(failed), "x", color="#D55E00", transform=floor, clip_on=False)
        board.legend(Line2D([], [], color="#D55E00", marker="x", linestyle=""), "no result within the limits")
    axes.set_xlim(0.5, len(numbers) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    title = progress_title(search)
    return board.save(path, title, caption, x="trial, in the order of measuring", y=name, note=note)


def importance_plot(
    search: Search, views: list[View], shares: pd.DataFrame, caption: str, path: Path
) -> Plot:
    """A bar per parameter and objective, with the range of resampled trials."""
    names = list(search.varied)
    board = Board(
        [view.name for view in views],
        columns=min(3, len(views)),
        panel_inches=0.7 + 0.4 * len(names),
        subject=_subject(search),
    )
    for number, (axes, view) in enumerate(zip(board.axes, views, strict=True)):
        own = shares[shares["objective"] == view.metric].set_index("parameter").loc[names]
        axes.barh(range(len(names)), 100 * own["share"], color="#7A9CC6", edgecolor="white", height=0.7)
        for at, (low, high) in enumerate(zip(own["low"], own["high"], strict=True)):
            axes.plot(
                [100 * low, 100 * high], [at, at], color="black", linewidth=1.2, marker="|", markersize=7
            )
        axes.set_yticks(range(len(names)), [parameter_name(n) if number == 0 else "" for n in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.grid(visible=False, axis="y")
    note = (
        f"PED-ANOVA over {len(search.measured)} measured trials; bars of a panel add up to 100 %. Lines: "
        "95 % range over bootstrap resamples of the trials. Says how much, not which way: see the next plot."
    )
    x = "share in telling the best quarter of the trials from the rest (%)"
    return board.save(path, importance_title(search, shares), caption, x=x, note=note)


def slices_plot(search: Search, views: list[View], shares: pd.DataFrame, caption: str, path: Path) -> Plot:
    """Each objective over each parameter: where the good values lie."""
    names = [name for name in search.varied if name != "selection"] or list(search.varied)
    names = names[:4]
    board = Board(
        [""] * (len(names) * len(views)),
        columns=len(names),
        panel_inches=2.5,
        share_x=False,
        subject=_subject(search),
    )
    for at, axes in enumerate(board.axes):
        view, name = views[at // len(names)], names[at % len(names)]
        places = _places(search, name, axes)
        for (_, line), x in zip(search.measured.iterrows(), places, strict=True):
            clear = 1.0 if line["on_front"] else _FADED
            marks = {"alpha": clear, **_marks(_look(line), markersize=5)}
            axes.plot([x], [line[view.metric] / view.scale], **marks)
        if view.metric == "tokens_per_s":
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.margins(y=0.1)
        if at // len(names) == len(views) - 1:
            axes.set_xlabel(parameter_axis(name))
        if at % len(names) == 0:
            axes.set_ylabel(view.axis.replace(", ", ",\n"))
    for _, line in search.measured.drop_duplicates(["method"]).iterrows():
        style = _look(line)
        board.legend(line_handle(style, linestyle="", markersize=6), f"{style.label}, a trial each")
    full = "on the front" if len(views) > 1 else "the best"
    note = f"Dark: {full}. Faded: the other trials. Samplers crowd what looks good, so empty is not bad."
    return board.save(path, slices_title(search, shares), caption, note=note)


def _places(search: Search, name: str, axes: Axes) -> np.ndarray:
    """Where the measured trials stand on a parameter's axis, which is set up for it."""
    values = search.measured["k_pct" if name == "k_frac" else name]
    axis = search.part.axes[name]
    if isinstance(axis, Range):
        scale = 100 if name == "k_frac" else 1
        low, high = scale * axis.low, scale * axis.high
        if axis.log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if high / low < 100 else (1.0,)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.set_xlim(low / (high / low) ** 0.06, high * (high / low) ** 0.06)
        else:
            axes.set_xlim(low - 0.06 * (high - low), high + 0.06 * (high - low))
        return values.to_numpy(dtype=float)
    choices = [100 * float(choice) if name == "k_frac" else choice for choice in axis]
    choices = list(dict.fromkeys(choices))
    if all(isinstance(choice, int | float) for choice in choices):
        choices = sorted(choices)
    labels = [f"{choice:g}" if isinstance(choice, int | float) else str(choice) for choice in choices]
    axes.set_xticks(range(len(choices)), labels)
    axes.set_xlim(-0.6, len(choices) - 0.4)
    if isinstance(choices[0], str):
        return np.array([choices.index(value) for value in values], dtype=float)
    off = np.abs(values.to_numpy(dtype=float)[:, None] - np.array(choices, dtype=float)[None, :])
    return np.asarray(off.argmin(axis=1), dtype=float)  # K is known to whole channels, so nearest, not equal
