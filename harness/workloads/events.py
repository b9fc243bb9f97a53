"""What a trial says to its parent: one JSON line per event, told apart by its field `event`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError


class _Event(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Environment(_Event):
    """The machine and its software, once per trial."""

    event: Literal["environment"] = "environment"
    record: dict[str, Any]


class Start(_Event):
    """The point is about to use the device."""

    event: Literal["start"] = "start"
    point_key: str


class Samples(_Event):
    """Raw samples behind a row, or a curve: `x` is the round, or the tokens seen."""

    event: Literal["samples"] = "samples"
    run_id: str
    point_key: str
    metric: str
    x: list[int | float]
    value: list[float | None]


class Progress(_Event):
    """How far the point is, 0 to 1."""

    event: Literal["progress"] = "progress"
    point_key: str
    fraction: float
    text: str = ""


class Intermediate(_Event):
    """What a training has reached after `percent` of its tokens, by metric."""

    event: Literal["intermediate"] = "intermediate"
    point_key: str
    percent: int
    values: dict[str, float]


class Finish(_Event):
    """The point is done, with all its rows."""

    event: Literal["finish"] = "finish"
    point_key: str
    status: str
    rows: list[dict[str, Any]]


Event = Environment | Start | Samples | Progress | Intermediate | Finish
_EVENTS: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="event")])


def write_event(event: Event) -> str:
    """One line of JSON. NaN and infinity become null, since JSON has neither."""
    return event.model_dump_json() + "\n"


def parse_event(line: bytes) -> Event | None:
    """Inverse of `write_event`; None for a line that is empty or that a crash or a full disk cut short.

    Raises ValueError (of pydantic) for JSON that is no event.
    """
    try:
        return _EVENTS.validate_json(line)
    except ValidationError as error:
        if error.errors()[0]["type"] == "json_invalid":
            return None
        raise
