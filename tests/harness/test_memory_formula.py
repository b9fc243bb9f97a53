"""The memory self-test: predicted whole-model peaks against measured ones."""

import pandas as pd
import pytest
from rows import rows_of

from harness.report.memory_formula import memory_formula
from harness.report.points import point_table
from harness.store.rows import COLUMNS
from harness.sweep.point import Point

SHAPE = {"preset": "1m", "d_model": 128, "d_ffn": 384, "n_layers": 4, "n_heads": 4, "batch": 2, "seq_len": 64}


def table(dense_peak: float, *moc_peaks: float, metric: str = "peak_allocated_bytes") -> pd.DataFrame:
    """Dense keeps 1000 bytes a token and layer, MoC 400; 128 tokens, 4 layers: 307,200 bytes less.

    One seed per MoC peak.
    """
    rows = []
    for seed, moc_peak in enumerate(moc_peaks):
        for method, rule, peak, saved in (
            ("dense", None, dense_peak, 1000.0),
            ("moc_reference", "topk:0.25", moc_peak, 400.0),
        ):
            point = Point("pretrain", method, rule, dtype="bf16", seed=seed, train_tokens=1000, **SHAPE)
            values = {metric: peak, "saved_activation_bytes_per_token": saved, "tokens_per_s": 10.0}
            rows += rows_of(point, values, run_id=f"{method}{seed}")
    return memory_formula(point_table(pd.DataFrame(rows, columns=list(COLUMNS))))


def test_a_model_that_saves_what_its_layers_save_has_no_error() -> None:
    """Dense peak minus 600 bytes x 128 tokens x 4 layers is what MoC must measure."""
    (line,) = table(1_000_000.0, 1_000_000.0 - 600 * 128 * 4).to_dict("records")
    assert (line["method"], line["against"]) == ("moc_reference", "dense")
    assert line["error"] == 0.0


def test_memory_that_does_not_fall_is_seen() -> None:
    """If the peak stays where it was, the formula is off by all that should have been saved."""
    (line,) = table(1_000_000.0, 1_000_000.0).to_dict("records")
    assert line["error"] == pytest.approx(-0.3072)


def test_resident_sets_are_not_judged() -> None:
    """On a CPU the peak is that of the process, which holds more than tensors: no line."""
    assert table(1e6, 1e6, metric="peak_rss_over_start_bytes").empty


def test_seeds_share_a_line_that_has_the_worst_error() -> None:
    """Two seeds, one without error and one whose peak stayed: means of both, and the error of the second."""
    fallen = 1_000_000.0 - 600 * 128 * 4
    (line,) = table(1_000_000.0, fallen, 1_000_000.0).to_dict("records")
    assert line["measured_bytes"] == (fallen + 1_000_000.0) / 2
    assert line["error"] == pytest.approx(-0.3072)
