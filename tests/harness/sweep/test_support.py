"""Why a point cannot be measured: one answer, known before a process is started."""

import dataclasses
import io
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rows import train_point

from harness.measure.environment import device_name
from harness.run.options import RunOptions
from harness.run.runner import run_sweep
from harness.store.frames import read_rows
from harness.sweep.load import parse_sweep
from harness.sweep.point import Point
from harness.sweep.support import unsupported_reason

SWEEP = """\
version: 1
name: s
workload: ffn_decode
axes: {method: [dense, moc_reference], selection: ["topk:999"]}
fixed: {preset: 1m, batch: 4, dtype: fp32}
"""


def pretrain_point(**changes: Any) -> Point:
    """A small point of a whole model."""
    own = {"n_heads": 4, "vocab_size": 512, "train_tokens": 8192, "eval_tokens": 1024, "lr": 1e-3}
    values = train_point().to_dict() | {"selection": None}
    return Point(**{**values, **own, "workload": "pretrain", "preset": None, **changes})


@pytest.mark.parametrize(
    ("point", "reason"),
    [
        (train_point(), None),
        (pretrain_point(), None),
        (train_point("dense", "topk:999"), None),  # a dense method ignores the rule
        (train_point("densee"), "did you mean dense?"),
        (train_point("moc_reference", "topk:x"), "expected topk:FRACTION"),
        (train_point("moc_reference", "topk:999"), "K=999 exceeds d_ffn=384"),
        (train_point("moc_reference"), "needs a selection"),
        (train_point("dense_compiled"), "does not run on cpu"),
        (
            dataclasses.replace(train_point(), workload="ffn_decode", n_layers=2),
            "ffn_decode measures one layer, not n_layers=2",
        ),
        (pretrain_point(dtype="fp16"), "dtype fp16 cannot be trained; choose one of bf16, fp32"),
        (pretrain_point(n_heads=None), "pretrain: n_heads is missing from the point"),
        (pretrain_point(n_heads=5), "n_heads"),
    ],
)
def test_a_point_that_cannot_be_measured_says_why(point: Point, reason: str | None) -> None:
    """The method, the rule, the dtype, the device or the model: in one line, and never as an exception."""
    found = unsupported_reason(point, "cpu")
    assert found is None if reason is None else reason in str(found)


def test_an_unsupported_point_gets_its_row_without_a_process(tmp_path: Path) -> None:
    """The trial of this run ends at once: only the point that is supported fails with it."""
    command = (sys.executable, "-c", "raise SystemExit(1)")
    options = RunOptions(results=tmp_path, trial_command=command)
    summary = run_sweep(parse_sweep(SWEEP, "s.yaml"), options, Console(file=io.StringIO()))
    assert summary.statuses == {"unsupported": 1, "crashed": 1}
    rows = read_rows(tmp_path / "s").set_index("method")
    assert rows["status"].to_dict() == {"dense": "crashed", "moc_reference": "unsupported"}
    assert "K=999 exceeds d_ffn" in rows.loc["moc_reference", "detail"]
    assert rows.loc["moc_reference", "device_name"] == device_name("cpu")


def test_a_group_without_a_supported_point_starts_no_process(tmp_path: Path) -> None:
    """Nothing is left to run, not even beside a dense point."""
    options = RunOptions(results=tmp_path, trial_command=("/no/such/program",))
    sweep = parse_sweep(SWEEP.replace("dense, ", ""), "s.yaml")
    assert run_sweep(sweep, options, Console(file=io.StringIO())).statuses == {"unsupported": 1}
    assert not (tmp_path / "s/jobs").exists()


def test_the_rule_and_k_of_a_point() -> None:
    """The parsed selection, and the channels it keeps: dense keeps all, a rule that does not fit none."""
    assert train_point().rule is None
    assert train_point().k == 384
    assert str(train_point("moc_reference", "topk:0.25").rule) == "topk:0.25"
    assert train_point("moc_reference", "topk:0.25").k == 96
    assert train_point("moc_reference", "topk:0.25").k_frac == 0.25
    unfit = train_point("moc_reference", "topk:999")
    assert (unfit.k, unfit.k_frac) == (None, None)
