"""What compares with what, and what the sentences say: rows whose answers are known by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rows import (
    CPU,
    GPU,
    around,
    frame,
    gpu_rows,
    point,
    quality,
    quick_rows,
    write_results,
)

from harness.report import wording
from harness.report.build import conclusions, read_results
from harness.report.findings import findings
from harness.report.points import is_dense, point_table
from harness.report.present import workload_table
from harness.report.summary import failures, headline_table, lead_lines, summarise
from harness.report.tables import tables_of

TOPK = "topk:0.1875"


def line(rows: pd.DataFrame, method: str = "moc_reference", **where: Any) -> pd.Series:
    """The one summary line of a method."""
    table = summarise(point_table(rows))
    for name, value in {"method": method, **where}.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return table.iloc[0]


def findings_of(rows: pd.DataFrame) -> list[str]:
    """What some rows of one device show."""
    return findings(tables_of(rows))


def trained(rate: float, loss: float = 4.0, peak: float = 10e9, **more: float) -> dict[str, Any]:
    """Metrics of a trained model."""
    return {"tokens_per_s": rate, "peak_allocated_bytes": peak, **quality(loss), **more}


def three() -> pd.DataFrame:
    """Two dense methods and MoC: MoC has 0.75 of the speed of the faster one."""
    return frame(
        point("dense", None, trained(1000, 4.0, 40e9)),
        point("dense_compiled", None, trained(2000, 4.0, 20e9)),
        point("moc_reference", TOPK, trained(1500, 4.01, 15e9)),
    )


def test_speed_is_divided_by_the_fastest_dense_of_the_cell() -> None:
    """1500 tokens/s against 2000 of dense_compiled is 0.75, and the ratio names its baseline."""
    found = line(three())
    assert found["x_best_dense"] == pytest.approx(0.75)
    assert found["baseline"] == "dense_compiled"
    assert not found["paired"]
    assert line(three(), "dense")["x_best_dense"] == pytest.approx(0.5)


def test_interval_of_an_unpaired_ratio_adds_both_errors() -> None:
    """Factors of e^0.03 and e^0.04 make e^0.05, whichever end they come from; 1.0 has no interval."""
    dense = (2000.0, 2000 * math.exp(-0.03), 2000 * math.exp(0.06))
    sparse = (1000.0, 1000 * math.exp(-0.08), 1000 * math.exp(0.04))
    rows = frame(
        point("dense", None, {"tokens_per_s": dense}), point("moc_reference", TOPK, {"tokens_per_s": sparse})
    )
    found = line(rows)
    assert found["x_best_dense_ci_low"] == pytest.approx(0.5 * math.exp(-0.1))
    assert found["x_best_dense_ci_high"] == pytest.approx(0.5 * math.exp(0.05))
    assert math.isnan(line(rows, "dense")["x_best_dense_ci_low"])


def test_interval_of_a_ratio_of_times_is_turned_round() -> None:
    """The slow end of a step time is the low end of its speed."""
    rows = frame(
        point("dense", None, {"step_ms": (2.0, 2.0, 2.0)}, workload="ffn_train"),
        point("moc_reference", TOPK, {"step_ms": (4.0, 3.9, 5.0)}, workload="ffn_train"),
    )
    found = line(rows)
    assert found["x_best_dense_ci_low"] == pytest.approx(2 / 5)
    assert found["x_best_dense_ci_high"] == pytest.approx(2 / 3.9)


def test_a_noisy_ratio_is_called_noisy() -> None:
    """An interval wider than 10 % either way is said; a narrow one is not."""
    for share, expected in ((0.3, True), (0.02, False)):
        rows = frame(
            point("dense", None, {"tokens_per_s": around(1000, share)}),
            point("moc_reference", TOPK, {"tokens_per_s": around(500, 0.01)}),
        )
        assert any("measure again on a quiet machine" in s for s in findings_of(rows)) is expected


def test_measured_paired_ratio_wins_over_the_quotient() -> None:
    """Where a workload measured the paired ratio, that number and its interval are the ones reported."""
    rows = frame(
        point("dense", None, {"step_ms": 2.0, "speedup_vs_best_dense": 1.0}, workload="ffn_train"),
        point(
            "moc_reference",
            TOPK,
            {"step_ms": 4.0, "speedup_vs_best_dense": (0.52, 0.51, 0.53)},
            workload="ffn_train",
        ),
    )
    found = line(rows)
    assert (found["x_best_dense"], found["x_best_dense_ci_low"]) == (0.52, 0.51)
    assert found["paired"]


def test_baseline_of_paired_ratios_is_the_one_with_ratio_one() -> None:
    """The method the ratios were taken against is named even if another one's median step is shorter."""
    rows = frame(
        point("dense", None, {"step_ms": 2.00, "speedup_vs_best_dense": 1.0}, workload="ffn_train"),
        point("dense_gu", None, {"step_ms": 1.99, "speedup_vs_best_dense": 0.999}, workload="ffn_train"),
    )
    assert line(rows, "dense_gu")["baseline"] == "dense"


def test_a_faster_dense_method_measured_later_takes_the_ratio_over() -> None:
    """A paired ratio to a method that is no longer the fastest gives way to the quotient, and says so."""
    first, later = {"run_id": "first"}, {"run_id": "later"}
    rows = frame(
        point("dense", None, {"step_ms": 2.0, "speedup_vs_best_dense": 1.0}, workload="ffn_train", **first),
        point("moc", TOPK, {"step_ms": 1.0, "speedup_vs_best_dense": 2.02}, workload="ffn_train", **first),
        point(
            "dense_fused", None, {"step_ms": 1.6, "speedup_vs_best_dense": 1.0}, workload="ffn_train", **later
        ),
        point(
            "moc", "nm:2:8", {"step_ms": 0.8, "speedup_vs_best_dense": 2.01}, workload="ffn_train", **later
        ),
    )
    ratios = rows["metric"] == "speedup_vs_best_dense"
    rows.loc[ratios, "detail"] = ["over dense", "over dense", "over dense_fused", "over dense_fused"]
    earlier, latest = line(rows, "moc", selection=TOPK), line(rows, "moc", selection="nm:2:8")
    assert earlier["baseline"] == latest["baseline"] == "dense_fused"
    assert (earlier["x_best_dense"], latest["x_best_dense"]) == (1.6, 2.01)
    assert (earlier["paired"], latest["paired"]) == (False, True)
    assert (earlier["unpaired"], latest["unpaired"]) == (True, False)
    assert line(rows, "dense")["x_best_dense"] == pytest.approx(0.8)
    notes = workload_table(summarise(point_table(rows))).set_index("method")["note"]
    assert (notes["dense"], notes["dense_fused"]) == ("unpaired", "")


def test_memory_is_compared_with_the_leanest_dense_that_is_as_fast() -> None:
    """A leaner dense method that is slower than MoC does not count; one that is faster does."""
    rows = frame(
        point("dense", None, trained(2000, peak=20e9)),
        point("dense_gu", None, trained(1600, peak=16e9)),
        point("dense_recompute", None, trained(1000, peak=5e9)),
        point("moc_reference", TOPK, trained(1500, peak=12e9)),
    )
    found = line(rows)
    assert found["leanest"] == "dense_gu"
    assert found["memory_change"] == pytest.approx(12 / 16 - 1)
    assert found["memory_change_fastest"] == pytest.approx(12 / 20 - 1)


def test_memory_falls_back_to_the_fastest_dense_if_none_is_as_fast() -> None:
    """A method faster than every dense one is compared with the fastest, and the sentence says so."""
    rows = frame(
        point("dense", None, trained(1000, peak=20e9)),
        point("dense_recompute", None, trained(500, peak=5e9)),
        point("moc_reference", TOPK, trained(1500, peak=12e9)),
    )
    found = line(rows)
    assert not found["dense_as_fast"]
    assert found["memory_change"] == pytest.approx(-0.4)
    assert any("40 % below dense, the fastest dense method (none is as fast)" in s for s in findings_of(rows))


def test_perplexity_difference_in_nats_and_percent() -> None:
    """0.01 nats more is exp(0.01) - 1 in perplexity; two intervals of 0.02 add up to 0.0283."""
    found = line(three())
    assert found["loss_gap"] == pytest.approx(0.01)
    assert found["perplexity_change"] == pytest.approx(100 * (math.exp(0.01) - 1))
    assert found["loss_gap_ci_high"] - found["loss_gap"] == pytest.approx(0.02 * math.sqrt(2))


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_a_summary_has_the_means_and_intervals_of_its_groups(seeds: int) -> None:
    """Group by group: the mean over seeds, and the t interval from three seeds on, else the mean bounds."""
    points = point_table(quick_rows(seeds))
    table = summarise(points)
    groups = dict(list(points.groupby(["cell", "method", "selection"])))
    assert len(table) == len(groups)
    for _, found in table.iterrows():
        group = groups[found["cell"], found["method"], found["selection"]]
        assert found["seeds"] == seeds
        for name in ("tokens_per_s", "loss_gap", "x_best_dense", "parameters"):
            values = group[name]
            assert found[name] == pytest.approx(values.mean(), nan_ok=True)
            if seeds == 3:
                half = 4.302653 * values.std() / math.sqrt(3)
                low, high = values.mean() - half, values.mean() + half
            else:
                low, high = (group[f"{name}_ci_{end}"].mean() for end in ("low", "high"))
            ends = [found[f"{name}_ci_low"], found[f"{name}_ci_high"]]
            assert ends == pytest.approx([low, high], nan_ok=True, rel=1e-6)


def test_three_seeds_give_a_t_interval_of_paired_differences() -> None:
    """Gaps of 0.01, 0.02 and 0.03 nats: mean 0.02, half-width 4.3027 * 0.01 / sqrt(3)."""
    points = []
    for seed, gap in enumerate((0.01, 0.02, 0.03)):
        base = 4.0 + seed  # large differences between seeds cancel, because seeds are paired
        points.append(point("dense", None, trained(1000, base), seed=seed))
        points.append(point("moc_reference", TOPK, trained(500, base + gap), seed=seed))
    found = line(frame(*points))
    assert found["seeds"] == 3
    assert found["loss_gap"] == pytest.approx(0.02)
    assert found["loss_gap_ci_high"] == pytest.approx(0.02 + 4.302652729 * 0.01 / math.sqrt(3))
    sentences = " ".join(findings_of(frame(*points)))
    assert "95 % over 3 seeds" in sentences
    assert "one seed" not in sentences


def test_a_lone_setting_of_one_seed_hedges_no_claim_about_another() -> None:
    """The same rule in fp32, one seed and no dense beside it, is compared with nothing and hedges nothing."""
    points = [point("moc_reference", TOPK, trained(500), dtype="fp32")]
    for seed in range(3):
        points.append(point("dense", None, trained(1000), seed=seed))
        points.append(point("moc_reference", TOPK, trained(500), seed=seed))
    assert "one seed" not in " ".join(findings_of(frame(*points)))


@pytest.mark.parametrize(
    "other",
    [
        *({"seq_len": 512}, {"device": CPU}, {"seed": 1}, {"dtype": "fp16"}),
        *({"train_tokens": 1}, {"tokens": 8192}, {"eval_tokens": 1}),
    ],
    ids=lambda other: next(iter(other)),
)
def test_points_of_another_cell_never_compare(other: dict[str, Any]) -> None:
    """A dense method of another length, device, seed, dtype, budget or batch is no baseline."""
    rows = frame(point("dense", None, trained(1000), **other), point("moc_reference", TOPK, trained(500)))
    found = line(rows)
    assert found["baseline"] == ""
    assert math.isnan(found["x_best_dense"])


def test_failed_dense_method_is_no_baseline() -> None:
    """The fastest dense method that has a measurement is the baseline; one that is `wrong` is not."""
    rows = frame(
        point("dense", None, trained(1000)),
        point("dense_compiled", None, {"max_rel_err": 0.9}, status="wrong", detail="dx off"),
        point("moc_reference", TOPK, trained(500)),
    )
    assert line(rows)["baseline"] == "dense"
    assert list(failures(point_table(rows))["method"]) == ["dense_compiled"]


def test_a_factory_is_not_taken_for_a_dense_method() -> None:
    """Only registered exact dense methods may be the baseline."""
    assert is_dense("dense_recompute", None)
    assert not is_dense("dense", TOPK)
    assert not is_dense("moc_reference", None)
    assert not is_dense("rivals.low_rank:build", None)


def test_headline_leaves_out_misaligned_and_failed_points() -> None:
    """A width of 5461 and a point out of memory are in no headline; aligned measured points are."""
    rows = frame(
        point("dense", None, trained(1000)),
        point("moc_reference", TOPK, trained(500)),
        point("moc_reference", "nm:2:8", status="oom", detail="out of memory"),
        point("dense", None, trained(1000), preset="paper-1b"),
        point("moc_reference", TOPK, trained(2000), preset="paper-1b"),
    )
    table = headline_table(tables_of(rows).summary)
    assert list(table["method"]) == ["dense", "moc_reference"]
    assert set(table["d_ffn"]) == {1408}
    sentences = findings_of(rows)
    assert any("0.50x" in sentence for sentence in sentences)
    assert not any("2.00x" in sentence for sentence in sentences)
    assert any(s.startswith("Misaligned shapes (paper-1b:") for s in sentences)
    assert any("1 of 5 points failed (1 oom)" in s for s in sentences)


def test_headline_takes_saved_bytes_of_the_same_layer() -> None:
    """Saved bytes measured on one FFN layer stand beside the whole model of the same shape and rule."""
    table = headline_table(tables_of(gpu_rows()).summary)
    assert set(table["workload"]) == {"pretrain"}
    saved = table.set_index(["method", "selection", "seq_len"])["saved_bytes_per_token"]
    assert saved["dense", "", 256] == 2 * (512 + 4 * 1408)
    assert saved["moc_reference", TOPK, 1024] == 2 * (512 + 2 * 0.1875 * 1408)


def test_headline_of_a_sweep_without_training_is_the_ffn_layer() -> None:
    """`ffn_train` alone still has a headline: speed from step time, tokens over milliseconds."""
    rows = frame(
        point("dense", None, {"step_ms": 2.0}, workload="ffn_train", tokens=4096),
        point("moc_reference", TOPK, {"step_ms": 4.0}, workload="ffn_train", tokens=4096),
    )
    table = headline_table(tables_of(rows).summary)
    assert table["tokens_per_s"].tolist() == [2_048_000, 1_024_000]
    assert table["x_best_dense"].tolist() == [1.0, 0.5]


def test_memory_is_named_for_what_it_is_on_each_device() -> None:
    """CUDA rows speak of allocated memory, CPU rows of the resident set, which says nothing of a GPU."""
    on_gpu = " ".join(findings_of(gpu_rows()))
    on_cpu = " ".join(findings_of(quick_rows()))
    assert "peak allocated memory" in on_gpu
    assert "resident" not in on_gpu
    assert "peak resident memory over start" in on_cpu
    assert "allocated" not in on_cpu
    assert "say nothing about a GPU" in on_cpu
    assert "CPU numbers" not in on_gpu


def test_sentences_carry_the_figures() -> None:
    """One setting: ratio, speeds, memory saving, both quality differences, and that it is unpaired."""
    joined = " ".join(findings_of(three()))
    for words in (
        "at 0.75x the speed of the fastest dense method of the same run (dense_compiled; 1,500 against",
        "2,000 tokens/s, unpaired: each was measured in a process of its own",
        "60m at sequence length 256",
        "25 % below dense_compiled, the leanest dense method of equal or better speed",
        "After 40M training tokens its validation perplexity is 55.15, +1.0 % from dense",
        "(+0.010 nats ± 0.028",
        "no difference shows within that uncertainty",
        "one seed",
    ):
        assert words in joined


def test_a_clear_difference_is_not_called_none() -> None:
    """A gap of 0.1 nats with an interval of 0.03 is a difference."""
    rows = frame(point("dense", None, trained(1000, 4.0)), point("moc_reference", TOPK, trained(900, 4.1)))
    assert not any("no difference shows" in sentence for sentence in findings_of(rows))


def test_short_runs_are_called_short() -> None:
    """Tokens per parameter are given, with the warning that short runs favour sparsity, only where true."""
    short = {"parameters": 58e6, "train_tokens_seen": 40e6}
    long = {"parameters": 58e6, "train_tokens_seen": 58e6 * 25}
    for counts, expected in ((short, True), (long, False)):
        rows = frame(
            point("dense", None, trained(1000, **counts)),
            point("moc_reference", TOPK, trained(500, **counts)),
        )
        assert any("0.69 tokens per parameter" in s and "favour" in s for s in findings_of(rows)) is expected


def test_paired_ratios_are_called_paired() -> None:
    """FFN sentences name the paired ratio with its interval, and the saved bytes."""
    rows = gpu_rows()
    ffn = rows[(rows["workload"] == "ffn_train") & (rows["preset"] == "60m")]
    speed, memory, *_ = findings_of(ffn)
    assert "at 0.39x the speed of the fastest dense method" in speed
    assert "paired ratio, 95 % interval 0.384 to 0.389" in speed
    assert "unpaired" not in speed
    assert "5.8 % above dense_recompute, the leanest dense method of equal or better speed" in memory
    assert "keeps 2,080 bytes a token for backward, 103 % above the same method" in memory
    assert "83 % below dense_compiled, the fastest" in memory


def test_no_dense_method_supports_no_comparison() -> None:
    """Without a dense method there is a plain statement and no ratio."""
    sentences = findings_of(frame(point("moc_reference", TOPK, trained(500))))
    assert any("no dense method was measured" in sentence for sentence in sentences)
    assert not any("x the speed" in sentence for sentence in sentences)


def test_only_dense_and_only_misaligned_are_said() -> None:
    """A run with nothing sparse, and one with misaligned shapes alone, each say why nothing is judged."""
    only_dense = findings_of(frame(point("dense", None, trained(500))))
    assert any("only dense methods" in sentence for sentence in only_dense)
    off = findings_of(frame(point("dense", None, trained(500), preset="paper-1b")))
    assert any("only misaligned shapes" in sentence for sentence in off)


def test_no_rows_and_only_failures_give_no_claims() -> None:
    """Empty rows say nothing; rows that all failed say only that."""
    assert findings_of(frame()) == []
    sentences = findings_of(frame(point("dense", status="timeout", detail="300 s")))
    assert sentences == ["1 of 1 points failed (1 timeout); they are listed below."]


def test_devices_speak_one_after_the_other(tmp_path: Path) -> None:
    """Rows of two devices give sentences that each name their device, with ratios inside a device only."""
    rows = frame(
        point("dense", None, trained(1000)),
        point("moc_reference", TOPK, trained(500)),
        point("dense", None, {"tokens_per_s": 10.0}, device=CPU),
        point("moc_reference", TOPK, {"tokens_per_s": 8.0}, device=CPU),
    )
    sentences = conclusions(read_results(write_results(tmp_path, rows)))
    assert all(sentence.startswith((f"{GPU}: ", f"{CPU}: ")) for sentence in sentences)
    assert any(s.startswith(f"{GPU}: ") and "0.50x" in s for s in sentences)
    assert any(s.startswith(f"{CPU}: ") and "0.80x" in s for s in sentences)


def test_unstable_points_count_and_are_marked() -> None:
    """A point at its time cap is used, and the sentences say how many there are."""
    rows = frame(
        point("dense", None, {"step_ms": 2.0}, workload="ffn_train"),
        point("moc_reference", TOPK, {"step_ms": 4.0}, workload="ffn_train", status="unstable"),
    )
    assert line(rows)["unstable"]
    assert any("1 of 2 points reached their time cap" in sentence for sentence in findings_of(rows))


def test_the_default_k_speaks_for_the_sweep() -> None:
    """Of several K the one nearest to 18.75 % is the lead; MoC leads before act_prune, topk before n:m."""
    table = summarise(point_table(quick_rows()))
    assert set(lead_lines(table)["selection"]) == {TOPK}
    rows = frame(
        point("act_prune", TOPK, trained(900)),
        point("moc_reference", "nm:2:8", trained(800)),
        point("dense", None, trained(1000)),
    )
    lead = lead_lines(summarise(point_table(rows)))
    assert list(lead["method"]) == ["moc_reference"]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (wording.number(1234567, 4), "1,235,000"),
        (wording.number(0.01234), "0.0123"),
        (wording.number(0), "0"),
        (wording.number(math.nan), "–"),
        (wording.number(99.96), "100"),
        (wording.number(-2.5, 2), "−2.5"),
        (wording.signed(-0.0004, 3), "0.000"),
        (wording.signed(0.0126, 3), "+0.013"),
        (wording.percent(18.75), "18.75 %"),
        (wording.percent(25.0), "25 %"),
        (wording.size(1.5 * 2**30), "1.50 GiB"),
        (wording.size(300 * 2**20), "300 MiB"),
        (wording.tokens(40e6), "40M"),
        (wording.change([-0.2, -0.2]), "20 % below"),
        (wording.change([0.031, 0.052]), "3.1 to 5.2 % above"),
        (wording.change([-0.3, -0.1]), "10 to 30 % below"),
        (wording.change([-0.05, 0.02]), "from 5.0 % below to 2.0 % above"),
        (wording.change([0.0001]), "level with"),
        (wording.span([0.5, 0.71], wording.ratio), "0.50x to 0.71x"),
        (wording.span([0.5], wording.ratio), "0.50x"),
    ],
)
def test_numbers_are_written_with_sensible_digits(written: str, expected: str) -> None:
    """Digits, units, signs and ranges come out as a person would write them."""
    assert written == expected


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("mocbench run sweeps/quick.yaml", "mocbench run sweeps/quick.yaml"),
        ("/opt/venv/bin/python -m harness run", "python -m harness run"),
        ("run --data 'files:/home/me/x/*.jsonl'", "run --data 'files:*.jsonl'"),
        ("run ../other/x.yaml ~/y/z.yaml ./a.yaml", "run x.yaml z.yaml a.yaml"),
        ("run --storage postgresql+psycopg://me:secret@db/x", "run --storage postgresql+psycopg://..."),
        ("run --data hf:allenai/c4", "run --data hf:allenai/c4"),
    ],
)
def test_commands_lose_the_paths_of_the_machine(command: str, expected: str) -> None:
    """Folders and servers go, file names and names of data sets stay."""
    assert wording.without_paths(command) == expected
