"""Validation loss over tokens, and its gap to dense: the trend that one number at the end cannot show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.ticker import FuncFormatter

from harness.report import wording
from harness.report.plots.panels import board_of, one_size_each, series_of, with_k
from harness.report.plots.style import Board, Plot, line_handle
from harness.report.plots.titles import gap_title, loss_title
from harness.report.summary import lead_lines


def loss_curves(seeds: pd.DataFrame, samples: pd.DataFrame) -> pd.DataFrame:
    """Validation loss over tokens seen: the `eval_loss_nats` samples with the columns of their point."""
    if samples.empty:
        return pd.DataFrame()
    chosen = samples[(samples["metric"] == "eval_loss_nats") & samples["value"].notna()]
    wanted = ["point_key", "cell", "method", "selection", "family", "is_dense", "baseline", "seed", "k_pct"]
    # A point measured twice has curves of both runs; the newest one belongs to the rows that are shown.
    newest = chosen.drop_duplicates(["point_key"], keep="last")[["run_id", "point_key"]]
    chosen = chosen.merge(newest, on=["run_id", "point_key"])
    return chosen.merge(seeds[wanted], on="point_key")


def loss_over_tokens(summary: pd.DataFrame, curves: pd.DataFrame, caption: str, path: Path) -> Plot | None:
    """Validation loss while training; None unless some curve has three points."""
    note = "Lines: means over seeds." if summary["seeds"].max() > 1 else "One seed."
    y_name = "validation loss (nats/token)"
    return _curve_plot(summary, curves, caption, path, lambda _, shown: loss_title(shown), y_name, note)


def gap_over_tokens(summary: pd.DataFrame, curves: pd.DataFrame, caption: str, path: Path) -> Plot | None:
    """Validation loss minus that of the fastest dense method at the same token: the trend that counts."""
    if curves.empty or not (curves["baseline"] != "").any():
        return None
    dense = curves[curves["method"] == curves["baseline"]]
    place = ["cell", "seed", "x"]
    gaps = curves.merge(dense[[*place, "value"]], on=place, suffixes=("", "_dense"))
    gaps = gaps.assign(value=gaps["value"] - gaps["value_dense"])
    gaps = gaps[~gaps["is_dense"]]
    note = "Below the line at 0, the fastest dense method: better than dense at that point. "
    several = summary["seeds"].max() > 1
    note += "Thin: single seeds." if several else f"One seed: noise of {wording.SEED_NOISE} unseen."
    y_name = "validation loss minus dense (nats/token)"
    return _curve_plot(summary, gaps, caption, path, gap_title, y_name, note)


def _curve_plot(
    summary: pd.DataFrame,
    curves: pd.DataFrame,
    caption: str,
    path: Path,
    title: Callable[[pd.DataFrame, pd.DataFrame], str],
    y_name: str,
    note: str,
) -> Plot | None:
    if curves.empty or curves.groupby(["cell", "method", "selection"])["x"].nunique().max() < 3:
        return None
    shown = one_size_each(summary[summary["cell"].isin(set(curves["cell"]))])
    board, parts = board_of(shown)
    is_gap = "value_dense" in curves
    for axes, part in parts:
        for style, group in series_of(part):
            line = group.iloc[0]
            same = (curves["cell"] == line["cell"]) & (curves["method"] == line["method"])
            own = curves[same & (curves["selection"] == line["selection"])]
            if own.empty:
                continue
            for _, each in own.groupby("seed") if line["seeds"] > 1 else ():
                each = each.sort_values("x")
                axes.plot(each["x"], each["value"], color=style.color, linewidth=0.6, alpha=0.5)
            mean = own.groupby("x")["value"].mean()
            every = max(1, len(mean) // 6)
            axes.plot(mean.index, mean, clip_on=False, **style.marks(markersize=5, markevery=every))
            board.legend(line_handle(style), with_k(style, group))
        if is_gap:
            axes.axhline(0, color="black", linewidth=1.4)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: wording.tokens(max(value, 0))))
        axes.set_xlim(left=0)
    lead = lead_lines(shown)
    return board.save(path, title(lead, curves), caption, x="tokens seen in training", y=y_name, note=note)


_TRAIN, _EVAL = "train_loss_nats", "eval_loss_nats"


def draw_trial(samples: pd.DataFrame, title: str, caption: str, path: Path) -> Plot | None:
    """Training and validation loss over tokens seen, of one run, as a PNG at `path`.

    `samples` are the run's raw samples as `harness.store.frames.read_samples` gives them. None, and no file,
    if it has no training loss.
    """
    curves = {name: samples[samples["metric"] == name].dropna(subset=["value"]) for name in (_TRAIN, _EVAL)}
    if curves[_TRAIN].empty:
        return None
    board = Board([""], columns=1)
    axes = board.axes[0]
    (line,) = axes.plot(curves[_TRAIN]["x"], curves[_TRAIN]["value"], color="#8C8C8C", linewidth=1.0)
    board.legend(line, "training batches")
    evaluated: dict[str, Any] = {"color": "black", "marker": "o", "linewidth": 1.4, "clip_on": False}
    (marks,) = axes.plot(curves[_EVAL]["x"], curves[_EVAL]["value"], **evaluated)
    board.legend(marks, "held-out text")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: wording.tokens(max(value, 0))))
    axes.set_xlim(left=0)
    return board.save(path, title, caption, x="tokens seen in training", y="loss (nats/token)")
