"""Training step of the bare FFN: all methods of a group on the same weights and inputs, in one process.

For each method: is it right (gate), then how fast (paired timing of forward, backward and step), then how
much memory (a pass of its own). A method that cannot run, is wrong, or runs out of memory gets its typed
outcome, and the rest is measured without it. With `n_layers` above one, everything but the gate is of that
many FFNs in sequence, each with its own weights; saved bytes are per layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from harness.measure import memory, roofline
from harness.measure.ffn import FfnTensors, TrainingCalls, ffn_weights, natural_tensors
from harness.measure.launch import TimedMethod, load_libraries
from harness.measure.stats import Estimate, without_interval
from harness.measure.timing import PairedTimes
from harness.workloads.group import Bench, PlannedMethod, join_notes, open_group
from harness.workloads.job import Job
from harness.workloads.reporter import EventReporter

_QUANTITIES = ("forward", "backward", "step")
_HIDDEN_SLACK = 2**20  # bytes: what rounding many blocks up to 512 bytes may add


@dataclass(frozen=True)
class _TrainBench(Bench):
    """What all methods of the group are measured with."""

    tensors: list[FfnTensors]  # one per layer; x and dy of the first are used
    ceilings: roofline.Ceilings

    @property
    def x(self) -> Tensor:
        return self.tensors[0].x

    @property
    def dy(self) -> Tensor:
        return self.tensors[0].dy


@dataclass(frozen=True)
class _ReadyMethod:
    """A method that passed the gate."""

    planned: PlannedMethod
    layers: nn.Sequential  # not compiled
    calls: TrainingCalls

    def timed(self, quantity: str) -> TimedMethod:
        calls = self.calls
        work = {"forward": calls.forward, "backward": calls.backward, "step": calls.step}[quantity]
        prepare = calls.prepare_backward if quantity == "backward" else None
        return TimedMethod(self.planned.name, work, prepare, anchor=self.planned.method.is_dense)


def run(job: Job, report: EventReporter) -> None:
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
    bench = _TrainBench(group, job.measure, report, tensors, roofline.ensure_ceilings(group.device))
    planned = group.plan(report)
    ready = bench.ready_methods(planned, lambda method: _prepare(bench, method))
    ready, times = bench.time_methods(ready, _QUANTITIES, _ReadyMethod.timed, group.timing_mode)
    for method in ready:
        report.start(method.planned.point)
        _report_method(bench, method, ready, times)


def _prepare(bench: _TrainBench, planned: PlannedMethod) -> _ReadyMethod:
    group = bench.group
    layers = nn.Sequential(*(group.make_layer(planned, tensors) for tensors in bench.tensors))
    whole = group.compiled(planned, layers[0] if len(layers) == 1 else layers)
    weights = [weight for layer in layers for weight in ffn_weights(layer, group.shape).values()]
    calls = TrainingCalls(whole, weights, bench.x, bench.dy)
    bench.report_compile_time(planned, calls.step)
    one = whole if len(layers) == 1 else group.compiled(planned, layers[0])
    bench.check_layer(planned, one, layers[0], [(group.tokens, 1)])
    return _ReadyMethod(planned, layers, calls)


def _report_method(
    bench: _TrainBench, ready: _ReadyMethod, others: list[_ReadyMethod], times: dict[str, PairedTimes]
) -> None:
    """All remaining rows of one method, and its point finished."""
    planned, step = ready.planned, times["step"]
    found = {
        quantity: bench.report_time(planned, f"{quantity}_ms", times[quantity]) for quantity in _QUANTITIES
    }
    bench.report_rate(planned, bench.group.tokens, step)
    bench.report_speedup(planned, others, step)
    bench.report_overflow(planned, bench.x.detach(), bench.tensors[0].w_gate)
    saved = _report_memory(bench, ready) if bench.settings.memory else None
    _report_roofline(bench, ready, saved, found["step"].value)
    bench.finish(planned, step)


def _report_memory(bench: _TrainBench, ready: _ReadyMethod) -> float:
    """The memory rows; returns saved bytes per token and layer."""
    group, report, calls, x = bench.group, bench.report, ready.calls, bench.x
    point = ready.planned.point
    report.progress(point, 0.9, "memory")
    weights = list(ready.layers.parameters())
    saved = memory.saved_bytes(calls.forward, weights, [x])
    per_token = saved.activation_bytes / group.tokens / group.n_layers
    notes = []
    declared = ready.planned.declared_saved_bytes(group)
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
        report.measure(point, "peak_allocated_bytes", _largest(peak.over_start_bytes))
        report.measure(point, "transient_peak_bytes", _largest(transient))
        hidden = memory.hidden_bytes(memory.peak_bytes(calls.forward), output, saved)
        if hidden > _HIDDEN_SLACK:
            notes.append(f"holds {hidden} bytes more that autograd does not know of")
    else:
        peak_rss = memory.peak_rss_over_start_bytes(calls.step)
        report.measure(point, "peak_rss_over_start_bytes", _largest(peak_rss))
    detail = join_notes(*notes)
    report.measure(point, "saved_activation_bytes_per_token", without_interval(per_token), detail=detail)
    return per_token


def _largest(value: int) -> Estimate:
    return without_interval(value, statistic="max")


def _report_roofline(
    bench: _TrainBench, ready: _ReadyMethod, measured_saved: float | None, step_ms: float
) -> None:
    """Counts and the share of the floor, of the step."""
    group = bench.group
    flops = _count_flops(bench, ready)
    declared = ready.planned.declared_saved_bytes(group)
    saved = declared if declared is not None else measured_saved
    traffic = roofline.train_min_bytes(group.shape, group.tokens, group.dtype.itemsize, saved)
    min_bytes = None if traffic is None else traffic.step * group.n_layers
    bench.report_roofline(ready.planned.point, flops, min_bytes, bench.ceilings, step_ms)


def _count_flops(bench: _TrainBench, ready: _ReadyMethod) -> int | None:
    """Of the layers without torch.compile, which hides its products from the counter; None if unknown."""
    try:
        return roofline.count_flops(lambda: ready.layers(bench.x).backward(bench.dy))
    except (RuntimeError, MemoryError) as error:
        if not memory.is_out_of_memory(error):
            raise
        return None  # compiled it fits, eager it does not
    finally:
        bench.x.grad = None
        ready.layers.zero_grad(set_to_none=True)
