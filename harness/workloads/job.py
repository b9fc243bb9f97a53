"""What the runner and a trial process say to each other: a job in, events out, both JSON.

A job is written to a file and names one point, or the points of one group. The trial appends one JSON line
per event (see `harness.workloads.events`) to the job's output file: `start` before it touches a point,
`samples`, `progress`, and `finish` with all rows of that point. So when the process dies, the parent knows
which point was at work and keeps what was finished before.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic.dataclasses import dataclass

from harness.sweep.model import Measure
from harness.sweep.point import Point


def _point_fields(value: Any) -> Any:
    return dataclasses.asdict(Point.from_dict(value)) if isinstance(value, dict) else value


_JobPoint = Annotated[
    Point, pydantic.BeforeValidator(_point_fields), pydantic.PlainSerializer(lambda point: point.to_dict())
]


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class Job:
    """One child process's work.

    `data` is the text source of `pretrain` (`stdlib`, `files:GLOB`, `hf:NAME`). `work_dir` is where the
    trial may keep checkpoints. `device` is `cpu` or `cuda`.
    """

    sweep: str
    run_id: str
    attempt: int
    points: tuple[_JobPoint, ...]
    measure: Measure
    device: str
    work_dir: str
    data: str | None = None

    def to_json(self) -> str:
        """JSON text that `from_json` reads back."""
        return _JOB.dump_json(self, indent=1).decode()

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Inverse of `to_json`. Raises ValueError if the text is not a job."""
        return _JOB.validate_json(text)


_JOB = pydantic.TypeAdapter(Job)


def write_job(job: Job, path: Path) -> None:
    """Write the job where `harness.run.trial` will read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(job.to_json() + "\n", encoding="utf-8")
