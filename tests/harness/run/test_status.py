"""`mocbench status`, and how the command line ends where there is nothing to work on."""

import shutil
import sys
from pathlib import Path

import pytest
from rows import rows_of, train_point
from typer.testing import CliRunner

from harness.cli import app, main
from harness.errors import UserError
from harness.store.files import Store
from harness.sweep.grid import expand
from harness.sweep.load import load_sweep
from harness.sweep.point import Point

SWEEP = """\
version: 1
name: half
parts:
  - workload: ffn_train
    axes: {batch: [1, 2], method: [dense, moc_reference], selection: ["topk:0.25", "topk:48"]}
    fixed: {preset: 1m, seq_len: 64, dtype: fp32}
  - workload: pretrain
    axes: {method: [dense, moc_reference], selection: ["topk:0.25"]}
    fixed: {preset: 1m, batch: 4, seq_len: 64, train_tokens: 8192, dtype: fp32}
"""


@pytest.fixture
def points(tmp_path: Path) -> list[Point]:
    """The points of a sweep file in `tmp_path` of which nothing is measured yet; its text is `d1`."""
    (tmp_path / "half.yaml").write_text(SWEEP)
    parts = load_sweep(tmp_path / "half.yaml").parts
    return [point for part in parts for point in expand(part, {32000: "d1"})]


def status(folder: Path) -> str:
    """What the verb prints about the sweep file in `folder`, spaces and lines of tables left out."""
    named = [str(folder / "half.yaml"), "--device", "cpu", "--results", str(folder / "results")]
    done = CliRunner().invoke(app, ["status", *named])
    assert done.exit_code == 0, f"{done.output} {done.exception!r}"
    return "\n".join(" ".join(line.replace("│", " ").split()) for line in done.output.splitlines())


def test_status_counts_and_names_what_is_missing(tmp_path: Path, points: list[Point]) -> None:
    """Counts of measured, failed, unsupported and missing points, and the labels of the missing ones."""
    store = Store(tmp_path / "results/half")
    *train, pretrain_dense, pretrain_moc = points
    store.append(rows_of(train[0], {"step_ms": 1.0}))
    store.append(rows_of(train[1], {"step_ms": 1.0}, status="unstable"))
    store.append(rows_of(train[2], {}, status="oom"))
    store.append(rows_of(train[3], {}, status="unsupported"))
    store.append(rows_of(pretrain_dense, {"tokens_per_s": 1.0}))
    store.append(rows_of(train[0], {"step_ms": 1.0}, device="other"))
    store.append(rows_of(train_point(seed=7), {"step_ms": 1.0}))  # of no part of the sweep
    said = status(tmp_path)
    assert "D ffn_train 2 1 1 2" in said
    assert "D pretrain 1 0 0 1" in said
    assert "other ffn_train 1 0 0 5" in said
    assert "other pretrain 0 0 0 2" in said
    listed = [line for line in said.splitlines() if line.startswith("missing on D: ")]
    assert listed == [f"missing on D: {point.label}" for point in (*train[4:], pretrain_moc)]
    assert "D: 1 point on record is not in the sweep's grids" in said
    assert f"oom: {train[2].label}: because" in said


def test_a_long_list_of_missing_points_is_cut(
    tmp_path: Path, points: list[Point], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the limit only their number is said."""
    monkeypatch.setattr("harness.run.status.MISSING_LINES", 3)
    Store(tmp_path / "results/half").append(rows_of(points[0], {"step_ms": 1.0}))
    lines = status(tmp_path).splitlines()
    assert sum(line.startswith("missing on D: ") for line in lines) == 4
    assert "missing on D: 4 more points" in lines


def test_status_reads_a_folder_of_which_only_the_tables_were_kept(
    tmp_path: Path, points: list[Point]
) -> None:
    """`rows.parquet` says the same as `rows.jsonl`."""
    folder = tmp_path / "results/half"
    Store(folder).append(rows_of(points[0], {"step_ms": 1.0}))
    CliRunner().invoke(app, ["report", str(folder)])
    (folder / "rows.jsonl").unlink()
    assert "D ffn_train 1 0 0 5" in status(tmp_path)


def test_nothing_measured_is_one_line(tmp_path: Path, points: list[Point]) -> None:
    """No folder yet."""
    named = [str(tmp_path / "half.yaml"), "--device", "cpu", "--results", str(tmp_path / "results")]
    done = CliRunner().invoke(app, ["status", *named])
    assert isinstance(done.exception, UserError)
    assert str(done.exception) == f"{tmp_path / 'results/half'}: nothing is measured yet; run the sweep first"


@pytest.mark.parametrize("verb", ["report", "status", "crossover"])
def test_empty_rows_are_one_line_and_exit_code_2(
    tmp_path: Path,
    points: list[Point],
    verb: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run that was killed before its first row leaves an empty file."""
    folder = tmp_path / "results/half"
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").touch()
    shutil.copy(tmp_path / "half.yaml", folder / "sweep.yaml")
    named = {
        "report": [str(folder)],
        "status": [str(tmp_path / "half.yaml"), "--device", "cpu", "--results", str(tmp_path / "results")],
        "crossover": [str(folder)],
    }
    monkeypatch.setattr(sys, "argv", ["mocbench", verb, *named[verb]])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"{folder}: ")
