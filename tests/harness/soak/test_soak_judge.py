"""The judge of a soak run: it finds what it is there to find."""

from pathlib import Path

import pytest
from rows import rows_of

from harness.soak.run import Verdict, count_losses, soak_sweep
from harness.soak.trial import expected_value
from harness.store.files import Store
from harness.store.lines import append_lines
from harness.sweep.grid import expand
from harness.sweep.point import Point


def write(
    folder: Path, point: Point, run: str = "r1", value: float | None = None, samples: bool = True
) -> None:
    """An outcome as a soak trial would leave it, straight into the files, past the store's own checks."""
    right = expected_value(point.key)
    append_lines(
        folder / "rows.jsonl", rows_of(point, {"latency_us": right if value is None else value}, run_id=run)
    )
    item = {"run_id": run, "point_key": point.key, "metric": "latency_us", "x": [0, 1]}
    if samples:
        append_lines(folder / "samples.jsonl", [{**item, "value": [right, right + 1]}])


POINTS = expand(soak_sweep(3).parts[0])


@pytest.mark.parametrize(
    ("flaw", "found"),
    [
        ("none", {}),
        ("missing", {"lost": 1}),
        ("seen_once", {"lost": 1}),
        ("twice", {"doubled": 1}),
        ("another_value", {"wrong": 1}),
        ("no_samples", {"wrong": 1}),
        ("crashed", {"failed": 1}),
    ],
)
def test_every_flaw_is_counted(tmp_path: Path, flaw: str, found: dict[str, int]) -> None:
    """One flaw in a sweep of three points is one in the verdict, of its kind."""
    first, second, third = POINTS
    write(
        tmp_path,
        first,
        value=1.0 if flaw == "another_value" else None,
        samples=flaw != "no_samples",
    )
    write(tmp_path, second)
    if flaw != "missing":
        write(tmp_path, third)
    if flaw == "twice":
        write(tmp_path, first, "r2")
    if flaw == "crashed":
        append_lines(tmp_path / "rows.jsonl", rows_of(first, {}, status="crashed", run_id="r2"))
    verdict = Verdict(points=3, workers=1)
    count_losses(
        verdict, Store(tmp_path), tmp_path, {"a point that was seen"} if flaw == "seen_once" else set()
    )
    assert {name: getattr(verdict, name) for name in ("lost", "doubled", "wrong", "failed")} == {
        **{"lost": 0, "doubled": 0, "wrong": 0, "failed": 0},
        **found,
    }
