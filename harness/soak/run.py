"""The soak run: a sweep of points that cost nothing, while runners, workers and trials are killed at random.

    python -m harness.soak --points 200 --workers 4 --kills 100 --seed 0

starts one `mocbench run` and so many `mocbench worker` processes on one sweep, kills whatever the seed says
at moments spread over its progress, starts again what died, and at the end compares what is on record with
what should be. Trials are stand-ins (`harness.soak.trial`); all the rest is the real thing. `--over postgres`
brings the rows together in a PostgreSQL server that it starts, `--over ray` places the workers on two nodes
of a Ray cluster that it starts. The exit code is 0 only if no row was lost or doubled and no process was
left.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import psutil
import typer

from harness.measure.environment import device_name
from harness.soak.trial import DEVICE_VARIABLE, SECONDS_VARIABLE, expected_value
from harness.store.files import RowStore, Store
from harness.store.processes import with_variable
from harness.store.rows import MEASURED
from harness.sweep.load import parse_sweep
from harness.sweep.model import Sweep

# In the environment of every process of a soak run, so that each can be found.
MARK_VARIABLE = "MOCBENCH_SOAK"
RAY_NODES = 2
# Victims and how often each is chosen. A Ray driver takes its workers with it, so there it is left alone.
WEIGHTS = {"run": 1, "worker": 3, "trial": 4}
WEIGHTS_ON_RAY = {"worker": 3, "trial": 4}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Over(enum.StrEnum):
    """Where the rows of a soak run come together, or who places its workers."""

    folder = "folder"
    postgres = "postgres"
    ray = "ray"


@dataclass
class Verdict:
    """What a soak run came to."""

    points: int
    workers: int
    kills: Counter[str] = field(default_factory=Counter)
    restarts: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0  # rows with another value, or without their samples
    failed: int = 0  # outcomes without a value
    left: int = 0  # processes
    wall_seconds: float = 0.0
    overhead_ms: float = math.nan  # between a worker's trials, in the mean

    @property
    def good(self) -> bool:
        """Whether every point is there exactly once, with its value, and no process is left."""
        return not any((self.lost, self.doubled, self.wrong, self.failed, self.left))

    def text(self) -> str:
        """The figures for people."""
        who = ", ".join(f"{role} {count}" for role, count in sorted(self.kills.items())) or "none"
        return (
            f"{self.points} points, {self.workers} workers: "
            f"rows lost {self.lost}, doubled {self.doubled}, wrong {self.wrong}, failed {self.failed}\n"
            f"kill -9: {sum(self.kills.values())} ({who}); restarts {self.restarts}; "
            f"processes left {self.left}\n"
            f"wall time {self.wall_seconds:.1f} s; {self.overhead_ms:.0f} ms from one trial to the next"
        )


def soak_sweep(points: int) -> Sweep:
    """A sweep of so many points, each a group of its own."""
    return parse_sweep(
        "version: 1\nname: soak\nworkload: ffn_decode\n"
        f"axes: {{method: [dense], batch: {list(range(1, points + 1))}}}\n"
        "fixed: {preset: 1m, dtype: fp32}\nlimits: {trial_seconds: 60, retries: 10}\n",
        "soak",
    )


def soak(points: int, workers: int, kills: int, seed: int, over: str, trial_seconds: float) -> Verdict:
    """Run one soak; `over` is folder, postgres or ray. Raises RuntimeError if a process fails by itself."""
    verdict = Verdict(points, workers)
    mark = uuid.uuid4().hex
    # Also of this process: a Ray cluster takes its environment from here.
    os.environ.update({MARK_VARIABLE: mark, SECONDS_VARIABLE: str(trial_seconds)})
    os.environ[DEVICE_VARIABLE] = device_name("cpu")
    with tempfile.TemporaryDirectory(prefix="soak") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)  # the database server, which is another user, lives in it
        options = ["--points", str(points), "--results", str(folder / "results")]
        store: RowStore = Store(folder / "results" / "soak")
        if over == "postgres":
            from harness.soak.postgres import PrivatePostgres
            from harness.store.database import Database, DatabaseStore

            url = stack.enter_context(PrivatePostgres(folder / "postgres")).url
            options += ["--storage", url]
            database = Database(url)
            stack.callback(database.close)
            store = DatabaseStore(database, "soak")
        if over == "ray":
            stack.enter_context(_ray_cluster(workers))
            options += ["--executor", "ray"]
        crew = _Crew(options, folder / "processes.log", 1 if over == "ray" else workers)
        stack.callback(crew.stop)
        begin = time.monotonic()
        seen = _kill_at_random(
            crew, verdict, store, kills, random.Random(seed), WEIGHTS_ON_RAY if over == "ray" else WEIGHTS
        )
        verdict.wall_seconds = time.monotonic() - begin
        verdict.restarts = crew.restarts
        crew.run_once_more()
        count_losses(verdict, store, folder / "results" / "soak", seen)
    verdict.left = _left_over(mark)
    return verdict


class _Crew:
    """One runner and the workers beside it, each started again when it is killed."""

    def __init__(self, options: list[str], log: Path, size: int) -> None:
        self._options = options
        self._log = log
        self._processes = {number: self._start(number) for number in range(size)}
        self.restarts = 0

    def is_busy(self) -> bool:
        """Start again what was killed; False once everybody has found that nothing is left to do."""
        for number, process in list(self._processes.items()):
            if process.poll() == 0:
                del self._processes[number]
            elif process.returncode == -signal.SIGKILL:
                self._processes[number] = self._start(number)
                self.restarts += 1
            elif process.returncode is not None:
                text = self._log.read_text(encoding="utf-8", errors="replace")
                raise RuntimeError(f"a process ended with {process.returncode} by itself:\n{text[-4000:]}")
        return bool(self._processes)

    def run_once_more(self) -> None:
        """What a person would do to be sure; it also writes the tables of a database."""
        self._processes = {0: self._start(0)}
        while self.is_busy():
            time.sleep(0.05)

    def stop(self) -> None:
        """Kill what still runs, if the soak did not come to its end."""
        for process in self._processes.values():
            process.kill()
            process.wait()

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        role = "run" if number == 0 else "worker"
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "harness.soak", "--role", role, *self._options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )


def _kill_at_random(
    crew: _Crew, verdict: Verdict, store: RowStore, kills: int, chance: random.Random, weights: dict[str, int]
) -> set[str]:
    """Kill at moments spread over the first nine tenths of the sweep; the points that were seen finished.

    When and which role depends on `chance` alone, so that a seed names them.
    """
    moments = sorted(chance.randrange(max(1, round(0.9 * verdict.points))) for _ in range(kills))
    roles = chance.choices(list(weights), list(weights.values()), k=kills)
    seen: set[str] = set()
    while crew.is_busy():
        seen |= {key for (_, key), status in store.finished().items() if status in MEASURED}
        while moments and len(seen) >= moments[0]:
            time.sleep(chance.uniform(0, 0.1))
            victims = _processes(os.environ[MARK_VARIABLE])[roles[0]]
            if not victims:
                break
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(victims), signal.SIGKILL)
                verdict.kills[roles.pop(0)] += 1
                moments.pop(0)
        time.sleep(0.05)
    return seen


def count_losses(verdict: Verdict, store: RowStore, folder: Path, seen: set[str]) -> None:
    """Compare what is on record with what should be."""
    from harness.sweep.grid import expand

    expected = {point.key for point in expand(soak_sweep(verdict.points).parts[0])}
    good: Counter[str] = Counter()
    for batch in store.batches():
        row = batch.rows[-1]
        if row["status"] not in MEASURED:
            verdict.failed += 1
            continue
        good[row["point_key"]] += 1
        value = expected_value(row["point_key"])
        right = row["value"] == value and [s["value"] for s in batch.samples] == [[value, value + 1]]
        verdict.wrong += not right
    in_folder = {key for (_, key), status in Store(folder).finished().items() if status in MEASURED}
    verdict.lost = len((expected | seen) - (good.keys() & in_folder))
    verdict.doubled = sum(good.values()) - len(good)
    verdict.overhead_ms = _overhead_ms(folder)


def _overhead_ms(folder: Path) -> float:
    """Of each worker's time from its first trial to its last, what lay outside trials, per trial.

    A trial begins when its job file is written and ends when it has said its last word.
    """
    trials: dict[str, list[tuple[float, float]]] = {}
    for path in (folder / "jobs").glob("*.times"):
        with contextlib.suppress(ValueError):  # killed as it wrote the file
            runner, begin, end = json.loads(path.read_text(encoding="utf-8"))
            trials.setdefault(runner, []).append((begin, end))
    gaps = [
        later[0] - earlier[1] for own in trials.values() for earlier, later in itertools.pairwise(sorted(own))
    ]
    return 1000 * sum(gaps) / len(gaps) if gaps else math.nan


def _processes(mark: str) -> dict[str, list[int]]:
    """Living processes of the soak run by role; `other` are the helpers of trials and of Ray."""
    found: dict[str, list[int]] = {"run": [], "worker": [], "trial": [], "other": []}
    for pid, value in with_variable(MARK_VARIABLE):
        if value != mark:
            continue
        with contextlib.suppress(psutil.Error):
            words = psutil.Process(pid).cmdline() or [""]
            role = "other"
            if "--role" in words:
                role = words[words.index("--role") + 1]
            elif "harness.soak.trial" in words:
                role = "trial"
            elif words[0].startswith("ray::_RayWorker"):
                role = "worker"
            found[role].append(pid)
    return found


def _left_over(mark: str) -> int:
    """Processes that are still there a moment after the end."""
    deadline = time.monotonic() + 10
    while (count := sum(map(len, _processes(mark).values()))) and time.monotonic() < deadline:
        time.sleep(0.1)
    return count


@contextlib.contextmanager
def _ray_cluster(workers: int) -> Iterator[None]:
    """Two nodes on this host, with a CPU slot for each worker; RAY_ADDRESS says where."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for node in range(RAY_NODES):
        slots = workers // RAY_NODES + (node < workers % RAY_NODES)
        cluster.add_node(num_cpus=slots, object_store_memory=80 * 2**20)
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        yield
    finally:
        cluster.shutdown()


def _play(role: str, points: int, results: Path, storage: str | None, executor: str) -> None:
    """Be a runner or a worker of the soak run."""
    from rich.console import Console

    from harness.run.local import run_worker
    from harness.run.options import RunOptions
    from harness.run.runner import run_sweep

    options = RunOptions(
        results=results,
        storage=storage,
        executor=executor,
        trial_command=(sys.executable, "-m", "harness.soak.trial"),
    )
    play = run_sweep if role == "run" else run_worker
    play(soak_sweep(points), options, Console())


@app.command()
def main(
    points: Annotated[int, typer.Option(min=1)] = 200,
    workers: Annotated[int, typer.Option(min=1)] = 4,
    kills: Annotated[int, typer.Option(min=0)] = 100,
    seed: int = 0,
    over: Annotated[Over, typer.Option(help="Where the rows come together, or who places workers.")] = (
        Over.folder
    ),
    trial_seconds: Annotated[float, typer.Option(help="Of a trial, in the mean.")] = 0.1,
    role: Annotated[str | None, typer.Option(hidden=True)] = None,
    results: Annotated[Path, typer.Option(hidden=True)] = Path("results"),
    storage: Annotated[str | None, typer.Option(hidden=True)] = None,
    executor: Annotated[str, typer.Option(hidden=True)] = "local",
) -> None:
    """Kill the processes of a sweep at random and count what is lost; hidden options are of its processes."""
    if role is not None:
        _play(role, points, results, storage, executor)
        return
    verdict = soak(points, workers, kills, seed, over, trial_seconds)
    print(verdict.text())
    if not verdict.good:
        raise typer.Exit(1)
