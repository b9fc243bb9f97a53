"""`mocbench compare` of what is on disk, and `mocbench history`: machines, samples, change points."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rows import rows_of, train_point

from harness.cli import main
from harness.errors import UserError
from harness.regression.compare.sides import find_side, refuse_other_machine
from harness.regression.compare.stored import compare_stored
from harness.regression.history import levels, read_runs, write_history
from harness.store.files import Store

MACHINE: dict[str, Any] = {
    "device": "cuda",
    "device_name": "D",
    "gpu_id": "g1",
    "cpu_cores": 8,
    "os": "Linux",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "git_revision": "abc",
    "git_dirty": False,
    "env_id": "e",
}
POINTS = {"dense": train_point(), "moc": train_point("moc_reference", "topk:0.25")}


def times(mean: float, seed: int = 0, count: int = 40) -> list[float]:
    """Samples of a run, in milliseconds, half a percent apart."""
    return np.random.default_rng(seed).normal(mean, 0.005 * mean, count).tolist()


def results(folder: Path, step_ms: Mapping[str, Sequence[float] | None], **environment: Any) -> Path:
    """A results folder with these samples by method; None: it ran out of memory."""
    store = Store(folder)
    store.append_environment({**MACHINE, **environment})
    device = environment.get("device_name", "D")
    for name, samples in step_ms.items():
        point = POINTS[name]
        if samples is None:
            store.append(rows_of(point, {}, "oom", device=device))
            continue
        raw = {"run_id": "r1", "point_key": point.key, "metric": "step_ms"}
        rows = rows_of(point, {"step_ms": float(np.median(samples))}, device=device)
        store.append(rows, [{**raw, "x": list(range(len(samples))), "value": list(samples)}])
    return folder


def test_half_a_line_of_a_killed_run_is_no_reason_to_give_up(tmp_path: Path) -> None:
    """Environments are read as the store reads them: what a kill cut short is passed over."""
    sides = [results(tmp_path / name, {"dense": times(1.0)}) for name in ("base", "head")]
    with (sides[1] / "environments.jsonl").open("a") as file:
        file.write('{"env_id": "f", "device')
    outcomes, environment = compare_stored(*(find_side(str(side)) for side in sides))
    assert [outcome.verdict for outcome in outcomes] == ["SAME"]
    assert environment["env_id"] == "e"


def bench_file(
    path: Path, medians_ms: Mapping[str, float], day: int = 1, seed: int = 0, **environment: Any
) -> Path:
    """A file as `make bench` keeps it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    benchmarks = []
    for number, (name, ms) in enumerate(medians_ms.items()):
        data = [sample / 1e3 for sample in times(ms, 100 * seed + number)]
        stats = {"data": data, "median": float(np.median(data))}
        benchmarks.append({"name": f"test_time[{name}]", "extra_info": {"benchmark": name}, "stats": stats})
    when = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(days=day)
    file = {
        "machine_info": {"mocbench": {**MACHINE, **environment}},
        "commit_info": {"id": f"{day:08d}ffff", "dirty": False},
        "datetime": when.isoformat(),
        "benchmarks": benchmarks,
    }
    path.write_text(json.dumps(file))
    return path


def verdicts(base: Path, head: Path) -> dict[str, str | None]:
    """Verdicts by point."""
    outcomes, _environment = compare_stored(find_side(str(base)), find_side(str(head)))
    return {outcome.name: outcome.verdict for outcome in outcomes}


def test_results_are_joined_by_point(tmp_path: Path) -> None:
    """Points of two folders are compared by their samples; a slower one is SLOW, an equal one SAME."""
    base = results(tmp_path / "base", {"dense": times(2, 1), "moc": times(1, 2)})
    head = results(tmp_path / "head", {"moc": times(1.05, 3), "dense": times(2, 4)}, git_revision="def")
    assert verdicts(base, head) == {
        "ffn_train 1m seq 64 dense: step_ms": "SAME",
        "ffn_train 1m seq 64 moc_reference topk:0.25: step_ms": "SLOW",
    }


def test_points_of_one_side_and_failed_ones_are_named(tmp_path: Path) -> None:
    """A point that only one folder has is said to be; one that now fails has failed, with its reason."""
    base = results(tmp_path / "base", {"dense": times(2), "moc": times(1)})
    head = results(tmp_path / "head", {"moc": None})
    outcomes, _environment = compare_stored(find_side(str(base)), find_side(str(head)))
    notes = {outcome.name: (outcome.note, outcome.failed) for outcome in outcomes}
    assert notes == {
        "ffn_train 1m seq 64 dense": ("only base has it", False),
        "ffn_train 1m seq 64 moc_reference topk:0.25": ("head: oom: because", True),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device_name": "E"}, "D against E"),
        ({"torch": "2.12.0"}, "torch 2.11.0 against 2.12.0"),
        ({"gpu_id": "g2"}, "gpu_id g1 against g2"),
        ({"driver": "600"}, "driver None against 600"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_another_machine_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """Another device, card or version refuses the comparison of folders and files, naming what differs."""
    base, head = (
        results(tmp_path / name, {"dense": times(2)}, **more) for name, more in (("a", {}), ("b", change))
    )
    with pytest.raises(UserError, match=f"measured on different machines.*{message}"):
        verdicts(base, head)
    base, head = (
        bench_file(tmp_path / f"{name}.json", {"x": 1.0}, **more) for name, more in (("a", {}), ("b", change))
    )
    with pytest.raises(UserError, match=f"measured on different machines.*{message}"):
        verdicts(base, head)


def test_another_revision_is_not_another_machine() -> None:
    """The code may differ, which is what a comparison is about."""
    refuse_other_machine(MACHINE, {**MACHINE, "git_revision": "def", "git_dirty": True, "env_id": "f"})


def test_files_of_make_bench(tmp_path: Path) -> None:
    """Two files are compared benchmark by benchmark; a file of something else is refused."""
    base = bench_file(tmp_path / "a.json", {"x": 1.0, "y": 2.0, "z": 1.0})
    head = bench_file(tmp_path / "b.json", {"x": 1.0, "y": 1.8, "w": 1.0}, seed=1)
    assert verdicts(base, head) == {"x": "SAME", "y": "FAST", "z": None, "w": None}
    (tmp_path / "c.json").write_text("[1]")
    with pytest.raises(UserError, match=r"c\.json: not a file of pytest-benchmark"):
        verdicts(base, tmp_path / "c.json")
    file = json.loads(head.read_text())
    del file["benchmarks"][0]["stats"]["data"]
    (tmp_path / "d.json").write_text(json.dumps(file))
    with pytest.raises(UserError, match="samples or environment are missing"):
        verdicts(base, tmp_path / "d.json")


def test_exit_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command exits with 3 and a summary where something is slower, with 2 and a line if it refuses."""
    base = bench_file(tmp_path / "a.json", {"x": 1.0})
    slower = bench_file(tmp_path / "b.json", {"x": 1.1})
    other = bench_file(tmp_path / "c.json", {"x": 1.0}, torch="2.12.0")

    def compare(head: Path) -> tuple[object, str, str]:
        command = ["mocbench", "compare", str(base), str(head), "--device", "cpu"]
        monkeypatch.setattr("sys.argv", [*command, "--output", str(tmp_path / "out")])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return end.value.code, said.out, said.err

    code, said, _error = compare(slower)
    assert code == 3
    assert said.splitlines()[-1].startswith(f"{slower} against {base}: 1 SLOW. Slower: x +10")
    assert "| x | SLOW | +10" in (tmp_path / "out" / "summary.md").read_text()
    code, _said, error = compare(other)
    assert code == 2
    assert error.startswith("measured on different machines or versions")
    assert len(error.splitlines()) == 1


def test_history_finds_where_a_benchmark_changed(tmp_path: Path) -> None:
    """A step of 3 % is found at its run and with the software that changed there; a bad run is no change."""
    for day in range(16):
        more = {"torch": "2.12.0"} if day >= 9 else {}
        medians = {"x": 1.03 if day >= 9 else 1.0, "y": 1.3 if day == 5 else 1.0}
        # Written in another order than they were run.
        bench_file(tmp_path / f"{(7 * day) % 16:04d}.json", medians, day, seed=day, **more)
    told = write_history(tmp_path, tmp_path / "out")
    assert told[0] == "D: 16 runs, 1 changes"
    assert told[1].startswith("x: +3.")
    assert "from 00000009 (2026-01-10) on" in told[1]
    assert told[1].endswith("; with it changed torch 2.11.0 to 2.12.0")
    assert told[1] in (tmp_path / "out" / "history.md").read_text()
    assert list((tmp_path / "out").glob("history-*.png"))


def test_history_keeps_machines_apart(tmp_path: Path) -> None:
    """Runs of two machines are two histories, and a machine keeps its own over versions of software."""
    for day in range(4):
        bench_file(tmp_path / f"{day}.json", {"x": 1.0}, day, torch=f"2.{day}")
        bench_file(tmp_path / f"other-{day}.json", {"x": 2.0}, day, gpu_id="g2")
    assert len({run.machine for run in read_runs(tmp_path)}) == 2
    assert [line for line in write_history(tmp_path, tmp_path / "out") if "runs" in line] == [
        "D: 4 runs, 0 changes"
    ] * 2


def test_a_history_of_nothing_is_refused(tmp_path: Path) -> None:
    """Without a file of `make bench` there is one line that says so."""
    (tmp_path / "x.json").write_text('{"machine_info": {}}')
    with pytest.raises(UserError, match="holds no run"):
        write_history(tmp_path, tmp_path / "out")


def test_levels() -> None:
    """Jumps are found where they are, a flat or short series has none, a drift within scatter neither."""
    scatter = np.random.default_rng(3).normal(0, 0.004, 30)
    assert levels(np.exp(scatter).tolist()) == []
    assert levels(np.exp(scatter + 0.03 * (np.arange(30) >= 12)).tolist()) == [12]
    assert levels(np.exp(scatter + 0.05 * ((np.arange(30) >= 8) & (np.arange(30) < 20))).tolist()) == [8, 20]
    assert levels([1.0, 1.0, 2.0]) == []
    assert levels([1.0, 1.0, 2.0, 2.0]) == [2]
