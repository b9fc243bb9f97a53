"""Up to which batch a sparse method still beats the fastest dense one when decoding.

A dense step reads the same weights for one token and for sixteen, while the tokens of a batch choose
different channels, so what a sparse method saves shrinks as the batch grows, to nothing at the crossover.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pandas as pd

from harness.report import wording
from harness.sweep.catalog import workloads_where

SHAPE = ("workload", "preset", "d_model", "d_ffn", "n_layers", "seq_len", "dtype")  # of what is decoded
_SERIES = ("device_name", *SHAPE, "method", "selection")  # its lines differ in the batch alone


def crossovers(lines: pd.DataFrame) -> pd.DataFrame:
    """One line per device, shape, sparse method and selection that was decoded at several batches.

    `lines` are as `decoded` gives them. Columns beside those that name the line: `smallest` and `largest`
    batch measured, `x_smallest` and `x_largest` (speed against the fastest dense method there), `wins_to`
    (the largest batch up to which it wins at every measured one, NaN if it loses at the smallest) and
    `crossing` (the batch, between measured ones, at which the ratio first falls to 1.0, NaN if it does not).
    It wins at a batch where its ratio is above one with its whole interval.
    """
    found = [_line(series.sort_values("batch")) for _, series in lines.groupby(list(_SERIES), sort=False)]
    names = [*_SERIES, "family", "k_frac", "smallest", "largest", "x_smallest", "x_largest"]
    return pd.DataFrame([line for line in found if line], columns=[*names, "wins_to", "crossing"])


def decoded(summary: pd.DataFrame) -> pd.DataFrame:
    """The lines of a summary that compare the decoding speed of a sparse method with dense."""
    decodes = summary["workload"].isin(workloads_where(decodes=True))
    sparse = (summary["family"] != "") & ~summary["is_dense"]
    return summary[decodes & sparse & summary["x_best_dense"].notna() & ~summary["misaligned"]]


def _line(series: pd.DataFrame) -> dict[str, Any]:
    series = series.drop_duplicates("batch")
    if len(series) < 2:
        return {}
    batches, ratios = series["batch"].tolist(), series["x_best_dense"].tolist()
    low = series["x_best_dense_ci_low"].tolist()  # too few samples for an interval are no win
    lost = next((at for at, bound in enumerate(low) if not bound > 1.0), len(batches))
    first = series.iloc[0]
    return {
        **{name: first[name] for name in (*_SERIES, "family", "k_frac")},
        "smallest": batches[0],
        "largest": batches[-1],
        "x_smallest": ratios[0],
        "x_largest": ratios[-1],
        "wins_to": batches[lost - 1] if lost else math.nan,
        "crossing": _crossing(batches, ratios),
    }


def _crossing(batches: list[float], ratios: list[float]) -> float:
    """Batch at which the ratio first falls to 1.0, between two measured ones on a line in logarithms of
    both; NaN if it never does."""
    for (batch, ratio), (after, lower) in pairwise(zip(batches, ratios, strict=True)):
        if ratio > 1.0 >= lower:
            share = math.log(ratio) / (math.log(ratio) - math.log(lower))
            return float(batch * (after / batch) ** share)
    return math.nan


def independent_union(k_frac: float, batch: float) -> float:
    """Share of the channels that some token of a batch keeps if each token chose its own at random."""
    return float(1.0 - (1.0 - k_frac) ** batch)


def crossover_table(found: pd.DataFrame) -> pd.DataFrame:
    """The lines of `crossovers` for people; columns that are the same everywhere are left out."""
    lines = [
        {
            "device": line["device_name"],
            "workload": line["workload"],
            "model": wording.cell_label(line, shape=True),
            "seq_len": f"{line['seq_len']:.0f}" if line["workload"] == "generate" else wording.DASH,
            "dtype": line["dtype"],
            "method": line["method"],
            "selection": line["selection"],
            "wins up to batch": _wins(line),
            "crossing 1.0 at": wording.number(line["crossing"], 2),
            "x at smallest batch": f"{wording.ratio(line['x_smallest'])} ({line['smallest']:.0f})",
            "x at largest batch": f"{wording.ratio(line['x_largest'])} ({line['largest']:.0f})",
        }
        for _, line in found.iterrows()
    ]
    table = pd.DataFrame(lines)
    same = [name for name in ("device", "dtype") if len(table) and table[name].nunique() == 1]
    return table.drop(columns=same)


def _wins(line: pd.Series) -> str:
    if math.isnan(line["wins_to"]):
        return "none"
    return f"{line['wins_to']:.0f}{' (all measured)' if line['wins_to'] == line['largest'] else ''}"
