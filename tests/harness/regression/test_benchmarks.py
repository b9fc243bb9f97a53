"""The benchmarks themselves: which there are, that each runs, and what `make bench` keeps of them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from harness.cli import app
from harness.measure.timing import MODES
from harness.regression.benchmarks import benchmarks
from harness.regression.budget.check import ROOT
from harness.regression.compare.sides import find_side
from harness.regression.compare.stored import compare_stored
from harness.regression.history import read_runs

CPU = torch.device("cpu")
# Few rounds: what is kept is looked at, not how long it took.
RUN_BENCH = """
import sys, pytest
sys.path.insert(0, "tests/benchmarks")
import bench_all
bench_all.SECONDS = 0.0
options = ["-p", "no:xdist", "-q", "--benchmark-only", "--benchmark-autosave", "--benchmark-save-data"]
sys.exit(pytest.main(["tests/benchmarks/bench_all.py", "-k", "select", *options, *sys.argv[1:]]))
"""


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_there_is(device: str) -> None:
    """Steps, decoding, selection and a whole model are timed on either device; a name is its benchmark's."""
    found = benchmarks(device)
    assert all(benchmark.name == name for name, benchmark in found.items())
    assert all(benchmark.mode in MODES for benchmark in found.values())
    kinds = {"-".join(name.split("-")[:2]) for name in found}
    assert {"ffn-step", "ffn-decode", "select-topk", "select-nm", "model-step"} <= kinds
    assert not any("=" in name or " " in name for name in found)  # NAME=SHARE has to be told apart


def test_the_kernels_are_timed_where_they_run() -> None:
    """On a GPU the Triton methods and their passes are timed, elsewhere what they are checked against."""
    on_gpu, on_cpu = benchmarks("cuda"), benchmarks("cpu")
    kernels = {"ffn-step-moc-topk", "ffn-step-moc-nm", "ffn-step-moc_fp8-topk", "expand", "ffn-decode-moc-nm"}
    assert kernels <= set(on_gpu)
    assert not kernels & set(on_cpu)
    assert 8 <= len(on_gpu) <= 10  # each costs the acceptance of a change half a second thirty times


@pytest.mark.parametrize("name", benchmarks("cpu"))
def test_each_runs(name: str) -> None:
    """Every benchmark of the CPU gets ready and does its work, twice, on memory of its own each time."""
    benchmark = benchmarks("cpu")[name]
    for method in (benchmark.open(CPU), benchmark.open(CPU)):
        method.call()
        assert method.name == name
        assert method.units >= 1


def test_make_bench_keeps_what_compare_and_history_read(tmp_path: Path) -> None:
    """A run leaves one file by machine, with samples, environment and rates, which is the same as itself."""
    command = [sys.executable, "-c", RUN_BENCH, f"--benchmark-storage={tmp_path}"]
    # Not a worker of the run this test is part of, which pytest-benchmark would see by the environment.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        command, cwd=ROOT, env={**env, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    (path,) = tmp_path.glob("*/0001_*.json")
    (run,) = read_runs(tmp_path)
    assert set(run.medians_ms) == {"select-topk", "select-nm"}
    assert all(ms > 0 for ms in run.medians_ms.values())
    assert run.environment["torch"] == torch.__version__
    outcomes, _environment = compare_stored(find_side(str(path)), find_side(str(path)))
    assert {outcome.name for outcome in outcomes} == set(run.medians_ms)
    assert all(outcome.change is not None and outcome.change.value == 0 for outcome in outcomes)


def test_the_workflow_runs_what_there_is() -> None:
    """Every target and verb that CI calls exists, so the workflow cannot rot unseen."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/bench.yml").read_text())
    assert set(workflow["jobs"]) == {"exact", "timed", "nightly"}
    commands = "\n".join(
        step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step
    )
    commands += (ROOT / ".ci/run").read_text()
    targets = re.findall(r"^make ([a-z-]+)", commands, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert {"setup", "bench-check", "bench", "test", "lint"} <= set(targets)
    assert all(f"\n{target}: " in makefile for target in targets)
    verbs = set(re.findall(r"mocbench ([a-z]+)", commands))
    assert verbs == {"compare", "history"}
    assert verbs <= {command.callback.__name__ for command in app.registered_commands if command.callback}
