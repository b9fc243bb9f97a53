"""The frozen models of a sweep file, section by section."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

MAX_POINTS = 100_000


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Range(_Model):
    """A continuous or integer axis of an optimisation: `{low: 0.05, high: 0.5, log: false}`."""

    low: float
    high: float
    log: bool = False
    step: float | None = None


def _scalar(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("a name or a number")
    return value


_Scalar = Annotated[Any, pydantic.AfterValidator(_scalar)]


Axis = Annotated[
    Annotated[list[_Scalar], Field(min_length=1), pydantic.Tag("list")]
    | Annotated[Range, pydantic.Tag("range")],
    pydantic.Discriminator(lambda value: "range" if isinstance(value, dict | Range) else "list"),
]


class Timing(_Model):
    """When a timing loop stops."""

    rel_ci: float = Field(0.01, gt=0, lt=1)  # relative half-width of the 95 % interval of the paired ratio
    max_seconds: float = Field(20.0, gt=0)  # of one timing loop; a row that reaches it is `unstable`


class Measure(_Model):
    """What is measured of a point, and how carefully."""

    timing: Timing = Timing()
    memory: bool = True
    gate: bool = True
    checkpoint_seconds: float | None = Field(None, gt=0)  # pretrain: time between checkpoints; None: none
    union: bool = False  # pretrain: the channels that the tokens of a decoding batch need together


class Limits(_Model):
    trial_seconds: float = Field(1800.0, gt=0)
    memory_bytes: float | None = Field(None, gt=0)
    retries: int = Field(1, ge=0, le=10)


class Objective(_Model):
    metric: str
    direction: Literal["maximize", "minimize"]


class Optimize(_Model):
    """A search in place of a grid.

    `constraints` are limits: at most for a metric where less is better, at least where more is. `seed` is
    the sampler's; the seeds of the measurements are the part's own, the same for every trial, and an
    objective is the mean over them. `baseline` is the dense method each trial is compared with.
    """

    sampler: Literal["tpe", "nsga2", "random"] = "tpe"
    n_trials: int = Field(30, ge=1, le=MAX_POINTS)
    objectives: list[Objective] = Field(min_length=1)
    constraints: dict[str, Annotated[float, Field(gt=0)]] = {}
    pruner: Literal["none", "median", "hyperband"] = "none"
    baseline: str = "dense"
    seed: int = 0


class Part(_Model):
    """One workload over one set of axes."""

    name: str = ""
    workload: str
    mode: Literal["grid", "optimize"] = "grid"
    axes: dict[str, Axis]
    fixed: dict[str, _Scalar] = {}
    exclude: list[dict[str, _Scalar]] = []
    measure: Measure = Measure()
    seeds: list[int] = Field([0], min_length=1)
    limits: Limits = Limits()
    optimize: Optimize | None = None


class Sweep(_Model):
    """A whole sweep file. `name` is also the folder under results/."""

    version: Literal[1]
    name: str
    description: str = ""
    data: str = "stdlib"
    parts: list[Part] = Field(min_length=1)


def sweep_text(sweep: Sweep) -> str:
    """The sweep as YAML that `load_sweep` reads back, with what was left out spelled as its default."""
    return yaml.safe_dump(sweep.model_dump(mode="json", exclude_none=True), sort_keys=False, width=110)


def part_name(part: Part) -> str:
    """The part's name, its workload if it has none."""
    return part.name or part.workload
