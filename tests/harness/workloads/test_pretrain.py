"""The `pretrain` workload: one point trained end to end, and what its reporter hears."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.measure.stats import Estimate
from harness.sweep.metrics import METRICS
from harness.sweep.model import Measure
from harness.sweep.point import Point
from harness.training.data import prepare
from harness.training.data.batches import evaluation_text
from harness.training.trainer import evaluate
from harness.workloads import pretrain
from harness.workloads.job import Job
from moc.layers.dense import DenseFFN
from moc.llama import Llama

VOCAB = 300
# Without an interval of their own: counts and single readings.
SINGLE = {"parameters", "train_tokens_seen", "saved_activation_bytes_per_token", "peak_rss_over_start_bytes"}


class FakeReporter:
    """Keeps what a workload reports, and checks that it names known metrics only."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.curves: dict[str, tuple[list[float], list[float] | None]] = {}
        self.started: list[Point] = []
        self.finished: list[tuple[Point, str, str]] = []
        self.fractions: list[float] = []
        self.reached: dict[int, dict[str, float]] = {}

    def start(self, point: Point) -> None:
        """See `EventReporter`."""
        self.started.append(point)

    def measure(self, point: Point, metric: str, number: Estimate | float, **more: Any) -> None:
        """See `EventReporter`."""
        assert metric in METRICS
        assert metric not in self.rows
        self.rows[metric] = {**(vars(number) if isinstance(number, Estimate) else {"value": number}), **more}

    def samples(
        self, point: Point, metric: str, values: Sequence[float], x: Sequence[float] | None = None
    ) -> None:
        """See `EventReporter`."""
        self.curves[metric] = (list(values), None if x is None else list(x))

    def progress(self, point: Point, fraction: float, text: str = "") -> None:
        """See `EventReporter`."""
        self.fractions.append(fraction)

    def intermediate(self, point: Point, percent: int, values: dict[str, float]) -> None:
        """See `EventReporter`."""
        self.reached[percent] = values

    def finish(self, point: Point, status: str = "ok", detail: str = "") -> None:
        """See `EventReporter`."""
        self.finished.append((point, status, detail))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A repetitive corpus on disk."""
    folder = tmp_path_factory.mktemp("data")
    sentence = "the gate keeps the largest channels and the rest of the channels are dropped. "
    lines = [json.dumps({"text": f"{number}: " + sentence * 6}) for number in range(120)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    return f"files:{folder}/a.jsonl"


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token caches of these tests lie in a folder of their own."""
    monkeypatch.setenv("MOCBENCH_CACHE", str(tmp_path_factory.getbasetemp() / "pretrain-cache"))


POINT = Point(
    workload="pretrain",
    method="dense",
    selection=None,
    preset="1m",
    d_model=32,
    d_ffn=64,
    n_layers=2,
    n_heads=2,
    batch=8,
    seq_len=16,
    dtype="fp32",
    seed=0,
    vocab_size=VOCAB,
    train_tokens=128 * 40,
    eval_tokens=256,
    lr=1e-2,
)


def run(source: str, folder: Path, settings: Measure | None = None, **values: Any) -> FakeReporter:
    """Run the workload on one tiny point."""
    point = dataclasses.replace(POINT, **values)
    report = FakeReporter()
    settings = settings or Measure()
    pretrain.run(Job("sweep", "run", 1, (point,), settings, "cpu", str(folder), source), report)
    assert report.started == [point]
    assert [item[0] for item in report.finished] == [point]
    return report


@pytest.mark.parametrize(("method", "rule"), [("dense", None), ("moc_reference", "topk:0.25")])
def test_a_point_end_to_end(source: str, tmp_path: Path, method: str, rule: str | None) -> None:
    """Every promised metric is there with its interval, the curves too, and the model has learned."""
    report = run(source, tmp_path, method=method, selection=rule)
    assert report.finished[0][1:] == ("ok", "")
    rows = report.rows
    assert set(rows) == {
        "step_ms",
        "tokens_per_s",
        "peak_rss_over_start_bytes",
        "saved_activation_bytes_per_token",
        "parameters",
        "untrained_loss_nats",
        "untrained_perplexity",
        "eval_loss_nats",
        "perplexity",
        "bits_per_byte",
        "train_tokens_seen",
    }
    for metric in set(rows) - SINGLE:
        assert rows[metric]["ci_low"] <= rows[metric]["value"] <= rows[metric]["ci_high"], metric
    assert rows["train_tokens_seen"]["value"] == 128 * 40
    assert rows["parameters"]["value"] == 2 * VOCAB * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    assert rows["untrained_perplexity"]["value"] == pytest.approx(VOCAB, rel=0.1)
    assert rows["perplexity"]["value"] < 30
    times, places = report.curves["step_ms"]
    assert places is None
    assert rows["step_ms"]["value"] == np.median(times)
    assert rows["tokens_per_s"]["value"] == pytest.approx(128 / (np.median(times) / 1e3), rel=1e-12)
    trend, seen = report.curves["eval_loss_nats"]
    assert (trend[0], trend[-1]) == (rows["untrained_loss_nats"]["value"], rows["eval_loss_nats"]["value"])
    assert seen == [0, 1280, 2560, 3840, 5120]
    assert {percent: values["eval_loss_nats"] for percent, values in report.reached.items()} == dict(
        zip((25, 50, 75), trend[1:-1], strict=True)
    )
    assert report.reached[50]["perplexity"] == math.exp(report.reached[50]["eval_loss_nats"])
    losses, seen = report.curves["train_loss_nats"]
    assert seen is not None
    assert (len(losses), seen[0], seen[-1]) == (40, 128.0, 5120.0)
    assert report.fractions[-1] == 1.0
    # x, and gate, up, silu(gate) and z whole; or compact gate and up and one bit a channel
    elements = 32 + 4 * 64 if rule is None else 32 + 2 * 16 + 64 / 32
    assert rows["saved_activation_bytes_per_token"]["value"] == 4 * elements


def test_quality_is_arithmetic_on_the_evaluation(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reported loss is the trained model's on the fixed windows; the other rows follow from it."""
    models: list[Llama] = []

    class Kept(Llama):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            models.append(self)

    monkeypatch.setattr(pretrain, "Llama", Kept)
    rows = run(source, tmp_path).rows
    dataset = prepare(source, VOCAB)
    text = evaluation_text(dataset.validation, dataset.token_bytes, 16, 256)
    loss = evaluate(models[0], text, torch.device("cpu"), "fp32", 10**6).mean()
    assert rows["eval_loss_nats"]["value"] == pytest.approx(loss, rel=1e-6)
    assert rows["perplexity"]["value"] == math.exp(rows["eval_loss_nats"]["value"])
    assert rows["perplexity"]["ci_high"] == math.exp(rows["eval_loss_nats"]["ci_high"])
    decoded = dataset.tokenizer.decode(dataset.validation[1:257].tolist())  # skips end-of-text
    bits = rows["eval_loss_nats"]["value"] * 256 / math.log(2)
    assert rows["bits_per_byte"]["value"] == pytest.approx(bits / len(decoded.encode()), rel=1e-12)


def test_interval_of_the_loss_covers_the_mean() -> None:
    """Over many draws of windows, the 95 % interval holds the true mean about 95 % of the time."""
    generator = np.random.default_rng(0)
    estimates = [pretrain.mean_estimate(generator.gamma(9.0, 0.5, size=60)) for _ in range(200)]
    covered = sum(estimate.ci_low <= 4.5 <= estimate.ci_high for estimate in estimates)
    assert 178 <= covered <= 199
    single = pretrain.mean_estimate([3.0])
    assert (single.value, single.n_samples) == (3.0, 1)
    assert math.isnan(single.ci_low)


def test_same_point_twice_has_the_same_quality(source: str, tmp_path: Path) -> None:
    """Only times and memory differ between two runs of a point."""
    first, second = (run(source, tmp_path).rows for _ in range(2))
    for metric in ("untrained_loss_nats", "eval_loss_nats", "perplexity", "bits_per_byte"):
        assert first[metric] == second[metric]


def test_threshold_reports_what_its_cap_left_out(source: str, tmp_path: Path) -> None:
    """A cap too small for the threshold leaves channels out, and the row says how many of all."""
    tight = run(source, tmp_path, method="moc_reference", selection="threshold:-100.0:0.25").rows
    assert tight["overflow_fraction"]["value"] == 0.75
    loose = run(source, tmp_path, method="moc_reference", selection="threshold:100.0:0.25").rows
    assert loose["overflow_fraction"]["value"] == 0.0


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"dtype": "fp16"}, "dtype fp16 cannot be trained; choose one of bf16, fp32"),
        ({"method": "dense_compiled"}, "does not run on cpu"),
        ({"method": "moc_reference"}, "needs a selection"),
        ({"method": "moc_reference", "selection": "topk:65"}, "65"),
    ],
)
def test_what_cannot_run_is_unsupported(
    source: str, tmp_path: Path, values: dict[str, Any], reason: str
) -> None:
    """A point the method or the loop cannot do ends as `unsupported` with the reason, and no rows."""
    report = run(source, tmp_path, **values)
    assert report.finished[0][1] == "unsupported"
    assert reason in report.finished[0][2]
    assert report.rows == {}


def test_diverged_training_is_wrong(source: str, tmp_path: Path) -> None:
    """An absurd learning rate ends the point as `wrong` and names the step."""
    report = run(source, tmp_path, lr=1e30)
    assert report.finished[0][1] == "wrong"
    assert report.finished[0][2].startswith("loss is not finite at step ")


def test_other_text_than_planned_is_refused(source: str, tmp_path: Path) -> None:
    """If the text has changed since the sweep was planned, the point is not measured under the old name."""
    with pytest.raises(ValueError, match=r"but the point was planned with 0123; plan the sweep again"):
        run(source, tmp_path, data_id="0123")


def test_incomplete_jobs_are_refused(source: str, tmp_path: Path) -> None:
    """A point without a training budget, or two points at once, are named."""
    with pytest.raises(ValueError, match="pretrain: train_tokens is missing from the point"):
        run(source, tmp_path, train_tokens=None)
    two = Job("sweep", "run", 1, (POINT, POINT), Measure(), "cpu", str(tmp_path), source)
    with pytest.raises(ValueError, match="one point per job, not 2"):
        pretrain.run(two, FakeReporter())


def test_killed_point_goes_on_from_its_checkpoint(source: str, tmp_path: Path) -> None:
    """After a kill, the next attempt trains only what was missing and reports what an unbroken one does."""
    whole = run(source, tmp_path)
    settings = Measure(checkpoint_seconds=1e-9)

    class Killed(Exception):
        pass

    class Killer(FakeReporter):
        def progress(self, point: Point, fraction: float, text: str = "") -> None:
            if fraction >= 0.6:
                raise Killed

    with pytest.raises(Killed):
        pretrain.run(Job("sweep", "run", 1, (POINT,), settings, "cpu", str(tmp_path), source), Killer())
    assert list((tmp_path / POINT.key).iterdir())
    resumed = run(source, tmp_path, settings)
    assert len(resumed.fractions) < 20
    assert resumed.rows["eval_loss_nats"] == whole.rows["eval_loss_nats"]
    assert resumed.curves["train_loss_nats"] == whole.curves["train_loss_nats"]
    assert resumed.curves["eval_loss_nats"] == whole.curves["eval_loss_nats"]
    assert not (tmp_path / POINT.key).exists()


def test_peak_counts_what_a_model_adds() -> None:
    """Resident memory touched after the meter was made, before or within the steps, is in the peak."""
    meter = pretrain.PeakMeter(torch.device("cpu"))
    standing = torch.ones(10_000_000)
    peak = meter.measure(lambda: torch.ones(20_000_000).sum().item())
    assert peak == pytest.approx(120e6, rel=0.05)
    assert standing.sum() == 10_000_000
    assert "stood before the steps" in meter.detail


def test_a_rival_by_module_path_is_trained(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A factory outside the registry is a row like any other, with the same start as the dense method."""
    module = types.ModuleType("rival")
    module.make = lambda shape, selection: DenseFFN(shape)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rival", module)
    rows = run(source, tmp_path, method="rival:make").rows
    assert rows["eval_loss_nats"] == run(source, tmp_path).rows["eval_loss_nats"]


def test_the_channels_a_batch_needs_are_measured_when_asked(source: str, tmp_path: Path) -> None:
    """With `union` a selecting method reports a curve from K for one token to at most all for sixteen."""
    settings = Measure(memory=False, union=True)
    report = run(source, tmp_path, settings, method="moc_reference", selection="topk:0.25")
    curve, batches = report.curves["union_share"]
    assert batches == list(range(1, 17))
    assert curve[0] == pytest.approx(0.25)
    assert all(after >= before for before, after in itertools.pairwise(curve))
    assert 0.25 < curve[-1] < 1 - 0.75**16  # trained choices are less spread than independent ones
    assert report.rows["union_share"]["value"] == pytest.approx(curve[-1])
    assert "union_share" not in run(source, tmp_path, settings).rows


def test_too_little_text_for_a_batch_is_said_before_training(source: str, tmp_path: Path) -> None:
    """Fewer windows than the largest batch has tokens is unsupported, and no step is run."""
    settings = Measure(memory=False, union=True)
    report = run(source, tmp_path, settings, method="moc_reference", selection="topk:0.25", eval_tokens=64)
    assert report.finished[0][1] == "unsupported"
    assert "needs 16 windows of validation text; there are 4" in report.finished[0][2]
    assert report.fractions == []
