"""What `ffn_train`, `ffn_decode` and `generate` share: how the methods of a group are made ready, checked,
timed in turns and reported.

A workload says how to build a method (`Bench.ready_methods`), what to time of it (`Bench.time_methods`), and
adds the rows that are its own.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from harness.measure import gate, stats
from harness.measure.clocks import TimingConditions
from harness.measure.ffn import DTYPES, FfnTensors, ffn_weights
from harness.measure.gate_data import chunk_rows
from harness.measure.launch import TimedMethod, first_call_seconds
from harness.measure.memory import is_out_of_memory
from harness.measure.roofline import Ceilings, floor_ms, pct_of_roofline
from harness.measure.timing import MethodFailed, PairedTimes, TimingSettings, time_paired
from harness.sweep.catalog import ALIGNMENT
from harness.sweep.model import Measure
from harness.sweep.point import Point
from harness.sweep.support import unsupported_reason
from harness.workloads.job import Job
from harness.workloads.reporter import EventReporter
from moc.config import FfnShape
from moc.layers.base import FfnWeights
from moc.methods import Method, get_method
from moc.reference import overflow_count
from moc.selection import Selection

# How decoding is launched: each call goes over its own weights once, so no cache has to be flushed.
_ROTATED = {"auto": "graph_rotated", "graph_cold": "graph_rotated", "launch_cold": "launch_rotated"}

_Work = TypeVar("_Work", bound=Callable[..., Any])


class UnsupportedMethod(Exception):
    """A method that cannot run the group's shape; the message says why."""


class WrongMethod(Exception):
    """A method that failed a correctness check; the message says by how much."""


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
    def rotated_mode(self) -> str:
        """The timing mode of work that goes over copies of its weights."""
        return _ROTATED.get(self.timing_mode, self.timing_mode)

    @property
    def alignment_note(self) -> str:
        """`misaligned: ...` for a shape off the aligned fast path, else empty."""
        off = [
            f"{name}={value}"
            for name, value in (("d_model", self.shape.d_model), ("d_ffn", self.shape.d_ffn))
            if value % ALIGNMENT
        ]
        return f"misaligned: {', '.join(off)} not a multiple of {ALIGNMENT}" if off else ""

    def plan(self, report: EventReporter) -> list[PlannedMethod]:
        """The methods that can run the group; the points of all others are finished as `unsupported`."""
        planned = []
        for point in self.points:
            report.start(point)
            reason = unsupported_reason(point, self.device.type)
            if reason is not None:
                report.finish(point, "unsupported", reason)
                continue
            method = get_method(point.method)
            planned.append(PlannedMethod(point, method, point.rule if method.takes_selection else None))
        return planned

    def make_layer(self, planned: PlannedMethod, tensors: FfnTensors | None = None) -> nn.Module:
        """The method's layer, on the given weights if there are any; all methods share their storage.

        Raises UnsupportedMethod if the method refuses the shape, or the layer's parameters are not those of a
        SwiGLU.
        """
        try:
            layer = planned.method.make(self.shape, planned.selection).to(self.device, self.dtype)
            weights = ffn_weights(layer, self.shape)
        except ValueError as error:
            raise UnsupportedMethod(str(error)) from error
        if tensors is not None:
            for name, weight in weights.items():
                weight.data = getattr(tensors, name)
        return layer

    def compiled(self, planned: PlannedMethod, work: _Work) -> _Work:
        """A module or function as the method wants it run: through torch.compile with static shapes, or as it
        is."""
        if not planned.method.compiles_on(self.device.type):
            return work
        run: _Work = torch.compile(work, dynamic=False, mode=planned.method.compile_mode)  # type: ignore[assignment]
        return run

    def release_memory(self) -> None:
        """Give back what a finished or failed part of the measurement held."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class PlannedMethod:
    """One point of the group, and its method, which can run the group's shape."""

    point: Point
    method: Method
    selection: Selection | None  # None where the method takes none

    @property
    def name(self) -> str:
        """Tells it from the other methods of the group."""
        return f"{self.point.method} {self.selection}" if self.selection is not None else self.point.method

    def declared_saved_bytes(self, group: Group) -> float | None:
        """Bytes saved per token and layer by the method's own formula; None if it has none."""
        formula = self.method.saved_bytes_per_token
        if formula is None:
            return None
        k = group.shape.d_ffn if self.selection is None else self.selection.k(group.shape.d_ffn)
        return formula(group.shape, k, group.dtype.itemsize)


class ReadyMethod(Protocol):
    """A method that is built and checked, whatever else its workload knows of it."""

    @property
    def planned(self) -> PlannedMethod:
        """Its point, method and rule."""


_Ready = TypeVar("_Ready", bound=ReadyMethod)


@dataclass(frozen=True)
class Bench:
    """A group, how it is measured, and where its rows go."""

    group: Group
    settings: Measure
    report: EventReporter

    @property
    def timing(self) -> TimingSettings:
        """When to stop timing."""
        timing = self.settings.timing
        return TimingSettings(rel_ci=timing.rel_ci, max_seconds=timing.max_seconds, seed=self.group.seed)

    def ready_methods(
        self, planned: Sequence[PlannedMethod], prepare: Callable[[PlannedMethod], _Ready]
    ) -> list[_Ready]:
        """What `prepare` makes of each method.

        One that is unsupported, wrong or out of memory has its point finished as that, with the reason, and
        is left out. Any other error is raised; its point is then the last one started.
        """
        report, ready = self.report, []
        for number, method in enumerate(planned):
            report.start(method.point)
            report.progress(method.point, 0.5 * number / len(planned), "checking")
            try:
                ready.append(prepare(method))
            except UnsupportedMethod as error:
                report.finish(method.point, "unsupported", f"method {method.method.name}: {error}")
            except WrongMethod as error:
                report.finish(method.point, "wrong", str(error))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                report.finish(method.point, "oom", str(error).partition("\n")[0])
            self.group.release_memory()
        return ready

    def report_compile_time(self, planned: PlannedMethod, call: Callable[[], object]) -> None:
        """Run `call` for the first time; what that cost more than a steady call is the row `compile_s`."""
        first, steady = first_call_seconds(TimedMethod(planned.name, call), self.group.device)
        seconds = stats.without_interval(max(0.0, first - steady), statistic="first_minus_steady")
        self.report.measure(planned.point, "compile_s", seconds)

    def check_layer(
        self,
        planned: PlannedMethod,
        run: Callable[[Tensor], Tensor],
        layer: nn.Module,
        draws: Sequence[tuple[int, int]],
        *,
        backward: bool = True,
    ) -> None:
        """The correctness gate on one layer, if gates are wanted.

        `draws` are pairs of a number of tokens and a number of inputs that have so many.
        `run` calls `layer`, compiled or not. Raises WrongMethod if it is off.
        """
        if not self.settings.gate:
            return
        worst, count, details = 0.0, 0, []
        for tokens, number in draws:
            found = gate.check(
                run,
                ffn_weights(layer, self.group.shape),
                planned.method.reference,
                planned.selection,
                tokens,
                self.group.seed + 1,
                backward=backward,
                draws=number,
                kept_roundoff=planned.method.kept_roundoff,
            )
            worst, count = max(worst, found.max_rel_err), count + number * len(found.errors)
            if not found.ok:
                details.append(f"with {tokens} tokens {found.detail}" if len(draws) > 1 else found.detail)
        self.report.measure(planned.point, "max_rel_err", stats.without_interval(worst, count, "max"))
        if details:
            raise WrongMethod("; ".join(details))

    def time_methods(
        self,
        ready: list[_Ready],
        quantities: Sequence[str],
        timed: Callable[[_Ready, str], TimedMethod],
        mode: str,
    ) -> tuple[list[_Ready], dict[str, PairedTimes]]:
        """Paired times of all methods by quantity, and the methods that got through.

        One that runs out of memory has its point finished as `oom`, and the rest are timed anew. After any
        other failure the error is raised with its point blamed: what it left behind on the device is unknown,
        so the rest of the group needs a fresh process.
        """
        while ready:
            points = {method.planned.name: method.planned.point for method in ready}
            try:
                times = {}
                for number, quantity in enumerate(quantities):
                    begin = self._starter(points, 0.5 + 0.4 * number / len(quantities), f"timing {quantity}")
                    calls = [timed(method, quantity) for method in ready]
                    times[quantity] = time_paired(calls, self.timing, self.group.device, mode, begin)
                    self.group.release_memory()
                return ready, times
            except MethodFailed as failure:
                failed = failure.name
                if not failure.out_of_memory:
                    self.report.start(points[failed])
                    raise failure.__cause__ or failure  # noqa: B904 - the cause is the error itself
                self.report.finish(points[failed], "oom", str(failure))
            # Out of the handler, so that the failed attempt's frames no longer hold its memory.
            ready = [method for method in ready if method.planned.name != failed]
            self.group.release_memory()
        return [], {}

    def _starter(self, points: Mapping[str, Point], fraction: float, text: str) -> Callable[[str], None]:
        def start(name: str) -> None:
            self.report.start(points[name])
            self.report.progress(points[name], fraction, text)

        return start

    def report_time(
        self, planned: PlannedMethod, metric: str, times: PairedTimes, per_ms: float = 1.0
    ) -> stats.Estimate:
        """The row and the samples of a time, in the metric's unit, of which a millisecond has `per_ms`.

        Returns the time in milliseconds.
        """
        samples = times.samples[planned.name]
        time = stats.median_estimate(samples, self.group.seed)
        unsettled = times.unsettled(planned.name, self.timing)
        self.report.measure(
            planned.point,
            metric,
            stats.scaled(time, per_ms),
            conditions=_conditions(times),
            status="unstable" if unsettled else "ok",
            detail=join_notes(unsettled, *times.notes),
        )
        self.report.samples(planned.point, metric, (samples * per_ms).tolist())
        return time

    def report_rate(self, planned: PlannedMethod, tokens: int, times: PairedTimes) -> None:
        """Tokens per second, of work that handles so many tokens."""
        time = stats.median_estimate(times.samples[planned.name], self.group.seed)
        rate = stats.rate(tokens * 1e3, time)
        self.report.measure(planned.point, "tokens_per_s", rate, conditions=_conditions(times))

    def report_speedup(
        self, planned: PlannedMethod, ready: Sequence[ReadyMethod], times: PairedTimes
    ) -> None:
        """The paired ratio to the fastest exact dense method of `ready`; no row if there is none."""
        dense = [other.planned.name for other in ready if other.planned.method.is_dense]
        if not dense:
            return
        base = min(dense, key=lambda name: stats.median(times.samples[name]))
        ratio = stats.paired_ratio(times.samples[base], times.samples[planned.name], self.group.seed)
        conditions, detail = _conditions(times), f"over {base}"
        self.report.measure(
            planned.point, "speedup_vs_best_dense", ratio, conditions=conditions, detail=detail
        )

    def finish(self, planned: PlannedMethod, times: PairedTimes) -> None:
        """Finish a point as `ok`, or as `unstable` if its ratio did not settle, saying what was reached."""
        unsettled = times.unsettled(planned.name, self.timing)
        detail = join_notes(self.group.alignment_note, unsettled, *times.notes)
        self.report.finish(planned.point, "unstable" if unsettled else "ok", detail)

    def report_roofline(
        self, point: Point, flops: float | None, min_bytes: float | None, ceilings: Ceilings, ms: float
    ) -> None:
        """Counts and the share of the floor in a time; what is unknown has no row."""
        floor = floor_ms(flops, min_bytes, ceilings, self.group.dtype_name)
        rows = {"flops": flops, "min_bytes": min_bytes, "pct_of_roofline": pct_of_roofline(floor, ms)}
        for metric, value in rows.items():
            if value is not None:
                self.report.measure(point, metric, float(value))

    def report_overflow(self, planned: PlannedMethod, x: Tensor, w_gate: Tensor) -> None:
        """For a `threshold` rule: the share of the channels above the threshold that its cap left out."""
        selection = planned.selection
        if selection is None or selection.rule != "threshold":
            return
        wanted, left_out = 0, 0
        with torch.no_grad():
            for rows in chunk_rows(x.shape[0], self.group.shape.d_ffn):
                gates = x[rows] @ w_gate.T
                wanted += int((gates.double() > selection.threshold_f32).sum())
                left_out += int(overflow_count(gates, selection))
        share = stats.without_interval(left_out / wanted if wanted else 0.0)
        self.report.measure(planned.point, "overflow_fraction", share)


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


def frozen(layer: nn.Module) -> nn.Module:
    """The layer itself, ready for calls without gradients on the weights it has."""
    if isinstance(layer, FfnWeights):  # a layer from outside the project need not be one
        layer.freeze()
    return layer


def _conditions(times: PairedTimes) -> TimingConditions:
    return TimingConditions.of(times.mode, times.conditions)


def join_notes(*notes: str) -> str:
    """Notes for the `detail` column, in one line."""
    return "; ".join(note for note in notes if note)
