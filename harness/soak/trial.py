"""The trial of a soak run: a stand-in for `harness.run.trial` that measures nothing and imports no PyTorch.

Every point takes about as long as the soak run says, and has a value that follows from its key, so that a row
in the wrong place shows. Each trial also starts a process of its own that would outlive it, half of them in a
session of their own.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path

from harness.run import guard
from harness.run.trial import output_path
from harness.sweep.catalog import WORKLOADS
from harness.sweep.point import Point
from harness.workloads.job import Job
from harness.workloads.reporter import EventReporter

DEVICE_VARIABLE = "MOCBENCH_SOAK_DEVICE"
SECONDS_VARIABLE = "MOCBENCH_SOAK_SECONDS"


def expected_value(point_key: str) -> float:
    """What a soak trial measures of a point."""
    return int(point_key[:8], 16) / 7


def times_path(job_path: Path) -> Path:
    """Where a trial that came to its end says whose it was, and from when to when it ran, in seconds of the
    wall clock."""
    return job_path.with_suffix(".times")


def main() -> int:
    """Entry point; the only argument is the path of the job file."""
    guard.enter()
    path = Path(sys.argv[1])
    job = Job.from_json(path.read_text(encoding="utf-8"))
    chance = random.Random(job.run_id)
    os.posix_spawn("/bin/sleep", ["sleep", "600"], os.environ, setsid=chance.random() < 0.5)
    device = os.environ[DEVICE_VARIABLE]
    with output_path(path).open("a", encoding="utf-8") as stream:
        report = EventReporter(job, stream, device, "soak")
        report.environment({"env_id": "soak", "device_name": device})
        for point in job.points:
            report.start(point)
            time.sleep(float(os.environ[SECONDS_VARIABLE]) * chance.uniform(0.5, 1.5))
            _measure(report, point)
    begin = path.stat().st_mtime  # the runner writes the job file right before it starts this process
    runner = os.environ[guard.MARK_VARIABLE].rpartition("/")[0]
    times_path(path).write_text(json.dumps([runner, begin, time.time()]), encoding="utf-8")
    return 0


def _measure(report: EventReporter, point: Point) -> None:
    metric, value = WORKLOADS[point.workload].primary_metric, expected_value(point.key)
    report.samples(point, metric, [value, value + 1])
    report.measure(point, metric, value)
    report.finish(point)


if __name__ == "__main__":
    sys.exit(main())
