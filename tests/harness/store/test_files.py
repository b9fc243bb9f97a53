"""The store: finished points are durable, whole and there once; tables follow from them."""

import json
import os
from pathlib import Path

import pandas as pd
import pytest
from rows import rows_of, train_point

from harness.store.files import Store, failure_log
from harness.store.frames import export, read_rows, read_samples, wide
from harness.store.rows import COLUMNS

VALUES = {"step_ms": 2.0, "forward_ms": 0.5, "saved_activation_bytes_per_token": 100.0}


def whole_rows(folder: Path) -> list[dict[str, object]]:
    """Every row of every whole outcome, in the order they were written."""
    return [row for batch in Store(folder).batches() for row in batch.rows]


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
    assert len(whole_rows(tmp_path)) == 4


def test_a_later_failure_does_not_hide_a_measurement(tmp_path: Path) -> None:
    """What was measured stays what counts: a failure that comes late, as from a runner that was thought dead,
    is refused, and one that stands in the file all the same is not shown."""
    store = Store(tmp_path)
    store.append(rows_of(train_point(), VALUES))
    failure = rows_of(train_point(), {}, status="oom", run_id="r2")
    assert not store.append(failure)
    with store.path.open("a") as file:
        file.write(json.dumps(failure[0]) + "\n")
    assert set(read_rows(tmp_path)["status"]) == {"ok"}
    for reader in (store, Store(tmp_path)):
        assert reader.finished() == {("D", train_point().key): "ok"}
        assert len(reader.current("D")[train_point().key]) == len(VALUES)


def test_the_same_outcome_is_written_once(tmp_path: Path) -> None:
    """Bringing a failure again, as when tables are copied between stores, adds nothing."""
    failure = rows_of(train_point(), {}, status="oom")
    assert Store(tmp_path).append(failure)
    assert not Store(tmp_path).append(failure)
    assert len(whole_rows(tmp_path)) == 1


def test_every_writer_sees_what_the_others_wrote(tmp_path: Path) -> None:
    """Two stores on one folder, appending in turns, agree at every step with one that reads it anew."""
    writers = [Store(tmp_path), Store(tmp_path)]
    points = [train_point(seed=seed) for seed in range(6)]
    for index, point in enumerate(points):
        run = f"r{index}"
        assert writers[index % 2].append(rows_of(point, VALUES, run_id=run))
        assert not writers[1 - index % 2].append(rows_of(point, VALUES, run_id=run + "again"))
        expected = {("D", known.key): "ok" for known in points[: index + 1]}
        assert [store.finished() for store in (*writers, Store(tmp_path))] == [expected] * 3
    assert writers[0].finished([points[1].key, "unknown"]) == {("D", points[1].key): "ok"}
    rows = writers[0].current("D", [points[4].key])
    assert [(row["metric"], row["run_id"]) for row in rows[points[4].key]] == [
        ("forward_ms", "r4"),
        ("saved_activation_bytes_per_token", "r4"),
        ("step_ms", "r4"),
    ]


@pytest.mark.parametrize("change", ["replaced", "shortened", "deleted"])
def test_a_file_that_is_not_what_it_was_is_read_anew(tmp_path: Path, change: str) -> None:
    """A store that has read the file notices when somebody puts another one in its place or cuts it."""
    store = Store(tmp_path)
    for seed in range(3):
        store.append(rows_of(train_point(seed=seed), VALUES, run_id=f"r{seed}"))
    lines = store.path.read_text().splitlines(keepends=True)
    if change == "replaced":
        (tmp_path / "other").write_text("".join(lines[:3] + lines[6:]))
        (tmp_path / "other").replace(store.path)
        left = {0, 2}
    elif change == "shortened":
        store.path.write_text("".join(lines[3:6]))
        left = {1}
    else:
        store.path.unlink()
        left = set()
    assert store.finished() == {("D", train_point(seed=seed).key): "ok" for seed in left}
    assert store.append(rows_of(train_point(seed=9), VALUES, run_id="r9"))
    assert len(Store(tmp_path).finished()) == len(left) + 1


def test_a_failure_keeps_the_end_of_its_log(tmp_path: Path) -> None:
    """The log lies beside the rows, and comes along when everything is read for another store."""
    failure = rows_of(train_point(), {}, status="crashed")
    Store(tmp_path).append(failure, log="line 1\nFatal Python error")
    assert failure_log(tmp_path, failure[0]).read_text() == "line 1\nFatal Python error\n"
    (batch,) = Store(tmp_path).batches()
    assert (batch.rows, batch.samples, batch.log) == (failure, [], "line 1\nFatal Python error")


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
    assert whole_rows(tmp_path) == []


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
    samples = {"run_id": "r1", "point_key": "k", "metric": "step_ms", "x": [0, 1], "value": [2.0, 3.0]}
    Store(tmp_path).append(rows_of(train_point(), VALUES), [samples])
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
