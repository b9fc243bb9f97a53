"""Decoding step of the bare FFN, forward only, for one to a few tokens: all methods of a group in one
process.

At these sizes the weights are the traffic, and whether they are in the L2 decides the time. In a model they
never are: a layer's turn comes again after all other layers. So every call goes over enough copies of the
weights for each to be evicted before its turn, all inside one CUDA graph, and the time is per copy. All
methods use the same copies: so many that the one that reads the least of each reads more than four times the
L2 in all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness.measure import roofline
from harness.measure.ffn import FfnTensors, decoding_call, weight_copies, with_weights
from harness.measure.launch import TimedMethod, load_libraries
from harness.measure.timing import PairedTimes
from harness.workloads.group import Bench, Group, PlannedMethod, frozen, open_group
from harness.workloads.job import Job
from harness.workloads.reporter import EventReporter
from moc.reference import select_mask

_GATE_DRAWS = 8  # a gate on one token sees little
_DENSE_OUTPUT = 0.02  # relative: an output nearer than this to the dense one needs all channels
_FLOOR_COPIES = 8  # over which the number of channels a batch needs is averaged


@dataclass(frozen=True)
class _DecodeBench(Bench):
    """What all methods of the group are measured with."""

    copies: list[FfnTensors]  # x of the first is the input of all
    ceilings: roofline.Ceilings

    @property
    def x(self) -> Tensor:
        return self.copies[0].x


@dataclass(frozen=True)
class _ReadyMethod:
    """A method that passed the gate: one call decodes one step with each copy."""

    planned: PlannedMethod
    layers: list[nn.Module]  # one per copy, compiled if the method wants it
    call: Callable[[], object]

    def timed(self, _quantity: str) -> TimedMethod:
        dense = self.planned.method.is_dense
        return TimedMethod(self.planned.name, self.call, anchor=dense, calls=len(self.layers))


def run(job: Job, report: EventReporter) -> None:
    """Measure the points of a group; see the module. Raises as `harness.workloads.ffn_train.run` does."""
    group = open_group(job)
    load_libraries(group.device, group.dtype)
    planned = group.plan(report)
    if not planned:
        return
    leanest = min(planned, key=lambda method: _least_read(group, method))
    report.start(leanest.point)  # without it fewer copies would do, should they not fit
    copies = weight_copies(
        _least_read(group, leanest), group.shape, group.tokens, group.dtype, group.device, group.seed
    )
    bench = _DecodeBench(group, job.measure, report, copies, roofline.ensure_ceilings(group.device))
    ready = bench.ready_methods(planned, lambda method: _prepare(bench, method))
    ready, times = bench.time_methods(ready, ("latency",), _ReadyMethod.timed, group.rotated_mode)
    for method in ready:
        report.start(method.planned.point)
        _report_method(bench, method, ready, times["latency"])


def _least_read(group: Group, planned: PlannedMethod) -> float:
    return roofline.decode_least_bytes(planned.method, planned.selection, group.shape, group.dtype.itemsize)


def _prepare(bench: _DecodeBench, planned: PlannedMethod) -> _ReadyMethod:
    group = bench.group
    first = group.make_layer(planned, bench.copies[0])
    others = (with_weights(first, tensors) for tensors in bench.copies[1:])
    plain = [frozen(layer) for layer in (first, *others)]
    layers = [group.compiled(planned, layer) for layer in plain]
    call = decoding_call(layers, bench.x)
    bench.report_compile_time(planned, call)
    bench.check_layer(planned, layers[0], plain[0], [(group.tokens, _GATE_DRAWS)], backward=False)
    return _ReadyMethod(planned, layers, call)


def _report_method(
    bench: _DecodeBench, ready: _ReadyMethod, others: list[_ReadyMethod], times: PairedTimes
) -> None:
    """All remaining rows of one method, and its point finished."""
    group, planned = bench.group, ready.planned
    time = bench.report_time(planned, "latency_us", times, per_ms=1e3)
    bench.report_rate(planned, group.tokens, times)
    bench.report_speedup(planned, others, times)
    channels = _channels_read(bench, ready)
    itemsize = group.dtype.itemsize
    row_bytes = planned.method.row_bytes(group.shape.d_model, itemsize)
    min_bytes = roofline.decode_min_bytes(group.shape, group.tokens, itemsize, channels, row_bytes)
    # Of the products the function needs, each of a channel that some token keeps; far below the traffic here.
    flops = 2.0 * group.tokens * group.shape.d_model * (group.shape.d_ffn + 2 * channels)
    bench.report_roofline(planned.point, flops, min_bytes, bench.ceilings, time.value)
    bench.finish(planned, times)


def _channels_read(bench: _DecodeBench, ready: _ReadyMethod) -> int:
    """Channels whose up and down rows the output needs: those any token keeps, on average over the copies.

    All of them where the output is the dense one, as `act_prune`'s is although it takes a selection.
    """
    selection, d_ffn = ready.planned.selection, bench.group.shape.d_ffn
    if selection is None:
        return d_ffn
    counts = []
    with torch.no_grad():
        for tensors, layer in list(zip(bench.copies, ready.layers, strict=True))[:_FLOOR_COPIES]:
            gates = bench.x @ tensors.w_gate.T
            up = bench.x @ tensors.w_up.T
            dense = (torch.nn.functional.silu(gates) * up @ tensors.w_down).double()
            if float((layer(bench.x).double() - dense).norm()) < _DENSE_OUTPUT * float(dense.norm()):
                return d_ffn
            counts.append(int(select_mask(gates, selection).any(dim=0).sum()))
    return round(sum(counts) / len(counts))
