"""What `ffn_train`, `ffn_decode` and `generate` share: a group's points made runnable, and rows of times."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from harness.measure import stats
from harness.measure.clocks import any_throttled, median_sm_clock
from harness.measure.ffn import DTYPES, FfnTensors, ffn_weights
from harness.measure.gate_data import chunk_rows
from harness.measure.timing import ContenderFailed, PairedTimes, TimingSettings
from harness.sweep.catalog import ALIGNMENT
from harness.sweep.model import Measure
from harness.sweep.point import Point
from harness.workloads.job import Job, Reporter
from moc.config import FfnShape
from moc.layers.base import FfnWeights
from moc.methods import Method, get_method
from moc.reference import overflow_count
from moc.selection import Selection, parse_selection

# Every method, selection and shape of a group compiles the same few functions anew; past this many PyTorch
# would run the rest eagerly without a word.
_RECOMPILE_LIMIT = 1024

_Work = TypeVar("_Work", bound=Callable[..., Any])


@dataclass(frozen=True)
class Group:
    """What all points of a job have in common."""

    points: tuple[Point, ...]
    shape: FfnShape
    tokens: int
    dtype_name: str
    device: torch.device
    seed: int
    n_layers: int
    timing_mode: str

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, inputs and outputs."""
        return DTYPES[self.dtype_name]

    @property
    def alignment_note(self) -> str:
        """`misaligned: ...` for a shape off the aligned fast path, else empty."""
        off = [
            f"{name}={value}"
            for name, value in (("d_model", self.shape.d_model), ("d_ffn", self.shape.d_ffn))
            if value % ALIGNMENT
        ]
        return f"misaligned: {', '.join(off)} not a multiple of {ALIGNMENT}" if off else ""


@dataclass(frozen=True)
class Entry:
    """One point whose method can run the group's shape."""

    point: Point
    method: Method
    selection: Selection | None  # None where the method takes none

    @property
    def name(self) -> str:
        """Tells the entry from its rivals."""
        return f"{self.point.method} {self.selection}" if self.selection is not None else self.point.method

    def declared_saved_bytes(self, group: Group) -> float | None:
        """Bytes saved per token and layer by the method's own formula; None if it has none."""
        formula = self.method.saved_bytes_per_token
        if formula is None:
            return None
        k = group.shape.d_ffn if self.selection is None else self.selection.k(group.shape.d_ffn)
        return formula(group.shape, k, group.dtype.itemsize)


def open_group(job: Job) -> Group:
    """The common part of the job's points. Raises ValueError if they are not one group."""
    first = job.points[0]
    strangers = [point.label for point in job.points if point.group_key != first.group_key]
    if strangers:
        raise ValueError(f"points of more than one group in one job: {first.label} and {strangers[0]}")
    return Group(
        points=job.points,
        shape=FfnShape(d_model=first.d_model, d_ffn=first.d_ffn),
        tokens=first.tokens,
        dtype_name=first.dtype,
        device=torch.device(job.device),
        seed=first.seed,
        n_layers=first.n_layers,
        timing_mode=first.timing_mode,
    )


def open_entry(group: Group, point: Point, report: Reporter, *, train: bool) -> Entry | None:
    """The point's method and rule; None after the point was finished as `unsupported`, with the reason."""
    try:
        method = get_method(point.method)
        selection = parse_selection(point.selection) if point.selection and method.takes_selection else None
        reason = method.unsupported_reason(group.shape, selection, group.dtype_name, group.device.type)
        if reason is None and train and not method.backward:
            reason = f"method {method.name} has no backward"
        if reason is None and not train and not method.decode:
            reason = f"method {method.name} does not decode"
        if reason is None and point.workload == "generate" and method.generate_refusal is not None:
            reason = f"method {method.name} does not generate: {method.generate_refusal}"
    except ValueError as error:  # a wrong name or rule; the message is one line for people
        reason = str(error)
    if reason is not None:
        report.finish(point, "unsupported", reason)
        return None
    return Entry(point, method, selection)


def make_layer(group: Group, entry: Entry, tensors: FfnTensors) -> nn.Module:
    """The method's layer on the tensors' own weights: rivals share the storage, so no address is better.

    Raises ValueError if the layer's parameters are not those of a SwiGLU.
    """
    layer = entry.method.make(group.shape, entry.selection).to(group.device, group.dtype)
    for name, weight in ffn_weights(layer, group.shape).items():
        weight.data = getattr(tensors, name)
    return layer


def with_weights(layer: nn.Module, tensors: FfnTensors) -> nn.Module:
    """A copy of the layer on other weights."""
    other = copy.deepcopy(layer)
    shape = FfnShape(d_model=tensors.w_gate.shape[1], d_ffn=tensors.w_gate.shape[0])
    for name, weight in ffn_weights(other, shape).items():
        weight.data = getattr(tensors, name)
    return other


def frozen(layer: nn.Module) -> nn.Module:
    """The layer itself, ready for calls without gradients on the weights it has."""
    if isinstance(layer, FfnWeights):  # one from outside need not be
        layer.freeze()
    return layer


def compiled(group: Group, entry: Entry, work: _Work) -> _Work:
    """A module or function as the method wants it run: through torch.compile with static shapes, or as it
    is."""
    if not entry.method.compiles_on(group.device.type):
        return work
    torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
    torch._dynamo.config.accumulated_recompile_limit = _RECOMPILE_LIMIT
    run: _Work = torch.compile(work, dynamic=False, mode=entry.method.compile_mode)  # type: ignore[assignment]
    return run


class Timeable(Protocol):
    """A candidate for timing, whatever else its workload knows of it."""

    @property
    def entry(self) -> Entry:
        """Its point and method."""


_Candidate = TypeVar("_Candidate", bound=Timeable)


def time_all(
    group: Group,
    report: Reporter,
    candidates: list[_Candidate],
    quantities: Sequence[str],
    time_one: Callable[[list[_Candidate], str], PairedTimes],
) -> tuple[list[_Candidate], dict[str, PairedTimes]]:
    """Paired times by quantity, and the candidates that got through; the others are finished as `oom`.

    When one runs out of memory, the rest are timed anew. Raises what `time_one` raises else.
    """
    while candidates:
        try:
            return candidates, {quantity: time_one(candidates, quantity) for quantity in quantities}
        except ContenderFailed as failure:
            left = _without_failed(report, failure, [candidate.entry for candidate in candidates])
        # Out of the handler, so that the failed attempt's frames no longer hold its memory.
        candidates = [candidate for candidate in candidates if candidate.entry in left]
        release_memory(group)
    return [], {}


def _without_failed(report: Reporter, failure: ContenderFailed, entries: Sequence[Entry]) -> list[Entry]:
    """The entries without the one that ran out of memory, whose point is finished as `oom`.

    Any other failure is raised again with its point blamed: what it left behind on the device is unknown, so
    the rest of the group belongs into a fresh process.
    """
    guilty = next(entry for entry in entries if entry.name == failure.name)
    if not failure.out_of_memory:
        report.start(guilty.point)
        raise failure.__cause__ or failure
    report.finish(guilty.point, "oom", str(failure))
    return [entry for entry in entries if entry is not guilty]


def report_estimate(
    report: Reporter,
    point: Point,
    metric: str,
    estimate: stats.Estimate,
    times: PairedTimes,
    *,
    status: str = "ok",
    detail: str = "",
) -> None:
    """A row of a number that comes from paired times, with the conditions they were taken under."""
    report.measure(
        point,
        metric,
        estimate.value,
        ci_low=estimate.ci_low,
        ci_high=estimate.ci_high,
        n_samples=estimate.n_samples,
        statistic=estimate.statistic,
        status=status,
        detail=detail,
        timing_mode=times.mode,
        sm_clock_mhz=median_sm_clock(times.conditions),
        throttled=any_throttled(times.conditions),
    )


def report_speedup(
    group: Group, report: Reporter, entry: Entry, entries: Sequence[Entry], times: PairedTimes
) -> None:
    """The paired ratio to the fastest exact dense method of `entries`; no row if there is none."""
    dense = [other.name for other in entries if other.method.is_dense]
    if not dense:
        return
    base = min(dense, key=lambda name: stats.median(times.samples[name]))
    ratio = stats.paired_ratio(times.samples[base], times.samples[entry.name], group.seed)
    report_estimate(report, entry.point, "speedup_vs_best_dense", ratio, times, detail=f"over {base}")


def timing_settings(group: Group, settings: Measure) -> TimingSettings:
    """When to stop timing this group."""
    return TimingSettings(
        rel_ci=settings.timing.rel_ci, max_seconds=settings.timing.max_seconds, seed=group.seed
    )


def finish_timed(group: Group, settings: Measure, report: Reporter, entry: Entry, times: PairedTimes) -> None:
    """Finish a point as `ok`, or as `unstable` if its ratio did not settle, saying what was reached."""
    unsettled = times.unsettled(entry.name, timing_settings(group, settings))
    detail = join_notes(group.alignment_note, unsettled, *times.notes)
    report.finish(entry.point, "unstable" if unsettled else "ok", detail)


def report_overflow(group: Group, report: Reporter, entry: Entry, x: Tensor, w_gate: Tensor) -> None:
    """For a `threshold` rule: the share of the channels above the threshold that its cap left out."""
    selection = entry.selection
    if selection is None or selection.rule != "threshold":
        return
    wanted, left_out = 0, 0
    with torch.no_grad():
        for rows in chunk_rows(x.shape[0], group.shape.d_ffn):
            gates = x[rows] @ w_gate.T
            wanted += int((gates.double() > selection.threshold_f32).sum())
            left_out += int(overflow_count(gates, selection))
    report.measure(entry.point, "overflow_fraction", left_out / wanted if wanted else 0.0, n_samples=1)


def join_notes(*notes: str) -> str:
    """Notes for the `detail` column, in one line."""
    return "; ".join(note for note in notes if note)


def release_memory(group: Group) -> None:
    """Give back what a finished or failed part of the measurement held."""
    gc.collect()
    if group.device.type == "cuda":
        torch.cuda.empty_cache()
