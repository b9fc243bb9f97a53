"""The main job end to end, at a size that takes seconds: the command people type, and what it leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from harness.cli import app

TINY = """\
version: 1
name: tiny
parts:
  - workload: pretrain
    axes:
      preset: [1m]
      seq_len: [32]
      method: [dense, moc_reference]
      selection: ["topk:0.25"]
    fixed: {tokens: 256, train_tokens: 8192, eval_tokens: 2048, vocab_size: 512, lr: 3e-3, dtype: fp32}
  - workload: ffn_train
    axes: {preset: [1m], method: [dense, moc_reference], selection: ["nm:2:8"]}
    fixed: {tokens: 128, seq_len: 64, dtype: fp32}
    measure: {timing: {rel_ci: 0.5, max_seconds: 0.3}}
"""
FILES = ("rows.jsonl", "rows.parquet", "rows.csv", "wide.csv", "report.md", "report.html", "study.journal")


def command(folder: Path, *options: str) -> list[str]:
    """`mocbench run` on the tiny sweep, CPU, results under `folder`."""
    sweep = folder / "tiny.yaml"
    if not sweep.exists():
        sweep.write_text(TINY)
    return [
        *(sys.executable, "-m", "harness", "run", str(sweep), "--device", "cpu"),
        *("--results", str(folder / "results"), *options),
    ]


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run to the end; the exit code is the caller's to judge."""
    return subprocess.run(command(folder, *options), capture_output=True, text=True, check=False)


def raw_rows(folder: Path) -> list[dict[str, object]]:
    """The lines of rows.jsonl as they are."""
    path = folder / "results/tiny/rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@dataclass(frozen=True)
class Interrupted:
    """A sweep that was killed after its first point and then run to its end."""

    folder: Path
    before: list[dict[str, object]]  # the rows when it was killed
    all_gone: bool  # whether no process of it was left then


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    """kill -9 of the tiny sweep after its first point, and the run that ends it."""
    folder = tmp_path_factory.mktemp("sweep")
    process = subprocess.Popen(
        command(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[1/4]"):
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    before, all_gone = raw_rows(folder), _gone(str(folder / "results"))
    done = run(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return Interrupted(folder, before, all_gone)


@pytest.fixture(scope="module")
def finished(interrupted: Interrupted) -> Path:
    """A folder in which the tiny sweep has come to its end."""
    return interrupted.folder


def test_a_sweep_leaves_tables_plots_report_and_study(finished: Path) -> None:
    """Every promised file is there, plots are PNG files, and every point is ok."""
    results = finished / "results/tiny"
    assert [name for name in FILES if not (results / name).is_file()] == []
    plots = list((results / "plots").glob("*.png"))
    assert len(plots) >= 4
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)
    wide = pd.read_csv(results / "wide.csv")
    assert len(wide) == 2 + 2
    assert set(wide["status"]) <= {"ok", "unstable"}  # timing on a busy machine may reach its cap


def test_training_lowers_perplexity_below_the_untrained_one(finished: Path) -> None:
    """Real text was learned from: perplexity falls well below its untrained value, for every method."""
    wide = pd.read_csv(finished / "results/tiny/wide.csv")
    trained = wide[wide["workload"] == "pretrain"]
    assert (trained["untrained_perplexity"].between(300, 900)).all()  # near the 512 tokens of the vocabulary
    assert (trained["perplexity"] < 0.8 * trained["untrained_perplexity"]).all()


def test_dense_and_moc_are_paired(finished: Path) -> None:
    """Same seed, same initial weights: dense and MoC that differ only in the FFN start at nearly one loss."""
    wide = pd.read_csv(finished / "results/tiny/wide.csv")
    start = wide[wide["workload"] == "pretrain"].pivot_table(
        index="seq_len", columns="method", values="untrained_loss_nats"
    )
    assert ((start["dense"] - start["moc_reference"]).abs() < 0.05).all()


def test_a_second_run_measures_nothing(finished: Path) -> None:
    """All points are found finished; rows.jsonl does not change by a byte."""
    before = (finished / "results/tiny/rows.jsonl").read_bytes()
    again = run(finished)
    assert again.returncode == 0
    assert "4 points, 4 already measured" in again.stdout
    assert (finished / "results/tiny/rows.jsonl").read_bytes() == before


def test_status_and_plan_agree_that_nothing_is_missing(finished: Path) -> None:
    """Both verbs read the same rows."""
    sweep, results = str(finished / "tiny.yaml"), str(finished / "results")
    options = ["--device", "cpu", "--results", results]
    plan, status = (CliRunner().invoke(app, [verb, sweep, *options]) for verb in ("plan", "status"))
    assert (plan.exit_code, status.exit_code) == (0, 0)
    assert "4 points, 0 to measure" in plan.output
    assert "pretrain" in status.output


def test_a_killed_sweep_goes_on_with_just_what_is_missing(interrupted: Interrupted) -> None:
    """kill -9 after the first point: its rows stay, no trial survives, the next run does the rest."""
    before, after = interrupted.before, raw_rows(interrupted.folder)
    assert {row["metric"] for row in before} >= {"tokens_per_s", "perplexity"}
    assert len({row["point_key"] for row in before}) < 4
    assert interrupted.all_gone
    assert after[: len(before)] == before
    points = [(row["point_key"], row["metric"]) for row in after]
    assert len(set(points)) == len(points)
    assert len({row["point_key"] for row in after}) == 4


def test_a_bad_sweep_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    """The message goes to standard error, with nothing else around it."""
    (tmp_path / "tiny.yaml").write_text(TINY.replace("seq_len: [32]", "seqlen: [32]"))
    done = run(tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"{tmp_path}/tiny.yaml: parts[0].axes.seqlen is not an axis of pretrain; did you mean seq_len?\n"
    )


def _gone(text: str) -> bool:
    """Whether no process with `text` in its command line is left, within ten seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        lines = [_command_line(pid) for pid in os.listdir("/proc") if pid.isdigit()]
        if not any(text in line for line in lines):
            return True
    return False


def _command_line(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
