"""Points summarised over seeds: means, intervals, the headline table and failures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from scipy import stats

from harness.report.points import point_table
from harness.sweep.catalog import WORKLOADS
from harness.sweep.metrics import METRICS
from moc.methods import METHODS

DEFAULT_K = 0.1875


# From so many seeds on, their scatter gives a mean its interval.
SEEDS_FOR_INTERVAL = 3


# Which sparse series speaks for the sweep in sentences and titles, if several were measured.
_LEAD_METHODS = ("moc", "moc_fp8", "moc_reference")


# The order people meet them in: the paper's rule first, its local stand-in of the same budget next.
_FAMILIES = ("topk", "nm:12:64", "nm:2:8", "topk_abs", "threshold")


def summarise(points: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of the measured points: one line per cell, method and selection.

    The interval of a mean is the t interval over seeds where there are three or more; with fewer it is the
    mean of the measured intervals, which knows nothing of seed noise. `seeds` says how many.
    """
    measured = points[points["measured"]]
    numeric = [
        *(name for name in METRICS),
        *("speed", "peak_bytes", "x_best_dense", "memory_change", "saved_change", "loss_gap"),
        *("memory_change_fastest", "saved_change_fastest", "perplexity_change", "tokens_per_parameter"),
    ]
    lines = []
    for _, group in measured.groupby(["cell", "method", "selection"], sort=False):
        line = group.iloc[0].to_dict()
        line["seeds"] = group["seed"].nunique()
        line["unstable"] = bool((group["status"] == "unstable").any())
        line["throttled"] = bool(group["throttled"].any())
        for name in numeric:
            bounds = (f"{name}_ci_low", f"{name}_ci_high")
            line[name] = group[name].mean()
            line[bounds[0]], line[bounds[1]] = mean_interval(group, name)
        lines.append(line)
    columns = [*points.columns, "seeds", "unstable"]
    table = pd.DataFrame(lines) if lines else pd.DataFrame(columns=columns)
    return in_order(table)


def mean_interval(group: pd.DataFrame, name: str) -> tuple[float, float]:
    """95 % interval of the mean of a column over the seeds in `group`; NaN where nothing is known."""
    values = group[name].dropna()
    low, high = f"{name}_ci_low", f"{name}_ci_high"
    if len(values) >= SEEDS_FOR_INTERVAL:
        half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
        return float(values.mean() - half), float(values.mean() + half)
    if low in group and high in group:
        return float(group[low].mean()), float(group[high].mean())
    return math.nan, math.nan


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
    order = [
        *("device_name", "_work", "workload", "_size", "preset", "tokens", "seq_len", "dtype", "cell"),
        *("_sparse", "_known", "method", "_rule", "family", "k_frac", "selection"),
    ]
    index = keys.sort_values(order, kind="stable").index
    return table.loc[index].reset_index(drop=True)


def _rank(name: str, order: Sequence[str]) -> int:
    return order.index(name) if name in order else len(order)


def lead_series(summary: pd.DataFrame) -> tuple[str, str] | None:
    """Method and family that speak for the sweep: MoC before rivals, global top-k before local rules."""
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
    lines = summary[
        (summary["method"] == series[0]) & (summary["family"] == series[1]) & ~summary["misaligned"]
    ]
    selection = nearest_to_default(lines)
    return lines[lines["selection"] == selection]


def nearest_to_default(lines: pd.DataFrame) -> str:
    """The selection among `lines` that most cells have, nearest to K = 18.75 % if several do."""
    ranked = lines.groupby("selection").agg(cells=("cell", "nunique"), k=("k_frac", "mean"))
    ranked["off"] = (ranked["k"] - DEFAULT_K).abs()
    return str(ranked.sort_values(["cells", "off"], ascending=[False, True], kind="stable").index[0])


def headline_table(rows: pd.DataFrame) -> pd.DataFrame:
    """What a reader should see first: one line per cell, method and selection, means over seeds.

    Whole-model training where the sweep has it, else the FFN workloads. Failed points and misaligned
    shapes are never in it. `saved_bytes_per_token` comes from `ffn_train` of the same shape if the whole
    model did not measure it. Numbers are plain: tokens/s, bytes, %, nats; NaN where not measured.
    """
    summary = summarise(point_table(rows))
    columns = {
        "device_name": "device_name", "workload": "workload", "preset": "preset", "d_model": "d_model",
        "d_ffn": "d_ffn", "batch": "batch", "seq_len": "seq_len", "tokens": "tokens", "dtype": "dtype",
        "train_tokens": "train_tokens", "vocab_size": "vocab_size", "lr": "lr", "data_id": "data_id",
        "timing_mode": "timing_mode", "method": "method", "selection": "selection", "k_pct": "k_pct",
        "seeds": "seeds", "tokens_per_s": "speed", "x_best_dense": "x_best_dense", "paired": "paired",
        "unpaired": "unpaired",
        "peak_memory_bytes": "peak_bytes", "peak_metric": "peak_metric",
        "saved_bytes_per_token": "saved_activation_bytes_per_token", "perplexity": "perplexity",
        "bits_per_byte": "bits_per_byte", "untrained_perplexity": "untrained_perplexity",
        "misaligned": "misaligned", "unstable": "unstable", "throttled": "throttled",
    }  # fmt: skip
    if summary.empty:
        return pd.DataFrame(columns=list(columns))
    summary["saved_activation_bytes_per_token"] = _saved_from_ffn(summary)
    aligned = summary[~summary["misaligned"]]
    whole = aligned[aligned["workload"] == "pretrain"]
    chosen = whole if not whole.empty else aligned
    table = chosen[list(columns.values())].set_axis(list(columns), axis=1)
    return table.reset_index(drop=True)


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
