"""Jobs, events and rows: what is written is read back, and what is wrong is refused where it is made."""

import io
import json
import math
import re
from typing import Any

import numpy as np
import pytest
from rows import train_point

from harness.measure.clocks import TimingConditions
from harness.measure.stats import Estimate, without_interval
from harness.store.rows import COLUMNS, checked
from harness.sweep.model import Measure
from harness.workloads import events
from harness.workloads.job import Job
from harness.workloads.reporter import EventReporter, make_row

POINT = train_point("moc_reference", "topk:0.25")
JOB = Job("t", "r1", 1, (POINT, train_point()), Measure(), "cpu", "work", "stdlib")


def test_a_job_is_read_back() -> None:
    """Points with their unset fields, and the settings of measuring."""
    assert Job.from_json(JOB.to_json()) == JOB


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ('"attempt": 1', '"attempt": "first"'),
        ('"method"', '"metod"'),
        ('"d_model": 128', '"d_model": "wide"'),
        ('"rel_ci"', '"rel"'),
        ("}", ""),
    ],
)
def test_what_is_no_job_is_refused(right: str, wrong: str) -> None:
    """A wrong type, name or end is a ValueError, in the job itself and in its points."""
    with pytest.raises(ValueError, match="validation error"):
        Job.from_json(JOB.to_json().replace(right, wrong))


def test_each_event_is_read_back() -> None:
    """The text of an event gives an equal one of the same kind."""
    for event in (
        events.Environment(record={"env_id": "e", "device_name": "D", "deep": [None, 1.5]}),
        events.Start(point_key="k"),
        events.Samples(run_id="r", point_key="k", metric="step_ms", x=[0, 1], value=[1.5, None]),
        events.Progress(point_key="k", fraction=0.5, text="half"),
        events.Intermediate(point_key="k", percent=10, values={"perplexity": 9.0}),
        events.Finish(point_key="k", status="ok", rows=[{"metric": "step_ms", "value": None}]),
    ):
        line = events.write_event(event)
        assert line.endswith("\n")
        assert events.parse_event(line.rstrip().encode()) == event


def test_half_a_line_is_no_event_and_a_wrong_one_is_an_error() -> None:
    """A kill in the middle of a line leaves nothing to read; whole JSON that is no event is a fault."""
    line = events.write_event(events.Start(point_key="k")).encode()
    assert [events.parse_event(line[:end]) for end in range(len(line) - 1)] == [None] * (len(line) - 1)
    for wrong in (
        b'{"event":"stop","point_key":"k"}',
        b'{"event":"start"}',
        b'{"event":"start","point":"k"}',
    ):
        with pytest.raises(ValueError, match="validation error"):
            events.parse_event(wrong)


def reported(*measured: tuple[str, Any], **settings: Any) -> list[dict[str, Any]]:
    """The events of a trial that measures these numbers of POINT."""
    stream = io.StringIO()
    reporter = EventReporter(JOB, stream, "D", "e")
    reporter.start(POINT)
    for metric, number in measured:
        reporter.measure(POINT, metric, number, **settings)
    reporter.samples(POINT, "step_ms", [1.0, math.nan])
    reporter.finish(POINT)
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_row_has_the_columns_of_the_store() -> None:
    """An estimate fills its columns, a plain number only the value; what is not finite is null."""
    found = reported(
        ("step_ms", Estimate(np.float64(2.0), math.nan, math.inf, 9, "median")),
        ("flops", 5),
        ("max_rel_err", without_interval(math.inf, 4, "max")),
        conditions=TimingConditions("graph_cold", 1755.0, False),
        detail="why",
    )
    rows = {row["metric"]: row for row in checked(found[-1]["rows"])}
    assert {tuple(row) for row in rows.values()} == {COLUMNS}
    names = ("value", "ci_low", "ci_high", "n_samples", "statistic", "timing_mode", "sm_clock_mhz", "detail")
    expected = [2.0, None, None, 9, "median", "graph_cold", 1755.0, "why"]
    assert [rows["step_ms"][name] for name in names] == expected
    assert [rows["flops"][name] for name in names[:5]] == [5, None, None, None, None]
    assert [rows["max_rel_err"][name] for name in names[:5]] == [None, None, None, 4, "max"]
    assert found[1]["value"] == [1.0, None]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"metric": "speed"}, "metric 'speed' is not in"),
        ({"status": "fine"}, "row of step_ms: column status: Value error, status 'fine' is not one of ok,"),
        ({"value": "fast"}, "row of step_ms: column value: Input should be a valid number"),
        ({"n_samples": 1.5}, "row of step_ms: column n_samples: Input should be a valid integer"),
        ({"colour": "red"}, "row of step_ms: column colour: Extra inputs are not permitted"),
    ],
)
def test_a_wrong_row_fails_where_it_is_made(columns: dict[str, Any], message: str) -> None:
    """An unknown metric, status or column, or a value of a wrong type, is named at once."""
    values = {"metric": "step_ms", "status": "ok", "detail": "", "device_name": "D", "env_id": "e", **columns}
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        make_row(JOB, POINT, **values)


def test_a_job_file_of_an_older_version_is_read() -> None:
    """A point without the fields that were not set, as job files have always had it."""
    values = json.loads(JOB.to_json())
    assert "selection" not in values["points"][1]
    assert Job.from_json(json.dumps(values)).points[1].selection is None
