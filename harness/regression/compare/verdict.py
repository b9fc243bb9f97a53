"""SAME, FAST, SLOW or AMBG: what a ratio with its interval says about a change of the code.

A change is reported from `smallest_change` on (3 % on a GPU). The whole interval has to lie beyond *half* of
that. A change of exactly 3 % has an interval around 3 %, half of which lies below, so a limit of 3 % would
miss it every other time, while no change at all has an interval around 0. With the limit in the middle, both
are equally far from a wrong verdict. The interval is narrow enough for that, see `Rule.rel_ci`.

SLOW also needs a difference above the grain of the clock, and it needs to come out twice.

`mocbench doctor --aa` tests this very judge (`judge_rounds`) on changes of known size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from harness.measure.stats import MIN_SAMPLES, Estimate, Verdict, bootstrap, median, paired_ratio
from harness.measure.timing import PairedTimes, TimingSettings

NEAR_LOOKS = 3  # at most, at what is near the limit
MIN_ROUNDS = 12  # of one look


@dataclass(frozen=True)
class Rule:
    """What is reported on a kind of device."""

    smallest_change: float  # of time, as a share, that is reported
    floor_ms: float  # a smaller difference is not reported: it is within the grain of the clock
    max_seconds: float  # the longest that one look may take; on a GPU it mostly takes a fraction of a second

    @property
    def limit(self) -> float:
        """The share beyond which the whole interval has to lie."""
        return self.smallest_change / 2

    @property
    def rel_ci(self) -> float:
        """Half-width of the interval at which measuring stops: three of them are the way to the limit."""
        return self.limit / 3

    def timing(self, seed: int) -> TimingSettings:
        """When to stop taking the rounds of one look."""
        return TimingSettings(self.rel_ci, self.max_seconds, MIN_ROUNDS, seed=seed)


# A CUDA event counts in 0.5 us. On the CPU, wall clock on a machine that does other things too.
RULES = {"cuda": Rule(0.03, 0.001, 2.0), "cpu": Rule(0.10, 0.02, 12.0)}


@dataclass(frozen=True)
class Change:
    """By how much head takes longer than base: 0.03 is 3 % slower. Unknown ends are NaN."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, speedup: Estimate) -> Change:
        """From the speed-up of head over base, as `harness.measure.stats.paired_ratio` gives it."""
        return cls(1 / speedup.value - 1, 1 / speedup.ci_high - 1, 1 / speedup.ci_low - 1)

    def __str__(self) -> str:
        if not math.isfinite(self.low + self.high):
            return f"{100 * self.value:+.1f} %"
        return f"{100 * self.value:+.1f} % ({100 * self.low:+.1f} to {100 * self.high:+.1f})"


def judge(change: Change, base_ms: float, rule: Rule) -> Verdict:
    """One look at a change.

    - SLOW: the whole interval lies beyond the limit, and so much of the base's time is above the floor.
    - FAST: likewise on the other side (as a ratio: 1/(1+limit)).
    - SAME: the whole interval lies within the limits, or everything in it is below the floor.
    - AMBG: anything else, and where there is no interval; more samples are needed to say.
    """
    if not math.isfinite(change.low + change.high):
        return "AMBG"
    faster = 1 / (1 + rule.limit) - 1
    if change.low > rule.limit and change.low * base_ms > rule.floor_ms:
        return "SLOW"
    if change.high < faster and -change.high * base_ms > rule.floor_ms:
        return "FAST"
    within = faster <= change.low and change.high <= rule.limit
    small = max(abs(change.low), abs(change.high)) * base_ms <= rule.floor_ms
    return "SAME" if within or small else "AMBG"


def final(looks: Sequence[Verdict]) -> Verdict | None:
    """The verdict of one or more looks at the same change, in order; None if another look is needed.

    The last look counts. SLOW needs two looks in a row; a SLOW that was not confirmed makes the verdict AMBG.
    """
    if looks[-1] == "SLOW":
        return "SLOW" if looks[-2:-1] == ["SLOW"] else None
    return "AMBG" if "SLOW" in looks else looks[-1]


@dataclass(frozen=True)
class Look:
    """One look at "head" against "base", from paired rounds."""

    times: PairedTimes
    change: Change
    base_ms: float
    verdict: Verdict


def judge_rounds(
    take: Callable[[int], PairedTimes], rule: Rule, *, seed: int, units: int = 1
) -> tuple[Verdict, list[Look]]:
    """The verdict on "head" against "base", and the looks it took.

    `take` is given the number of the look and measures paired rounds. SLOW is looked at again, and so is what
    stays open although the interval is narrow: then it is near the limit. `seed` is that of the bootstrap. A
    sample is the time of a unit of work, and `units` of them are timed at once.
    """
    looks: list[Look] = []
    while True:
        times = take(len(looks))
        base, head = times.samples["base"], times.samples["head"]
        change, base_ms = Change.of(paired_ratio(base, head, seed)), median(base)
        looks.append(Look(times, change, base_ms, judge(change, base_ms * units, rule)))
        found = [look.verdict for look in looks]
        verdict = final(found)
        near = times.stopped == "ci" and "SLOW" not in found and len(looks) < NEAR_LOOKS
        if verdict is not None and not (verdict == "AMBG" and near):
            return verdict, looks


def unpaired_speedup(base: ArrayLike, head: ArrayLike, seed: int = 0) -> Estimate:
    """Speed-up of head over base from samples of two runs: the ratio of medians, base over head.

    The interval is a 95 % percentile bootstrap that draws from each run by itself; both ends are NaN for
    fewer than `harness.measure.stats.MIN_SAMPLES` samples. Raises ValueError for no samples or times not
    positive.
    """
    first, second = np.asarray(base, dtype=np.float64), np.asarray(head, dtype=np.float64)
    for values in (first, second):
        if values.ndim != 1 or values.size == 0 or not (values > 0).all():
            raise ValueError(f"a ratio needs positive times in one dimension, got {values}")
    value = float(np.median(first) / np.median(second))
    count = min(first.size, second.size)
    name = "ratio_of_medians"
    if count < MIN_SAMPLES:
        return Estimate(value, math.nan, math.nan, count, name)
    if np.ptp(first) == 0 and np.ptp(second) == 0:
        return Estimate(value, value, value, count, name)
    low, high = bootstrap(
        (first, second), lambda a, b, axis: np.median(a, axis) / np.median(b, axis), seed, vectorized=True
    )
    return Estimate(value, low, high, count, name)
