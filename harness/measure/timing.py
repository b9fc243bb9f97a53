"""Paired timing: methods alternate within one process until their ratios are known well enough.

A round samples every method once. Rounds come in pairs, the second in the reverse order of the first
(ABBA), so a clock that drifts steadily favours no method; each pair has its own shuffled order, so no method
always runs after the same one. Ratios are taken within rounds, see `harness.measure.stats.paired_ratio`.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from harness.measure import stats
from harness.measure.clocks import ClockReader, Conditions
from harness.measure.launch import CaptureError, CpuSampler, CudaSampler, Sampler, TimedMethod
from harness.measure.memory import is_out_of_memory

MODES = ("auto", "graph_cold", "launch_cold", "graph_hot", "graph_rotated", "launch_rotated")
_CHECK_GROWTH = 1.25  # rounds between two looks at the intervals grow by this, so looking stays cheap


@dataclass(frozen=True)
class TimingSettings:
    """When to stop. The time cap wins over `min_rounds`, but one pair of rounds is always measured."""

    rel_ci: float = 0.01  # wanted relative half-width of every method's paired ratio
    max_seconds: float = 20.0
    min_rounds: int = 10
    max_rounds: int = 2000
    seed: int = 0


@dataclass(frozen=True)
class PairedTimes:
    """Samples of all methods, aligned by round."""

    mode: str  # how the work was launched
    samples: dict[str, NDArray[np.float64]]  # milliseconds, one per round
    stopped: Literal["ci", "cap"]  # every half-width reached `rel_ci`, or time or rounds ran out
    half_widths: dict[str, float]  # relative half-width each method reached, see `half_widths`
    conditions: tuple[Conditions | None, ...]  # one reading at each look at the intervals
    seconds: float
    notes: tuple[str, ...]  # what a reader of the numbers must know

    def unsettled(self, name: str, settings: TimingSettings) -> str:
        """Why this method's ratio is not known as well as was wanted; empty if it is."""
        rounds = len(self.samples[name])
        if rounds < settings.min_rounds:
            return f"{rounds} rounds in {self.seconds:.0f} s, at least {settings.min_rounds} are needed"
        if self.half_widths[name] <= settings.rel_ci:
            return ""
        reached = f"half-width {self.half_widths[name]:.1%} after {self.seconds:.0f} s"
        return f"{reached}, wanted {settings.rel_ci:.1%}"


class MethodFailed(RuntimeError):
    """A method raised while it was warmed up or sampled; the error itself is `__cause__`."""

    def __init__(self, name: str, error: BaseException) -> None:
        first_line = str(error).partition("\n")[0]
        super().__init__(f"{name}: {type(error).__name__}: {first_line}")
        self.name = name
        self.out_of_memory = is_out_of_memory(error)


def time_paired(
    methods: Sequence[TimedMethod],
    settings: TimingSettings,
    device: torch.device,
    mode: str = "auto",
    on_start: Callable[[str], None] | None = None,
) -> PairedTimes:
    """Time all methods in turn, all in the same launch mode; see `open_sampler` for the arguments.

    Raises as `open_sampler` does, and MethodFailed if a method raises while it is sampled.
    """
    sampler, notes = open_sampler(methods, device, mode, on_start)
    names = [method.name for method in methods]
    anchors = [method.name for method in methods if method.anchor]
    read = ClockReader(device).read
    times = run_rounds(names, anchors, sampler.sample, settings, mode=sampler.mode, read=read)
    held_up = [
        f"{name} waits for the device, so launch gaps are in its time" for name in sampler.host_bound()
    ]
    return replace(times, notes=(*notes, *held_up))


def median_ms(
    call: Callable[[], object], device: torch.device, settings: TimingSettings, mode: str = "auto"
) -> float:
    """Median milliseconds of one call that is compared with nothing. Raises as `time_paired`."""
    times = time_paired([TimedMethod("call", call)], settings, device, mode)
    return float(np.median(times.samples["call"]))


def open_sampler(
    methods: Sequence[TimedMethod],
    device: torch.device,
    mode: str = "auto",
    on_start: Callable[[str], None] | None = None,
) -> tuple[Sampler, list[str]]:
    """All methods warmed up and ready to be sampled in one mode, and notes on how that came about.

    `mode` is one of `MODES` (see `harness.measure.launch.CudaSampler`); `auto` is `graph_cold`, and on the
    CPU every mode is `cpu`. If one method cannot run inside a CUDA graph, or the graphs do not fit in
    memory, *all* are launched eagerly instead and a note says why. `on_start(name)` is called before a
    method is first touched. Raises ValueError for an unknown mode, no method or a name given twice,
    MethodFailed if one raises.
    """
    names = [method.name for method in methods]
    if mode not in MODES:
        raise ValueError(f"timing mode {mode!r} is not one of {', '.join(MODES)}")
    if not names or len(set(names)) != len(names):
        raise ValueError(f"methods need distinct names, got {names}")
    gc.collect()  # garbage of what came before; none is collected while samples are taken
    if device.type != "cuda":
        on_cpu = CpuSampler()
        _add_all(on_cpu, methods, on_start)
        return on_cpu, []
    wanted = "graph_cold" if mode == "auto" else mode
    try:
        sampler = CudaSampler(device, wanted)
        _add_all(sampler, methods, on_start)
        return sampler, []
    except (CaptureError, MethodFailed) as error:
        too_big = isinstance(error, MethodFailed) and error.out_of_memory
        if wanted.startswith("launch") or not (isinstance(error, CaptureError) or too_big):
            raise
        note = f"all launched eagerly, since {error}"
    # Out of the handler, so that the failed attempt's frames no longer hold its memory.
    del sampler
    gc.collect()
    torch.cuda.empty_cache()
    sampler = CudaSampler(device, "launch_rotated" if wanted == "graph_rotated" else "launch_cold")
    _add_all(sampler, methods, on_start)
    return sampler, [note]


def run_rounds(
    names: Sequence[str],
    anchors: Sequence[str],
    sample: Callable[[str], float],
    settings: TimingSettings,
    *,
    mode: str,
    read: Callable[[], Conditions | None],
    clock: Callable[[], float] = time.monotonic,
) -> PairedTimes:
    """The loop of `time_paired` over anything that gives milliseconds for a name.

    Raises MethodFailed if `sample` raises.
    """
    samples: dict[str, list[float]] = {name: [] for name in names}
    conditions = [read()]
    reached: dict[str, float] = {}
    begin = clock()
    rounds, next_look = 0, settings.min_rounds
    stopped: Literal["ci", "cap"] = "cap"
    with _no_garbage_collection():
        while rounds < settings.max_rounds:
            for name in order_of_pair(names, rounds // 2, settings.seed):
                try:
                    samples[name].append(sample(name))
                except Exception as error:  # whatever a method's code raises; the caller learns whose it was
                    raise MethodFailed(name, error) from error
            rounds += 2
            out_of_time = clock() - begin >= settings.max_seconds
            if rounds >= next_look or out_of_time:
                next_look = max(rounds + 2, math.ceil(rounds * _CHECK_GROWTH))
                conditions.append(read())
                reached = half_widths(samples, anchors, settings.seed)
                if rounds >= settings.min_rounds and max(reached.values()) <= settings.rel_ci:
                    stopped = "ci"
                    break
            if out_of_time:
                break
    return PairedTimes(
        mode=mode,
        samples={name: np.array(values) for name, values in samples.items()},
        stopped=stopped,
        half_widths=reached or half_widths(samples, anchors, settings.seed),
        conditions=tuple(conditions),
        seconds=clock() - begin,
        notes=(),
    )


def order_of_pair(names: Sequence[str], pair: int, seed: int) -> list[str]:
    """The order of one pair of rounds: a shuffle by `pair` and `seed` alone, then its reverse."""
    order = [names[index] for index in np.random.default_rng((seed, pair)).permutation(len(names))]
    return order + order[::-1]


def half_widths(
    samples: Mapping[str, Sequence[float]], anchors: Sequence[str], seed: int
) -> dict[str, float]:
    """Relative half-width of each method's paired ratio to the fastest other anchor (else fastest other).

    A method that is alone has no ratio: then it is that of its median.
    """
    medians = {name: float(np.median(values)) for name, values in samples.items()}
    widths = {}
    for name, values in samples.items():
        others = [other for other in anchors if other != name] or [o for o in samples if o != name]
        if others:
            fastest = min(others, key=medians.__getitem__)
            estimate = stats.paired_ratio(samples[fastest], values, seed, n_resamples=stats.QUICK_RESAMPLES)
        else:
            estimate = stats.median_estimate(values, seed, n_resamples=stats.QUICK_RESAMPLES)
        widths[name] = stats.relative_half_width(estimate)
    return widths


def _add_all(
    sampler: Sampler, methods: Sequence[TimedMethod], on_start: Callable[[str], None] | None
) -> None:
    for method in methods:
        if on_start is not None:
            on_start(method.name)
        try:
            sampler.add(method)
        except CaptureError:
            raise
        except Exception as error:  # whatever a method's code raises; the caller learns whose it was
            raise MethodFailed(method.name, error) from error


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """None while samples are taken: a pause would hit whoever is running."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
