"""Part `rows` of the budget: which rows a point of each workload leaves.

A tiny point of each runs as a trial would run it. What a row says is not looked at, only that it is there: a
metric that goes missing from every table is noticed here first.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from harness.measure import roofline
from harness.regression.budget.check import Facts
from harness.run.trial import measure_job
from harness.sweep.catalog import WORKLOADS
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
METHODS = (("dense", None), ("moc_reference", "threshold:0.5:0.25"))  # the rule with a row of its own


def collect() -> Facts:
    """The metrics of a point's rows, in one line, by workload and method.

    Raises RuntimeError unless the cache folder of this process, `MOCBENCH_CACHE`, is there and empty.
    """
    folder = os.environ.get("MOCBENCH_CACHE")
    if folder is None or any(Path(folder).iterdir()):
        raise RuntimeError(f"made-up ceilings need an empty cache folder: run python -m {__package__} rows")
    # Measuring them would take most of the time, and no row's name depends on them.
    rates = dict.fromkeys(("fp64", "fp32", "fp16", "bf16"), 1e9)
    roofline.store_ceilings(torch.device("cpu"), roofline.Ceilings(1e9, rates))
    source = _text(Path(folder))
    facts: Facts = {"rows": {}}
    for workload in WORKLOADS:
        if importlib.util.find_spec(f"harness.workloads.{workload}") is None:
            continue
        if workload not in TINY:
            facts["rows"][workload] = f"no tiny point in {Path(__file__).name}"
            continue
        points = [Point(workload=workload, method=m, selection=r, **TINY[workload]) for m, r in METHODS]
        for job in [points] if WORKLOADS[workload].grouped else [[point] for point in points]:
            metrics = _metrics(job, folder, source)
            for point in job:
                name = " ".join(filter(None, (point.method, point.selection)))
                facts["rows"][f"{workload}: {name}"] = " ".join(sorted(metrics[point.key]))
    return facts


def _metrics(points: Sequence[Point], folder: str, source: str) -> dict[str, list[str]]:
    """The metrics of the rows that one job leaves for each of its points, by point_key."""
    measure = Measure(timing=Timing(rel_ci=0.99, max_seconds=1e-3))  # two rounds of each timing
    stream = io.StringIO()
    if measure_job(Job("budget", "run", 1, tuple(points), measure, "cpu", folder, source), stream):
        raise RuntimeError(f"{points[0].label} or another method crashed; the traceback stands above")
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
