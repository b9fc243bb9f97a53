"""A trial process for tests of whole searches: it makes its measurements up, at once and without PyTorch.

Steps take longer and keep more with a larger K; a batch of 16 of a sparse method does not fit in memory.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from harness.run.trial import output_path
from harness.sweep.point import Point
from harness.workloads import events
from harness.workloads.job import Job
from harness.workloads.reporter import make_row


def rows_of(job: Job, point: Point) -> tuple[str, list[dict[str, Any]]]:
    """Status and rows of a point."""
    k_frac = float(point.selection.partition(":")[2]) if point.selection else 1.0
    k = round(k_frac * point.d_ffn)
    # As a dense point first: the columns of a sparse one would import all of PyTorch.
    plain = dataclasses.replace(point, method="dense", selection=None)
    own = {"method": point.method, "selection": point.selection, "point_key": point.key}
    own |= {"k": k, "k_frac": k / point.d_ffn}

    def row(metric: str, value: float | None, status: str = "ok", detail: str = "") -> dict[str, Any]:
        columns = {"device_name": NAME, "env_id": "e", "value": value, "n_samples": 1}
        return {**make_row(job, plain, metric, status, detail, **columns), **own}

    if point.batch == 16 and point.selection:
        return "oom", [row("step_ms", None, "oom", "made up")]
    values = {
        "saved_activation_bytes_per_token": 1000 * k_frac,
        "speedup_vs_best_dense": 1 / (0.5 + k_frac / 2),
        "step_ms": point.batch * (0.5 + k_frac / 2),
    }
    return "ok", [row(metric, value) for metric, value in values.items()]


if __name__ == "__main__":
    NAME, path = sys.argv[1], Path(sys.argv[2])
    job = Job.from_json(path.read_text())
    with output_path(path).open("a") as stream:
        for point in job.points:
            status, rows = rows_of(job, point)
            for event in (
                events.Start(point_key=point.key),
                events.Finish(point_key=point.key, status=status, rows=rows),
            ):
                stream.write(events.write_event(event))
