"""What a workload says of a point becomes rows and events."""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Sequence
from typing import IO, Any

from harness.sweep.catalog import WORKLOADS
from harness.sweep.metrics import METRICS, STATUSES
from harness.sweep.point import SCHEMA_VERSION, Point
from harness.workloads.job import Job

PROGRESS_SECONDS = 0.5


class EventReporter:
    """The `Reporter` of a trial: turns what a workload says into events and rows.

    Every row gets the point's columns and the conditions (device, environment, time) here, so no workload
    can forget them.
    """

    def __init__(self, job: Job, stream: IO[str], device_name: str, env_id: str) -> None:
        self._job = job
        self._stream = stream
        self._conditions = {"device_name": device_name, "env_id": env_id}
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._started: dict[str, str] = {}
        self._last_progress = 0.0
        self.finished: set[str] = set()
        self.current: Point | None = None

    def start(self, point: Point) -> None:
        """See `Reporter`."""
        self.current = point
        self._started.setdefault(point.key, _now())
        self._emit({"event": "start", "point_key": point.key})

    def measure(
        self,
        point: Point,
        metric: str,
        value: float | None,
        *,
        ci_low: float | None = None,
        ci_high: float | None = None,
        n_samples: int | None = None,
        statistic: str | None = None,
        status: str = "ok",
        detail: str = "",
        timing_mode: str | None = None,
        sm_clock_mhz: float | None = None,
        throttled: bool | None = None,
    ) -> None:
        """See `Reporter`. Raises ValueError for a metric or status that is not in the
        schema.
        """
        if metric not in METRICS:
            raise ValueError(f"metric {metric!r} is not in harness.sweep.metrics.METRICS")
        row = self._row(point, metric, status, detail, timing_mode)
        row.update(value=_number(value), ci_low=_number(ci_low), ci_high=_number(ci_high))
        row.update(n_samples=n_samples, statistic=statistic)
        row.update(sm_clock_mhz=_number(sm_clock_mhz), throttled=throttled)
        self._rows.setdefault(point.key, []).append(row)

    def samples(
        self, point: Point, metric: str, values: Sequence[float], x: Sequence[float] | None = None
    ) -> None:
        """See `Reporter`."""
        place = list(range(len(values))) if x is None else [float(item) for item in x]
        item = {"run_id": self._job.run_id, "point_key": point.key, "metric": metric}
        self._emit({"event": "samples", **item, "x": place, "value": [_number(value) for value in values]})

    def progress(self, point: Point, fraction: float, text: str = "") -> None:
        """See `Reporter`. At most one event in `PROGRESS_SECONDS`, the last one always."""
        now = time.monotonic()
        if fraction >= 1.0 or now - self._last_progress >= PROGRESS_SECONDS:
            self._last_progress = now
            self._emit({"event": "progress", "point_key": point.key, "fraction": fraction, "text": text})

    def intermediate(self, point: Point, percent: int, values: dict[str, float]) -> None:
        """See `Reporter`. A value that is not finite is left out."""
        known = {name: value for name, value in values.items() if math.isfinite(value)}
        key = point.key
        self._emit({"event": "intermediate", "point_key": key, "percent": percent, "values": known})

    def finish(self, point: Point, status: str = "ok", detail: str = "") -> None:
        """See `Reporter`. A status without a measured value leaves one row that says
        why.
        """
        if status not in STATUSES:
            raise ValueError(f"status {status!r} is not one of {', '.join(STATUSES)}")
        rows = self._rows.pop(point.key, [])
        primary = WORKLOADS[point.workload].primary_metric
        if status in ("ok", "unstable"):
            for row in rows:
                if row["metric"] == primary:
                    row["status"] = status
                    row["detail"] = detail or row["detail"]
        else:
            kept = [row for row in rows if row["metric"] == "max_rel_err"]
            rows = [*kept, self._row(point, primary, status, detail, None)]
        self.finished.add(point.key)
        self._emit({"event": "finish", "point_key": point.key, "status": status, "rows": rows})

    def environment(self, record: dict[str, Any]) -> None:
        """The machine, once per trial."""
        self._emit({"event": "environment", "record": record})

    def _row(
        self, point: Point, metric: str, status: str, detail: str, timing_mode: str | None
    ) -> dict[str, Any]:
        started = self._started.get(point.key) or _now()
        return make_row(self._job, point, metric, status, detail, timing_mode, started, **self._conditions)

    def _emit(self, event: dict[str, Any]) -> None:
        self._stream.write(json.dumps(event, separators=(",", ":")) + "\n")
        self._stream.flush()


def make_row(
    job: Job,
    point: Point,
    metric: str,
    status: str,
    detail: str,
    timing_mode: str | None = None,
    started_at: str | None = None,
    *,
    device_name: str,
    env_id: str | None,
) -> dict[str, Any]:
    """A row with every column of the schema and no value yet."""
    row = point_columns(job, point)
    row.update(timing_mode=timing_mode or point.timing_mode, metric=metric, unit=METRICS[metric].unit)
    row.update(higher_is_better=METRICS[metric].higher_is_better, value=None, ci_low=None, ci_high=None)
    row.update(n_samples=None, statistic=None, status=status, detail=detail)
    row.update(device_name=device_name, sm_clock_mhz=None, throttled=None, env_id=env_id)
    row.update(started_at=started_at or _now())
    return row


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def point_columns(job: Job, point: Point) -> dict[str, Any]:
    """The key and point columns of a row."""
    k: int | None = point.d_ffn
    if point.selection is not None:
        from moc.selection import parse_selection

        try:
            k = parse_selection(point.selection).k(point.d_ffn)
        except ValueError:
            k = None  # the rule does not fit this width; the point is `unsupported`
    return {
        "schema_version": SCHEMA_VERSION,
        "sweep": job.sweep,
        "point_key": point.key,
        "run_id": job.run_id,
        "attempt": job.attempt,
        "seed": point.seed,
        "workload": point.workload,
        "method": point.method,
        "selection": point.selection,
        "preset": point.preset,
        "d_model": point.d_model,
        "d_ffn": point.d_ffn,
        "n_layers": point.n_layers,
        "n_heads": point.n_heads,
        "k": k,
        "k_frac": None if k is None else k / point.d_ffn,
        "batch": point.batch,
        "seq_len": point.seq_len,
        "tokens": point.tokens,
        "train_tokens": point.train_tokens,
        "eval_tokens": point.eval_tokens,
        "vocab_size": point.vocab_size,
        "lr": point.lr,
        "data_id": point.data_id,
        "dtype": point.dtype,
    }


def _number(value: float | None) -> float | None:
    """JSON has no NaN or infinity: a value that is neither finite nor known is null."""
    if value is None:
        return None
    value = float(value)
    return value if value == value and abs(value) != float("inf") else None
