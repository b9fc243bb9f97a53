"""Whatever happened to a run, the next one finds all that was finished and measures just the rest, once."""

import contextlib
import functools
import io
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from rich.console import Console

from harness.measure.environment import device_name
from harness.run.options import RunOptions, Summary
from harness.run.runner import run_sweep
from harness.search.storage import open_storage
from harness.store.files import Store
from harness.store.frames import read_rows, read_samples
from harness.store.leases import Claims
from harness.store.lines import read_lines
from harness.sweep.grid import expand
from harness.sweep.load import parse_sweep
from harness.sweep.model import Sweep

COMMAND = (sys.executable, str(Path(__file__).parents[1] / "fault_trial.py"))


def sweep(points: int) -> Sweep:
    """A sweep of so many points, each a group of its own, numbered by batch from 1."""
    return parse_sweep(
        "version: 1\nname: s\nworkload: ffn_decode\n"
        f"axes: {{method: [dense], batch: {list(range(1, points + 1))}}}\n"
        "fixed: {preset: 1m, dtype: fp32}\nlimits: {trial_seconds: 30, retries: 0}\n",
        "s.yaml",
    )


@pytest.fixture(autouse=True)
def trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the trials of these tests read from their environment; see fault_trial.py."""
    monkeypatch.setenv("FAULTS", str(tmp_path / "faults"))
    monkeypatch.setenv("DEVICE", device_name("cpu"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    set_faults(tmp_path, {})


def set_faults(folder: Path, faults: dict[int, str]) -> None:
    """What goes wrong from now on, by batch."""
    (folder / "faults").write_text(json.dumps(faults))


def run(results: Path, model: Sweep, **options: object) -> Summary:
    """`mocbench run` in this process, with the stand-in trial."""
    settings = RunOptions(results=results, trial_command=COMMAND, **options)  # type: ignore[arg-type]
    return run_sweep(model, settings, Console(file=io.StringIO()))


def ok_counts(results: Path) -> Counter[int]:
    """How many times each batch has an `ok` outcome in the rows as they stand in the file."""
    rows = read_lines(results / "s/rows.jsonl")
    return Counter(row["batch"] for row in rows if row["metric"] == "latency_us" and row["status"] == "ok")


def once(points: int) -> Counter[int]:
    """Every point measured exactly once."""
    return Counter(range(1, points + 1))


def complete_trials(results: Path) -> list[str]:
    """Point keys of the complete trials of the only study."""
    storage = open_storage(results / "s")
    (study,) = storage.get_all_studies()
    found = storage.get_all_trials(study._study_id, states=(optuna.trial.TrialState.COMPLETE,))
    return sorted(str(trial.user_attrs["point_key"]) for trial in found)


@pytest.mark.parametrize(
    ("retry", "again"), [("none", set()), ("failed", {1, 2}), ("oom", {3}), ("all", {1, 2, 3})]
)
def test_retry_measures_again_what_it_names(tmp_path: Path, retry: str, again: set[int]) -> None:
    """After the cause is gone a run with --retry has just the named failures left, and each once."""
    set_faults(tmp_path, {1: "hard_exit", 2: "segfault", 3: "oom"})
    first = run(tmp_path, sweep(4))
    assert (first.statuses, first.failed) == ({"crashed": 2, "oom": 1, "ok": 1}, 3)
    set_faults(tmp_path, {})
    second = run(tmp_path, sweep(4), retry=retry)
    assert second.statuses == ({"ok": len(again)} if again else {})
    assert ok_counts(tmp_path) == Counter(again | {4})
    status = read_rows(tmp_path / "s").query("metric == 'latency_us'").set_index("batch")["status"]
    assert {batch for batch, value in status.items() if value == "ok"} == again | {4}


def test_a_retried_failure_that_fails_again_is_tried_once_a_run(tmp_path: Path) -> None:
    """Two workers of one run do not hand it to each other for ever."""
    set_faults(tmp_path, {1: "hard_exit"})
    for attempts in (1, 2):
        assert run(tmp_path, sweep(1), retry="failed", workers=2).statuses == {"crashed": 1}
        assert len(list(read_lines(tmp_path / "s/rows.jsonl"))) == attempts


def test_a_failure_leaves_the_end_of_its_log_and_status_shows_where(tmp_path: Path) -> None:
    """The log is a file in the results folder; `mocbench status` names it and prints its last lines."""
    set_faults(tmp_path, {2: "babble"})
    run(tmp_path / "results", sweep(2))
    (log,) = (tmp_path / "results/s/failures").iterdir()
    assert log.read_text().splitlines()[-1] == "line 99999"
    assert len(log.read_text().splitlines()) == 40
    (tmp_path / "s.yaml").write_text((tmp_path / "results/s/sweep.yaml").read_text())
    shown = subprocess.run(
        [sys.executable, "-m", "harness", "status", str(tmp_path / "s.yaml"), "--results", "results"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f"results/s/failures/{log.name}" in shown
    assert "line 99999" in shown


@pytest.mark.parametrize("seed", range(4))
def test_rows_cut_anywhere_lose_only_what_was_cut(tmp_path: Path, seed: int) -> None:
    """The file ends in the middle of something: whole points before it stay byte for byte, the others are
    measured again, and the study has each once."""
    run(tmp_path, sweep(6))
    path = tmp_path / "s/rows.jsonl"
    whole = path.read_bytes()
    kept = random.Random(seed).randrange(len(whole))
    os.truncate(path, kept)
    left = len(Store(tmp_path / "s").finished())
    assert run(tmp_path, sweep(6)).statuses == {"ok": 6 - left}
    assert ok_counts(tmp_path) == once(6)
    lines = whole.splitlines(keepends=True)[:left]  # of one row a point
    assert path.read_bytes().startswith(b"".join(lines))
    assert complete_trials(tmp_path) == sorted(point.key for point in expand(sweep(6).parts[0]))


@pytest.mark.parametrize("loss", ["deleted", "half_a_line", "several_lines", "stale_lock"])
def test_a_lost_or_broken_journal_costs_no_measurement(tmp_path: Path, loss: str) -> None:
    """The study is there again after the next run, with every point once; nothing is measured for it."""
    run(tmp_path, sweep(3))
    journal = tmp_path / "s/study.journal"
    rows = (tmp_path / "s/rows.jsonl").read_bytes()
    if loss == "deleted":
        journal.unlink()
    elif loss == "half_a_line":
        os.truncate(journal, journal.stat().st_size - 25)
    elif loss == "several_lines":
        os.truncate(journal, journal.stat().st_size * 4 // 5)
    else:
        (tmp_path / "s/study.journal.lock").write_text("")
    assert run(tmp_path, sweep(3)).statuses == {}
    assert (tmp_path / "s/rows.jsonl").read_bytes() == rows
    assert complete_trials(tmp_path) == sorted(point.key for point in expand(sweep(3).parts[0]))


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("room", [0, 3_000, 40_000])
def test_a_full_disk_stops_the_run_and_the_next_one_goes_on(
    tmp_path: Path, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no room for rows the run ends with the system's error; with room again just the rest is measured,
    and no point is called crashed because its process could not write."""
    # A run that could not give its leases back is this process, which lives on: they have to run out.
    monkeypatch.setattr("harness.run.runner.Claims", functools.partial(Claims, lease_seconds=1.0))
    with small_disk(tmp_path / "disk", 4 * 2**20) as disk:
        assert run(disk, sweep(2)).statuses == {"ok": 2}
        ballast = disk / "ballast"
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        os.truncate(ballast, ballast.stat().st_size - room)
        with pytest.raises(OSError, match="No space left on device"):
            run(disk, sweep(16))
        finished = ok_counts(disk)
        assert finished == once(len(finished))
        ballast.unlink()
        summary = run(disk, sweep(16))
        assert summary.statuses == {"ok": 16 - len(finished)}
        assert ok_counts(disk) == once(16)
        assert set(Store(disk / "s").finished().values()) == {"ok"}


PLAY = """
import io, sys; from pathlib import Path; sys.path[:0] = sys.argv[4:]
from rich.console import Console; from harness.run import local, options, runner
import test_resume as tests
settings = options.RunOptions(results=Path(sys.argv[3]), trial_command=tests.COMMAND)
model = getattr(tests, sys.argv[2])(12)
role = getattr(local if sys.argv[1] == "run_worker" else runner, sys.argv[1])
summary = role(model, settings, Console(file=io.StringIO()))
print(summary.total, summary.already_done + sum(summary.statuses.values()), summary.failed)
"""


def play_together(results: Path, model: str, *roles: str, **environment: str) -> list[str]:
    """Processes that start together on one sweep of twelve points, each until all is done; their totals, what
    they found done and what failed."""
    here = [str(path) for path in Path(__file__).parents[:2]]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PLAY, role, model, str(results), *here],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        for role in roles
    ]
    return [process.communicate()[0] for process in processes]


def test_two_runners_and_a_worker_share_a_sweep(tmp_path: Path) -> None:
    """None measures what another does, rows and samples are there once, and so are the study's trials."""
    set_faults(tmp_path, dict.fromkeys(range(1, 13), "slow"))
    told = play_together(tmp_path, "sweep", "run_sweep", "run_sweep", "run_worker")
    assert told == ["12 12 0\n"] * 3
    assert ok_counts(tmp_path) == once(12)
    assert complete_trials(tmp_path) == sorted(point.key for point in expand(sweep(12).parts[0]))
    assert len(read_samples(tmp_path / "s")) == 12
    assert len(list((tmp_path / "s/jobs").glob("*.log"))) == 12
    assert not list((tmp_path / "s").glob("*.tmp"))


def search(trials: int) -> Sweep:
    """A search of so many trials for the smallest batch: a trial's latency is its batch."""
    return parse_sweep(
        "version: 1\nname: s\nworkload: ffn_decode\nmode: optimize\n"
        "axes: {method: [dense], batch: {low: 1, high: 1000}}\n"
        "fixed: {preset: 1m, dtype: fp32}\nlimits: {trial_seconds: 30, retries: 0}\n"
        f"optimize: {{sampler: random, n_trials: {trials}, "
        "objectives: [{metric: latency_us, direction: minimize}]}\n",
        "s.yaml",
    )


def test_workers_of_a_search_share_its_trials(tmp_path: Path) -> None:
    """Two runners and a worker make twelve trials together, not each; none is left running, and every trial's
    point was measured once."""
    play_together(tmp_path, "search", "run_sweep", "run_sweep", "run_worker")
    storage = open_storage(tmp_path / "s")
    (study,) = storage.get_all_studies()
    found = storage.get_all_trials(study._study_id)
    assert [trial.state.name for trial in found if trial.state.name != "FAIL"] == ["COMPLETE"] * 12
    assert all(trial.user_attrs.get("status") is None for trial in found if trial.state.name == "FAIL")
    counts = ok_counts(tmp_path)
    assert set(counts.values()) == {1}
    assert {trial.params["batch"] for trial in found if trial.state.name == "COMPLETE"} == set(counts)


def test_a_killed_search_goes_on_with_its_trials(tmp_path: Path) -> None:
    """kill -9 of the runner after some trials: the next run makes just the others."""
    set_faults(tmp_path, dict.fromkeys(range(1, 1001), "slow"))
    here = [str(path) for path in Path(__file__).parents[:2]]
    command = [sys.executable, "-c", PLAY, "run_sweep", "search", str(tmp_path), *here]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as runner:
        while len(ok_counts(tmp_path)) < 3:
            assert runner.poll() is None
        runner.kill()
    before = ok_counts(tmp_path)
    run(tmp_path, search(12))
    storage = open_storage(tmp_path / "s")
    (study,) = storage.get_all_studies()
    states = Counter(trial.state.name for trial in storage.get_all_trials(study._study_id))
    assert states["COMPLETE"] == 12
    assert states["RUNNING"] == 0
    assert before.keys() <= ok_counts(tmp_path).keys()
    assert set(ok_counts(tmp_path).values()) == {1}


def test_points_of_a_host_that_fell_silent_are_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker elsewhere holds half the sweep and is never heard of again: the run waits for a lease's time
    and then measures that half too."""
    folder = tmp_path / "s"
    folder.mkdir()
    keys = [point.key for point in expand(sweep(4).parts[0])]
    abroad = "elsewhere another-boot:pid:[1]/1/1 x"
    holders = {f"{key}@{device_name('cpu')}": abroad for key in keys[:2]}
    (folder / "claims.json").write_text(json.dumps({"holders": holders, "beats": {abroad: 7}}))
    monkeypatch.setattr("harness.run.runner.Claims", functools.partial(Claims, lease_seconds=2.0))
    assert run(tmp_path, sweep(4)).statuses == {"ok": 4}
    assert [row["batch"] for row in read_lines(folder / "rows.jsonl")] == [3, 4, 1, 2]


JUMPING_CLOCK = """
import random, time
real = time.time
time.time = lambda: real() + random.choice([-3e8, -3600, 0, 3600, 3e8])
"""


def test_a_clock_that_jumps_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """Two runners whose time of day leaps by hours and years at every look finish a sweep exactly once."""
    (tmp_path / "sitecustomize.py").write_text(JUMPING_CLOCK)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    told = play_together(tmp_path / "results", "sweep", "run_sweep", "run_sweep", PYTHONPATH=path)
    assert told == ["12 12 0\n"] * 2
    assert ok_counts(tmp_path / "results") == once(12)
