"""Decoding step of the bare FFN, forward only, for one to a few tokens: all methods of a group in one
process.

At these sizes the weights are the traffic, and whether they are in the L2 decides the time. In a model they
never are: a layer's turn comes again after all other layers. So every call goes over enough copies of the
weights for each to be evicted before its turn, all inside one CUDA graph, and the time is per copy. All
methods use the same copies: so many that the one that reads the least of each reads more than four times the
L2 in all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness.measure import gate, memory, roofline, stats
from harness.measure.ffn import FfnTensors, ffn_weights, natural_tensors
from harness.measure.launch import Contender, first_call_seconds, load_libraries, rotated_copies
from harness.measure.timing import (
    PairedTimes,
    time_paired,
)
from harness.sweep.model import Measure
from harness.sweep.point import Point
from harness.workloads.group import (
    Entry,
    Group,
    compiled,
    finish_timed,
    frozen,
    make_layer,
    open_entry,
    open_group,
    report_estimate,
    report_speedup,
    time_all,
    timing_settings,
    with_weights,
)
from harness.workloads.job import Job, Reporter
from moc.config import FfnShape
from moc.reference import select_mask

_GATE_DRAWS = 8  # a gate on one token sees little
_DENSE_OUTPUT = 0.02  # relative: an output nearer than this to the dense one needs all channels
_FLOOR_COPIES = 8  # over which the number of channels a batch needs is averaged
_MODES = {"auto": "graph_rotated", "graph_cold": "graph_rotated", "launch_cold": "launch_rotated"}


@dataclass(frozen=True)
class _Bench:
    """What all methods of the group are measured with."""

    group: Group
    settings: Measure
    report: Reporter
    copies: list[FfnTensors]  # x of the first is the input of all
    ceilings: roofline.Ceilings

    @property
    def x(self) -> Tensor:
        return self.copies[0].x


@dataclass(frozen=True)
class _Candidate:
    """An entry that passed the gate, ready to run: one call decodes one step with each copy."""

    entry: Entry
    layers: list[nn.Module]  # one per copy, compiled if the method wants it
    call: Callable[[], object]


def run(job: Job, report: Reporter) -> None:
    """Measure the points of a group; see the module. Raises as `harness.workloads.ffn_train.run` does."""
    group = open_group(job)
    load_libraries(group.device, group.dtype)
    entries = []
    for point in group.points:
        report.start(point)
        entry = _open(group, point, report)
        if entry is not None:
            entries.append(entry)
    if not entries:
        return
    itemsize = group.dtype.itemsize
    least_read, leanest = min(
        (
            (roofline.decode_least_bytes(entry.method, entry.selection, group.shape, itemsize), entry)
            for entry in entries
        ),
        key=lambda pair: pair[0],
    )
    report.start(leanest.point)  # without it fewer copies would do, should they not fit
    copies = _weight_copies(least_read, group.shape, group.tokens, group.dtype, group.device, group.seed)
    bench = _Bench(group, job.measure, report, copies, roofline.ensure_ceilings(group.device))
    candidates = []
    for number, entry in enumerate(entries):
        report.start(entry.point)
        report.progress(entry.point, 0.5 * number / len(entries), "checking")
        candidate = _admit(bench, entry)
        if candidate is not None:
            candidates.append(candidate)
    candidates, times = time_all(
        group, report, candidates, ("latency",), lambda left, _quantity: _time(bench, left)
    )
    for candidate in candidates:
        report.start(candidate.entry.point)
        _report_candidate(bench, candidate, candidates, times["latency"])


def _open(group: Group, point: Point, report: Reporter) -> Entry | None:
    """The point's entry; None after it was finished as unsupported."""
    entry = open_entry(group, point, report, train=False)
    if entry is not None and group.n_layers != 1:
        report.finish(point, "unsupported", f"ffn_decode measures one layer, not n_layers={group.n_layers}")
        return None
    return entry


def _weight_copies(
    least_read: float, shape: FfnShape, batch: int, dtype: torch.dtype, device: torch.device, seed: int
) -> list[FfnTensors]:
    """As many copies of the weights as the rotation needs, each of its own values."""
    count = rotated_copies(least_read, device)
    return [natural_tensors(shape, batch, dtype, device, seed + 1000 * copy) for copy in range(count)]


def _decode_call(layers: Sequence[nn.Module], x: Tensor) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            for layer in layers:
                layer(x)

    return call


def _admit(bench: _Bench, entry: Entry) -> _Candidate | None:
    """The entry ready to be timed; None after it was finished as unsupported, out of memory or wrong."""
    group, report, point = bench.group, bench.report, entry.point
    try:
        first_layer = make_layer(group, entry, bench.copies[0])
    except ValueError as error:
        report.finish(point, "unsupported", f"method {entry.method.name}: {error}")
        return None
    others = (with_weights(first_layer, tensors) for tensors in bench.copies[1:])
    plain = [frozen(layer) for layer in (first_layer, *others)]
    layers = [compiled(group, entry, layer) for layer in plain]
    call = _decode_call(layers, bench.x)
    result = None
    try:
        first, steady = first_call_seconds(Contender(entry.name, call), group.device)
        if bench.settings.gate:
            result = gate.check(
                layers[0],
                ffn_weights(plain[0], group.shape),
                entry.method.reference,
                entry.selection,
                group.tokens,
                group.seed + 1,
                backward=False,
                draws=_GATE_DRAWS,
            )
    except (RuntimeError, MemoryError) as error:
        if not memory.is_out_of_memory(error):
            raise
        report.finish(point, "oom", str(error).partition("\n")[0])
        return None
    report.measure(point, "compile_s", max(0.0, first - steady), n_samples=1, statistic="first_minus_steady")
    if result is not None:
        count = len(result.errors) * _GATE_DRAWS
        report.measure(point, "max_rel_err", result.max_rel_err, n_samples=count, statistic="max")
        if not result.ok:
            report.finish(point, "wrong", result.detail)
            return None
    return _Candidate(entry, layers, call)


def _time(bench: _Bench, candidates: Sequence[_Candidate]) -> PairedTimes:
    group = bench.group
    points = {candidate.entry.name: candidate.entry.point for candidate in candidates}

    def on_start(name: str) -> None:
        bench.report.start(points[name])
        bench.report.progress(points[name], 0.6, "timing")

    contenders = [
        Contender(
            candidate.entry.name,
            candidate.call,
            anchor=candidate.entry.method.is_dense,
            calls=len(candidate.layers),
        )
        for candidate in candidates
    ]
    mode = _MODES.get(group.timing_mode, group.timing_mode)
    return time_paired(contenders, timing_settings(group, bench.settings), group.device, mode, on_start)


def _report_candidate(
    bench: _Bench, candidate: _Candidate, candidates: Sequence[_Candidate], times: PairedTimes
) -> None:
    """All remaining rows of one candidate, and its point finished."""
    group, report, entry = bench.group, bench.report, candidate.entry
    samples = times.samples[entry.name]
    time = stats.median_estimate(samples, group.seed)
    report_estimate(report, entry.point, "latency_us", stats.scaled(time, 1e3), times)
    report.samples(entry.point, "latency_us", (samples * 1e3).tolist())
    report_estimate(report, entry.point, "tokens_per_s", stats.rate(group.tokens * 1e3, time), times)
    report_speedup(group, report, entry, [other.entry for other in candidates], times)
    channels = _channels_read(bench, candidate)
    itemsize = group.dtype.itemsize
    row_bytes = entry.method.row_bytes(group.shape.d_model, itemsize)
    min_bytes = roofline.decode_min_bytes(group.shape, group.tokens, itemsize, channels, row_bytes)
    # Of the products the function needs, each of a channel that some token keeps; far below the traffic here.
    flops = 2.0 * group.tokens * group.shape.d_model * (group.shape.d_ffn + 2 * channels)
    floor = roofline.floor_ms(flops, min_bytes, bench.ceilings, group.dtype_name)
    report.measure(entry.point, "flops", flops)
    report.measure(entry.point, "min_bytes", min_bytes)
    share = roofline.pct_of_roofline(floor, time.value)
    if share is not None:
        report.measure(entry.point, "pct_of_roofline", share)
    finish_timed(group, bench.settings, report, entry, times)


def _channels_read(bench: _Bench, candidate: _Candidate) -> int:
    """Channels whose up and down rows the output needs: those any token keeps, on average over the copies.

    All of them where the output is the dense one, as `act_prune`'s is although it takes a selection.
    """
    selection, d_ffn = candidate.entry.selection, bench.group.shape.d_ffn
    if selection is None:
        return d_ffn
    counts = []
    with torch.no_grad():
        for tensors, layer in list(zip(bench.copies, candidate.layers, strict=True))[:_FLOOR_COPIES]:
            gates = bench.x @ tensors.w_gate.T
            up = bench.x @ tensors.w_up.T
            dense = (torch.nn.functional.silu(gates) * up @ tensors.w_down).double()
            if float((layer(bench.x).double() - dense).norm()) < _DENSE_OUTPUT * float(dense.norm()):
                return d_ffn
            counts.append(int(select_mask(gates, selection).any(dim=0).sum()))
    return round(sum(counts) / len(counts))
