"""Speed-up over batch when decoding, and beside it why it falls: the share of channels a batch needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from harness.report import wording
from harness.report.crossover import SHAPE, independent_union
from harness.report.plots.panels import interval, one_size_each, series_of, with_k
from harness.report.plots.style import Board, Plot, Subject, handle, line_handle, look, subject_of
from harness.report.plots.titles import ratio_note
from harness.report.summary import lead_series
from harness.report.tables import Tables

_WORDS = {"ffn_decode": "one FFN", "generate": "whole model"}
_CHANCE: dict[str, Any] = {"color": "#777777", "linestyle": (0, (1, 2)), "linewidth": 1.6}


def crossover_plot(tables: Tables, caption: str, path: Path, of_report: bool = True) -> Plot | None:
    """A panel per decoded shape with two batches or more, and one for the union of channels; None without.

    Points and samples may hold the `union_share` curves of trained models; without them the union of
    independent choices is drawn alone. A plot that is not `of_report`, such as one of several folders, has no
    subject: no report removes it, and no study shows it.
    """
    known = tables.decoded
    several = known.groupby([*SHAPE, "method", "selection"])["batch"].transform("nunique") > 1
    known = known[several] if len(known) else known
    if known.empty:
        return None
    known = one_size_each(known)
    panels = [group for _, group in known.groupby(list(SHAPE), sort=False)]
    columns = 2 if len(panels) == 3 else 3  # of one panel more
    titles = [*(_title(panel, panels) for panel in panels), "channels a batch needs"]
    board = Board(titles, columns=columns, subject=subject_of(known) if of_report else Subject())
    batches = sorted(set(known["batch"]))
    for axes, panel in zip(board.axes, panels, strict=False):
        _speedups(board, axes, panel)
    union = union_curves(tables.points, tables.samples)
    _unions(board, board.axes[-1], known, union, batches)
    for axes in board.axes:
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [f"{batch:.0f}" for batch in batches])
        axes.xaxis.set_minor_locator(NullLocator())
    speeds = f"{ratio_note(known)}; bars: 95 % intervals; the line at 1.0 is the fastest dense method"
    note = f"{speeds}. Last panel, as a share of all channels: {_union_note(union)}"
    return board.save(path, _message(tables), caption, x="batch (sequences decoded at once)", note=note)


def union_curves(points: pd.DataFrame, samples: pd.DataFrame) -> pd.DataFrame:
    """Measured union by batch, means over trained models: columns preset, selection, family, x, value."""
    names = ["preset", "selection", "family", "x", "value"]
    if samples.empty or not (samples["metric"] == "union_share").any():
        return pd.DataFrame(columns=names)
    chosen = samples[samples["metric"] == "union_share"]
    newest = chosen.drop_duplicates(["point_key"], keep="last")[["run_id", "point_key"]]
    own = chosen.merge(newest, on=["run_id", "point_key"]).merge(
        points[["point_key", "preset", "selection", "family"]].drop_duplicates("point_key"), on="point_key"
    )
    return own.groupby(names[:4])["value"].mean().reset_index()


def _title(panel: pd.DataFrame, panels: list[pd.DataFrame]) -> str:
    line = panel.iloc[0]
    lengths = {other.iloc[0]["seq_len"] for other in panels if other.iloc[0]["workload"] == line["workload"]}
    varying = ["seq_len"] if line["workload"] == "generate" and len(lengths) > 1 else []
    return f"{_WORDS[line['workload']]}, {wording.cell_label(line, varying)}"


def _speedups(board: Board, axes: Axes, panel: pd.DataFrame) -> None:
    for style, group in series_of(panel):
        group = group.sort_values("batch")
        bars = interval(group, "x_best_dense", 1.0)
        axes.errorbar(group["batch"], group["x_best_dense"], bars, capsize=3, **style.marks())
        board.legend(line_handle(style), with_k(style, group))
    axes.axhline(1.0, color="black", linewidth=1.4, zorder=1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.94), max(high, 1.06))


def _unions(board: Board, axes: Axes, known: pd.DataFrame, union: pd.DataFrame, batches: list[float]) -> None:
    x = [batches[-1] ** (step / 40) for step in range(41)]
    for k_frac in sorted(set(known["k_frac"])):
        axes.plot(x, [100 * independent_union(k_frac, batch) for batch in x], **_CHANCE)
    board.legend(handle(**_CHANCE), "independent choices")
    for (_, selection, family), curve in union.groupby(["preset", "selection", "family"], sort=False):
        if selection in set(known["selection"]):
            style = look("moc", str(family), dense=False)
            shown = curve[curve["x"].isin(batches)].sort_values("x")
            axes.plot(shown["x"], 100 * shown["value"], **style.marks(markersize=6, linewidth=1.2))
    axes.set_ylim(0, 100)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))


def _union_note(union: pd.DataFrame) -> str:
    chance = "dotted, independent choices, 1 - (1 - K/d_ffn)^batch;"
    if union.empty:
        return f"{chance} no trained model was measured in these rows."
    models = wording.names(union["preset"])
    return f"{chance} marks, trained {models} on held-out text, each token of another text."


def _message(tables: Tables) -> str:
    """Up to which batch the lead series wins, by workload."""
    found = tables.crossovers
    lead = lead_series(tables.decoded)
    if lead is None or found.empty:
        return "Decoding speed against the fastest dense method, by batch"
    own = found[(found["method"] == lead[0]) & (found["family"] == lead[1])]
    label = wording.series_label(*lead)
    parts = []
    for workload, lines in own.groupby("workload", sort=False):
        words = "one FFN" if workload == "ffn_decode" else "the whole model"
        wins = lines["wins_to"].dropna()
        if wins.empty:
            parts.append(f"at no batch with {words}")
            continue
        where = "" if len(wins) == len(lines) else f" at {len(wins)} of {len(lines)} shapes"
        until = "at batch 1" if wins.max() == 1 else f"up to batch {wording.span(wins, wording.tokens)}"
        parts.append(f"{until} with {words}{where}")
    if not parts:
        return f"{label} decodes at several speeds"
    return f"{label} beats the fastest dense decoding {wording.listing(parts)}"
