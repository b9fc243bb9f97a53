"""Points summarised over seeds: means, intervals, the headline table and failures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from pandas.core.groupby import DataFrameGroupBy
from scipy import stats

from harness.report.points import COMPARISONS
from harness.sweep.catalog import WORKLOADS
from harness.sweep.metrics import METRICS
from moc.methods import METHODS

DEFAULT_K = 0.1875
# From so many seeds on, their scatter gives a mean its interval.
SEEDS_FOR_INTERVAL = 3
# Which sparse series titles and sentences are about, if several were measured.
_LEAD_METHODS = ("moc", "moc_fp8", "moc_reference")
# The order people meet them in: the paper's rule first, its local stand-in of the same budget next.
_FAMILIES = ("topk", "nm:12:64", "nm:2:8", "topk_abs", "threshold")
# What is averaged over the seeds of a cell, method and selection.
_AVERAGED = (*METRICS, "speed", "peak_bytes", *COMPARISONS, "tokens_per_parameter")
# Columns of the headline by the column of the summary they come from, where the two names differ.
_HEADLINE_NAMES = {
    "speed": "tokens_per_s",
    "peak_bytes": "peak_memory_bytes",
    "saved_activation_bytes_per_token": "saved_bytes_per_token",
}


def summarise(points: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of the measured points: one line per cell, method and selection.

    The interval of a mean is the t interval over seeds where there are three or more; with fewer it is the
    mean of the measured intervals, which does not include seed noise. `seeds` says how many there are.
    """
    measured = points[points["measured"]]
    measured = measured.assign(unstable=measured["status"] == "unstable")
    groups = measured.groupby(["cell", "method", "selection"], sort=False)
    first = groups.head(1).reset_index(drop=True)
    means = groups[list(_AVERAGED)].mean().reset_index(drop=True)
    over_seeds = groups[["unstable", "throttled"]].any().reset_index(drop=True)
    over_seeds.insert(0, "seeds", groups["seed"].nunique().to_numpy())
    columns = {**means, **_intervals(groups), **over_seeds}
    kept = first.drop(columns=[name for name in columns if name in first])
    return in_order(kept.join(pd.DataFrame(columns, index=kept.index)))


def _intervals(groups: DataFrameGroupBy) -> dict[str, pd.Series]:
    """Both ends of the 95 % interval of every mean, by column name; NaN where nothing is known."""
    averaged = groups[list(_AVERAGED)]
    count, mean, deviation = (
        table.reset_index(drop=True) for table in (averaged.count(), averaged.mean(), averaged.std(ddof=1))
    )
    ends = [f"{name}_ci_{end}" for name in _AVERAGED for end in ("low", "high")]
    ends = [name for name in ends if name in groups.obj.columns]
    measured = groups[ends].mean().reset_index(drop=True)
    found = {}
    for name in _AVERAGED:
        half = stats.t.ppf(0.975, count[name].clip(lower=2) - 1) * deviation[name] / np.sqrt(count[name])
        for end, sign in (("low", -1), ("high", 1)):
            column = f"{name}_ci_{end}"
            few = measured.get(column, math.nan)
            found[column] = (mean[name] + sign * half).where(count[name] >= SEEDS_FOR_INTERVAL, few)
    return found


def gaps_hold_zero(lines: pd.DataFrame) -> bool:
    """Whether the interval of every loss gap is known and holds zero: no difference from dense shows."""
    return bool(((lines["loss_gap_ci_low"] <= 0) & (lines["loss_gap_ci_high"] >= 0)).all())


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """Sorted as people read it: small models first, short sequences first, dense before sparse, then K."""
    if table.empty:
        return table
    keys = table.assign(
        _work=[_rank(name, tuple(WORKLOADS)) for name in table["workload"]],
        _size=table["n_layers"] * table["d_model"] * table["d_ffn"],
        _sparse=~table["is_dense"].astype(bool),
        _known=[_rank(name, tuple(METHODS)) for name in table["method"]],
        _rule=[_rank(name, _FAMILIES) for name in table["family"]],
    )
    cell = ["device_name", "_work", "workload", "_size", "preset", "tokens", "seq_len", "dtype", "cell"]
    series = ["_sparse", "_known", "method", "_rule", "family", "k_frac", "selection"]
    index = keys.sort_values([*cell, *series], kind="stable").index
    return table.loc[index].reset_index(drop=True)


def _rank(name: str, order: Sequence[str]) -> int:
    return order.index(name) if name in order else len(order)


def lead_series(summary: pd.DataFrame) -> tuple[str, str] | None:
    """Method and family of the series that titles and sentences are about: MoC first, then global top-k."""
    sparse = summary[~summary["is_dense"] & ~summary["misaligned"] & (summary["family"] != "")]
    if sparse.empty:
        return None

    def rank(series: tuple[str, str]) -> tuple[int, bool, int, str]:
        method, rule = series
        by_method = _rank(method, _LEAD_METHODS)
        return by_method, method == "act_prune", _rank(rule, _FAMILIES), f"{method} {rule}"

    return min(set(zip(sparse["method"], sparse["family"], strict=True)), key=rank)


def lead_lines(summary: pd.DataFrame) -> pd.DataFrame:
    """The lines of the lead series nearest to the default K: one selection, at most once per aligned cell."""
    series = lead_series(summary)
    if series is None:
        return summary.iloc[:0]
    own = (summary["method"] == series[0]) & (summary["family"] == series[1])
    lines = summary[own & ~summary["misaligned"]]
    return lines[lines["selection"] == nearest_to_default(lines)]


def nearest_to_default(lines: pd.DataFrame) -> str:
    """The selection among `lines` that most cells have, nearest to K = 18.75 % if several do."""
    ranked = lines.groupby("selection").agg(cells=("cell", "nunique"), k=("k_frac", "mean"))
    ranked["off"] = (ranked["k"] - DEFAULT_K).abs()
    return str(ranked.sort_values(["cells", "off"], ascending=[False, True], kind="stable").index[0])


def headline_table(summary: pd.DataFrame) -> pd.DataFrame:
    """What a reader should see first: one line per cell, method and selection, means over seeds.

    `summary` is as `summarise` gives it. Whole-model training where the sweep has it, else the other
    workloads. Failed points and misaligned shapes are never in it. `saved_bytes_per_token` comes from
    `ffn_train` of the same shape if the whole model did not measure it. Numbers are plain: tokens/s, bytes,
    %, nats; NaN where not measured.
    """
    if summary.empty:
        return summary
    table = summary.drop(columns=list(_HEADLINE_NAMES.values()), errors="ignore")
    table = table.assign(saved_activation_bytes_per_token=_saved_from_ffn(summary))
    table = table[~table["misaligned"]].rename(columns=_HEADLINE_NAMES)
    whole = table[table["workload"] == "pretrain"]
    return (table if whole.empty else whole).reset_index(drop=True)


def _saved_from_ffn(summary: pd.DataFrame) -> pd.Series:
    name = "saved_activation_bytes_per_token"
    keys = ["device_name", "d_model", "d_ffn", "dtype", "method", "selection"]
    known = summary[summary["workload"] == "ffn_train"].dropna(subset=[name]).drop_duplicates(keys)
    lookup = known.set_index(keys)[name].to_dict()
    found = [lookup.get(tuple(key), math.nan) for key in summary[keys].itertuples(index=False)]
    return summary[name].fillna(pd.Series(found, index=summary.index, dtype="float64"))


def failures(points: pd.DataFrame) -> pd.DataFrame:
    """The points without a usable measurement, with status and reason."""
    return in_order(points[~points["measured"]])
