"""A reporter that remembers what a workload says, and tiny points of the FFN workloads."""

from collections.abc import Sequence
from typing import Any

from harness.measure.clocks import TimingConditions
from harness.measure.stats import Estimate
from harness.sweep.metrics import METRICS, STATUSES
from harness.sweep.point import Point

D, D_FFN, BATCH, SEQ = 16, 48, 2, 32


class Recorder:
    """A reporter that remembers everything in order, and refuses what the schema does not know."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.rows: dict[str, dict[str, dict[str, Any]]] = {}
        self.finished: dict[str, tuple[str, str]] = {}
        self.raw: dict[str, dict[str, list[float]]] = {}

    def start(self, point: Point) -> None:
        self.events.append(("start", name_of(point)))

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
        assert metric in METRICS
        assert status in STATUSES
        assert metric not in self.rows.setdefault(name_of(point), {})
        row = vars(number) if isinstance(number, Estimate) else {"value": number}
        if conditions is not None:
            row = {**row, "timing_mode": conditions.mode}
        self.rows[name_of(point)][metric] = {**row, "status": status, "detail": detail}
        self.events.append(("measure", name_of(point)))

    def samples(
        self, point: Point, metric: str, values: Sequence[float], x: Sequence[float] | None = None
    ) -> None:
        self.raw.setdefault(name_of(point), {})[metric] = list(values)

    def progress(self, point: Point, fraction: float, text: str = "") -> None:
        assert 0 <= fraction <= 1

    def finish(self, point: Point, status: str = "ok", detail: str = "") -> None:
        assert status in STATUSES
        assert name_of(point) not in self.finished
        self.finished[name_of(point)] = (status, detail)


def name_of(point: Point) -> str:
    return f"{point.method} {point.selection}" if point.selection else point.method


def point(method: str, selection: str | None = None, **changes: Any) -> Point:
    values: dict[str, Any] = {
        "workload": "ffn_train",
        "method": method,
        "selection": selection,
        "preset": None,
        "d_model": D,
        "d_ffn": D_FFN,
        "n_layers": 1,
        "batch": BATCH,
        "seq_len": SEQ,
        "dtype": "fp32",
        "seed": 0,
    }
    return Point(**{**values, **changes})
