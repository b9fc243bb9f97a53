"""The plots of a sweep: only those its rows support, each with one message, units and intervals.

Means over seeds are drawn large, single seeds small. A sparse method is a marker at its K, a dense one a
horizontal line with its interval as a band, because K means nothing to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from harness.report import wording
from harness.report.plots.panels import (
    CONDITIONS,
    board_of,
    interval,
    mark_of,
    one_size_each,
    panels,
    series_of,
    with_k,
)
from harness.report.plots.style import Board, Look, Plot, line_handle, subject_of, thousands
from harness.report.plots.titles import k_title, pareto_title, scaling_title
from harness.report.points import cell_ids
from harness.report.summary import SEEDS_FOR_INTERVAL
from harness.search.pareto import front

_K_AXIS = "K: channels kept per token (% of d_ffn)"
_WHISKER: dict[str, Any] = {"capsize": 3, "elinewidth": 1.1, "capthick": 1.1}


def _level(axes: Axes, board: Board, style: Look, line: pd.Series, metric: str, scale: float) -> None:
    axes.axhline(line[metric] / scale, color=style.color, linestyle=style.line, linewidth=1.8, zorder=2)
    low, high = line[f"{metric}_ci_low"], line[f"{metric}_ci_high"]
    if not math.isnan(low):
        axes.axhspan(low / scale, high / scale, color=style.color, alpha=0.16, linewidth=0, zorder=1)
    board.legend(line_handle(replace(style, marker="")), style.label)


def _note(summary: pd.DataFrame, metric: str, *, singles: bool = False) -> str:
    """How to read marks and intervals; `singles`: single seeds are drawn as small marks."""
    seeds = int(summary["seeds"].max())
    small = "; small marks: single seeds" if singles else ""
    if seeds >= SEEDS_FOR_INTERVAL:
        return f"Means of {seeds} seeds with 95 % t intervals{small}."
    measured = summary[f"{metric}_ci_low"].notna().any()
    ends = "Bars and bands: 95 % intervals of the measurement. " if measured else ""
    one = "One seed: differences between seeds are not in the picture."
    return ends + (f"Means of 2 seeds{small}." if seeds == 2 else one)


def against_k(
    summary: pd.DataFrame,
    seeds: pd.DataFrame,
    metric: str,
    y_name: str,
    caption: str,
    path: Path,
    *,
    scale: float = 1.0,
) -> Plot | None:
    """A metric over K, a panel per setting; None if no sparse point has it.

    Perplexity shows every detail of its range and only the fastest dense line (dense methods compute the
    same function); amounts (tokens/s, bytes) start at zero and show every dense method.
    """
    known = summary[summary[metric].notna()]
    kept = sorted(set(known.loc[known["family"] != "", "k_pct"]))
    if not kept:
        return None
    amounts = metric != "perplexity"
    board, parts = board_of(known)
    room = max(4.0, (kept[-1] - kept[0]) * 0.18)
    shifts = _side_by_side(known, 0.03 * (kept[-1] - kept[0] + 2 * room))
    for axes, part in parts:
        for style, group in series_of(part):
            line = group.iloc[0]
            if line["family"] == "":
                if amounts or not line["is_dense"] or line["method"] == _baseline(part):
                    _level(axes, board, style, line, metric, scale)
                continue
            group = group.sort_values("k_pct")
            x = group["k_pct"] + [shifts[style.label, round(value, 1)] for value in group["k_pct"]]
            axes.errorbar(
                x, group[metric] / scale, interval(group, metric, scale), **_WHISKER, **style.marks()
            )
            board.legend(line_handle(style), style.label)
            for at, (_, line) in zip(x, group.iterrows(), strict=True):
                _single_seeds(axes, seeds, line, metric, at, scale, style)
        axes.set_xlim(kept[0] - room, kept[-1] + room)
        axes.set_xticks(_readable(kept, room), [f"{value:g}" for value in _readable(kept, room)])
        if amounts:
            axes.set_ylim(0, _top(part, metric) / scale * 1.08)
        if metric == "tokens_per_s":
            thousands(axes.yaxis)
    title = k_title(known, metric)
    return board.save(path, title, caption, x=_K_AXIS, y=y_name, note=_note(known, metric, singles=True))


def _baseline(part: pd.DataFrame) -> str:
    named = [name for name in part["baseline"] if name]
    dense = part.loc[part["is_dense"], "method"]
    return str(named[0]) if named else str(dense.iloc[0]) if len(dense) else ""


def _top(part: pd.DataFrame, metric: str) -> float:
    return float(max(part[metric].max(), part[f"{metric}_ci_high"].fillna(0).max()))


def _readable(values: Sequence[float], room: float) -> list[float]:
    """Positions of ticks at measured K, without those whose labels would overlap."""
    ticks: list[float] = []
    for value in values:
        if not ticks or value - ticks[-1] >= room * 0.45:
            ticks.append(round(value, 2))
    return ticks


def _side_by_side(known: pd.DataFrame, step: float) -> dict[tuple[str, float], float]:
    """How far a series moves sideways at a K it shares, by label and K: else marks would cover each other."""
    at: dict[float, list[str]] = {}
    for style, group in series_of(known[known["family"] != ""]):
        for value in dict.fromkeys(round(value, 1) for value in group["k_pct"]):
            at.setdefault(value, []).append(style.label)
    return {
        (label, value): step * (place - (len(labels) - 1) / 2)
        for value, labels in at.items()
        for place, label in enumerate(labels)
    }


def _single_seeds(
    axes: Axes, seeds: pd.DataFrame, line: pd.Series, metric: str, x: float, scale: float, style: Look
) -> None:
    if line["seeds"] > 1:
        same = (seeds["cell"] == line["cell"]) & (seeds["method"] == line["method"])
        each = seeds.loc[same & (seeds["selection"] == line["selection"]), metric] / scale
        axes.plot([x] * len(each), each, **style.marks(linestyle="", markersize=3, alpha=0.7))


def pareto(
    summary: pd.DataFrame, peak: str, x_name: str, scale: float, caption: str, path: Path
) -> Plot | None:
    """Perplexity over peak memory: the front drawn, dominated points faded; None without both metrics."""
    known = summary[summary[peak].notna() & summary["perplexity"].notna()]
    if known.empty or known.groupby("cell").size().max() < 2:
        return None
    known = known.assign(on_front=False)
    for _, part in known.groupby("cell", sort=False):
        known.loc[part.index, "on_front"] = front(part[[peak, "perplexity"]].to_numpy())
    board, parts = board_of(known, share_x=False)
    labelled = False
    for axes, part in parts:
        best = part[part["on_front"]].sort_values(peak)
        axes.step(
            best[peak] / scale, best["perplexity"], where="post", color="#444444", linewidth=1, linestyle=":"
        )
        for style, group in series_of(part):
            shown = style.points()
            for _, line in group.iterrows():
                alone = group.loc[[line.name]]
                up, across = interval(alone, "perplexity", 1.0), interval(alone, peak, scale)
                clear = {"alpha": 1.0 if line["on_front"] else 0.35, **_WHISKER, **shown}
                axes.errorbar([line[peak] / scale], [line["perplexity"]], up, across, **clear)
            handle = line_handle(style) if style.marker else axes.plot([], [], **shown)[0]
            board.legend(handle, with_k(style, group) if len(set(group["k_pct"])) == 1 else style.label)
        many = part[(part["family"] != "") & part.duplicated(["method", "family"], keep=False)]
        labelled = labelled or not many.empty
        axes.margins(0.16, 0.2)
        texts = part["k_pct"].map(wording.percent).where(part.index.isin(many.index), "")
        marks = zip(part.iterrows(), texts, strict=True)
        board.label(
            axes, [mark_of(line, (peak, scale), ("perplexity", 1.0), text) for (_, line), text in marks]
        )
    note = "Dotted: the front. Faded: another method is at least as good in both. "
    note += "Percentages: K. " if labelled else ""
    note += _note(known, "perplexity")
    names = {"x": f"{x_name}, less is better", "y": "perplexity, less is better"}
    return board.save(path, pareto_title(known), caption, note=note, **names)


def scaling(summary: pd.DataFrame, caption: str, path: Path) -> Plot | None:
    """Training speed over sequence length, one rule size per series; None with a single length."""
    known, held = _several_lengths(summary[summary["tokens_per_s"].notna() & ~summary["misaligned"]])
    if known.empty:
        return None
    shown = one_size_each(known)
    titles = panels(shown, [name for name in CONDITIONS if name not in ("seq_len", "batch")])
    board = Board(list(titles.values()), columns=3, panel_inches=3.1, subject=subject_of(shown))
    lengths = sorted(set(shown["seq_len"]))
    for axes, cell in zip(board.axes, titles, strict=True):
        part = shown[shown["cell"] == cell]
        for style, group in series_of(part):
            group = group.sort_values("seq_len")
            changes: dict[str, Any] = {} if style.marker else {"marker": "h", "markersize": 6}
            marks, ends = style.marks(**changes), interval(group, "tokens_per_s", 1.0)
            axes.errorbar(group["seq_len"], group["tokens_per_s"], ends, **_WHISKER, **marks)
            board.legend(line_handle(style, **changes), with_k(style, group))
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{value:.0f}" for value in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(lengths[0] / 1.25, lengths[-1] * 1.25)
        axes.set_ylim(0, _top(part, "tokens_per_s") * 1.08)
        thousands(axes.yaxis)
    note = f"{held} held still. " + _note(shown, "tokens_per_s")
    title = scaling_title(summary)
    return board.save(path, title, caption, x="sequence length (tokens)", y="tokens/s trained", note=note)


def _several_lengths(lines: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Lines measured at two lengths or more with all else equal, `cell` naming all but the length.

    Lengths compare at equal tokens per step if the sweep held that still, else at equal batch.
    """
    rest = ["preset", "d_model", "d_ffn", "n_layers", "train_tokens", "vocab_size", "lr", "data_id", "dtype"]
    for still, name in (("tokens", "Tokens per step"), ("batch", "Batch")):
        known = lines.assign(cell=cell_ids(lines, [*rest, still]))
        known = known[known.groupby("cell")["seq_len"].transform("nunique") > 1]
        if not known.empty:
            return known, name
    return lines.iloc[:0], ""
