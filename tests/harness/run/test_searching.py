"""A whole search as `mocbench run` makes it, its trial processes replaced by quick ones."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from harness.measure.environment import device_name
from harness.report.build import conclusions, read_results, write_report
from harness.run.options import RunOptions, Summary
from harness.run.runner import run_sweep
from harness.search.proposals import SearchStudy
from harness.search.storage import JOURNAL_NAME, open_storage
from harness.store.frames import read_rows, wide
from harness.sweep.load import parse_sweep

SWEEP = """\
version: 1
name: tuned
workload: ffn_train
mode: optimize
axes:
  k_frac: {low: 0.05, high: 0.5}
  batch: [4, 8, 16]
  method: [moc_reference]
fixed: {preset: 1m, seq_len: 64, dtype: fp32}
optimize:
  n_trials: 6
  objectives:
    - {metric: step_ms, direction: minimize}
    - {metric: saved_activation_bytes_per_token, direction: minimize}
"""


@pytest.fixture(autouse=True)
def harness_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in can import the harness wherever the tests are started."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))


def run(folder: Path, text: str = SWEEP) -> tuple[Summary, str]:
    """Run the sweep; its summary and what it printed."""
    said = io.StringIO()
    command = (sys.executable, str(Path(__file__).parents[1] / "surface_trial.py"), device_name("cpu"))
    options = RunOptions(results=folder, device="cpu", workers=1, trial_command=command)
    summary = run_sweep(parse_sweep(text, "s.yaml"), options, Console(file=said, width=200))
    return summary, said.getvalue()


def study_of(folder: Path, text: str = SWEEP) -> SearchStudy:
    """The sweep's study as the journal has it."""
    sweep = parse_sweep(text, "s.yaml")
    return SearchStudy(sweep, sweep.parts[0], open_storage(folder / "tuned"), "cpu")


def test_a_search_runs_resumes_grows_and_survives_the_loss_of_its_journal(tmp_path: Path) -> None:
    """Six trials; again: none; eight wanted: two more; journal lost: nothing measured twice, and the trials
    are back. Out of memory is a result of a search, not a failure of the run."""
    summary, said = run(tmp_path)
    points = wide(read_rows(tmp_path / "tuned"))
    sparse = points[points["method"] == "moc_reference"]
    lost = int((sparse["status"] == "oom").sum())
    assert summary.failed == 0
    assert lost >= 1
    assert len(sparse) == 6
    assert set(points["method"]) == {"dense", "moc_reference"}
    assert points["point_key"].is_unique
    assert len(study_of(tmp_path).study.ended()) == 6
    assert f"[{len(points)}/{len(points)}]" in said

    summary, _ = run(tmp_path)
    assert len(wide(read_rows(tmp_path / "tuned"))) == len(points)
    more = SWEEP.replace("n_trials: 6", "n_trials: 8")
    run(tmp_path, more)
    grown = wide(read_rows(tmp_path / "tuned"))
    assert (grown["method"] == "moc_reference").sum() == 8
    assert grown["point_key"].is_unique

    (tmp_path / "tuned" / JOURNAL_NAME).unlink()
    summary, _ = run(tmp_path, more)
    assert len(wide(read_rows(tmp_path / "tuned"))) == len(grown)
    assert len(study_of(tmp_path, more).study.ended()) == 8


def test_the_report_of_a_search_needs_no_journal(tmp_path: Path) -> None:
    """Front, dense baselines, ratios and what ran out of memory come from the rows; the plots of grids, which
    would be a panel a trial, are not drawn."""
    run(tmp_path, SWEEP.replace("n_trials: 6", "n_trials: 14"))
    folder = tmp_path / "tuned"
    (folder / JOURNAL_NAME).unlink()
    names = [path.name for path in write_report(read_results(folder))]
    assert names == [
        "optimization_pareto.png",
        "optimization_progress.png",
        "report.md",
        "report.html",
    ]
    report = (folder / "report.md").read_text()
    said = conclusions(read_results(folder))
    trials = wide(read_rows(folder))
    lost = int((trials["status"] == "oom").sum())
    assert f"14 trials, of which {14 - lost} measured and {lost} out of memory" in said[0]
    assert all(sentence.replace("<", "&lt;") in report for sentence in said)
    assert "its speed (paired)" in report
    assert "#### Pareto set" in report
    assert "oom: made up" in report
    assert "All points of ffn_train" not in report


def test_what_a_search_asks_for_and_the_workload_lacks_ends_the_run_at_once(tmp_path: Path) -> None:
    """One trial is enough to know; the message names what is measured."""
    text = SWEEP.replace("metric: step_ms", "metric: perplexity").replace("[4, 8, 16]", "[4, 8]")
    with pytest.raises(ValueError, match="ffn_train does not measure perplexity here; valid: saved_act"):
        run(tmp_path, text)
    assert len(list((tmp_path / "tuned" / "jobs").glob("*.json"))) == 2  # the trial and its baseline


def test_jobs_of_a_search_put_dense_beside_the_trial(tmp_path: Path) -> None:
    """So that the speed against dense is a paired ratio of one process."""
    run(tmp_path, SWEEP.replace("n_trials: 6", "n_trials: 2"))
    jobs = [json.loads(path.read_text()) for path in (tmp_path / "tuned" / "jobs").glob("*.json")]
    methods = sorted([point["method"] for point in job["points"]] for job in jobs)
    assert methods[-2:] == [["dense", "moc_reference"]] * 2
