"""Trials in child processes: whatever one does to itself becomes a typed row, and its rivals go on."""

import os
from collections.abc import Iterator
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

HERE = str(Path(__file__).parents[1])


@pytest.fixture(scope="module", autouse=True)
def rivals_on_path() -> Iterator[None]:
    """Child processes can import tests/harness/rivals.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (HERE, os.environ.get("PYTHONPATH")))))
        yield


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


# In this order in one job, so that each process dies at its first point and the last one measures the rest.
RIVALS = ("segfault", "exits", "hard_exit", "sigkill", "raises", "cuda_error", "memory")


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    """What became of every bad rival, of dense and of a good rival in one group, by method."""
    points = [*(tiny(f"rivals:{name}") for name in RIVALS), tiny("dense"), tiny("rivals:good")]
    return outcomes(tmp_path_factory.mktemp("group"), points, Limits(trial_seconds=60, retries=0))


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
    group: dict[str, Finished], rival: str, status: str, detail: str
) -> None:
    """The bad method gets its status and reason; the dense one of the same group its time."""
    bad = group[f"rivals:{rival}"]
    assert (bad.status, bad.rows[-1]["detail"]) == (status, detail)
    assert bad.rows[-1]["value"] is None
    assert group["dense"].status in ("ok", "unstable")
    if status == "crashed":  # nothing of that process can be trusted: each of the others got another
        others = [outcome for outcome in group.values() if outcome is not bad]
        assert bad.rows[-1]["run_id"] not in {outcome.rows[-1]["run_id"] for outcome in others}


def test_a_trial_that_hangs_is_ended_with_everything_it_started(tmp_path: Path) -> None:
    """After the time limit neither the trial nor a process it started is left."""
    heard = outcomes(tmp_path, [tiny("rivals:orphan")], Limits(trial_seconds=8, retries=0))
    assert heard["rivals:orphan"].status == "timeout"
    assert "limits.trial_seconds = 8" in heard["rivals:orphan"].rows[-1]["detail"]
    job_file = str(next((tmp_path / "jobs").glob("*.json")))
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and _belongs_to(pid, job_file)]


def test_a_trial_over_its_memory_limit_is_ended_as_out_of_memory(tmp_path: Path) -> None:
    """The limit counts the resident set of the whole process group."""
    heard = outcomes(tmp_path, [tiny("rivals:hang")], Limits(trial_seconds=60, retries=0, memory_bytes=1e6))
    assert heard["rivals:hang"].status == "oom"
    assert "over limits.memory_bytes" in heard["rivals:hang"].rows[-1]["detail"]


def test_a_crash_leaves_the_end_of_its_log(group: dict[str, Finished]) -> None:
    """The traceback that went to the log comes back with the outcome."""
    assert "RuntimeError: this FFN always fails" in group["rivals:raises"].log_tail


def test_somebody_elses_ffn_is_measured_beside_dense(group: dict[str, Finished]) -> None:
    """A method given as package.module:factory gets its own rows by the same rules."""
    assert {name: group[name].status in ("ok", "unstable") for name in ("dense", "rivals:good")} == {
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
