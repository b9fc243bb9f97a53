"""What plots with a panel per setting share: which panels, in which order, and which series in them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from harness.report import wording
from harness.report.plots.style import Board, Look, Mark, look, subject_of
from harness.report.summary import nearest_to_default
from harness.sweep.catalog import FIELDS

# A panel title names these where they differ between panels; the batch only if the length does not fix it.
CONDITIONS = tuple(field.name for field in FIELDS if field.in_title)


def panels(
    summary: pd.DataFrame, conditions: Sequence[str] = CONDITIONS, *, shape: bool = False
) -> dict[str, str]:
    """Title of every cell's panel by cell id: the model size (with `shape` also d and d_ffn) and what else
    differs between the panels."""
    varying = [name for name in conditions if summary[name].nunique(dropna=False) > 1]
    if "batch" in varying and (summary.groupby("seq_len")["batch"].nunique() == 1).all():
        varying.remove("batch")
    titles: dict[str, str] = {}
    for _, line in summary.iterrows():
        off = " (misaligned)" if line["misaligned"] else ""
        titles.setdefault(line["cell"], wording.cell_label(line, varying, shape=shape) + off)
    return titles


def side_by_side(panels: int) -> int:
    """How many of so many panels stand in a line: up to three, and four as two by two."""
    return 2 if panels == 4 else min(3, panels)


def arrange(summary: pd.DataFrame) -> tuple[list[str], int]:
    """Cell ids in reading order of the grid, and how many stand side by side.

    A column holds one model size where two or three sizes have equally many panels; else up to three panels
    follow each other in a line.
    """
    by_size = summary.groupby("preset", sort=False)["cell"]
    sizes = [list(dict.fromkeys(cells)) for _, cells in by_size]
    if 1 < len(sizes) <= 3 and len({len(cells) for cells in sizes}) == 1:
        return [cell for line in zip(*sizes, strict=True) for cell in line], len(sizes)
    cells = [cell for size in sizes for cell in size]
    return cells, side_by_side(len(cells))


def board_of(summary: pd.DataFrame, **options: Any) -> tuple[Board, list[tuple[Axes, pd.DataFrame]]]:
    """A board with a panel per cell, and each panel with the lines that belong in it."""
    titles = panels(summary)
    cells, columns = arrange(summary)
    board = Board([titles[cell] for cell in cells], columns=columns, subject=subject_of(summary), **options)
    return board, [(a, summary[summary["cell"] == c]) for a, c in zip(board.axes, cells, strict=True)]


def series_of(lines: pd.DataFrame) -> Iterable[tuple[Look, pd.DataFrame]]:
    """The lines of each method and rule family, with how they are drawn."""
    for (method, rule), group in lines.groupby(["method", "family"], sort=False):
        dense = bool(group["is_dense"].iloc[0])
        yield look(str(method), str(rule), dense=dense), group


def interval(group: pd.DataFrame, metric: str, scale: float) -> Any:
    """Distances from the mean to the ends of the interval; zero where there is none."""
    down = (group[metric] - group[f"{metric}_ci_low"]) / scale
    up = (group[f"{metric}_ci_high"] - group[metric]) / scale
    return [down.fillna(0).clip(lower=0).to_numpy(), up.fillna(0).clip(lower=0).to_numpy()]


def mark_of(line: pd.Series, x: tuple[str, float], y: tuple[str, float], text: str) -> Mark:
    """A line as a point with its vertical interval and a text; `x` and `y` are a metric and its scale."""
    (across, x_scale), (up, y_scale) = x, y
    ends = (line[f"{up}_ci_low"], line[f"{up}_ci_high"])
    low, high = (line[up] if math.isnan(end) else end for end in ends)
    return Mark(line[across] / x_scale, line[up] / y_scale, low / y_scale, high / y_scale, text)


def one_size_each(summary: pd.DataFrame) -> pd.DataFrame:
    """Every dense line, and of every sparse series the selection nearest to the default K."""
    kept = [group for _, group in summary[summary["family"] == ""].groupby("method", sort=False)]
    for _, group in summary[summary["family"] != ""].groupby(["method", "family"], sort=False):
        kept.append(group[group["selection"] == nearest_to_default(group)])
    return pd.concat(kept).sort_index()


def with_k(style: Look, group: pd.DataFrame) -> str:
    """Name of a series shown at a single K."""
    if not style.marker or (group["family"] == "").all():
        return style.label
    return f"{style.label}, K = {wording.percent(group['k_pct'].iloc[0])}"
