"""The loss gap of two methods: paired over the windows of validation text both were evaluated on."""

import numpy as np
import pandas as pd
import pytest
from rows import rows_of
from scipy import stats

from harness.report.findings import findings
from harness.report.points import point_table
from harness.report.tables import tables_of
from harness.store.rows import COLUMNS
from harness.sweep.point import Point

SHAPE = {"preset": "1m", "d_model": 128, "d_ffn": 384, "n_layers": 4, "n_heads": 4, "batch": 2, "seq_len": 64}
DENSE = Point("pretrain", "dense", None, dtype="fp32", seed=0, train_tokens=1000, **SHAPE)
MOC = Point("pretrain", "moc_reference", "topk:0.25", dtype="fp32", seed=0, train_tokens=1000, **SHAPE)


def evaluated(point: Point, windows: np.ndarray, run_id: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows and window losses of a trained point."""
    loss = float(windows.mean())
    values = {"eval_loss_nats": loss, "perplexity": float(np.exp(loss)), "tokens_per_s": 10.0}
    rows = pd.DataFrame(rows_of(point, values, run_id=run_id), columns=list(COLUMNS))
    samples = pd.DataFrame({"x": np.arange(len(windows)), "value": windows})
    return rows, samples.assign(run_id=run_id, point_key=point.key, metric="eval_window_loss_nats")


def measured(seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame, np.ndarray, np.ndarray]:
    """Dense and MoC on the same 50 windows, whose difficulty varies far more than the methods differ."""
    generator = np.random.default_rng(seed)
    difficulty = generator.normal(5.0, 0.5, 50)
    dense, moc = difficulty + generator.normal(0, 0.01, 50), difficulty + generator.normal(0.02, 0.01, 50)
    parts = [evaluated(DENSE, dense, "r1"), evaluated(MOC, moc, "r2")]
    rows, samples = (pd.concat([part[i] for part in parts], ignore_index=True) for i in (0, 1))
    return rows, samples, dense, moc


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    """Gap and interval equal scipy's paired t-test on the window losses."""
    rows, samples, dense, moc = measured()
    line = point_table(rows, samples).set_index("method").loc["moc_reference"]
    expected = stats.ttest_rel(moc, dense).confidence_interval(0.95)
    assert line["gap_paired"]
    assert line["loss_gap"] == pytest.approx((moc - dense).mean())
    assert (line["loss_gap_ci_low"], line["loss_gap_ci_high"]) == pytest.approx((expected.low, expected.high))


def test_windows_of_an_older_run_are_not_used() -> None:
    """Only samples of the run whose rows are shown count, so a repeated point is never mixed up."""
    rows, samples, _, _ = measured()
    stale = samples[samples["run_id"] == "r2"].assign(run_id="r0", value=99.0)
    mixed = pd.concat([stale, samples], ignore_index=True)
    line = point_table(rows, mixed).set_index("method").loc["moc_reference"]
    assert line["loss_gap_ci_high"] < 0.1
    assert not point_table(rows, stale).set_index("method").loc["moc_reference", "gap_paired"]


def test_other_windows_do_not_pair() -> None:
    """Runs evaluated on different numbers of windows fall back to independent losses."""
    rows, samples, _, _ = measured()
    shorter = samples[(samples["run_id"] != "r2") | (samples["x"] < 30)]
    assert not point_table(rows, shorter)["gap_paired"].any()


def test_the_sentence_says_that_it_is_paired() -> None:
    """The reader is told what the interval covers and what it does not."""
    rows, samples, _, _ = measured()
    text = " ".join(findings(tables_of(rows, samples)))
    assert "paired; one seed's noise is not in it" in text
    assert "no difference shows" not in text
