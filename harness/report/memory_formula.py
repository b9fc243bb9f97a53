"""The self-test of memory numbers: does the whole model save what its layers say they do not keep?

peak(method) = peak(dense) - (dense bytes - method bytes per token and layer) * tokens * layers. Both peaks
and both counts of saved bytes are measured, so the error says how well they agree. The formula does not
include memory that is transient at the peak.
"""

from __future__ import annotations

import pandas as pd


def memory_formula(points: pd.DataFrame) -> pd.DataFrame:
    """One line per setting, sparse rule and dense baseline of `pretrain` with both numbers known.

    `points` is `harness.report.points.point_table` of a sweep. Columns: preset, seq_len, method, selection,
    against, measured_bytes and predicted_bytes, means over the seeds, and error (predicted over measured,
    minus one), the one farthest from zero. Only allocator peaks count: a resident set holds more than
    tensors.
    """
    peak, saved = "peak_allocated_bytes", "saved_activation_bytes_per_token"
    names = ["cell", "preset", "seq_len", "method", "selection", "against"]
    known = points[(points["workload"] == "pretrain") & points["measured"]].dropna(subset=[peak, saved])
    known = known.assign(against=known["baseline"])
    known = known[[*names, "seed", "is_dense", "tokens", "n_layers", peak, saved]]
    known = known.iloc[known.groupby(["cell", "seed"], sort=False).ngroup().argsort(kind="stable")]
    dense = known["is_dense"].astype(bool)
    pairs = known[~dense].merge(
        known[dense],
        left_on=["cell", "seed", "against"],
        right_on=["cell", "seed", "method"],
        suffixes=("", "_dense"),
    )
    less = (pairs[f"{saved}_dense"] - pairs[saved]) * pairs["tokens"] * pairs["n_layers"]
    pairs["measured_bytes"] = pairs[peak]
    pairs["predicted_bytes"] = pairs[f"{peak}_dense"] - less
    pairs["error"] = pairs["predicted_bytes"] / pairs["measured_bytes"] - 1
    of_seeds = pairs.groupby(names, sort=False, dropna=False)
    found = of_seeds.agg(
        measured_bytes=("measured_bytes", "mean"),
        predicted_bytes=("predicted_bytes", "mean"),
        error=("error", lambda errors: max(errors, key=abs)),
    )
    return found.reset_index().drop(columns="cell")
