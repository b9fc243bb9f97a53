"""The numbers behind report and plots: what compares with what, ratios, differences, means over seeds.

Points compare only inside one *cell*: same device, shape, batch, length, dtype, training budget and data.
Inside a cell and a seed a speed is divided by that of the fastest dense method; memory is compared with the
leanest dense method of equal or better speed; perplexity with that of the fastest dense method.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from harness.metrics import METRICS
from harness.store import MEASURED, wide
from moc.methods import METHODS

# What rivals of one comparison share, apart from the seed.
CELL: tuple[str, ...] = (
    *("device_name", "workload", "preset", "d_model", "d_ffn", "n_layers", "batch", "seq_len", "tokens"),
    *("train_tokens", "eval_tokens", "vocab_size", "lr", "data_id", "dtype", "timing_mode"),
)
# cuBLAS leaves its fast path where a width is not a multiple of this many elements.
ALIGNMENT = 8
DEFAULT_K = 0.1875
# From so many seeds on, their scatter gives a mean its interval.
SEEDS_FOR_INTERVAL = 3
# Which sparse series speaks for the sweep in sentences and titles, if several were measured.
_LEAD_METHODS = ("moc", "moc_fp8", "moc_reference")
# The order people meet them in: the paper's rule first, its local stand-in of the same budget next.
_FAMILIES = ("topk", "nm:12:64", "nm:2:8", "topk_abs", "threshold")
_WORKLOADS = ("pretrain", "generate", "ffn_train", "ffn_decode")
_NUMBERS = (
    *("d_model", "d_ffn", "n_layers", "batch", "seq_len", "tokens", "train_tokens", "vocab_size", "lr"),
    *("eval_tokens", "k", "k_frac", "seed"),
)
_WORDS = ("selection", "preset", "data_id", "dtype", "timing_mode", "detail")
_NUMERIC_COMPARISONS = (
    *("x_best_dense", "x_best_dense_ci_low", "x_best_dense_ci_high", "memory_change", "saved_change"),
    *("memory_change_fastest", "saved_change_fastest"),
    *("loss_gap", "loss_gap_ci_low", "loss_gap_ci_high", "perplexity_change"),
)
_RIVALS = ("baseline", "leanest", "saved_leanest")


def is_dense(method: str, selection: object) -> bool:
    """True for an exact dense FFN, which may be the baseline.

    A `package.module:factory` never is one: nothing here can know that it computes the dense function.
    """
    known = METHODS.get(method)
    return known is not None and known.is_dense and not isinstance(selection, str)


def family(selection: object) -> str:
    """The rule without its size, so that points of one curve over K share a name; n:m rules keep theirs."""
    if not isinstance(selection, str):
        return ""
    rule = selection.partition(":")[0]
    return selection if rule == "nm" else rule


def point_table(rows: pd.DataFrame, samples: pd.DataFrame | None = None) -> pd.DataFrame:
    """One line per point with plain float metrics, what is derived from its shape, and its comparisons.

    `rows` are the current rows of a sweep as `harness.store.read_rows` gives them. Every metric of
    `harness.metrics` and its interval has a column, NaN where not measured. Added besides: `cell` (an id),
    `family`, `k_pct`, `is_dense`, `misaligned`, `measured`, `speed` (tokens/s), `peak_bytes` with
    `peak_metric`, and per measured point `x_best_dense` (with interval) against `baseline`, `paired` if
    measured as such and else the quotient of two speeds, `unpaired` if that is so although the point has a
    paired ratio, to a dense method that a faster one has joined since; `memory_change` against `leanest` and
    `saved_change` against `saved_leanest` (fractions; the fastest dense stands in where `dense_as_fast` is
    false; `..._fastest` are against it always), `loss_gap` (nats) and `perplexity_change` (%).

    With the raw `samples` of the sweep (`harness.store.read_samples`) the interval of `loss_gap` is that of
    the differences window by window of the same validation text, and `gap_paired` is true; without them it
    takes the two losses as independent, which makes it several times wider.
    """
    keys = ["device_name", "point_key"]
    points = wide(rows).merge(
        rows[[*keys, "data_id", "eval_tokens"]].drop_duplicates(keys), on=keys, how="left"
    )
    metrics = [f"{metric}{end}" for metric in METRICS for end in ("", "_ci_low", "_ci_high")]
    words = ("device_name", "workload", "method", "status", "point_key", "started_at", *_WORDS)
    points = points.reindex(columns=[*words, *_NUMBERS, *metrics])
    said = points[list(words)].astype(object).where(points[list(words)].notna(), "")
    said["device_name"] = said["device_name"].replace("", "unknown device")
    # Training runs are not timed in a launch mode of one's choice, so there it is no condition.
    said["timing_mode"] = said["timing_mode"].where(said["workload"] != "pretrain", "")
    # One block of plain floats: nullable ones would give every comparison a third value.
    names = [*_NUMBERS, *metrics]
    numbers = points[names].apply(pd.to_numeric, errors="coerce").astype("Float64")
    values = numbers.to_numpy(dtype="float64", na_value=math.nan)
    points = said.join(pd.DataFrame(values, columns=names, index=points.index))
    return _with_comparisons(_with_derived(points, rows), _window_losses(rows, samples))


def _window_losses(rows: pd.DataFrame, samples: pd.DataFrame | None) -> dict[str, NDArray[np.float64]]:
    """Validation loss of every window by point, from the run whose rows are the current ones."""
    if samples is None or samples.empty:
        return {}
    chosen = samples[samples["metric"] == "eval_window_loss_nats"]
    current = set(zip(rows["run_id"], rows["point_key"], strict=True))
    return {
        str(key): group.sort_values("x")["value"].to_numpy(dtype=np.float64)
        for (run, key), group in chosen.groupby(["run_id", "point_key"])
        if (run, key) in current
    }


def cell_ids(lines: pd.DataFrame, names: Sequence[str]) -> pd.Series:
    """What is equal for lines that agree in all of these columns."""
    words = lines[list(names)].astype(object).map(lambda value: "" if pd.isna(value) else str(value))
    return pd.Series(map("|".join, words.to_numpy()), index=lines.index, dtype=object)


def _with_derived(points: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    throttled = rows.loc[rows["throttled"].astype("boolean").fillna(False).astype(bool), "point_key"]
    off = (points["d_model"] % ALIGNMENT != 0) | (points["d_ffn"] % ALIGNMENT != 0)
    allocated = points["peak_allocated_bytes"].notna()
    peak = points["peak_allocated_bytes"].fillna(points["peak_rss_over_start_bytes"])
    speed = points["tokens_per_s"].fillna(points["tokens"] / points["step_ms"] * 1e3)
    seen = points["train_tokens_seen"].fillna(points["train_tokens"])
    series = list(zip(points["method"], points["selection"], strict=True))
    peaks = [("peak_rss_over_start_bytes", "peak_allocated_bytes")[known] for known in allocated]
    derived = {
        "cell": cell_ids(points, CELL),
        "throttled": points["point_key"].isin(set(throttled)),
        "measured": points["status"].isin(MEASURED),
        "is_dense": [is_dense(method, selection or None) for method, selection in series],
        "family": [family(selection or None) for _, selection in series],
        "k_pct": 100 * points["k_frac"],
        "misaligned": off,
        "speed": speed.fillna(points["tokens"] / points["latency_us"] * 1e6),
        # A resident set that did not grow says that the pages were there before, not that none were needed.
        "peak_bytes": peak.where(peak > 0),
        "peak_metric": peaks,
        "tokens_per_parameter": seen / points["parameters"],
        "paired_over": _paired_over(points, rows),
    }
    return points.join(pd.DataFrame(derived, index=points.index))


def _paired_over(points: pd.DataFrame, rows: pd.DataFrame) -> list[str]:
    """The method a point's paired ratio was taken against, as its row says; empty if it has none."""
    ratios = rows[rows["metric"] == "speedup_vs_best_dense"]
    over = {
        (device, key): str(detail).removeprefix("over ")
        for device, key, detail in zip(
            ratios["device_name"], ratios["point_key"], ratios["detail"], strict=True
        )
    }
    return [over.get(where, "") for where in zip(points["device_name"], points["point_key"], strict=True)]


def best_dense(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The best dense method of every cell and seed by one metric of `harness.metrics.METRICS`.

    Returns the lines of `point_table(rows)` that won, at most one per cell and seed; cells without a
    measured dense method have none. Raises ValueError if the metric has no better direction.
    """
    higher = METRICS[metric].higher_is_better
    if higher is None:
        raise ValueError(f"metric {metric!r} has no better direction, so no method is best by it")
    points = point_table(rows)
    candidates = points[points["is_dense"] & points["measured"] & points[metric].notna()]
    ordered = candidates.sort_values(metric, ascending=not higher, kind="stable")
    return ordered.drop_duplicates(["cell", "seed"]).sort_index()


def _with_comparisons(points: pd.DataFrame, windows: dict[str, NDArray[np.float64]]) -> pd.DataFrame:
    records: list[dict[str, Any]] = [
        {str(k): v for k, v in line.items()} for line in points.to_dict("records")
    ]
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for point in records:
        if point["measured"]:
            groups.setdefault((point["cell"], point["seed"]), []).append(point)
    found: dict[int, dict[str, Any]] = {}
    for group in groups.values():
        dense = [point for point in group if point["is_dense"]]
        baseline = _fastest(group, dense)
        if baseline is not None:
            for point in group:
                found[id(point)] = _compare(point, baseline, dense or [baseline])
                found[id(point)].update(_paired_gap(point, baseline, windows))
    nothing = {**dict.fromkeys(_NUMERIC_COMPARISONS, math.nan), **dict.fromkeys(_RIVALS, "")}
    flags = dict.fromkeys(("dense_as_fast", "gap_paired", "paired", "unpaired"), False)
    lines = [{**nothing, **flags, **found.get(id(point), {})} for point in records]
    columns = [*_NUMERIC_COMPARISONS, *_RIVALS, *flags]
    return points.join(pd.DataFrame(lines, columns=columns, index=points.index))


def _fastest(group: list[dict[str, Any]], dense: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest dense point: the one the paired ratios were taken against, where they were taken.

    That one has a ratio of exactly 1 to itself. It may be a dense network from outside the registry. If a
    dense method was added later, each run has such a point, and the fastest of them counts.
    """
    references = [point for point in group if point["speedup_vs_best_dense"] == 1.0]
    timed = [point for point in references or dense if point["speed"] == point["speed"]]
    if len(references) == 1:
        return references[0]
    return max(timed, key=lambda point: point["speed"]) if timed else dense[0] if dense else None


def _compare(point: dict[str, Any], baseline: dict[str, Any], dense: list[dict[str, Any]]) -> dict[str, Any]:
    measured = point["speedup_vs_best_dense"] == point["speedup_vs_best_dense"]
    paired = measured and point["paired_over"] in ("", baseline["method"])
    found: dict[str, Any] = {"baseline": baseline["method"], "paired": paired}
    found["unpaired"] = measured and not paired  # the ratio it has is to a baseline of an earlier run
    if paired:
        ratio, low, high = (point[f"speedup_vs_best_dense{end}"] for end in ("", "_ci_low", "_ci_high"))
    else:
        ratio = point["speed"] / baseline["speed"]
        low, high = _ratio_interval(_speed_factors(point), _speed_factors(baseline), ratio)
        if point is baseline:
            low = high = math.nan  # a method against itself has no interval
    found.update(x_best_dense=ratio, x_best_dense_ci_low=low, x_best_dense_ci_high=high)

    as_fast = [rival for rival in dense if rival["speed"] >= point["speed"]]
    found["dense_as_fast"] = bool(as_fast)
    for metric, change, who in (
        ("peak_bytes", "memory_change", "leanest"),
        ("saved_activation_bytes_per_token", "saved_change", "saved_leanest"),
    ):
        rivals = [rival for rival in as_fast or [baseline] if rival[metric] > 0]
        if rivals:
            leanest = min(rivals, key=lambda rival: rival[metric])
            found[change] = point[metric] / leanest[metric] - 1
            found[who] = leanest["method"]
        if baseline[metric] > 0:
            found[f"{change}_fastest"] = point[metric] / baseline[metric] - 1

    gap = point["eval_loss_nats"] - baseline["eval_loss_nats"]
    half = math.hypot(_half(point, "eval_loss_nats"), _half(baseline, "eval_loss_nats"))
    found.update(loss_gap=gap, loss_gap_ci_low=gap - half, loss_gap_ci_high=gap + half)
    found["perplexity_change"] = 100 * (point["perplexity"] / baseline["perplexity"] - 1)
    return found


def _paired_gap(
    point: dict[str, Any], baseline: dict[str, Any], windows: dict[str, NDArray[np.float64]]
) -> dict[str, Any]:
    """The t interval of the mean difference over windows both runs were evaluated on; empty if unknown."""
    own, other = windows.get(point["point_key"]), windows.get(baseline["point_key"])
    if point is baseline or own is None or other is None or own.shape != other.shape or own.size < 2:
        return {}
    difference = own - other
    half = float(
        stats.t.ppf(0.975, difference.size - 1) * difference.std(ddof=1) / math.sqrt(difference.size)
    )
    gap = point["eval_loss_nats"] - baseline["eval_loss_nats"]
    return {"loss_gap_ci_low": gap - half, "loss_gap_ci_high": gap + half, "gap_paired": True}


def _half(point: dict[str, Any], metric: str) -> float:
    return float(point[f"{metric}_ci_high"] - point[f"{metric}_ci_low"]) / 2


def _speed_factors(point: dict[str, Any]) -> tuple[float, float]:
    """Logarithms of speed over the low end of its interval, and of the high end over speed."""
    for metric in ("tokens_per_s", "step_ms", "latency_us"):
        value, low, high = (point[f"{metric}{end}"] for end in ("", "_ci_low", "_ci_high"))
        if value == value:
            if not low > 0:
                return math.nan, math.nan
            down, up = math.log(value / low), math.log(high / value)
            return (down, up) if metric == "tokens_per_s" else (up, down)  # longer is slower
    return math.nan, math.nan


def _ratio_interval(
    over: tuple[float, float], under: tuple[float, float], ratio: float
) -> tuple[float, float]:
    """Interval of a quotient of two independent speeds: their errors add in squares, as factors."""
    return ratio * math.exp(-math.hypot(over[0], under[1])), ratio * math.exp(math.hypot(over[1], under[0]))


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
        _work=[_rank(name, _WORKLOADS) for name in table["workload"]],
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


def spread(values: Sequence[float] | pd.Series) -> tuple[float, float] | None:
    """Smallest and largest finite value, or None if there is none."""
    finite = [float(value) for value in values if value == value]
    return (min(finite), max(finite)) if finite else None
