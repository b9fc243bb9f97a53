"""What a workload says of a point becomes rows and events."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from harness.sweep.catalog import WORKLOADS
from harness.sweep.metrics import METRICS, STATUSES
from harness.sweep.point import SCHEMA_VERSION, Point
from harness.workloads import events
from harness.workloads.job import Job

if TYPE_CHECKING:
    from harness.measure.clocks import TimingConditions
    from harness.measure.stats import Estimate

PROGRESS_SECONDS = 0.5


def _known_status(name: str) -> str:
    if name not in STATUSES:
        raise ValueError(f"status {name!r} is not one of {', '.join(STATUSES)}")
    return name


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


_Number = Annotated[float | None, AfterValidator(_finite)]  # JSON has no NaN and no infinity: they are null


class Measured(BaseModel):
    """The columns of a row that say what was measured; `point_columns` gives the others."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    timing_mode: str
    metric: str
    unit: str
    higher_is_better: bool | None
    value: _Number = None
    ci_low: _Number = None
    ci_high: _Number = None
    n_samples: int | None = None
    statistic: str | None = None
    status: Annotated[str, AfterValidator(_known_status)]
    detail: str
    device_name: str
    sm_clock_mhz: _Number = None
    throttled: bool | None = None
    env_id: str | None
    started_at: str


class EventReporter:
    """What a workload calls to say what it measured; turns that into events and rows.

    Every row gets the point's columns and the conditions (device, environment, time) here, so no workload
    can forget them.
    """

    def __init__(self, job: Job, stream: IO[str], device_name: str, env_id: str) -> None:
        self._job = job
        self._stream = stream
        self._machine = {"device_name": device_name, "env_id": env_id}
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._started: dict[str, str] = {}
        self._last_progress = 0.0
        self.finished: set[str] = set()
        self.current: Point | None = None

    def start(self, point: Point) -> None:
        """This point is about to use the device: if the process dies now, this point is to blame."""
        self.current = point
        self._started.setdefault(point.key, _now())
        self._emit(events.Start(point_key=point.key))

    def measure(
        self,
        point: Point,
        metric: str,
        number: Estimate | float,
        *,
        conditions: TimingConditions | None = None,
        status: str = "ok",
        detail: str = "",
    ) -> None:
        """One row of the point: a metric named in `harness.sweep.metrics.METRICS`, and its number.

        A plain number has neither an interval nor samples. `conditions` are those of timed work. Raises
        ValueError for a row that is not of the schema.
        """
        columns: dict[str, Any] = {"value": number} if isinstance(number, int | float) else vars(number)
        if conditions is not None:
            columns = {**columns, "timing_mode": conditions.mode}
            columns |= {"sm_clock_mhz": conditions.sm_clock_mhz, "throttled": conditions.throttled}
        row = self._row(point, metric, status, detail, **columns)
        self._rows.setdefault(point.key, []).append(row)

    def samples(
        self, point: Point, metric: str, values: Sequence[float], x: Sequence[float] | None = None
    ) -> None:
        """Raw samples behind a row, or a curve. `x` gives the round or the tokens seen of each sample."""
        rounds = range(len(values)) if x is None else x
        run_id, key = self._job.run_id, point.key
        self._emit(
            events.Samples(run_id=run_id, point_key=key, metric=metric, x=list(rounds), value=list(values))
        )

    def progress(self, point: Point, fraction: float, text: str = "") -> None:
        """How far the point is, 0 to 1, for the progress bar.

        At most one event in `PROGRESS_SECONDS`, the last one always.
        """
        now = time.monotonic()
        if fraction >= 1.0 or now - self._last_progress >= PROGRESS_SECONDS:
            self._last_progress = now
            self._emit(events.Progress(point_key=point.key, fraction=fraction, text=text))

    def intermediate(self, point: Point, percent: int, values: dict[str, float]) -> None:
        """What a training has reached after `percent` of its tokens, by metric: a pruner may end it there.

        A value that is not finite is left out.
        """
        known = {name: value for name, value in values.items() if math.isfinite(value)}
        self._emit(events.Intermediate(point_key=point.key, percent=percent, values=known))

    def finish(self, point: Point, status: str = "ok", detail: str = "") -> None:
        """The point is done; its rows become durable. `status` is one of `harness.sweep.metrics.STATUSES`.

        A status without a measured value leaves one row that says why.
        """
        _known_status(status)
        rows = self._rows.pop(point.key, [])
        primary = WORKLOADS[point.workload].primary_metric
        if status in ("ok", "unstable"):
            for row in rows:
                if row["metric"] == primary:
                    row["status"] = status
                    row["detail"] = detail or row["detail"]
        else:
            kept = [row for row in rows if row["metric"] == "max_rel_err"]
            rows = [*kept, self._row(point, primary, status, detail)]
        self.finished.add(point.key)
        self._emit(events.Finish(point_key=point.key, status=status, rows=rows))

    def environment(self, record: dict[str, Any]) -> None:
        """The machine, once per trial."""
        self._emit(events.Environment(record=record))

    def _row(self, point: Point, metric: str, status: str, detail: str, **columns: Any) -> dict[str, Any]:
        started = self._started.get(point.key) or _now()
        columns = {**self._machine, "started_at": started, **columns}
        return make_row(self._job, point, metric, status, detail, **columns)

    def _emit(self, event: events.Event) -> None:
        self._stream.write(events.write_event(event))
        self._stream.flush()


def make_row(
    job: Job,
    point: Point,
    metric: str,
    status: str,
    detail: str,
    *,
    device_name: str,
    env_id: str | None,
    **columns: Any,
) -> dict[str, Any]:
    """A row with every column of the schema; `columns` are further ones of `Measured`.

    Raises ValueError for an unknown metric, status or column, or a value of a wrong type.
    """
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r} is not in harness.sweep.metrics.METRICS")
    columns = {"timing_mode": point.timing_mode, "started_at": _now(), **columns}
    columns |= {"metric": metric, "status": status, "detail": detail}
    columns |= {"unit": METRICS[metric].unit, "higher_is_better": METRICS[metric].higher_is_better}
    try:
        measured = Measured(**columns, device_name=device_name, env_id=env_id)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"row of {metric}: column {first['loc'][0]}: {first['msg']}") from error
    return {**point_columns(job, point), **measured.model_dump()}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def point_columns(job: Job, point: Point) -> dict[str, Any]:
    """The key and point columns of a row."""
    return {
        "schema_version": SCHEMA_VERSION,
        "sweep": job.sweep,
        "point_key": point.key,
        "run_id": job.run_id,
        "attempt": job.attempt,
        **point.columns,
    }
