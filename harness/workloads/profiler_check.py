"""Decoding times of the timer against those of the profiler, for `mocbench doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from harness.measure import stats
from harness.measure.clocks import ClockReader
from harness.measure.ffn import DTYPES, decoding_call, weight_copies, with_weights
from harness.measure.launch import TimedMethod, load_libraries
from harness.measure.timing import TimingSettings, open_sampler, run_rounds
from moc.config import FfnShape
from moc.methods import get_method


@dataclass(frozen=True)
class ProfilerCheck:
    """Two ways to say how long one decoding step of dense takes, in microseconds per copy of the weights."""

    graph_us: float  # as `ffn_decode` reports it: events around a replay
    span_us: float  # by the profiler, from the start of the first kernel to the end of the last
    busy_us: float  # sum of the kernels' own times in the profiler: no gap between them is in it
    kernels: float  # how many of them

    @property
    def difference(self) -> float:
        """Graph over the profiler's span, minus one."""
        return self.graph_us / self.span_us - 1.0


def check_against_profiler(
    shape: FfnShape, batch: int, dtype_name: str, device: torch.device
) -> ProfilerCheck:
    """Time eager dense by CUDA graph and by the profiler, on the same replays of the same graph.

    Raises ValueError without CUDA.
    """
    if device.type != "cuda":
        raise ValueError(f"the profiler check needs a CUDA device, not {device.type}")
    dtype = DTYPES[dtype_name]
    load_libraries(device, dtype)
    all_read = float(shape.n_params() * dtype.itemsize)
    copies = weight_copies(all_read, shape, batch, dtype, device, seed=0)
    dense = get_method("dense").make(shape, None).to(device, dtype)
    layers = [with_weights(dense, tensors) for tensors in copies]
    method = TimedMethod("dense", decoding_call(layers, copies[0].x), calls=len(layers))
    sampler, notes = open_sampler([method], device, "graph_rotated")
    if notes:
        raise RuntimeError(notes[0])
    read = ClockReader(device).read
    times = run_rounds(["dense"], [], sampler.sample, TimingSettings(), mode=sampler.mode, read=read)

    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for _ in range(20):
            sampler.sample("dense")
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    replays: list[list[Any]] = []
    for event in sorted(kernels, key=lambda event: event.time_range.start):
        if "spin" in event.name:  # one before every replay
            replays.append([])
        elif replays:
            replays[-1].append(event.time_range)
    spans = [max(time.end for time in replay) - replay[0].start for replay in replays]
    busy = [sum(time.elapsed_us() for time in replay) for replay in replays]
    return ProfilerCheck(
        graph_us=1e3 * stats.median(times.samples["dense"]),
        span_us=float(np.median(spans)) / len(layers),
        busy_us=float(np.median(busy)) / len(layers),
        kernels=float(np.median([len(replay) for replay in replays])) / len(layers),
    )
