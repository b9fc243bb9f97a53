"""A training that its search gives up ends in the middle, with its process and without a row."""

from __future__ import annotations

import sys
from pathlib import Path

from rows import train_point

from harness.run.supervise import Finished, Listener, run_job
from harness.sweep.model import Limits, Measure
from harness.sweep.point import Point
from harness.workloads.job import Job

# Stands in for a training: it says how far it is, and then goes on as if for an hour.
TRAINING = """
import json, os, sys, time
from harness.run import guard
guard.enter()
_, key, pid_file, job = sys.argv
open(pid_file, "w").write(str(os.getpid()))
out = open(job.replace(".json", ".out.jsonl"), "a")
def say(**event):
    out.write(json.dumps({**event, "point_key": key}) + "\\n")
    out.flush()
say(event="start")
say(event="intermediate", percent=25, values={"perplexity": 40.0})
say(event="intermediate", percent=50, values={"perplexity": 39.0})
time.sleep(3600)
"""


def test_a_training_that_is_given_up_is_killed_and_leaves_no_row(tmp_path: Path) -> None:
    """What it reached is asked about in order; at the first yes its process is gone, in the middle of its
    work and not at its time limit, which would be a row."""
    point = train_point()
    asked: list[tuple[int, dict[str, float]]] = []
    heard: list[Finished] = []

    def stop(which: Point, percent: int, values: dict[str, float]) -> bool:
        assert which == point
        asked.append((percent, values))
        return percent == 50

    script, process = tmp_path / "training.py", tmp_path / "pid"
    script.write_text(TRAINING)
    listener = Listener(heard.append, lambda record: None, lambda *progress: None, stop)
    run_job(
        Job("t", "r", 1, (point,), Measure(), "cpu", str(tmp_path)),
        tmp_path,
        Limits(trial_seconds=600),
        listener,
        device_name="D",
        environment={},
        command=(sys.executable, str(script), point.key, str(process)),
    )
    assert asked == [(25, {"perplexity": 40.0}), (50, {"perplexity": 39.0})]
    assert heard == []
    assert not Path(f"/proc/{process.read_text()}").exists()
