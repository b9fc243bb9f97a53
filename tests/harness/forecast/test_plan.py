"""The plan: memory by formula, durations from rows, and a command that leaves no trace."""

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
import torch
from rows import rows_of, train_point
from typer.testing import CliRunner

from harness.cli import app
from harness.forecast.duration import START_SECONDS, History, step_flops
from harness.forecast.memory import head_saved_bytes, layer_saved_bytes, predict_peak, saved_by_formula
from harness.forecast.view import Plan, duration
from harness.report.wording import size
from harness.store.files import Store
from harness.store.frames import read_rows, typed
from harness.store.rows import COLUMNS
from harness.sweep.load import parse_sweep
from harness.sweep.point import Point
from harness.training.data import find, prepare
from moc.config import LlamaConfig
from moc.llama import Llama
from moc.methods import get_method
from moc.selection import parse_selection

H100 = Path(__file__).parents[3] / "results/h100_first"
SWEEP = """\
version: 1
name: planned
data: files:{text}/*.txt
parts:
  - workload: pretrain
    axes:
      preset: [1m]
      method: [dense, dense_compiled, moc_reference]
      selection: ["topk:0.25", "topk:999"]
    fixed: {{seq_len: 32, tokens: 128, train_tokens: 2560, eval_tokens: 1024, vocab_size: 512, dtype: fp32}}
  - workload: ffn_train
    axes: {{preset: [1m], method: [dense, moc_reference], selection: ["topk:0.25"]}}
    fixed: {{batch: 2, seq_len: 64, dtype: fp32}}
"""


def point_of(row: pd.Series) -> Point:
    """The point a row is about, as far as predictions ask."""
    names = {field.name for field in dataclasses.fields(Point)} & set(COLUMNS)
    return Point(**{name: None if pd.isna(row[name]) else row[name] for name in names})


def measured_peaks(workload: str) -> list[tuple[Point, float, float | None]]:
    """Points of the committed H100 sweep with their measured peak and saved bytes."""
    rows = read_rows(H100)
    rows = rows[rows["workload"] == workload]
    values = rows.pivot_table(index="point_key", columns="metric", values="value")
    found = rows[rows["metric"] == "peak_allocated_bytes"].drop_duplicates("point_key")
    saved = values["saved_activation_bytes_per_token"].dropna()
    return [(point_of(row), float(row["value"]), saved.get(row["point_key"])) for _, row in found.iterrows()]


def saved_by_autograd(model: Llama, tokens: torch.Tensor, dtype: str) -> int:
    """Bytes autograd keeps for the backward pass of a loss, weights and tables apart."""
    standing = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        model.loss(tokens, tokens)
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in standing)


# Recomputing under autocast keeps x before its cast, twice what its formula says: fp32 only.
@pytest.mark.parametrize(
    ("method", "dtype"),
    [(method, dtype) for method in ("dense", "dense_gu", "moc_reference") for dtype in ("fp32", "bf16")]
    + [("dense_recompute", "fp32")],
)
def test_what_layers_save_is_exactly_what_autograd_keeps(method: str, dtype: str) -> None:
    """Models of one and three layers on the CPU: the difference is two layers, the rest is the head."""
    rule = "topk:0.25" if method == "moc_reference" else None
    point = Point("pretrain", method, rule, None, 64, 192, 1, 4, 32, dtype, 0, n_heads=4, vocab_size=256)
    tokens = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    size = {"fp32": 4, "bf16": 2}[dtype]
    kept = {}
    for layers in (1, 3):
        config = LlamaConfig("x", 64, 192, layers, 4, vocab_size=256, max_seq_len=32)
        selection = parse_selection(rule) if rule else None
        model = Llama(config, lambda: get_method(method).make(config.ffn, selection))  # noqa: B023
        casts = layers * (4 * 64 * 64 + 3 * 64 * 192) * size if dtype == "bf16" else 0
        kept[layers] = saved_by_autograd(model, tokens, dtype) - casts
    saved = saved_by_formula(get_method(method), point)
    assert saved is not None
    assert (kept[3] - kept[1]) / 2 / 128 == layer_saved_bytes(point, "cpu", saved)
    head = kept[1] - 128 * layer_saved_bytes(point, "cpu", saved)
    assert head == 128 * head_saved_bytes(point, "cpu") + 256 * 64 * size + 4  # d_weight, and one scale


def test_whole_models_on_an_h100_are_predicted_within_four_percent() -> None:
    """Every measured pretrain peak, dense, compiled and sparse; never below."""
    peaks = measured_peaks("pretrain")
    assert len(peaks) >= 4
    for point, measured, saved in peaks:
        peak = predict_peak(point, "cuda", saved)
        assert peak is not None
        assert not peak.assumed
        assert measured < peak.row_bytes < 1.04 * measured, point.label


def test_a_measured_rival_makes_a_prediction_better() -> None:
    """From the dense peak of the same setting, MoC's is within 1.5 %: only the difference is predicted."""
    peaks = {(p.method, p.selection, p.seq_len): (p, m) for p, m, _ in measured_peaks("pretrain")}
    dense, dense_bytes = peaks["dense", None, 256]
    moc, moc_bytes = peaks["moc_reference", "topk:0.1875", 256]
    moc_peak, dense_peak = predict_peak(moc, "cuda"), predict_peak(dense, "cuda")
    assert moc_peak is not None
    assert dense_peak is not None
    alone = abs(moc_peak.row_bytes / moc_bytes - 1)
    corrected = abs(moc_peak.corrected_by(dense_peak, dense_bytes).row_bytes / moc_bytes - 1)
    assert corrected < min(alone, 0.015)


def test_ffn_steps_on_an_h100_stay_below_their_prediction() -> None:
    """Eager dense steps are met within 2 %; what is leaner is never more than 1 % above its bound."""
    for point, measured, saved in measured_peaks("ffn_train"):
        peak = predict_peak(point, "cuda", saved)
        assert peak is not None
        assert measured < 1.01 * peak.row_bytes, point.label
        if point.method in ("dense", "dense_compiled", "dense_recompute"):
            assert abs(peak.row_bytes / measured - 1) < 0.025, point.label


def test_a_method_without_a_formula_is_taken_for_dense_and_says_so() -> None:
    """Unless what it saves was measured."""
    point = train_point("rivals:good")
    peak, dense = predict_peak(point, "cpu"), predict_peak(train_point(), "cpu")
    known = predict_peak(point, "cpu", saved_bytes=1000.0)
    assert peak is not None
    assert dense is not None
    assert known is not None
    assert peak.row_bytes == dense.row_bytes
    assert (peak.assumed, dense.assumed, known.assumed) == (True, False, False)


def history(*rows: dict[str, object]) -> History:
    """What is measured on device D."""
    return History(typed(pd.DataFrame(list(rows), columns=list(COLUMNS))), "D")


def test_durations_are_measured_scaled_or_unknown() -> None:
    """The same point keeps its time, twice the work takes twice as long, another method is unknown."""
    part = parse_sweep(SWEEP.format(text="x"), "s.yaml").parts[1]
    point, wide = train_point(), train_point(batch=4)
    known = history(*rows_of(point, {"step_ms": 2000.0, "compile_s": 7.0}))  # 3 samples
    same, scaled = known.estimate(part, point), known.estimate(part, wide)
    assert same is not None
    assert scaled is not None
    assert (same.scaled, scaled.scaled) == (False, True)
    assert same.seconds - 7.0 == 2.0 + 3 * 2 * 2.0  # the gate; three samples of step, and of its two parts
    assert scaled.seconds - same.seconds == 3 * 2 * 2.0
    assert known.estimate(part, train_point("dense_gu")) is None
    assert known.estimate(part, train_point(dtype="bf16")) is None
    other = history(*rows_of(point, {"step_ms": 2000.0}, device="another"))
    assert other.estimate(part, point) is None


def test_a_training_takes_its_steps_evaluations_and_compilation() -> None:
    """One H100 run took 120 s from start to start of the next, of which the estimate is within 10 %."""
    rows = read_rows(H100)
    point = next(
        p for p, _, _ in measured_peaks("pretrain") if p.selection == "topk:0.1875" and p.seq_len == 256
    )
    part = parse_sweep(SWEEP.format(text="x"), "s.yaml").parts[0]
    found = History(rows, "NVIDIA H100 80GB HBM3").estimate(part, point)
    assert found is not None
    assert found.seconds + START_SECONDS["cuda"] == pytest.approx(120, rel=0.1)


def test_flops_of_a_step_are_those_of_its_products() -> None:
    """Against the sum over all matrices, written out for the 1m preset."""
    ffn = train_point()
    assert step_flops(ffn) == 128 * 3 * (3 * 2 * 128 * 384)
    model = Point("pretrain", "dense", None, "1m", 128, 384, 4, 2, 64, "fp32", 0, n_heads=4, vocab_size=512)
    forward = 4 * (3 * 2 * 128 * 384 + 4 * 2 * 128 * 128 + 2 * 64 * 128) + 2 * 512 * 128
    assert step_flops(model) == 128 * 3 * forward


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small corpus, and a token cache that is not there yet."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(8):
        words = " ".join(f"word{number * i % 97} and {i}" for i in range(900))
        (folder / f"{number}.txt").write_text(words)
    monkeypatch.setenv("MOCBENCH_CACHE", str(tmp_path / "cache"))
    return folder


def run_plan(tmp_path: Path, text: Path, content: str = SWEEP) -> str:
    """Output of `mocbench plan` on a sweep."""
    sweep = tmp_path / "planned.yaml"
    sweep.write_text(content if content != SWEEP else SWEEP.format(text=text))
    done = CliRunner().invoke(
        app, ["plan", str(sweep), "--device", "cpu", "--results", str(tmp_path / "results")]
    )
    assert done.exit_code == 0, f"{done.output} {done.exception!r}"
    return done.output


def test_a_plan_runs_nothing_and_writes_nothing(tmp_path: Path, text: Path) -> None:
    """No results folder, no token cache; what cannot run says why, what is unknown says so."""
    said = run_plan(tmp_path, text)
    assert {path.name for path in tmp_path.iterdir()} == {"text", "planned.yaml"}
    assert "6 points, 6 to measure" in said
    assert "unsupported: method dense_compiled does not run on cpu" in said
    assert "unsupported: method moc_reference: " in said
    assert "the text (files:*.txt) is not tokenised yet" in said
    assert "duration unknown: none of these methods is measured on CPU" in said
    assert "none of them is predicted to run out of" in said


def test_a_plan_leaves_a_results_folder_as_it_was(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured points are not to be measured again, their rows give the rest a duration, no lock appears."""
    monkeypatch.setattr("harness.forecast.view.device_name", lambda device: "D")
    folder = tmp_path / "results/planned"
    Store(folder).append(rows_of(train_point(), {"step_ms": 2.0, "peak_rss_over_start_bytes": 3e6}))
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    prepare(f"files:{text}/*.txt", 512)
    said = run_plan(tmp_path, text)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert "6 points, 5 to measure" in said
    assert "not tokenised" not in said
    assert "2.86 MiB measured, formula " in said
    assert "memory formula against 1 measured peaks of ffn_train" in said


def test_points_too_large_for_the_device_are_named(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device of 10 MB the models do not fit and the single layers do."""
    monkeypatch.setattr("harness.forecast.view.device_bytes", lambda device: 10_000_000)
    said = run_plan(tmp_path, text)
    assert said.count("predicted out of memory") == 2
    assert "2 of them are predicted to run out of the 9.54 MiB of CPU" in said


def test_a_rival_that_is_measured_corrects_the_others(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prediction of an unmeasured method moves by what the formula missed of its dense rival."""
    monkeypatch.setattr("harness.forecast.view.device_name", lambda device: "D")
    dense, sparse = (
        predict_peak(train_point(), "cpu"),
        predict_peak(train_point("moc_reference", "topk:0.25"), "cpu"),
    )
    assert dense is not None
    assert sparse is not None
    measured = dense.row_bytes + 1e6
    Store(tmp_path / "results/planned").append(
        rows_of(train_point(), {"step_ms": 2.0, "peak_rss_over_start_bytes": measured})
    )
    plan = Plan(parse_sweep(SWEEP.format(text=text), "s.yaml"), tmp_path / "results", "cpu", "none")
    line = plan.parts[1][1][1]
    assert line.point.method == "moc_reference"
    assert line.peak is not None
    assert line.peak.row_bytes == sparse.row_bytes + 1e6


def test_a_search_is_bounded_by_the_largest_point_it_may_propose(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory and duration of its highest numbers, over all methods it chooses from."""
    monkeypatch.setattr("harness.forecast.view.device_name", lambda device: "D")
    search = """\
version: 1
name: planned
workload: ffn_train
mode: optimize
axes:
  {method: [dense, moc_reference], k_frac: {low: 0.1, high: 0.5}, batch: [2, 4], seq_len: {low: 8, high: 64}}
fixed: {preset: 1m, dtype: fp32}
optimize: {n_trials: 20, objectives: [{metric: step_ms, direction: minimize}]}
"""
    largest = predict_peak(train_point(batch=4), "cpu")
    assert largest is not None
    for method, rule in (("dense", None), ("moc_reference", "topk:0.5")):
        Store(tmp_path / "results/other").append(
            rows_of(train_point(method, rule, batch=4), {"step_ms": 500.0})
        )
    said = run_plan(tmp_path, text, search)
    assert f"20 trials by tpe │ sampled │ at most {size(largest.row_bytes)} " in " ".join(said.split())
    # each: the start of a process, the gate, three samples of step and of its two parts
    assert f"about {duration(20 * (5 + 2 + 3 * 2 * 0.5))}, without baselines" in said
    assert "1 searches apart" in said


def test_text_is_found_only_once_it_is_tokenised(tmp_path: Path, text: Path) -> None:
    """Looking builds nothing, and finds the same tokens that preparing gave."""
    source = f"files:{text}/*.txt"
    assert find(source, 512) is None
    assert not (tmp_path / "cache").exists()
    prepared = prepare(source, 512)
    found = find(source, 512)
    assert found is not None
    assert found.data_id == prepared.data_id
    assert find(source, 300) is None


def test_durations_are_written_for_people() -> None:
    """Seconds, minutes and hours."""
    assert [duration(s) for s in (3.2, 89, 600, 7200)] == ["3 s", "89 s", "10 min", "2.0 h"]
