"""The store: finished points are durable, whole and there once; tables follow from them."""

import json
import os
from pathlib import Path

import pandas as pd
import pytest
from rows import rows_of, train_point

from harness.store import COLUMNS, Store, export, finished, read_raw, read_rows, read_samples, wide

VALUES = {"step_ms": 2.0, "forward_ms": 0.5, "saved_activation_bytes_per_token": 100.0}


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    """Every column and value survives the file, with missing ones as missing."""
    rows = rows_of(train_point(), VALUES)
    assert Store(tmp_path).append(rows)
    frame = read_rows(tmp_path)
    assert list(frame.columns) == list(COLUMNS)
    assert dict(zip(frame["metric"], frame["value"], strict=True)) == VALUES
    assert frame["selection"].isna().all()
    assert frame["k"].tolist() == [384] * 3


def test_a_measured_point_is_not_stored_twice(tmp_path: Path) -> None:
    """A second measurement of a point on the same device is refused, on another device kept."""
    store = Store(tmp_path)
    assert store.append(rows_of(train_point(), VALUES))
    assert not store.append(rows_of(train_point(), VALUES, run_id="r2"))
    assert store.append(rows_of(train_point(), VALUES, run_id="r3", device="other"))
    assert len(read_rows(tmp_path)) == 6


def test_a_failure_gives_way_to_a_later_success(tmp_path: Path) -> None:
    """A failed point may be measured again, and tables then show the measurement."""
    store = Store(tmp_path)
    store.append(rows_of(train_point(), {}, status="crashed"))
    assert store.finished() == {("D", train_point().key): "crashed"}
    assert store.append(rows_of(train_point(), VALUES, run_id="r2"))
    assert set(read_rows(tmp_path)["status"]) == {"ok"}
    assert len(read_raw(tmp_path / "rows.jsonl")) == 4


def test_a_later_failure_does_not_hide_a_measurement(tmp_path: Path) -> None:
    """What was measured stays what tables show, whatever happens to a repetition."""
    store = Store(tmp_path)
    store.append(rows_of(train_point(), VALUES))
    store.append(rows_of(train_point(), {}, status="oom", run_id="r2"), replace=True)
    assert set(read_rows(tmp_path)["status"]) == {"ok"}
    assert finished(read_raw(tmp_path / "rows.jsonl")) == {("D", train_point().key): "ok"}


@pytest.mark.parametrize("kept", range(0, 100, 7))
def test_a_truncated_file_loses_only_the_point_that_was_being_written(tmp_path: Path, kept: int) -> None:
    """Cut anywhere inside the last point: the first stays, the second can be written again, whole."""
    store = Store(tmp_path)
    store.append(rows_of(train_point(), VALUES))
    whole = store.path.stat().st_size
    second = rows_of(train_point("dense_gu"), VALUES, run_id="r2")
    store.append(second)
    os.truncate(store.path, whole + (store.path.stat().st_size - whole - 1) * kept // 100)
    assert store.finished() == {("D", train_point().key): "ok"}
    assert store.append(second)
    assert set(read_rows(tmp_path)["method"]) == {"dense", "dense_gu"}
    assert len(read_rows(tmp_path)) == 6


def test_a_disk_that_fills_up_leaves_no_half_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a write fails half-way the file is as before, and the same point can be written later."""
    store = Store(tmp_path)
    store.append(rows_of(train_point(), VALUES))
    before = store.path.read_bytes()
    real_write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) > 100:
            return real_write(descriptor, data[:100])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: full(fd, bytes(data)[:150]))
        with pytest.raises(OSError, match="No space left"):
            store.append(rows_of(train_point("dense_gu"), VALUES, run_id="r2"))
    assert store.path.read_bytes() == before
    assert store.append(rows_of(train_point("dense_gu"), VALUES, run_id="r2"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "speed"}, "metric 'speed' is not in"),
        ({"status": "fine"}, "status 'fine' is not one of ok, oom"),
        ({"colour": "red"}, "other columns than the schema: \\['colour'\\]"),
    ],
)
def test_rows_outside_the_schema_are_refused(tmp_path: Path, change: dict[str, str], message: str) -> None:
    """An unknown metric, status or column is an error that names it, and nothing is written."""
    rows = rows_of(train_point(), VALUES)
    rows[1] = {**rows[1], **change}
    with pytest.raises(ValueError, match=message):
        Store(tmp_path).append(rows)
    assert read_raw(tmp_path / "rows.jsonl") == []


def test_a_point_needs_its_primary_metric(tmp_path: Path) -> None:
    """A measured ffn_train point without step_ms is refused: it could never count as finished."""
    with pytest.raises(ValueError, match="needs exactly one step_ms row, it has 0"):
        Store(tmp_path).append(rows_of(train_point(), {"forward_ms": 1.0}))


def test_wide_has_one_line_per_point(tmp_path: Path) -> None:
    """A column per metric, failures with their status and no value."""
    store = Store(tmp_path)
    store.append(rows_of(train_point(), VALUES))
    store.append(rows_of(train_point("moc_reference", "topk:0.25"), {}, status="oom", run_id="r2"))
    table = wide(read_rows(tmp_path)).set_index("method")
    assert table.loc["dense", "step_ms"] == 2.0
    assert pd.isna(table.loc["moc_reference", "step_ms"])
    assert table["status"].to_dict() == {"dense": "ok", "moc_reference": "oom"}
    assert table["k"].to_dict() == {"dense": 384, "moc_reference": 96}


def test_exports_agree_with_the_rows(tmp_path: Path) -> None:
    """Parquet, CSV and a folder that kept only tables all give the same rows."""
    store = Store(tmp_path)
    store.append(rows_of(train_point(), VALUES))
    store.append_samples(
        [{"run_id": "r1", "point_key": "k", "metric": "step_ms", "x": [0, 1], "value": [2.0, 3.0]}]
    )
    assert {path.name for path in export(tmp_path)} == {
        "rows.parquet",
        "rows.csv",
        "wide.csv",
        "samples.parquet",
    }
    rows = read_rows(tmp_path)
    assert pd.read_csv(tmp_path / "rows.csv")["value"].tolist() == [*list(VALUES.values())[1:], 2.0]
    assert read_samples(tmp_path)["value"].tolist() == [2.0, 3.0]
    (tmp_path / "rows.jsonl").unlink()
    (tmp_path / "samples.jsonl").unlink()
    pd.testing.assert_frame_equal(read_rows(tmp_path), rows)
    assert read_samples(tmp_path)["x"].tolist() == [0, 1]


def test_an_environment_is_kept_once(tmp_path: Path) -> None:
    """The same environment from many trials is one line."""
    store = Store(tmp_path)
    for _ in range(3):
        store.append_environment({"env_id": "a", "torch": "2"})
    store.append_environment({"env_id": "b", "torch": "3"})
    lines = (tmp_path / "environments.jsonl").read_text().splitlines()
    assert [json.loads(line)["env_id"] for line in lines] == ["a", "b"]
