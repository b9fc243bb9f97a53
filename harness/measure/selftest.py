"""Error rates of the judge: a method against itself, and against itself slowed down by a known amount.

A trial asks the judge of `mocbench compare` about one pair: it takes paired rounds until the stopping rule is
content, gives a verdict, and takes more rounds where it wants another look. Many trials give the rates at
which verdicts are wrong:

- nothing injected (A/A): every verdict that is not SAME is a false alarm;
- 1, 3 or 5 % injected: every verdict that is not SLOW is a miss, of a real change of that size.

The judge is an argument, since this package defines no verdicts: `harness.doctor` passes that of `compare`.
One thing differs from `compare`: each look takes new rounds of the same two captured calls, where `compare`
opens both sides anew, elsewhere in memory.

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
from harness.measure.clocks import ClockReader, Conditions
from harness.measure.ffn import DTYPES, WEIGHTS, TrainingCalls, ffn_weights, natural_tensors
from harness.measure.launch import Sampler, TimedMethod, spin_cycles_per_ms
from harness.measure.timing import PairedTimes, TimingSettings, open_sampler, run_rounds, time_paired
from moc.config import get_preset
from moc.methods import get_method

INJECTED = (0.0, 0.01, 0.03, 0.05)
SIDES = ("base", "head")
# Gives a verdict on "head" against "base", from rounds that it takes, as many times as it wants; the number
# given to the function is that of the look. The second argument seeds the bootstrap.
Judge = Callable[[Callable[[int], PairedTimes], int], stats.Verdict]
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


@dataclass(frozen=True)
class Trial:
    """What came of one trial; the ratio (base over slowed) and the cap are those of the last look."""

    verdict: stats.Verdict
    ratio: stats.Estimate
    capped: bool


def run_self_test(
    call: Callable[[], object],
    device: torch.device,
    settings: TimingSettings,
    trials: int,
    judge: Judge,
    mode: str = "auto",
    injected: Sequence[float] = INJECTED,
) -> list[SelfTestRow]:
    """A table of the judge's verdicts, one row per injected slow-down, on a real call.

    The calls are captured and warmed up once; each trial takes new rounds in a new order.
    """
    first = time_paired([TimedMethod(_BASE, call)], settings, device, mode)
    own_ms = float(np.median(first.samples[_BASE]))
    names = {f"+{fraction:.1%}": fraction for fraction in injected}
    methods = [TimedMethod(_BASE, call, anchor=True)]
    methods += [TimedMethod(name, slowed(call, fraction, own_ms, device)) for name, fraction in names.items()]
    sampler, _notes = open_sampler(methods, device, mode)
    read = ClockReader(device).read

    # Trials of all slow-downs alternate, so that a bad minute of the machine falls on all rows alike.
    outcomes: dict[str, list[Trial]] = {name: [] for name in names}
    for number in range(trials):
        seeded = dataclasses.replace(settings, seed=settings.seed + number)
        for name in names:
            sample = _sampled_as(sampler, {"base": _BASE, "head": name})
            outcomes[name].append(run_trial(sample, judge, seeded, sampler.mode, read))
    return [tally(fraction, outcomes[name]) for name, fraction in names.items()]


def _sampled_as(sampler: Sampler, names: dict[str, str]) -> Callable[[str], float]:
    return lambda side: sampler.sample(names[side])


def run_trial(
    sample: Callable[[str], float],
    judge: Judge,
    settings: TimingSettings,
    mode: str,
    read: Callable[[], Conditions | None],
) -> Trial:
    """One trial over anything that gives milliseconds for "base" and "head"."""
    looks: list[PairedTimes] = []

    def take(_look: int) -> PairedTimes:
        looks.append(run_rounds(SIDES, SIDES[:1], sample, settings, mode=mode, read=read))
        return looks[-1]

    verdict = judge(take, settings.seed)
    base, head = (looks[-1].samples[side] for side in SIDES)
    return Trial(verdict, stats.paired_ratio(base, head, settings.seed), looks[-1].stopped == "cap")


def tally(injected: float, trials: Sequence[Trial]) -> SelfTestRow:
    """One row of the table."""
    verdicts = [trial.verdict for trial in trials]
    ratios = [trial.ratio for trial in trials]
    return SelfTestRow(
        injected=injected,
        trials=len(trials),
        same=verdicts.count("SAME"),
        slow=verdicts.count("SLOW"),
        fast=verdicts.count("FAST"),
        ambiguous=verdicts.count("AMBG"),
        capped=sum(trial.capped for trial in trials),
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
