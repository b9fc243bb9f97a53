"""The ffn_train workload end to end on the CPU, at tiny shapes, with rivals from outside."""

from typing import Any

import pytest
import torch
from recorder import BATCH, D_FFN, SEQ, D, Recorder, point

from harness.measure import launch, roofline
from harness.measure.ffn import natural_tensors
from harness.sweep.model import Measure, Timing
from harness.sweep.point import Point
from harness.workloads import ffn_train
from harness.workloads.job import Job
from moc.config import FfnShape

TOKENS = BATCH * SEQ
TIME_METRICS = {"forward_ms", "backward_ms", "step_ms", "tokens_per_s", "speedup_vs_best_dense"}


def run(*points: Point, rel_ci: float = 0.99, max_seconds: float = 5.0, **settings: Any) -> Recorder:
    measure = Measure(timing=Timing(rel_ci=rel_ci, max_seconds=max_seconds), **settings)
    recorder = Recorder()
    ffn_train.run(Job("s", "r", 1, points, measure, "cpu", "."), recorder)
    return recorder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small cache flush and made-up ceilings: nothing here depends on either."""
    ceilings = roofline.Ceilings(1e9, {"bf16": 1e9, "fp32": 1e9})
    monkeypatch.setattr(launch, "MAX_CPU_FLUSH_BYTES", 2**16)
    monkeypatch.setattr(roofline, "ensure_ceilings", lambda device: ceilings)


def test_a_group_is_measured_whole() -> None:
    """Dense, recomputing, selecting and outside methods get all their rows, with intervals and samples."""
    found = run(
        point("dense"),
        point("dense_recompute"),
        point("moc_reference", "topk:0.25"),
        point("ffn_rivals:sparse", "nm:2:8"),
        point("ffn_rivals:exact"),
    )
    assert set(found.finished.values()) == {("ok", "")}
    assert len(found.finished) == 5
    for name, rows in found.rows.items():
        assert TIME_METRICS | {"compile_s", "max_rel_err", "peak_rss_over_start_bytes"} <= set(rows), name
        assert rows["max_rel_err"]["value"] < 1e-5
        for metric in TIME_METRICS:
            row = rows[metric]
            assert row["ci_low"] <= row["value"] <= row["ci_high"]
            assert row["timing_mode"] == "cpu"
            assert row["n_samples"] >= 10
        for metric in ("forward_ms", "backward_ms", "step_ms"):
            assert len(found.raw[name][metric]) == rows[metric]["n_samples"]
    assert found.rows["dense"]["tokens_per_s"]["value"] == pytest.approx(
        TOKENS / found.rows["dense"]["step_ms"]["value"] * 1e3
    )


def test_saved_bytes_are_exact() -> None:
    """Each method's saved bytes per token are its formula's, to the byte."""
    found = run(
        point("dense"),
        point("dense_gu"),
        point("dense_recompute"),
        point("moc_reference", "topk:12"),
        point("act_prune", "topk:12"),
    )
    expected = {
        "dense": (D + 4 * D_FFN) * 4,
        "dense_gu": (D + 2 * D_FFN) * 4,
        "dense_recompute": D * 4,
        "moc_reference topk:12": (D + 2 * 12) * 4 + 2 * 4,  # and a bitmask of two words
        "act_prune topk:12": (D + 2 * 12) * 4 + 2 * 4,
    }
    for name, saved in expected.items():
        row = found.rows[name]["saved_activation_bytes_per_token"]
        assert (row["value"], row["detail"]) == (saved, "")


def test_speedup_is_the_paired_ratio_to_the_fastest_exact_dense_method() -> None:
    """One dense method is the baseline of all, at exactly 1; a control that is not dense never is."""
    found = run(
        point("dense"), point("dense_recompute"), point("ffn_rivals:exact"), point("act_prune", "topk:0.25")
    )
    rows = {name: rows["speedup_vs_best_dense"] for name, rows in found.rows.items()}
    (base,) = {row["detail"].removeprefix("over ") for row in rows.values()}
    assert base in ("dense", "dense_recompute", "ffn_rivals:exact")
    assert (rows[base]["value"], rows[base]["ci_low"], rows[base]["ci_high"]) == (1.0, 1.0, 1.0)
    medians = {name: values["step_ms"]["value"] for name, values in found.rows.items()}
    assert medians[base] == min(medians[name] for name in ("dense", "dense_recompute", "ffn_rivals:exact"))
    samples = {name: torch.tensor(values["step_ms"]) for name, values in found.raw.items()}
    for name, row in rows.items():
        ratios = sorted((samples[base] / samples[name]).tolist())
        half = len(ratios) // 2
        median = ratios[half] if len(ratios) % 2 else (ratios[half - 1] + ratios[half]) / 2
        assert row["value"] == pytest.approx(median, rel=1e-5)


def test_without_a_dense_method_there_is_no_speedup() -> None:
    """A ratio needs a baseline in the same process."""
    found = run(point("moc_reference", "topk:0.25"))
    assert found.finished == {"moc_reference topk:0.25": ("ok", "")}
    assert "speedup_vs_best_dense" not in found.rows["moc_reference topk:0.25"]


def test_roofline_rows_are_arithmetic_on_counts_and_ceilings() -> None:
    """Dense: 18 T d d_ffn operations over the ceiling, as a share of the step; unknown counts have no row."""
    found = run(point("dense"), point("ffn_rivals:sparse", "nm:2:8"))
    rows = found.rows["dense"]
    flops = 18 * TOKENS * D * D_FFN
    assert rows["flops"]["value"] == flops
    weights, x, kept = 3 * D * D_FFN * 4, TOKENS * D * 4, 4 * TOKENS * D_FFN * 4
    assert rows["min_bytes"]["value"] == (x + weights + x + kept) + (x + weights + x + kept + x + weights)
    floor_ms = 1e3 * max(flops, rows["min_bytes"]["value"]) / 1e9
    assert rows["pct_of_roofline"]["value"] == pytest.approx(100 * floor_ms / rows["step_ms"]["value"])


def test_a_wrong_method_gets_no_speed_and_is_nobodys_baseline() -> None:
    """5 % too much is `wrong`, with its error as the only number, and the right methods are measured."""
    found = run(point("ffn_rivals:scaled"), point("dense"))
    status, detail = found.finished["ffn_rivals:scaled"]
    assert status == "wrong"
    assert "natural.y off by 5.00e-02" in detail
    assert set(found.rows["ffn_rivals:scaled"]) == {"compile_s", "max_rel_err"}
    assert found.rows["ffn_rivals:scaled"]["max_rel_err"]["value"] == pytest.approx(0.05, rel=0.01)
    assert found.rows["dense"]["speedup_vs_best_dense"]["detail"] == "over dense"


def test_what_cannot_run_is_unsupported_with_its_reason() -> None:
    """A wrong name, a rule that does not fit, a missing rule, another kind of module: each says why."""
    found = run(
        point("densee"),
        point("moc_reference", "topk:49"),
        point("moc_reference"),
        point("ffn_rivals:one_matrix"),
        point("dense"),
    )
    assert found.finished.pop("dense") == ("ok", "")
    assert {status for status, _detail in found.finished.values()} == {"unsupported"}
    assert "did you mean dense?" in found.finished["densee"][1]
    assert "K=49 exceeds d_ffn=48" in found.finished["moc_reference topk:49"][1]
    assert "needs a selection" in found.finished["moc_reference"][1]
    assert "no parameter w_gate" in found.finished["ffn_rivals:one_matrix"][1]


def test_running_out_of_memory_costs_one_method_only() -> None:
    """Before or during timing, the method that ran out is `oom` and its rivals are measured without it."""
    found = run(point("ffn_rivals:big_at_once"), point("dense"), point("ffn_rivals:big_later"))
    assert found.finished["ffn_rivals:big_at_once"] == ("oom", "CUDA out of memory. Tried to allocate 9 GiB")
    assert found.finished["ffn_rivals:big_later"][0] == "oom"
    assert found.finished["dense"] == ("ok", "")
    assert set(found.rows["dense"]) >= TIME_METRICS


def test_an_error_in_the_middle_of_timing_blames_its_own_point() -> None:
    """Whatever else a method raises ends the run, with that method's point the last one started."""
    measure = Measure(timing=Timing(rel_ci=0.99, max_seconds=5.0))
    job = Job("s", "r", 1, (point("ffn_rivals:breaks_later"), point("dense")), measure, "cpu", ".")
    recorder = Recorder()
    with pytest.raises(ZeroDivisionError, match="lost it"):
        ffn_train.run(job, recorder)
    assert [name for event, name in recorder.events if event == "start"][-1] == "ffn_rivals:breaks_later"
    assert recorder.finished == {}


def test_every_row_comes_after_its_point_was_started() -> None:
    """The point being worked on is always the last one started, so a killed process has a culprit."""
    found = run(point("dense"), point("moc_reference", "topk:0.25"))
    current = ""
    for event, name in found.events:
        if event == "start":
            current = name
        assert name == current


def test_a_shape_off_the_fast_path_is_flagged() -> None:
    """d_ffn = 45 is measured and said to be misaligned."""
    found = run(point("dense", d_ffn=45))
    assert found.finished["dense"] == ("ok", "misaligned: d_ffn=45 not a multiple of 8")


def test_at_the_cap_the_point_is_unstable_and_says_what_was_reached() -> None:
    """A width nobody can reach in no time: the values are kept, the status and reason say so."""
    found = run(point("dense"), point("dense_gu"), rel_ci=1e-9, max_seconds=0.01)
    status, detail = found.finished["dense"]
    assert status == "unstable"
    assert "rounds in 0 s, at least 10 are needed" in detail or "wanted 0.0%" in detail
    assert found.rows["dense"]["step_ms"]["value"] > 0
    assert found.rows["dense"]["forward_ms"]["status"] == "unstable"


def test_several_layers_are_measured_as_one_stack() -> None:
    """Depth 3: three times the work and traffic, the same saved bytes per layer, the gate on one layer."""
    one, three = run(point("dense")), run(point("dense", n_layers=3))
    for metric in ("flops", "min_bytes"):
        assert three.rows["dense"][metric]["value"] == 3 * one.rows["dense"][metric]["value"]
    saved = [found.rows["dense"]["saved_activation_bytes_per_token"]["value"] for found in (one, three)]
    assert saved[0] == saved[1] == (D + 4 * D_FFN) * 4
    assert three.finished["dense"] == ("ok", "")


def test_what_a_cap_left_out_is_reported() -> None:
    """The overflow of a threshold is the share of wanted channels above its cap, of the timed inputs."""
    found = run(point("moc_reference", "threshold:0.2:8"))
    value = found.rows["moc_reference threshold:0.2:8"]["overflow_fraction"]["value"]
    tensors = natural_tensors(FfnShape(D, D_FFN), TOKENS, torch.float32, torch.device("cpu"), seed=0)
    wanted = (tensors.x @ tensors.w_gate.T > 0.2).sum(dim=1)
    assert value == pytest.approx(float((wanted - 8).clamp(min=0).sum() / wanted.sum()))
    assert 0.3 < value < 0.9


def test_passes_can_be_left_out() -> None:
    """Without gate and memory there are no rows of them, and no traffic for a method without a formula."""
    found = run(point("ffn_rivals:exact"), gate=False, memory=False)
    assert set(found.rows["ffn_rivals:exact"]) == TIME_METRICS | {"compile_s", "flops"}


def test_points_of_two_groups_are_refused() -> None:
    """Rivals share shape, inputs and seed; a job that mixes groups is a mistake of the caller."""
    with pytest.raises(ValueError, match="more than one group"):
        run(point("dense"), point("dense_gu", seed=1))
