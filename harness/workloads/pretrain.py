"""Pre-train one model from its seed: throughput, peak memory, and perplexity on the held-out text.

One point per process: a training run is minutes long, so methods cannot alternate within it. They are paired
by their weights, batches and evaluation text instead, which are the same for every method of a seed.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike

from harness.measure import memory
from harness.measure.clocks import ClockReader, Conditions, TimingConditions
from harness.measure.stats import Estimate, bootstrap, median_estimate, rate, without_interval
from harness.measure.union import LARGEST_BATCH, union_shares
from harness.sweep.point import Point
from harness.sweep.support import _given, model_config, unsupported_reason
from harness.training.checkpoint import Checkpoints
from harness.training.data import prepare
from harness.training.data.batches import bits_per_byte
from harness.training.trainer import (
    DivergedError,
    Evaluation,
    TrainConfig,
    Trainer,
    TrainResult,
    autocast,
    evaluate,
)
from harness.workloads.job import Job
from harness.workloads.reporter import EventReporter
from moc.llama import Llama
from moc.methods import get_method
from moc.selection import Selection

CURVE_POINTS = 400  # of the training-loss curve: what a plot can show
SAVED_TOKENS = 1024  # saved bytes are linear in the tokens, so a small batch tells
CLOCK_SECONDS = 1.0  # between two readings of the card's conditions


def run(job: Job, report: EventReporter) -> None:
    """Measure the job's one point.

    A method that cannot run the point, or a dtype that cannot be trained, is `unsupported`; a loss that is
    not finite is `wrong`. Raises ValueError if the job has several points or its text is not the text the
    point was planned with, and MemoryError or torch.OutOfMemoryError if memory runs out.
    """
    if len(job.points) != 1:
        raise ValueError(f"pretrain measures one point per job, not {len(job.points)}")
    point = job.points[0]
    report.start(point)
    reason = unsupported_reason(point, job.device)
    if reason is not None:
        report.finish(point, "unsupported", reason)
        return
    try:
        _train_and_report(job, point, report)
    except DivergedError as error:
        report.finish(point, "wrong", str(error))
    except RuntimeError as error:
        if memory.is_out_of_memory(error) and not isinstance(error, torch.OutOfMemoryError):
            raise MemoryError(str(error)) from error  # the CPU allocator has no error of its own
        raise


def train_config(point: Point) -> TrainConfig:
    """How a point is trained. Raises ValueError for values that cannot be trained with."""
    return TrainConfig(
        tokens_per_step=point.tokens,
        seq_len=point.seq_len,
        train_tokens=_given(point, "train_tokens"),
        eval_tokens=_given(point, "eval_tokens"),
        seed=point.seed,
        lr=_given(point, "lr"),
        dtype=point.dtype,
    )


def _train_and_report(job: Job, point: Point, report: EventReporter) -> None:
    method, selection, config = get_method(point.method), point.rule, model_config(point)
    dataset = prepare(job.data or "stdlib", config.vocab_size)
    if point.data_id is not None and dataset.data_id != point.data_id:
        raise ValueError(
            f"the text {job.data} is now {dataset.data_id}, but the point was planned with {point.data_id};"
            " plan the sweep again"
        )
    device = torch.device(job.device)
    compiled = method.compiles_on(device.type)
    peak = PeakMeter(device)
    reader, readings = ClockReader(device), list[Conditions | None]()
    last_read = -math.inf
    n_steps = train_config(point).n_steps

    def on_step(step: int, loss: float) -> None:
        nonlocal last_read
        report.progress(point, step / n_steps, f"loss {loss:.3f}")
        if time.monotonic() - last_read >= CLOCK_SECONDS:
            last_read = time.monotonic()
            readings.append(reader.read())

    def on_evaluation(percent: int, evaluation: Evaluation) -> None:
        if 0 < percent < 100:
            nats, per_token = evaluation.loss, trainer.text.bytes_per_token
            quality = {"perplexity": perplexity(nats), "bits_per_byte": bits_per_byte(nats, per_token)}
            report.intermediate(point, percent, {"eval_loss_nats": nats, **quality})

    model = Llama(config, lambda: method.make(config.ffn, selection), seed=point.seed)
    checkpoints = None
    if job.measure.checkpoint_seconds is not None:
        folder = Path(job.work_dir) / point.key
        checkpoints = Checkpoints(folder, job.measure.checkpoint_seconds, point.key)
    trainer = Trainer(
        model,
        dataset,
        train_config(point),
        device,
        compile_loss=compiled,
        compile_mode=method.compile_mode,
        measure_peak=peak.measure if job.measure.memory else None,
        checkpoints=checkpoints,
        on_step=on_step,
        on_evaluation=on_evaluation,
    )
    texts = len(trainer.text.windows)
    if selection is not None and job.measure.union and texts < LARGEST_BATCH:
        reason = f"measure.union needs {LARGEST_BATCH} windows of validation text; there are {texts}"
        report.finish(point, "unsupported", f"{reason}: raise eval_tokens or lower seq_len")
        return
    result = trainer.run()
    _report_speed(report, point, result, compiled, TimingConditions.of("training", readings))
    if result.peak_bytes is not None:
        largest = without_interval(result.peak_bytes, statistic="max")
        report.measure(point, peak.metric, largest, detail=peak.detail)
    report.measure(point, "parameters", float(sum(p.numel() for p in model.parameters())))
    _report_quality(report, point, result, trainer.text.bytes_per_token)
    if selection is not None and selection.rule == "threshold":
        report.measure(point, "overflow_fraction", _overflow_fraction(model, trainer, point, device))
    if selection is not None and job.measure.union:
        _report_union(report, model, trainer, point, selection)
    if job.measure.memory:
        del trainer  # the optimizer's state is not needed any more
        value = _saved_bytes_per_token(model, point, device, compiled)
        report.measure(point, "saved_activation_bytes_per_token", value)
    report.finish(point)


def _saved_bytes_per_token(model: Llama, point: Point, device: torch.device, compiled: bool) -> float:
    """What one FFN layer of the trained model keeps for backward, in the dtype of training.

    The layer is compiled by itself where the model was: inductor chooses what to keep, so eager would show
    another number.
    """
    layer = model.layers[0].get_submodule("ffn")
    forward = torch.compile(layer, mode=get_method(point.method).compile_mode) if compiled else layer
    x = torch.randn(1, SAVED_TOKENS, point.d_model, device=device, requires_grad=True)
    with autocast(device, point.dtype):
        saved = memory.saved_bytes(lambda: forward(x), layer.parameters(), [x])
    return saved.activation_bytes / SAVED_TOKENS


def _overflow_fraction(model: Llama, trainer: Trainer, point: Point, device: torch.device) -> float:
    """Channels that a `threshold` rule's cap left out, of all channels, over the evaluation text.

    Counted after training in a pass of its own, so that a resumed run counts the same as an unbroken one.
    """
    counters = [buffer for name, buffer in model.named_buffers() if name.endswith("overflow_count")]
    for counter in counters:
        counter.zero_()
    evaluate(model, trainer.text, device, point.dtype, point.tokens)
    total = sum(int(counter) for counter in counters)
    return total / (trainer.text.n_tokens * point.n_layers * point.d_ffn)


def _report_union(
    report: EventReporter, model: Llama, trainer: Trainer, point: Point, selection: Selection
) -> None:
    """Channels that 1 to 16 tokens of a decoding batch need together, on the held-out text."""
    with autocast(model.head.device, point.dtype):
        shares = union_shares(model, trainer.text.windows[:, :-1], selection)
    largest = mean_estimate(shares[:, -1])
    statistic = f"mean over sets of {LARGEST_BATCH} texts"
    report.measure(point, "union_share", replace(largest, statistic=statistic))
    batches = np.arange(1, LARGEST_BATCH + 1, dtype=float)
    report.samples(point, "union_share", shares.mean(axis=0).tolist(), batches.tolist())


class PeakMeter:
    """Peak memory of ordinary training steps over what the process held before it had a model.

    So weights, gradients and optimizer state count, and the interpreter and its libraries do not. `detail`
    says how much of it stood before the steps began.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        # The first optimizer of a process imports this: 147 MB of code that belongs to no model.
        importlib.import_module("torch._dynamo")
        self._start = torch.cuda.memory_allocated() if self._cuda else memory.resident_bytes()
        self.metric = "peak_allocated_bytes" if self._cuda else "peak_rss_over_start_bytes"
        self.detail = ""

    def measure(self, run_steps: Callable[[], object]) -> int:
        """Run the steps once and return their peak in bytes."""
        if self._cuda:
            peak = memory.peak_bytes(run_steps)
            standing, over = peak.start_bytes - self._start, peak.over_start_bytes
        else:
            resident = [0]

            def noted() -> None:
                resident[0] = memory.resident_bytes()  # here, because what can be freed has been by now
                run_steps()

            over = memory.peak_rss_over_start_bytes(noted)
            standing = max(0, resident[0] - self._start)
        self.detail = f"of which {standing} bytes stood before the steps (weights, optimizer state)"
        return standing + over


def _report_speed(
    report: EventReporter, point: Point, result: TrainResult, compiled: bool, conditions: TimingConditions
) -> None:
    """Step time and throughput of the timed steps; what compilation cost."""
    step = median_estimate(result.step_ms)
    tokens_per_s = replace(rate(point.tokens * 1e3, step), statistic="tokens / median step")
    report.measure(point, "step_ms", step, conditions=conditions)
    report.measure(point, "tokens_per_s", tokens_per_s, conditions=conditions)
    report.samples(point, "step_ms", result.step_ms)
    if compiled and result.first_step_s is not None:
        report.measure(point, "compile_s", without_interval(result.first_step_s - step.value / 1e3))


def _report_quality(report: EventReporter, point: Point, result: TrainResult, bytes_per_token: float) -> None:
    """Loss before and after, perplexity, bits per byte, and the curves over tokens seen."""
    untrained = mean_estimate(result.evaluations[0].window_losses)
    trained = mean_estimate(result.evaluations[-1].window_losses)
    rows = (
        ("untrained_loss_nats", untrained),
        ("untrained_perplexity", _mapped(untrained, perplexity)),
        ("eval_loss_nats", trained),
        ("perplexity", _mapped(trained, perplexity)),
        ("bits_per_byte", _mapped(trained, lambda nats: bits_per_byte(nats, bytes_per_token))),
    )
    for metric, estimate in rows:
        report.measure(point, metric, estimate)
    # The same windows for every method: their differences pair, which a difference of means does not.
    report.samples(point, "eval_window_loss_nats", result.evaluations[-1].window_losses)
    report.measure(point, "train_tokens_seen", float(result.evaluations[-1].tokens_seen))
    report.samples(
        point,
        "eval_loss_nats",
        [evaluation.loss for evaluation in result.evaluations],
        [float(evaluation.tokens_seen) for evaluation in result.evaluations],
    )
    groups = np.array_split(np.array(result.losses), min(CURVE_POINTS, len(result.losses)))
    ends = np.cumsum([len(group) for group in groups]) * point.tokens
    report.samples(
        point, "train_loss_nats", [float(group.mean()) for group in groups], ends.astype(float).tolist()
    )


def mean_estimate(samples: ArrayLike, seed: int = 0) -> Estimate:
    """Mean of window losses with its 95 % percentile bootstrap interval over the windows.

    The mean and not the median, because perplexity is defined by it. The interval says how far the loss
    depends on which windows of the held-out text were taken, not how far on the seed of training.
    """
    values = np.asarray(samples, dtype=np.float64)
    value = float(values.mean())
    if values.size == 1:
        return Estimate(value, math.nan, math.nan, 1, "mean over windows")
    low, high = bootstrap((values,), np.mean, seed, batch=100)  # resamples held in memory at once
    return Estimate(value, low, high, values.size, "mean over windows")


def perplexity(nats: float) -> float:
    """exp of a loss; infinite where a float cannot hold it."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def _mapped(estimate: Estimate, function: Callable[[float], float]) -> Estimate:
    """A rising function of an estimate, with the ends of its interval mapped alike."""
    value, low, high = (function(x) for x in (estimate.value, estimate.ci_low, estimate.ci_high))
    return Estimate(value, low, high, estimate.n_samples, estimate.statistic)
