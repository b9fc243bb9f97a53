"""How long a point will take, from rows of the same device: its own, or a like point's scaled by FLOPs.

Nothing is guessed for a method that was never measured on the device: then the duration is unknown.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import pandas as pd

from harness.sweep.catalog import WORKLOADS, workloads_where
from harness.sweep.metrics import METRICS
from harness.sweep.model import Part
from harness.sweep.point import Point
from moc.config import FfnShape

# One process until it trains, in seconds: interpreter, PyTorch, device, weights (seen: 13 on one H100, 5 on
# two CPU cores).
START_SECONDS = {"cuda": 13.0, "cpu": 5.0}
_POINT_SECONDS = 2.0  # an FFN point's gate, warm-up and memory pass (seen on one H100)
_COMPILE_TWICE = 1.4  # compile_s is the model; its layer is compiled once more for its saved bytes
_EVALUATIONS = 5  # during one training run; each token costs a third of a training token
_SECONDS = {"ms": 1e-3, "us": 1e-6}  # of a unit of time


@dataclass(frozen=True)
class Duration:
    """Seconds of a point, without the start of its process."""

    seconds: float
    scaled: bool  # from a point of another size; False: the very same work was measured


class History:
    """What is measured on one device, by method: where estimates come from."""

    def __init__(self, rows: pd.DataFrame, device_name: str) -> None:
        """`rows` are those of any sweeps, as `harness.store.frames.read_rows` gives them."""
        own = rows[(rows["device_name"] == device_name) & rows["value"].notna()]
        self._points: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        self._metrics: dict[str, dict[str, float]] = {}
        for row in cast(list[dict[str, Any]], own.to_dict("records")):
            self._metrics.setdefault(row["point_key"], {})[row["metric"]] = float(row["value"])
            if row["metric"] == WORKLOADS[row["workload"]].step_metric:
                like = (row["workload"], row["method"], row["dtype"])
                self._points.setdefault(like, []).append(row)

    def metric(self, key: str, name: str) -> float | None:
        """A measured value of the point with this key."""
        return self._metrics.get(key, {}).get(name)

    def saved_bytes(self, point: Point) -> float | None:
        """Measured bytes per token that a layer of the point's method and shape saves; None if unknown."""
        for workload in workloads_where(decodes=False):
            for row in self._points.get((workload, point.method, point.dtype), ()):
                same = (row["d_model"], row["d_ffn"]) == (point.d_model, point.d_ffn)
                value = self.metric(row["point_key"], "saved_activation_bytes_per_token")
                if same and _rule(row) == point.selection and value is not None:
                    return value
        return None

    def estimate(self, part: Part, point: Point) -> Duration | None:
        """How long the point will take; None if its method was never measured on this device.

        The source is the nearest point of the same workload, method and dtype: of the same selection if there
        is one, then nearest in FLOPs of a step.
        """
        known = self._points.get((point.workload, point.method, point.dtype))
        if not known:
            return None
        workload = WORKLOADS[point.workload]
        work = step_flops(point)

        def distance(row: dict[str, Any]) -> tuple[bool, float]:
            return _rule(row) != point.selection, abs(math.log(work / _row_flops(row)))

        row = min(known, key=distance)
        ratio = work / _row_flops(row)
        step = float(row["value"]) * _SECONDS[METRICS[workload.step_metric].unit] * ratio
        compile_s = self.metric(row["point_key"], "compile_s") or 0.0
        if workload.reads_text:
            steps = (point.train_tokens or 0) // point.tokens
            evaluations = _EVALUATIONS * (point.eval_tokens or 0) / point.tokens / 3
            seconds = (steps + evaluations) * step + _COMPILE_TWICE * compile_s
        else:
            timed = int(row["n_samples"]) * step * workload.steps_per_sample
            longest = workload.loops * part.measure.timing.max_seconds
            seconds = _POINT_SECONDS + compile_s + min(timed, longest)
        return Duration(seconds, abs(ratio - 1) > 1e-9)


def step_flops(point: Point) -> float:
    """Floating-point operations of the matrix products in one step of a point's workload, if dense.

    Forward takes 2 per weight and token, and causal attention 2 d seq_len per layer and token; backward twice
    that. A step of decoding is a forward of one token a sequence. Sparse methods have the same products, so
    ratios hold for them as well.
    """
    workload = WORKLOADS[point.workload]
    layer = 2.0 * FfnShape(point.d_model, point.d_ffn).n_params()
    head = 0.0
    if workload.whole_model:
        layer += 2.0 * 4 * point.d_model**2 + 2.0 * point.d_model * point.seq_len
        head = 2.0 * (point.vocab_size or 0) * point.d_model
    return (point.n_layers * layer + head) * (point.batch if workload.decodes else 3 * point.tokens)


def _rule(row: dict[str, Any]) -> str | None:
    return row["selection"] if isinstance(row["selection"], str) else None


def _row_flops(row: dict[str, Any]) -> float:
    names = ("workload", "method", "d_model", "d_ffn", "n_layers", "batch", "seq_len", "dtype", "seed")
    values = {name: row[name] for name in names}
    vocab_size = None if pd.isna(row["vocab_size"]) else int(row["vocab_size"])
    return step_flops(Point(selection=None, preset=None, vocab_size=vocab_size, **values))
