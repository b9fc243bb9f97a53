"""What the runner and a trial process say to each other: a job in, events out, both JSON.

A job is written to a file and names one point, or the points of one group. The trial appends one JSON line
per event to the job's output file: `start` before it touches a point, `samples`, `progress`, and `finish`
with all rows of that point. So when the process dies, the parent knows which point did it and keeps what
was finished before.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from harness.sweep.model import Measure
from harness.sweep.point import Point


@dataclass(frozen=True)
class Job:
    """One child process's work.

    `data` is the text source of `pretrain` (`stdlib`, `files:GLOB`, `hf:NAME`). `work_dir` is where the
    trial may keep checkpoints. `device` is `cpu` or `cuda`.
    """

    sweep: str
    run_id: str
    attempt: int
    points: tuple[Point, ...]
    measure: Measure
    device: str
    work_dir: str
    data: str | None = None

    def to_json(self) -> str:
        """JSON text that `from_json` reads back."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["points"] = [point.to_dict() for point in self.points]
        values["measure"] = self.measure.model_dump(mode="json")
        return json.dumps(values, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Inverse of `to_json`. Raises ValueError or TypeError if the text is not a job."""
        values = json.loads(text)
        values["points"] = tuple(Point.from_dict(point) for point in values["points"])
        values["measure"] = Measure.model_validate(values["measure"])
        return cls(**values)


class Reporter(Protocol):
    """What a workload calls to say what it measured. `harness.run.trial` implements it."""

    def start(self, point: Point) -> None:
        """This point is about to use the device: if the process dies now, this point is to blame."""

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
        """One row of the point: a metric named in `harness.sweep.metrics.METRICS` and its value."""

    def samples(
        self, point: Point, metric: str, values: Sequence[float], x: Sequence[float] | None = None
    ) -> None:
        """Raw samples behind a row, or a curve: `x` is the sample's place (round, tokens seen)."""

    def progress(self, point: Point, fraction: float, text: str = "") -> None:
        """How far the point is, 0 to 1, for the progress bar."""

    def intermediate(self, point: Point, percent: int, values: dict[str, float]) -> None:
        """What a training has reached after `percent` of its tokens, by metric: a pruner may end it there."""

    def finish(self, point: Point, status: str = "ok", detail: str = "") -> None:
        """The point is done; its rows become durable. `status` is one of `harness.sweep.metrics.STATUSES`."""


def write_job(job: Job, path: Path) -> None:
    """Write the job where `harness.run.trial` will read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(job.to_json() + "\n", encoding="utf-8")


def read_events(path: Path) -> list[dict[str, Any]]:
    """All whole events of a trial's output file; a half-written last line (killed process) is ignored."""
    if not path.exists():
        return []
    events = []
    for line in path.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            events.append(json.loads(line))
        except ValueError:
            break
    return events
