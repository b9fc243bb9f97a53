"""The self-test of memory numbers: does the whole model save what its layers say they do not keep?

peak(method) = peak(dense) - (dense bytes - method bytes per token and layer) * tokens * layers. Both peaks
and both counts of saved bytes are measured, so the error says how well they agree. The formula does not
include memory that is transient at the peak.
"""

from __future__ import annotations

import pandas as pd

from harness.measure.memory import formula_error, predicted_peak


def memory_formula(points: pd.DataFrame) -> pd.DataFrame:
    """One line per setting, sparse rule and dense baseline of `pretrain` with both numbers known.

    `points` is `harness.report.points.point_table` of a sweep. Columns: preset, seq_len, method, selection,
    against, measured_bytes and predicted_bytes, means over the seeds, and error (predicted over measured,
    minus one), the one farthest from zero. Only allocator peaks count: a resident set holds more than
    tensors.
    """
    known = points[
        (points["workload"] == "pretrain")
        & points["measured"]
        & points["peak_allocated_bytes"].notna()
        & points["saved_activation_bytes_per_token"].notna()
    ]
    lines = []
    for _, group in known.groupby(["cell", "seed"], sort=False):
        dense = group[group["is_dense"]]
        for _, point in group[~group["is_dense"]].iterrows():
            baselines = dense[dense["method"] == point["baseline"]]
            if baselines.empty:
                continue
            base = baselines.iloc[0]
            predicted = predicted_peak(
                float(base["peak_allocated_bytes"]),
                float(base["saved_activation_bytes_per_token"]),
                float(point["saved_activation_bytes_per_token"]),
                int(point["tokens"]),
                int(point["n_layers"]),
            )
            measured = float(point["peak_allocated_bytes"])
            lines.append(
                {
                    **{name: point[name] for name in ("cell", "preset", "seq_len", "method", "selection")},
                    "against": base["method"],
                    "measured_bytes": measured,
                    "predicted_bytes": predicted,
                    "error": formula_error(predicted, measured),
                }
            )
    names = ["cell", "preset", "seq_len", "method", "selection", "against"]
    columns = [*names, "measured_bytes", "predicted_bytes", "error"]
    of_seeds = pd.DataFrame(lines, columns=columns).groupby(names, sort=False, dropna=False)
    found = of_seeds.agg(
        measured_bytes=("measured_bytes", "mean"),
        predicted_bytes=("predicted_bytes", "mean"),
        error=("error", lambda errors: max(errors, key=abs)),
    )
    return found.reset_index().drop(columns="cell")
