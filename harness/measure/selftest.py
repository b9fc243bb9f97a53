"""Does the referee tell the truth? A method against itself, and against itself slowed down by a known amount.

A trial is what a sweep does once for a pair of methods: paired rounds until the stopping rule is content, a
bootstrap interval, a verdict. Many trials give the rates at which verdicts are wrong:

- nothing injected (A/A): every verdict that is not SAME is a false alarm;
- 1, 3 or 5 % injected: every verdict that is not SLOW is a miss, of a real change of that size.

The injected work is a spin of the wanted fraction of the call's own median time, on the device, after the
call and inside what is timed (inside the CUDA graph where there is one). A spin is used rather than more
tokens, because a GEMM of 3 % more tokens takes 0 to 12 % longer, depending on how tiles fill the last wave.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from harness.measure import stats
from harness.measure.clocks import ClockReader
from harness.measure.ffn import DTYPES, WEIGHTS, TrainingCalls, ffn_weights, natural_tensors
from harness.measure.launch import Contender, spin_cycles_per_ms
from harness.measure.timing import TimingSettings, open_sampler, run_rounds, time_paired
from moc.config import get_preset
from moc.methods import get_method

INJECTED = (0.0, 0.01, 0.03, 0.05)
_BASE = "base"


@dataclass(frozen=True)
class SelfTestRow:
    """Verdicts of many trials of one injected slow-down."""

    injected: float  # fraction of the base's time; 0 is A/A
    trials: int
    same: int
    slow: int
    fast: int
    ambiguous: int
    capped: int  # trials that ran into the time cap
    median_ratio: float  # of the trials' ratios, base over slowed: 1 / (1 + injected) if all is well
    widest: float  # largest relative half-width of a trial
    median_rounds: float


def run_self_test(
    call: Callable[[], object],
    device: torch.device,
    settings: TimingSettings,
    trials: int,
    mode: str = "auto",
    injected: Sequence[float] = INJECTED,
    threshold: float = stats.DEFAULT_THRESHOLD,
) -> list[SelfTestRow]:
    """A table of verdicts, one row per injected slow-down, on a real call.

    The rivals are captured and warmed up once; each trial takes new rounds in a new order.
    """
    first = time_paired([Contender(_BASE, call)], settings, device, mode)
    own_ms = float(np.median(first.samples[_BASE]))
    rivals = {f"+{fraction:.1%}": fraction for fraction in injected}
    contenders = [Contender(_BASE, call, anchor=True)]
    contenders += [
        Contender(name, slowed(call, fraction, own_ms, device)) for name, fraction in rivals.items()
    ]
    sampler, _notes = open_sampler(contenders, device, mode)
    read = ClockReader(device).read

    def trial(name: str, number: int) -> tuple[stats.Estimate, bool]:
        seeded = dataclasses.replace(settings, seed=settings.seed + number)
        times = run_rounds([_BASE, name], [_BASE], sampler.sample, seeded, mode=sampler.mode, read=read)
        ratio = stats.paired_ratio(times.samples[_BASE], times.samples[name], seeded.seed)
        return ratio, times.stopped == "cap"

    # Trials of all rivals alternate, so that a bad minute of the machine falls on all rows alike.
    outcomes: dict[str, list[tuple[stats.Estimate, bool]]] = {name: [] for name in rivals}
    for number in range(trials):
        for name in rivals:
            outcomes[name].append(trial(name, number))
    return [tally(fraction, outcomes[name], threshold) for name, fraction in rivals.items()]


def tally(injected: float, outcomes: Sequence[tuple[stats.Estimate, bool]], threshold: float) -> SelfTestRow:
    """One row of the table from the trials' ratios (base over slowed) and whether each was capped."""
    ratios = [ratio for ratio, _capped in outcomes]
    verdicts = [stats.verdict(ratio, threshold) for ratio in ratios]
    return SelfTestRow(
        injected=injected,
        trials=len(outcomes),
        same=verdicts.count("SAME"),
        slow=verdicts.count("SLOW"),
        fast=verdicts.count("FAST"),
        ambiguous=verdicts.count("AMBG"),
        capped=sum(capped for _ratio, capped in outcomes),
        median_ratio=float(np.median([ratio.value for ratio in ratios])),
        widest=max(stats.relative_half_width(ratio) for ratio in ratios),
        median_rounds=float(np.median([ratio.n_samples for ratio in ratios])),
    )


def slowed(
    call: Callable[[], object], fraction: float, own_ms: float, device: torch.device
) -> Callable[[], object]:
    """`call` followed by a spin of `fraction` of its own time; nothing is added for 0.

    On CUDA the spin is a kernel of fixed cycles, from `own_ms`, the call's median time. On the CPU it is the
    fraction of what this very call took, since there a call's time changes with whatever else runs.
    """
    if fraction == 0.0:
        return lambda: call()  # another function, so that an A/A pair is captured as two graphs
    if device.type == "cuda":
        cycles = int(fraction * own_ms * spin_cycles_per_ms())

        def with_device_spin() -> object:
            result = call()
            torch.cuda._sleep(cycles)
            return result

        return with_device_spin

    def with_host_spin() -> object:
        begin = time.perf_counter_ns()
        result = call()
        now = time.perf_counter_ns()
        end = now + int(fraction * (now - begin))
        while time.perf_counter_ns() < end:
            pass
        return result

    return with_host_spin


def dense_training_step(device: torch.device, preset: str, tokens: int, dtype: str) -> Callable[[], object]:
    """A dense eager training step (`harness.measure.ffn.TrainingCalls.step`) to run the self-test on."""
    shape = get_preset(preset).ffn
    tensors = natural_tensors(shape, tokens, DTYPES[dtype], device, seed=0)
    module = get_method("dense").make(shape, None).to(device, DTYPES[dtype])
    weights = ffn_weights(module, shape)
    for name in WEIGHTS:
        weights[name].data = getattr(tensors, name)
    x = tensors.x.requires_grad_()
    return TrainingCalls(module, [weights[name] for name in WEIGHTS], x, tensors.dy).step
