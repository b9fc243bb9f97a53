"""Training step of the bare FFN: all methods of a group on the same weights and inputs, in one process.

For each method: is it right (gate), then how fast (paired timing of forward, backward and step), then how
much memory (a pass of its own). A method that cannot run, is wrong, or runs out of memory gets its typed
outcome, and the rest is measured without it. With `n_layers` above one, everything but the gate is of that
many FFNs in sequence, each with its own weights; saved bytes are per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from harness.measure import gate, memory, roofline, stats
from harness.measure.ffn import FfnTensors, TrainingCalls, ffn_weights, natural_tensors
from harness.measure.launch import Contender, first_call_seconds, load_libraries
from harness.measure.timing import PairedTimes, time_paired
from harness.sweep.model import Measure
from harness.sweep.point import Point
from harness.workloads.group import (
    Entry,
    Group,
    compiled,
    finish_timed,
    join_notes,
    make_layer,
    open_entry,
    open_group,
    release_memory,
    report_estimate,
    report_overflow,
    report_speedup,
    time_all,
    timing_settings,
)
from harness.workloads.job import Job, Reporter

_QUANTITIES = ("forward", "backward", "step")
_HIDDEN_SLACK = 2**20  # bytes: what rounding many blocks up to 512 bytes may add


@dataclass(frozen=True)
class _Bench:
    """What all methods of the group are measured with."""

    group: Group
    settings: Measure
    report: Reporter
    tensors: list[FfnTensors]  # one per layer; x and dy of the first are used
    ceilings: roofline.Ceilings

    @property
    def x(self) -> Tensor:
        return self.tensors[0].x

    @property
    def dy(self) -> Tensor:
        return self.tensors[0].dy


@dataclass(frozen=True)
class _Candidate:
    """An entry that passed the gate, ready to run."""

    entry: Entry
    layers: nn.Sequential  # not compiled
    calls: TrainingCalls


def run(job: Job, report: Reporter) -> None:
    """Measure the points of a group; see the module.

    Raises ValueError if the job's points are not one group, and whatever a method raises that is neither a
    known limit nor out of memory (its point is then the last one started).
    """
    group = open_group(job)
    load_libraries(group.device, group.dtype)
    tensors = [
        natural_tensors(group.shape, group.tokens, group.dtype, group.device, group.seed + 1000 * layer)
        for layer in range(group.n_layers)
    ]
    tensors[0].x.requires_grad_()
    bench = _Bench(group, job.measure, report, tensors, roofline.ensure_ceilings(group.device))
    candidates = []
    for number, point in enumerate(group.points):
        report.start(point)
        report.progress(point, 0.4 * number / len(group.points), "checking")
        candidate = _admit(bench, point)
        if candidate is not None:
            candidates.append(candidate)
    candidates, times = time_all(
        group, report, candidates, _QUANTITIES, lambda left, quantity: _time_one(bench, left, quantity)
    )
    for candidate in candidates:
        report.start(candidate.entry.point)
        _report_candidate(bench, candidate, candidates, times)


def _admit(bench: _Bench, point: Point) -> _Candidate | None:
    """The point ready to be timed; None after it was finished as unsupported, out of memory or wrong."""
    group, report = bench.group, bench.report
    entry = open_entry(group, point, report, train=True)
    if entry is None:
        return None
    try:
        layers = nn.Sequential(*(make_layer(group, entry, tensors) for tensors in bench.tensors))
    except ValueError as error:
        report.finish(point, "unsupported", f"method {entry.method.name}: {error}")
        return None
    run = compiled(group, entry, layers[0] if len(layers) == 1 else layers)
    weights = [weight for layer in layers for weight in ffn_weights(layer, group.shape).values()]
    calls = TrainingCalls(run, weights, bench.x, bench.dy)
    result = None
    try:
        first, steady = first_call_seconds(Contender(entry.name, calls.step), group.device)
        if bench.settings.gate:
            result = gate.check(
                run if len(layers) == 1 else compiled(group, entry, layers[0]),
                ffn_weights(layers[0], group.shape),
                entry.method.reference,
                entry.selection,
                group.tokens,
                group.seed + 1,
                kept_roundoff=entry.method.kept_roundoff,
            )
    except (RuntimeError, MemoryError) as error:
        if not memory.is_out_of_memory(error):
            raise
        report.finish(point, "oom", str(error).partition("\n")[0])
        return None
    report.measure(point, "compile_s", max(0.0, first - steady), n_samples=1, statistic="first_minus_steady")
    if result is not None:
        count = len(result.errors)
        report.measure(point, "max_rel_err", result.max_rel_err, n_samples=count, statistic="max")
        if not result.ok:
            report.finish(point, "wrong", result.detail)
            return None
    return _Candidate(entry, layers, calls)


def _time_one(bench: _Bench, candidates: Sequence[_Candidate], quantity: str) -> PairedTimes:
    points = {candidate.entry.name: candidate.entry.point for candidate in candidates}
    fraction = 0.4 + 0.15 * _QUANTITIES.index(quantity)

    def on_start(name: str) -> None:
        bench.report.start(points[name])
        bench.report.progress(points[name], fraction, f"timing {quantity}")

    def contender(candidate: _Candidate) -> Contender:
        calls = candidate.calls
        work = {"forward": calls.forward, "backward": calls.backward, "step": calls.step}[quantity]
        prepare = calls.prepare_backward if quantity == "backward" else None
        return Contender(candidate.entry.name, work, prepare, anchor=candidate.entry.method.is_dense)

    times = time_paired(
        [contender(candidate) for candidate in candidates],
        timing_settings(bench.group, bench.settings),
        bench.group.device,
        bench.group.timing_mode,
        on_start,
    )
    release_memory(bench.group)
    return times


def _report_candidate(
    bench: _Bench,
    candidate: _Candidate,
    candidates: Sequence[_Candidate],
    times: dict[str, PairedTimes],
) -> None:
    """All remaining rows of one candidate, and its point finished."""
    group, report, entry = bench.group, bench.report, candidate.entry
    for quantity in _QUANTITIES:
        samples = times[quantity].samples[entry.name]
        time = stats.median_estimate(samples, group.seed)
        unsettled = times[quantity].unsettled(entry.name, timing_settings(group, bench.settings))
        report_estimate(
            report,
            entry.point,
            f"{quantity}_ms",
            time,
            times[quantity],
            status="unstable" if unsettled else "ok",
            detail=join_notes(unsettled, *times[quantity].notes),
        )
        report.samples(entry.point, f"{quantity}_ms", samples.tolist())
    step = times["step"]
    step_time = stats.median_estimate(step.samples[entry.name], group.seed)
    report_estimate(report, entry.point, "tokens_per_s", stats.rate(group.tokens * 1e3, step_time), step)
    report_speedup(group, report, entry, [other.entry for other in candidates], step)
    report_overflow(group, report, entry, bench.x.detach(), bench.tensors[0].w_gate)
    saved = _report_memory(bench, candidate) if bench.settings.memory else None
    _report_roofline(bench, candidate, saved, step_time.value)
    finish_timed(group, bench.settings, report, entry, step)


def _report_memory(bench: _Bench, candidate: _Candidate) -> float:
    """The memory rows; returns saved bytes per token and layer."""
    group, report, calls, x = bench.group, bench.report, candidate.calls, bench.x
    point = candidate.entry.point
    report.progress(point, 0.9, "memory")
    weights = list(candidate.layers.parameters())
    saved = memory.saved_bytes(calls.forward, weights, [x])
    per_token = saved.activation_bytes / group.tokens / group.n_layers
    notes = []
    declared = candidate.entry.declared_saved_bytes(group)
    if declared is not None and declared != per_token:
        notes.append(f"its formula says {declared:g}")
    if saved.parameter_cast_bytes:
        notes.append(f"casts of weights apart: {saved.parameter_cast_bytes} bytes")
    if group.device.type == "cuda":
        output = x.numel() * x.element_size()
        peak = memory.peak_bytes(calls.step)
        # y, dx and one gradient for each weight
        made = 2 * output + sum(weight.numel() * weight.element_size() for weight in weights)
        transient = memory.transient_peak_bytes(peak, made, saved)
        report.measure(point, "peak_allocated_bytes", peak.over_start_bytes, n_samples=1, statistic="max")
        report.measure(point, "transient_peak_bytes", transient, n_samples=1, statistic="max")
        hidden = memory.hidden_bytes(memory.peak_bytes(calls.forward), output, saved)
        if hidden > _HIDDEN_SLACK:
            notes.append(f"holds {hidden} bytes more that autograd does not know of")
    else:
        peak_rss = memory.peak_rss_over_start_bytes(calls.step)
        report.measure(point, "peak_rss_over_start_bytes", peak_rss, n_samples=1, statistic="max")
    detail = join_notes(*notes)
    report.measure(point, "saved_activation_bytes_per_token", per_token, n_samples=1, detail=detail)
    return per_token


def _report_roofline(
    bench: _Bench, candidate: _Candidate, measured_saved: float | None, step_ms: float
) -> None:
    """Counts and the share of the floor, of the step; what is unknown has no row."""
    group = bench.group
    flops = _count_flops(bench, candidate)
    declared = candidate.entry.declared_saved_bytes(group)
    saved = declared if declared is not None else measured_saved
    traffic = roofline.train_min_bytes(group.shape, group.tokens, group.dtype.itemsize, saved)
    min_bytes = None if traffic is None else traffic.step * group.n_layers
    floor = roofline.floor_ms(flops, min_bytes, bench.ceilings, group.dtype_name)
    for metric, value in (
        ("flops", flops),
        ("min_bytes", min_bytes),
        ("pct_of_roofline", roofline.pct_of_roofline(floor, step_ms)),
    ):
        if value is not None:
            bench.report.measure(candidate.entry.point, metric, float(value))


def _count_flops(bench: _Bench, candidate: _Candidate) -> int | None:
    """Of the layers without torch.compile, which hides its products from the counter; None if unknown."""
    try:
        return roofline.count_flops(lambda: candidate.layers(bench.x).backward(bench.dy))
    except (RuntimeError, MemoryError) as error:
        if not memory.is_out_of_memory(error):
            raise
        return None  # compiled it fits, eager it does not
    finally:
        bench.x.grad = None
        candidate.layers.zero_grad(set_to_none=True)
