"""Rows as a trial would write them, for tests of what is downstream."""

from typing import Any

from harness.sweep.catalog import WORKLOADS
from harness.sweep.model import Measure
from harness.sweep.point import Point
from harness.workloads.job import Job
from harness.workloads.reporter import make_row


def train_point(method: str = "dense", selection: str | None = None, **changes: Any) -> Point:
    """A small ffn_train point."""
    values = {"preset": "1m", "d_model": 128, "d_ffn": 384, "n_layers": 1, "batch": 2, "seq_len": 64}
    return Point("ffn_train", method, selection, **{**values, "dtype": "fp32", "seed": 0, **changes})


def rows_of(
    point: Point, values: dict[str, float], status: str = "ok", run_id: str = "r1", device: str = "D"
) -> list[dict[str, Any]]:
    """One finished point's rows: a row per metric, or the single row of a failure."""
    job = Job("t", run_id, 1, (point,), Measure(), "cpu", "work")
    primary = WORKLOADS[point.workload].primary_metric
    if status not in ("ok", "unstable"):
        return [make_row(job, point, primary, status, "because", device_name=device, env_id="e")]
    rows = [
        make_row(
            job, point, metric, status if metric == primary else "ok", "", device_name=device, env_id="e"
        )
        for metric in values
    ]
    return [{**row, "value": values[row["metric"]], "n_samples": 3} for row in rows]
