"""Whatever a trial does to itself is a typed row with the end of its log, and no process of it is left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rows import train_point

from harness.run.guard import end_orphans
from harness.run.supervise import LOG_TAIL_LINES, Finished, Listener, run_job
from harness.store.processes import process_start
from harness.sweep.model import Limits, Measure
from harness.workloads.job import Job

HERE = Path(__file__).parents[1]
COMMAND = (sys.executable, str(HERE / "fault_trial.py"))


def run(folder: Path, faults: list[str], limits: Limits | None = None) -> list[Finished]:
    """One job with a point for each fault, in order; what was heard, one outcome a point."""
    (folder / "faults").write_text(json.dumps(dict(enumerate(faults, start=1))))
    points = tuple(train_point(batch=number) for number in range(1, len(faults) + 1))
    heard: list[Finished] = []
    run_job(
        Job("t", "r", 1, points, Measure(), "cpu", str(folder)),
        folder,
        limits or Limits(trial_seconds=30, retries=0),
        Listener(heard.append, lambda record: None, lambda *args: None),
        device_name="D",
        environment={"FAULTS": str(folder / "faults"), "PIDS": str(folder / "pids"), "DEVICE": "D"},
        command=COMMAND,
    )
    assert sorted(outcome.point.batch for outcome in heard) == [point.batch for point in points]
    return sorted(heard, key=lambda outcome: outcome.point.batch)


def left(folder: Path) -> list[int]:
    """Those of the last trial's processes that still live: itself, its guard and what it started."""
    return [pid for pid in json.loads((folder / "pids").read_text()) if process_start(pid) is not None]


@pytest.mark.parametrize(
    ("fault", "limits", "status", "detail"),
    [
        ("segfault", {}, "crashed", "killed by signal SIGSEGV"),
        ("abort", {}, "crashed", "killed by signal SIGABRT"),
        ("exit", {}, "crashed", "process ended with exit code 0 before the point was finished"),
        ("hard_exit", {}, "crashed", "process ended with exit code 3 before the point was finished"),
        ("sigkill", {}, "crashed", "killed by signal SIGKILL"),
        ("signals_its_group", {}, "crashed", "killed by signal SIGTERM"),
        ("kills_its_guard", {}, "crashed", "killed by signal SIGKILL"),
        ("loop", {"trial_seconds": 1.5}, "timeout", "longer than limits.trial_seconds = 1.5"),
        ("deaf", {"trial_seconds": 1.5}, "timeout", "longer than limits.trial_seconds = 1.5"),
        ("stops", {"trial_seconds": 1.5}, "timeout", "longer than limits.trial_seconds = 1.5"),
        ("memory", {"memory_bytes": 1e9}, "oom", "is over limits.memory_bytes = 1.00 GB"),
        ("oom", {}, "oom", "no more"),
        ("dies_when_done", {}, "ok", ""),
        ("half_a_line", {}, "ok", ""),
    ],
)
def test_every_fault_is_a_typed_row_and_leaves_no_process(
    tmp_path: Path, fault: str, limits: dict[str, float], status: str, detail: str
) -> None:
    """The point before it and the one after it are measured; the trial, its guard, its child, its child in
    another session and its orphan are gone when the job is over."""
    settings = Limits(**{"trial_seconds": 30, "retries": 0, **limits})
    before, bad, after = run(tmp_path, ["", fault, ""], settings)
    assert (before.status, bad.status, after.status) == ("ok", status, "ok")
    assert bad.rows[-1]["status"] == status
    assert detail in bad.rows[-1]["detail"]
    assert (bad.rows[-1]["value"] is None) == (status != "ok")
    run(tmp_path, [fault], settings)
    assert left(tmp_path) == []


def test_a_failure_keeps_the_last_forty_lines_of_its_log(tmp_path: Path) -> None:
    """Of a hundred thousand lines the end is kept; a point that went well keeps none."""
    good, bad = run(tmp_path, ["", "babble"])
    assert bad.log_tail.splitlines() == [
        f"line {number}" for number in range(100_000 - LOG_TAIL_LINES, 100_000)
    ]
    assert good.log_tail == ""
    (said,) = run(tmp_path, ["oom"])
    assert said.log_tail == "out of memory, says the trial"


def test_samples_come_with_their_point(tmp_path: Path) -> None:
    """A crash between two points takes no samples from the first and gives none to the second."""
    first, bad, last = run(tmp_path, ["", "segfault", ""])
    assert [item["value"] for item in first.samples] == [[1.0]]
    assert bad.samples == []
    assert [(item["run_id"], item["value"]) for item in last.samples] == [(last.rows[-1]["run_id"], [3.0])]


RUNNER = """
import json, sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])
from test_faults_isolation import run
for outcome in run(Path(sys.argv[1]), json.loads(sys.argv[3])):
    print(f"{outcome.status}: {outcome.rows[-1]['detail']}")
"""


def runner(folder: Path, *faults: str) -> subprocess.Popen[str]:
    """Another process that runs a job."""
    return subprocess.Popen(
        [sys.executable, "-c", RUNNER, str(folder), str(HERE), json.dumps(faults)],
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path) -> None:
    """Until the file is there and has something in it."""
    deadline = time.monotonic() + 30
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("also_the_guard", [False, True], ids=["runner", "runner_and_guard"])
def test_nothing_outlives_a_runner_that_is_killed(tmp_path: Path, also_the_guard: bool) -> None:
    """kill -9 of the runner ends the trial with all it started; if its guard is killed at the same moment,
    the next runner on the machine does."""
    process = runner(tmp_path, "deaf")
    wait_for(tmp_path / "pids")
    _, guard, *_ = json.loads((tmp_path / "pids").read_text())
    os.kill(process.pid, signal.SIGSTOP)  # so that it cannot react to the death of the guard
    if also_the_guard:
        os.kill(guard, signal.SIGKILL)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while left(tmp_path):
        assert time.monotonic() < deadline
        end_orphans() if also_the_guard else time.sleep(0.01)


def memory_group() -> Path | None:
    """Where a memory cgroup of a process below this one's could be made; None if that is not permitted."""
    root = Path("/sys/fs/cgroup")
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        parent = (root / "memory" if controllers == "memory" else root) / path.lstrip("/")
        if controllers in ("memory", "") and (parent / "cgroup.procs").exists():
            group = parent / f"mocbench-test-{os.getpid()}"
            limit = "memory.limit_in_bytes" if controllers else "memory.max"
            try:
                group.mkdir()
                (group / limit).write_text(str(300 * 2**20))
                return group
            except OSError:
                continue
    return None


IN_GROUP = "import os, sys; open(sys.argv.pop(), 'w').write(str(os.getpid()))\n"


def test_the_kernels_out_of_memory_killer_is_told_from_other_kills(tmp_path: Path) -> None:
    """In a memory cgroup of 300 MB a trial that takes 2 GB is killed by the kernel: an `oom` row that says
    so, and the runner and the next point live."""
    group = memory_group()
    if group is None:
        pytest.skip("no permission to make a memory cgroup here")
    try:
        faults = json.dumps(["memory", "sigkill", ""])
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                IN_GROUP + RUNNER,
                str(tmp_path),
                str(HERE),
                faults,
                str(group / "cgroup.procs"),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        group.rmdir()
    assert done.stdout.splitlines() == [
        "oom: killed by the kernel's out-of-memory killer",
        "crashed: killed by signal SIGKILL",
        "ok: ",
    ]
    assert left(tmp_path) == []


def test_a_point_that_crashes_is_tried_again_as_often_as_it_may(tmp_path: Path) -> None:
    """With two retries a point that always crashes is tried three times, its rival once."""
    outcomes = run(tmp_path, ["hard_exit", ""], Limits(trial_seconds=30, retries=2))
    assert [outcome.rows[-1]["attempt"] for outcome in outcomes] == [3, 1]
    assert len(list((tmp_path / "jobs").glob("*.log"))) == 4
