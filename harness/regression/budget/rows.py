"""Part `rows` of the budget: which rows a point of each workload leaves.

A tiny point of each runs as a trial would run it. What a row says is not looked at, only that it is there: a
metric that goes missing from every table is noticed here first.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.measure import launch, roofline
from harness.regression.budget.check import Facts
from harness.run.trial import measure_job
from harness.sweep.catalog import GROUPED_WORKLOADS, PRIMARY_METRIC
from harness.sweep.model import Measure, Timing
from harness.sweep.point import Point
from harness.workloads.job import Job

_FFN: dict[str, Any] = {"d_model": 16, "d_ffn": 48, "n_layers": 1, "dtype": "fp32", "seed": 0, "preset": None}
_MODEL: dict[str, Any] = {**_FFN, "n_layers": 2, "n_heads": 2, "d_model": 32, "vocab_size": 300}
# A tiny point of each workload, but for its method and selection.
TINY: dict[str, dict[str, Any]] = {
    "ffn_train": {**_FFN, "batch": 2, "seq_len": 32},
    "ffn_decode": {**_FFN, "batch": 1, "seq_len": 1},
    "generate": {**_MODEL, "batch": 2, "seq_len": 8},
    "pretrain": {**_MODEL, "batch": 8, "seq_len": 16, "train_tokens": 1280, "eval_tokens": 256, "lr": 1e-2},
}
RIVALS = (("dense", None), ("moc_reference", "threshold:0.5:0.25"))  # the rule with a row of its own


def collect() -> Facts:
    """The metrics of a point's rows, in one line, by workload and rival."""
    # Nothing below depends on how long a flush is or how fast the machine is.
    launch.MAX_CPU_FLUSH_BYTES = 2**16
    rates = dict.fromkeys(("fp64", "fp32", "fp16", "bf16"), 1e9)
    roofline.ensure_ceilings = lambda device: roofline.Ceilings(1e9, rates)
    facts: Facts = {"rows": {}}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOCBENCH_CACHE"] = folder
        source = _text(Path(folder))
        for workload in PRIMARY_METRIC:
            if importlib.util.find_spec(f"harness.workloads.{workload}") is None:
                continue
            if workload not in TINY:
                facts["rows"][workload] = f"no tiny point in {Path(__file__).name}"
                continue
            points = [Point(workload=workload, method=m, selection=r, **TINY[workload]) for m, r in RIVALS]
            jobs = [points] if workload in GROUPED_WORKLOADS else [[point] for point in points]
            for job in jobs:
                metrics = _metrics(job, folder, source)
                for point in job:
                    name = " ".join(filter(None, (point.method, point.selection)))
                    facts["rows"][f"{workload}: {name}"] = " ".join(sorted(metrics[point.key]))
    return facts


def _metrics(points: Sequence[Point], folder: str, source: str) -> dict[str, list[str]]:
    """The metrics of the rows that one job leaves for each of its points, by point_key."""
    measure = Measure(timing=Timing(rel_ci=0.99, max_seconds=5.0))
    stream = io.StringIO()
    if measure_job(Job("budget", "run", 1, tuple(points), measure, "cpu", folder, source), stream):
        raise RuntimeError(f"{points[0].label} or a rival crashed; the traceback stands above")
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    return {
        event["point_key"]: [row["metric"] for row in event["rows"]]
        for event in events
        if event["event"] == "finish"
    }


def _text(folder: Path) -> str:
    sentence = "the gate keeps the largest channels and the rest of the channels are dropped. "
    lines = [json.dumps({"text": f"{number}: " + sentence * 6}) for number in range(60)]
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return f"files:{folder}/text.jsonl"


if __name__ == "__main__":
    print(json.dumps(collect()))
