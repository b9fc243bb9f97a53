"""Trials in child processes: whatever one does to itself becomes a typed row, and its rivals go on."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch._dynamo
from rows import train_point

from harness.run.supervise import Finished, Listener, run_job
from harness.run.trial import RECOMPILE_LIMIT, set_process_options
from harness.sweep.model import Limits, Measure, Timing
from harness.sweep.point import Point
from harness.workloads.job import Job

HERE = str(Path(__file__).parent)


@pytest.fixture(autouse=True)
def rivals_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Child processes can import tests/harness/rivals.py."""
    monkeypatch.setenv("PYTHONPATH", HERE)


def outcomes(folder: Path, points: list[Point], limits: Limits, **settings: Any) -> dict[str, Finished]:
    """Run the points as one group; what was said of each, by method."""
    heard: list[Finished] = []
    listener = Listener(heard.append, lambda record: None, lambda *args: None)
    measure = Measure(timing=Timing(rel_ci=0.9, max_seconds=0.05), **settings)
    job = Job("t", "r", 1, tuple(points), measure, "cpu", str(folder))
    run_job(job, folder, limits, listener, device_name="D", environment={"OMP_NUM_THREADS": "1"})
    assert len({outcome.point.key for outcome in heard}) == len(heard)
    return {outcome.point.method: outcome for outcome in heard}


def tiny(method: str) -> Point:
    """An FFN small enough that processes, not arithmetic, take the time."""
    return train_point(method, preset=None, d_model=16, d_ffn=32, batch=1, seq_len=8)


@pytest.mark.parametrize(
    ("rival", "status", "detail"),
    [
        ("segfault", "crashed", "killed by signal SIGSEGV"),
        ("exits", "crashed", "process ended with exit code 0 before the point was finished"),
        ("hard_exit", "crashed", "process ended with exit code 3 before the point was finished"),
        ("sigkill", "crashed", "killed by signal SIGKILL"),
        ("raises", "crashed", "RuntimeError: this FFN always fails"),
        ("cuda_error", "crashed", "AcceleratorError: CUDA error: an illegal memory access was encountered"),
        ("memory", "oom", "no more"),
    ],
)
def test_a_trial_that_dies_is_a_typed_row_and_its_rivals_are_measured(
    tmp_path: Path, rival: str, status: str, detail: str
) -> None:
    """The bad method gets its status and reason; the dense one of the same group its time."""
    points = [tiny(f"rivals:{rival}"), tiny("dense")]
    heard = outcomes(tmp_path, points, Limits(trial_seconds=60, retries=0))
    bad = heard[f"rivals:{rival}"]
    assert (bad.status, bad.rows[-1]["detail"]) == (status, detail)
    assert bad.rows[-1]["value"] is None
    assert heard["dense"].status in ("ok", "unstable")
    if status == "crashed":  # nothing of that process can be trusted: dense got one of its own
        assert heard["dense"].rows[-1]["run_id"] != bad.rows[-1]["run_id"]


@pytest.mark.parametrize("rival", ["orphan", "loop"])
def test_a_trial_that_hangs_is_ended_with_everything_it_started(tmp_path: Path, rival: str) -> None:
    """After the time limit neither the trial nor a process it started is left."""
    heard = outcomes(tmp_path, [tiny(f"rivals:{rival}")], Limits(trial_seconds=8, retries=0))
    assert heard[f"rivals:{rival}"].status == "timeout"
    assert "limits.trial_seconds = 8" in heard[f"rivals:{rival}"].rows[-1]["detail"]
    job_file = str(next((tmp_path / "jobs").glob("*.json")))
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and _belongs_to(pid, job_file)]


def test_a_trial_over_its_memory_limit_is_ended_as_out_of_memory(tmp_path: Path) -> None:
    """The limit counts the resident set of the whole process group."""
    heard = outcomes(tmp_path, [tiny("rivals:hang")], Limits(trial_seconds=60, retries=0, memory_bytes=1e6))
    assert heard["rivals:hang"].status == "oom"
    assert "over limits.memory_bytes" in heard["rivals:hang"].rows[-1]["detail"]


def test_a_crash_is_tried_again_as_often_as_the_sweep_says(tmp_path: Path) -> None:
    """With one retry the row says attempt 2, and two jobs were run."""
    heard = outcomes(tmp_path, [tiny("rivals:hard_exit")], Limits(trial_seconds=60, retries=1))
    assert heard["rivals:hard_exit"].rows[-1]["attempt"] == 2
    assert len(list((tmp_path / "jobs").glob("*.json"))) == 2


def test_a_crash_leaves_the_end_of_its_log(tmp_path: Path) -> None:
    """The traceback that went to the log comes back with the outcome."""
    heard = outcomes(tmp_path, [tiny("rivals:raises")], Limits(trial_seconds=60, retries=0))
    assert "RuntimeError: this FFN always fails" in heard["rivals:raises"].log_tail


def test_somebody_elses_ffn_is_measured_beside_dense(tmp_path: Path) -> None:
    """A method given as package.module:factory gets its own rows by the same rules."""
    heard = outcomes(tmp_path, [tiny("dense"), tiny("rivals:good")], Limits(trial_seconds=60))
    assert {name: outcome.status in ("ok", "unstable") for name, outcome in heard.items()} == {
        "dense": True,
        "rivals:good": True,
    }


def test_the_limits_of_the_compiler_are_set_at_the_entry_of_a_trial() -> None:
    """On a GPU a group may compile as many variants as it has; on a CPU nothing is compiled or set."""
    names = ("recompile_limit", "accumulated_recompile_limit")
    with torch._dynamo.config.patch(dict.fromkeys(names, 7)):
        set_process_options("cpu")
        assert [getattr(torch._dynamo.config, name) for name in names] == [7, 7]
        set_process_options("cuda")
        assert [getattr(torch._dynamo.config, name) for name in names] == [RECOMPILE_LIMIT] * 2


def _belongs_to(pid: str, job_file: str) -> bool:
    """Whether a process is the trial of `job_file` or in the session it started."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return False
    return job_file in command or command.strip() == "sleep 1000"
