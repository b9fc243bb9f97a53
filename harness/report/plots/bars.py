"""The plots of one FFN layer: step time, saved bytes, and speed-up against the fastest dense method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from harness.report import wording
from harness.report.plots.panels import panels, side_by_side
from harness.report.plots.style import Board, Look, Plot, line_handle, look, subject_of, thousands
from harness.report.plots.titles import ratio_note, saved_title, speedup_title, step_title

_CONDITIONS = ("tokens", "seq_len", "dtype", "timing_mode")


def ffn_plots(summary: pd.DataFrame, caption: str, folder: Path, tail: str) -> list[Plot | None]:
    """The plots the `ffn_train` lines of a summary support, into `folder/NAME{tail}.png`."""
    if summary.empty:
        return []
    interval = "Whiskers: 95 % intervals. " if summary["step_ms_ci_low"].notna().any() else ""
    exact = "Counted by storage, input included, weights excluded: exact, so there is no interval. "
    step, saved = "step_ms", "saved_activation_bytes_per_token"
    times, sizes = (folder / f"{name}{tail}.png" for name in ("ffn_step_time", "ffn_saved_bytes"))
    step_axis = "forward + backward of one FFN layer (ms), less is better"
    saved_axis = "bytes kept for backward per token, less is better"
    return [
        horizontal_bars(summary, step, step_axis, step_title, caption, times, interval),
        horizontal_bars(summary, saved, saved_axis, saved_title, caption, sizes, exact),
        speedups(summary, caption, folder / f"ffn_speedup{tail}.png"),
    ]


def _board(summary: pd.DataFrame) -> tuple[Board, Iterator[tuple[Axes, pd.DataFrame]], list[str]]:
    """A board with a panel per cell and a line per series, its panels with their lines, and the series."""
    varies = summary["tokens"].nunique(dropna=False) > 1
    conditions = [name for name in _CONDITIONS if name != "seq_len" or not varies]  # an FFN sees tokens
    titles = panels(summary, conditions, shape=True)
    labels = list(dict.fromkeys(map(wording.series_label, summary["method"], summary["selection"])))
    board = Board(
        list(titles.values()),
        columns=side_by_side(len(titles)),
        panel_inches=0.7 + 0.27 * len(labels),
        share_x=False,
        subject=subject_of(summary),
    )
    for number, axes in enumerate(board.axes):
        named = number % board.columns == 0
        axes.set_yticks(range(len(labels)), labels if named else [""] * len(labels))
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
    parts = (summary[summary["cell"] == cell] for cell in titles)
    return board, zip(board.axes, parts, strict=True), labels


def _lines(part: pd.DataFrame, labels: list[str]) -> Iterator[tuple[pd.Series, Look, int]]:
    """Each line of a panel, how it is drawn, and its place among the labels."""
    for _, line in part.iterrows():
        at = labels.index(wording.series_label(line["method"], line["selection"]))
        yield line, look(line["method"], line["family"], dense=line["is_dense"]), at


def horizontal_bars(
    summary: pd.DataFrame,
    metric: str,
    x_name: str,
    title: Callable[[pd.DataFrame], str],
    caption: str,
    path: Path,
    note: str,
) -> Plot | None:
    """A bar per method from zero, its value written at the end; None if nothing has the metric."""
    known = summary[summary[metric].notna()]
    if known.empty:
        return None
    board, parts, labels = _board(known)
    for axes, part in parts:
        for line, style, at in _lines(part, labels):
            axes.barh(at, line[metric], color=style.color, hatch=style.hatch, edgecolor="white", height=0.72)
            end = line[metric]
            if not math.isnan(line[f"{metric}_ci_low"]):
                low, end = line[f"{metric}_ci_low"], line[f"{metric}_ci_high"]
                axes.plot([low, end], [at, at], color="black", linewidth=1.2, marker="|", markersize=6)
            words = f"{line[metric]:,.0f}" if metric.startswith("saved") else wording.number(line[metric])
            axes.annotate(words, (end, at), (4, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_xlim(0, part[metric].max() * 1.22)
        thousands(axes.xaxis)
    return board.save(path, title(known), caption, x=x_name, note=note)


def speedups(summary: pd.DataFrame, caption: str, path: Path) -> Plot | None:
    """Speed against the fastest dense method with its interval and a line at 1; None without a dense one."""
    known = summary[summary["x_best_dense"].notna()]
    if known[~known["is_dense"]].empty:
        return None
    board, parts, labels = _board(known)
    for axes, part in parts:
        for line, style, at in _lines(part, labels):
            low, high = line["x_best_dense_ci_low"], line["x_best_dense_ci_high"]
            if not math.isnan(low):
                axes.plot([low, high], [at, at], color=style.color, linewidth=1.8, marker="|", markersize=8)
            marks = style.marks(linestyle="", markersize=6)
            axes.plot([line["x_best_dense"]], [at], **{**marks, "marker": style.marker or "h"})
            beside = axes.get_yaxis_transform()  # x in parts of the panel, y in data: a column at its right
            words = wording.ratio(line["x_best_dense"])
            axes.text(1.015, at, words, transform=beside, va="center", fontsize=8)
        axes.axvline(1.0, color="black", linewidth=1.4)
        ends = [*part["x_best_dense_ci_low"].dropna(), *part["x_best_dense_ci_high"].dropna()]
        values = [1.0, *part["x_best_dense"], *ends]
        room = 0.12 * (max(values) - min(values)) + 0.02
        axes.set_xlim(min(values) - room, max(values) + room)
    one = line_handle(look("dense_compiled", "", dense=True))
    board.legend(one, "1.0: the fastest dense method of the run")
    name = "speed against the fastest dense method (x), more is better"
    note = f"{ratio_note(known)}; whiskers: 95 % intervals. Axes do not start at zero; the line is 1.0."
    return board.save(path, speedup_title(known), caption, x=name, note=note)
