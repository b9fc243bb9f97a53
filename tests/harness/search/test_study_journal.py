"""The Optuna study: a view that can be lost, and a sampler that is told what was measured."""

import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from rows import rows_of, train_point

from harness.errors import UserError
from harness.search.storage import open_storage
from harness.search.study import GridStudy
from harness.sweep.load import parse_sweep
from harness.sweep.model import Part, Sweep

GRID = """\
version: 1
name: demo
workload: ffn_train
axes: {preset: [1m], method: [dense, moc_reference], selection: ["topk:0.25"]}
fixed: {batch: 2, seq_len: 64, dtype: fp32}
"""
VALUES = {"saved_activation_bytes_per_token": 100.0, "step_ms": 2.0}
POINTS = [train_point(), train_point("moc_reference", "topk:0.25")]


def open_study(folder: Path, text: str = GRID) -> tuple[GridStudy, Sweep, Part]:
    """A study of the sweep's only part in `folder`."""
    sweep = parse_sweep(text, "s.yaml")
    part = sweep.parts[0]
    return (
        GridStudy(sweep, part, open_storage(folder), "cpu", POINTS if part.mode == "grid" else []),
        sweep,
        part,
    )


def trials(folder: Path, study: GridStudy) -> list[optuna.trial.FrozenTrial]:
    """All trials as another process reading the journal would see them."""
    return optuna.load_study(study_name=study.study.name, storage=open_storage(folder)).trials


def test_a_measured_point_is_a_complete_trial_with_flat_attributes(tmp_path: Path) -> None:
    """Values are the objectives in order; attributes and a note say what the point was."""
    study, _, _ = open_study(tmp_path)
    point = POINTS[1]
    study.complete(study.begin(point), point, rows_of(point, VALUES))
    (trial,) = trials(tmp_path, study)
    assert trial.state == optuna.trial.TrialState.COMPLETE
    assert trial.values == [2.0, 100.0]
    assert trial.params == {"preset": "1m", "method": "moc_reference", "selection": "topk:0.25"}
    said = {"method": "moc_reference", "selection": "topk:0.25", "k": 96, "preset": "1m", "seq_len": 64}
    assert {name: trial.user_attrs[name] for name in (*said, "status")} == {**said, "status": "ok"}
    notes = open_storage(tmp_path).get_study_system_attrs(0)
    assert "| step_ms | 2 | ms |" in notes[f"dashboard:{trial.number}:note_str:0"]


def test_a_failed_point_is_a_failed_trial_that_says_why(tmp_path: Path) -> None:
    """Status and reason stand on the trial."""
    study, _, _ = open_study(tmp_path)
    study.complete(study.begin(POINTS[0]), POINTS[0], rows_of(POINTS[0], {}, status="oom"))
    (trial,) = trials(tmp_path, study)
    assert (trial.state, trial.user_attrs["status"]) == (optuna.trial.TrialState.FAIL, "oom")
    assert trial.user_attrs["detail"] == "because"


def test_a_lost_journal_is_made_again_from_the_rows(tmp_path: Path) -> None:
    """Syncing an empty study adds every measured point once, and a second time nothing."""
    study, _, _ = open_study(tmp_path)
    rows = {point.key: rows_of(point, VALUES) for point in POINTS}
    assert study.sync(rows, POINTS) == 2
    assert study.sync(rows, POINTS) == 0
    assert [trial.values for trial in trials(tmp_path, study)] == [[2.0, 100.0]] * 2


def test_a_grid_point_is_shown_from_when_somebody_holds_it(tmp_path: Path) -> None:
    """One running trial while it is held, which becomes the complete one; a failure, and the success that
    follows it, are two."""
    study, _, _ = open_study(tmp_path)
    key = POINTS[0].key
    for _ in range(2):
        assert study.sync({}, POINTS, {key}) == 0
    assert [trial.state.name for trial in trials(tmp_path, study)] == ["RUNNING"]
    for _ in range(2):
        study.sync({key: rows_of(POINTS[0], {}, status="crashed")}, POINTS, {key})
    assert [trial.state.name for trial in trials(tmp_path, study)] == ["FAIL"]
    for _ in range(2):
        study.sync({key: rows_of(POINTS[0], VALUES)}, POINTS)
    assert [trial.state.name for trial in trials(tmp_path, study)] == ["FAIL", "COMPLETE"]


def test_running_trials_of_a_dead_runner_are_ended_and_living_ones_kept(tmp_path: Path) -> None:
    """Only trials whose point nobody holds become failed."""
    study, _, _ = open_study(tmp_path)
    for point in POINTS:
        study.begin(point)
    study.study.fail_stale(lambda: {POINTS[1].key})
    assert [trial.state.name for trial in trials(tmp_path, study)] == ["FAIL", "RUNNING"]


def test_a_changed_grid_gets_a_study_of_its_own(tmp_path: Path) -> None:
    """Optuna cannot change a parameter's choices, so other choices mean another study."""
    first, _, _ = open_study(tmp_path)
    sweep = parse_sweep(GRID, "s.yaml")
    other = GridStudy(sweep, sweep.parts[0], open_storage(tmp_path), "cpu", POINTS[:1])
    assert first.study.name != other.study.name


def test_sqlite_is_refused_and_the_journal_named(tmp_path: Path) -> None:
    """SQLite breaks under several workers, so it is not taken at all."""
    with pytest.raises(
        UserError, match="SQLite cannot be shared by workers; leave --storage out to use the journal"
    ):
        open_storage(tmp_path, "sqlite:///x.db")


WRITER = """
import sys; sys.path[:0] = sys.argv[2:]
from pathlib import Path; from test_study_journal import POINTS, VALUES, open_study; from rows import rows_of
study, _, _ = open_study(Path(sys.argv[1]))
for _ in range(10): study.complete(study.begin(POINTS[0]), POINTS[0], rows_of(POINTS[0], VALUES))
"""


def test_several_processes_share_one_journal(tmp_path: Path) -> None:
    """Three processes writing trials at once leave all 30, none broken."""
    study, _, _ = open_study(tmp_path)
    command = [sys.executable, "-c", WRITER, str(tmp_path), *map(str, Path(__file__).parents[:2])]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    found = trials(tmp_path, study)
    assert len(found) == 30
    assert {trial.number for trial in found} == set(range(30))
    assert all(trial.state == optuna.trial.TrialState.COMPLETE for trial in found)
