"""The numbers behind report and plots: what compares with what, ratios, differences, means over seeds.

Points compare only inside one *cell*: same device, shape, batch, length, dtype, training budget and data.
Inside a cell and a seed a speed is divided by that of the fastest dense method; memory is compared with the
leanest dense method of equal or better speed; perplexity with that of the fastest dense method.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from harness.store.frames import wide
from harness.store.rows import MEASURED
from harness.sweep.catalog import ALIGNMENT, FIELDS
from harness.sweep.metrics import METRICS
from moc.methods import METHODS

# What the methods of one comparison share, apart from the seed.
CELL: tuple[str, ...] = ("device_name", *(field.name for field in FIELDS if field.in_cell))
_NUMBERS = tuple(field.name for field in FIELDS if field.type is not str)
_WORDS = (*(field.name for field in FIELDS if field.type is str), "detail")
_CHANGES = ("memory_change", "saved_change", "memory_change_fastest", "saved_change_fastest")
COMPARISONS = ("x_best_dense", *_CHANGES, "loss_gap", "perplexity_change")
_INTERVALS = tuple(f"{name}_ci_{end}" for name in ("x_best_dense", "loss_gap") for end in ("low", "high"))
_METHODS_COMPARED = ("baseline", "leanest", "saved_leanest")


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
    """One line per point: what it is, its metrics as plain floats, and how it compares with dense methods.

    `rows` are the current rows of a sweep as `harness.store.frames.read_rows` gives them, `samples` its raw
    samples. Every metric of `harness.sweep.metrics` and both ends of its interval have a column, NaN where
    not measured. Besides the columns that say what the point is, these are added:

    =====================  ====================================================================
    cell                   id that points share if they can be compared
    family                 rule without its size (`family`)
    k_pct                  K in percent of d_ffn
    is_dense               exact dense FFN, which may be the baseline
    misaligned             a width is not a multiple of 8
    measured               the point has a usable measurement
    speed                  tokens/s
    peak_bytes             peak memory; `peak_metric` is the metric it comes from
    baseline               fastest dense method of the cell and seed
    x_best_dense           speed over that of `baseline`, with its interval
    paired                 that ratio was measured with both methods in one process
    unpaired               the point has a paired ratio, but to a method that is not `baseline`
    leanest                dense method with the least peak memory of those at least as fast
    memory_change          peak memory over that of `leanest`, minus one
    saved_leanest          the same method for saved bytes
    saved_change           saved bytes over those of `saved_leanest`, minus one
    dense_as_fast          some dense method is as fast; else `baseline` is `leanest`
    memory_change_fastest  peak memory over that of `baseline`, minus one
    saved_change_fastest   saved bytes over those of `baseline`, minus one
    loss_gap               validation loss minus that of `baseline` (nats), with its interval
    gap_paired             that interval is paired over the windows of the validation text
    perplexity_change      perplexity against that of `baseline` (%)
    =====================  ====================================================================

    The interval of `loss_gap` needs `samples` to be paired; without them the two losses count as
    independent, which makes it several times wider.
    """
    points = wide(rows)
    metrics = [f"{metric}{end}" for metric in METRICS for end in ("", "_ci_low", "_ci_high")]
    words = ("device_name", "status", "point_key", "started_at", *_WORDS)
    points = points.reindex(columns=[*words, *_NUMBERS, *metrics])
    texts = points[list(words)].astype(object).where(points[list(words)].notna(), "")
    texts["device_name"] = texts["device_name"].replace("", "unknown device")
    # Training runs are not timed in a launch mode of one's choice, so there it is no condition.
    texts["timing_mode"] = texts["timing_mode"].where(texts["workload"] != "pretrain", "")
    # One block of plain floats: nullable ones would give every comparison a third value.
    names = [*_NUMBERS, *metrics]
    numbers = points[names].apply(pd.to_numeric, errors="coerce").astype("Float64")
    values = numbers.to_numpy(dtype="float64", na_value=math.nan)
    points = texts.join(pd.DataFrame(values, columns=names, index=points.index))
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
    details = ratios.set_index(["device_name", "point_key"])["detail"].astype(str)
    over = details.str.removeprefix("over ").to_dict()
    return [over.get(where, "") for where in zip(points["device_name"], points["point_key"], strict=True)]


def _with_comparisons(points: pd.DataFrame, windows: dict[str, NDArray[np.float64]]) -> pd.DataFrame:
    records = cast(list[dict[str, Any]], points.to_dict("records"))
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
    nothing = {**dict.fromkeys((*COMPARISONS, *_INTERVALS), math.nan), **dict.fromkeys(_METHODS_COMPARED, "")}
    nothing |= dict.fromkeys(("dense_as_fast", "gap_paired", "paired", "unpaired"), False)
    lines = [{**nothing, **found.get(id(point), {})} for point in records]
    return points.join(pd.DataFrame(lines, columns=list(nothing), index=points.index))


def _fastest(group: list[dict[str, Any]], dense: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest dense point: the one the paired ratios were taken against, where they were taken.

    That one has a ratio of exactly 1 to itself. It may be a dense network from outside the registry. If a
    dense method was added later, each run has such a point, and the fastest of them counts.
    """
    references = [point for point in group if point["speedup_vs_best_dense"] == 1.0]
    timed = [point for point in references or dense if not math.isnan(point["speed"])]
    if len(references) == 1:
        return references[0]
    return max(timed, key=lambda point: point["speed"]) if timed else dense[0] if dense else None


def _compare(point: dict[str, Any], baseline: dict[str, Any], dense: list[dict[str, Any]]) -> dict[str, Any]:
    measured = not math.isnan(point["speedup_vs_best_dense"])
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

    as_fast = [other for other in dense if other["speed"] >= point["speed"]]
    found["dense_as_fast"] = bool(as_fast)
    for metric, change, who in (
        ("peak_bytes", "memory_change", "leanest"),
        ("saved_activation_bytes_per_token", "saved_change", "saved_leanest"),
    ):
        known = [other for other in as_fast or [baseline] if other[metric] > 0]
        if known:
            leanest = min(known, key=lambda other: other[metric])
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
    error = difference.std(ddof=1) / math.sqrt(difference.size)
    half = float(stats.t.ppf(0.975, difference.size - 1) * error)
    gap = point["eval_loss_nats"] - baseline["eval_loss_nats"]
    return {"loss_gap_ci_low": gap - half, "loss_gap_ci_high": gap + half, "gap_paired": True}


def _half(point: dict[str, Any], metric: str) -> float:
    return float(point[f"{metric}_ci_high"] - point[f"{metric}_ci_low"]) / 2


def _speed_factors(point: dict[str, Any]) -> tuple[float, float]:
    """Logarithms of speed over the low end of its interval, and of the high end over speed."""
    for metric in ("tokens_per_s", "step_ms", "latency_us"):
        value, low, high = (point[f"{metric}{end}"] for end in ("", "_ci_low", "_ci_high"))
        if not math.isnan(value):
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
