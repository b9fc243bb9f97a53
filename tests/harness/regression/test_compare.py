"""`mocbench compare` of code: two revisions of a tiny repository, timed by a clock that their work advances.

So what is timed is exact, and every verdict is known beforehand, on however busy a machine.
"""

import itertools
import json
import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

import moc
from harness.errors import UserError
from harness.regression.compare.checkouts import Child, Pair
from harness.regression.compare.child import DEFINITIONS as DEFINITIONS_AT
from harness.regression.compare.compare import compare, parse_injections
from harness.regression.compare.sides import checked_out, find_side, find_sides

MOC = str(Path(moc.__file__).parent)  # the referee needs its configuration
# As a checkout from before the folders has them, by names of that time (see child.OLD_NAMES).
# The work of a benchmark lasts as long as it says, give or take a permille that depends on the call alone.
DEFINITIONS = """
import itertools
from dataclasses import dataclass
from typing import Any

from harness.measure import launch, selftest
from harness.measure.ffn import TrainingCalls, ffn_weights, natural_tensors
from harness.measure.launch import Contender, rotated_copies
from harness.measure.roofline import decode_least_bytes
from moc import UNITS


class Clock:
    now = 0

    @staticmethod
    def perf_counter_ns():
        Clock.now += 1000  # so that waiting comes to an end
        return Clock.now


launch.time = selftest.time = Clock
launch.MAX_CPU_FLUSH_BYTES = 2**16


@dataclass
class Benchmark:
    name: str
    units: Any
    tokens: int = 100
    mode: str = "auto"

    def open(self, device):
        calls = itertools.count()

        def work():
            if self.units is None:
                raise RuntimeError("no such kernel\\nat all")
            Clock.now += self.units * 10_000 * (1000 + next(calls) % 3)

        return Contender(self.name, work)


def benchmarks(device):
    return {name: Benchmark(name, units) for name, units in UNITS.items()}
"""


def git(folder: Path, *arguments: str) -> str:
    """What git says in a repository."""
    identity = ("-c", "user.name=T", "-c", "user.email=t@example.org")
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def write_checkout(folder: Path, units: dict[str, Any] | None) -> None:
    """A checkout whose benchmarks last so many units of time; None: from before there were any."""
    (folder / "moc").mkdir(parents=True, exist_ok=True)
    (folder / "harness").mkdir(exist_ok=True)
    (folder / "moc" / "__init__.py").write_text(f"UNITS = {units}\n__path__.append({MOC!r})\n")
    if units is not None:
        (folder / "harness" / "benchmarks.py").write_text(DEFINITIONS)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Revisions `ancient` (no benchmarks), `old` and `new`."""
    folder = tmp_path_factory.mktemp("repository")
    git(folder, "init", "-q")
    revisions: dict[str, dict[str, Any] | None] = {
        "ancient": None,
        "old": {"steady": 10, "heavy": 10, "light": 10, "gone": 10, "broken": 10},
        "new": {"steady": 10, "heavy": 100, "light": 9, "fresh": 10, "broken": None},
    }
    for name, units in revisions.items():
        write_checkout(folder, units)
        git(folder, "add", "-A")
        git(folder, "commit", "-q", "-m", name)
        git(folder, "tag", name)
    return folder


def run(base: str, head: str, output: Path, **options: Any) -> tuple[int, dict[str, Any], str]:
    """Exit code, all that came out, and the summary."""
    values = {"inject": {}, "runs": 1, "only": [], **options}
    code = compare(base, head, "cpu", output=output, say=lambda _: None, **values)
    found = json.loads((output / "comparison.json").read_text())
    return code, found, (output / "summary.md").read_text()


def worktrees(repository: Path) -> int:
    """How many checkouts a repository knows of."""
    return git(repository, "worktree", "list", "--porcelain").count("worktree ")


def test_two_revisions(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times the work is SLOW in both looks and exits with 3, a tenth less is FAST, the same is SAME.

    A benchmark of one side alone is named, one that raises has failed and stops no other, and nothing of the
    checkouts is left.
    """
    monkeypatch.chdir(repository)
    code, found, summary = run("old", "new", tmp_path)
    assert code == 3
    outcomes = {outcome["name"]: outcome for outcome in found["runs"][0]}
    verdicts = {name: outcome["verdict"] for name, outcome in outcomes.items()}
    judged = {"steady": "SAME", "heavy": "SLOW", "light": "FAST"}
    assert verdicts == {**judged, "gone": None, "fresh": None, "broken": None}
    assert outcomes["heavy"]["looks"] == ["SLOW", "SLOW"]
    assert outcomes["heavy"]["change"]["value"] == pytest.approx(9, rel=0.01)
    assert outcomes["heavy"]["base_ms"] == pytest.approx(100, rel=0.01)
    assert outcomes["gone"]["note"] == "only base has it"
    assert outcomes["fresh"]["note"] == "only head has it"
    assert outcomes["broken"]["note"] == "head: MethodFailed: broken: RuntimeError: no such kernel"
    assert outcomes["broken"]["failed"]
    assert not outcomes["gone"]["failed"]
    heading = summary.splitlines()[0]
    commit = git(repository, "rev-parse", "new")[:10]
    assert heading.startswith(f"# new ({commit}) against old")
    assert "1 SAME, 1 FAST, 1 SLOW; 1 failed. Slower: heavy +900.0 %" in heading
    assert (tmp_path / "changes.png").stat().st_size > 0
    assert worktrees(repository) == 1


def test_a_revision_against_itself(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several runs nothing changed is SAME each time, and work injected in one benchmark SLOW there.

    A checkout counts as a revision does: here what was committed against the working tree.
    """
    monkeypatch.chdir(repository)
    git(repository, "checkout", "-q", "old")
    only = ["steady", "heavy"]
    code, found, summary = run("old", ".", tmp_path, runs=2, only=only, inject={"heavy": 0.1})
    assert code == 3
    assert "| steady | 2 | 0 | 0 | 0 |" in summary
    assert "| heavy | 0 | 0 | 2 | 0 |" in summary
    assert [len(outcomes) for outcomes in found["runs"]] == [2] * 2
    assert found["runs"][0][1]["change"]["value"] == pytest.approx(0.1, abs=0.003)


@pytest.mark.parametrize("place", DEFINITIONS_AT)
def test_definitions_of_any_time_are_run(place: str, repository: Path, tmp_path: Path) -> None:
    """In the place of today and in the former one, with today's name of what is timed or the former."""
    source = (repository / "harness/benchmarks.py").read_text()
    if place == DEFINITIONS_AT[0]:
        source = source.replace("Contender", "TimedMethod")
    write_checkout(tmp_path / "tree", {"steady": 10})
    (tmp_path / "tree/harness/benchmarks.py").unlink()
    (tmp_path / "tree" / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "tree" / place).write_text(source)
    tree = str(tmp_path / "tree")
    _code, found, _summary = run(tree, tree, tmp_path / "out")
    assert [(outcome["name"], outcome["verdict"]) for outcome in found["runs"][0]] == [("steady", "SAME")]


def test_what_cannot_be_run(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A revision from before the benchmarks is refused in one line, and its checkout is removed."""
    monkeypatch.chdir(repository)
    with pytest.raises(UserError, match=r"^cannot compare: base: .*no harness/regression/benchmarks.py"):
        run("ancient", "old", tmp_path)
    assert worktrees(repository) == 1
    assert not list(tmp_path.iterdir())


class Scripted:
    """A side without a process: it has these benchmarks, whose times come from a function of the attempt."""

    def __init__(self, times: Mapping[str, Callable[[int], float]], mode: str = "cpu") -> None:
        self.times, self.mode = times, mode
        self.attempts: dict[str, list[int]] = {}

    def listen(self) -> dict[str, Any]:
        return {"benchmarks": list(self.times), "environment": {}}

    def ask(self, do: str, name: str = "", attempt: int = 0, **_: Any) -> dict[str, Any]:
        if do == "open":
            self.attempts.setdefault(name, []).append(attempt)
            return {"mode": self.mode, "notes": [], "units": 1, "tokens": 100}
        if do == "sample":
            ms = self.times[name](self.attempts[name][-1])
            return {"ms": ms * (1 + 0.001 * next(JITTER))}
        return {"conditions": None}


JITTER = itertools.cycle((0, 1, 2, 1, 0, 2))


def pair(base: Scripted, head: Scripted, **inject: float) -> Pair:
    """Both sides."""
    return Pair(cast(Child, base), cast(Child, head), "cpu", inject)


def test_the_second_look_is_elsewhere_in_memory() -> None:
    """What is slower once only is open, not SLOW; for another look it is opened anew, on both sides.

    So is what is near the limit: it may be where it lies, and then the next look says SAME.
    """
    first, later = {"flaky": 12.0, "slow": 12.0, "same": 10.0, "near": 10.5}, {"slow": 12.0}
    base = Scripted({name: lambda _: 10.0 for name in first})
    head = Scripted(
        {name: lambda at, name=name: later.get(name, 10.0) if at else first[name] for name in first}
    )
    both = pair(base, head)
    outcomes = {name: both.measure(name, 4) for name in both.names}
    assert {name: (outcome.verdict, outcome.looks) for name, outcome in outcomes.items()} == {
        "flaky": ("AMBG", ("SLOW", "SAME")),
        "slow": ("SLOW", ("SLOW", "SLOW")),
        "same": ("SAME", ("SAME",)),
        "near": ("SAME", ("AMBG", "SAME")),
    }
    assert outcomes["flaky"].note.startswith("looks: +20.0 %")
    assert base.attempts == head.attempts
    assert base.attempts == {"flaky": [0, 1], "slow": [0, 1], "same": [0], "near": [0, 1]}
    assert outcomes["same"].tokens_per_s == pytest.approx(100 / 0.010, rel=0.01)


def test_what_is_launched_in_two_ways_is_not_compared() -> None:
    """A CUDA graph on one side and launches on the other is another comparison: the point fails."""
    sides = (Scripted({"x": lambda _: 1.0}, mode) for mode in ("graph_cold", "launch_cold"))
    outcome = pair(*sides).measure("x", 0)
    assert outcome.failed
    assert outcome.note.startswith("both: launched in different ways: base graph_cold, head launch_cold")


def test_names_that_are_none_are_refused() -> None:
    """An injection into a benchmark that is not on both sides is one line with the nearest name."""
    base, head = Scripted({"heavy": lambda _: 1.0, "old": lambda _: 1.0}), Scripted({"heavy": lambda _: 1.0})
    with pytest.raises(UserError, match=r"^--inject heavier: no such benchmark; did you mean heavy\?"):
        pair(base, head, heavier=0.03)
    assert pair(base, head).only_base == ["old"]


def test_nothing_is_left_when_told_to_end(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM in the middle of a comparison ends it, and its checkouts are gone."""
    monkeypatch.chdir(repository)
    paths: list[Path] = []

    def told_to_end() -> None:
        with checked_out(*find_sides("old", "new")) as both:
            paths.extend(both)
            old, new = ((path / "moc" / "__init__.py").read_text() for path in both)
            assert "'heavy': 10," in old
            assert "'heavy': 100," in new
            assert worktrees(repository) == 3
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as end:
        told_to_end()
    assert end.value.code == 143
    assert worktrees(repository) == 1
    assert not any(path.exists() for path in paths)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_sides(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A side is what it names: a path before a revision; what is nothing, or no match, is refused."""
    monkeypatch.chdir(repository)
    assert find_side("old").kind == "revision"
    write_checkout(tmp_path / "tree", None)
    assert find_side(str(tmp_path / "tree")).kind == "checkout"
    assert [side.kind for side in find_sides("old", str(tmp_path / "tree"))] == ["revision", "checkout"]
    (tmp_path / "rows.jsonl").touch()
    assert find_side(str(tmp_path)).kind == "results"
    with pytest.raises(UserError, match="compare code with code"):
        find_sides("old", str(tmp_path))
    with pytest.raises(UserError, match=r"^older: nothing to compare; valid: a git revision"):
        find_side("older")
    (tmp_path / "tree" / "moc" / "__init__.py").unlink()
    with pytest.raises(UserError, match="nothing to compare"):
        find_side(str(tmp_path / "tree"))


def test_injections() -> None:
    """NAME=SHARE is read; a share that is none is refused."""
    assert parse_injections(["a-b=0.03", "c=1"]) == {"a-b": 0.03, "c": 1.0}
    for wrong in ("a", "a=", "a=x", "a=0", "a=-1", "a=nan"):
        with pytest.raises(UserError, match="expected NAME=SHARE"):
            parse_injections([wrong])
