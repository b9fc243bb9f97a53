"""From samples to numbers with intervals.

Every interval is a 95 % percentile bootstrap of a median. The percentile method is used rather than BCa
because timers repeat exact values, and then BCa's acceleration is 0/0. Medians are used because a timer's
noise is one-sided: an interrupted sample is far too long, none is far too short.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike, NDArray

Verdict = Literal["SAME", "FAST", "SLOW", "AMBG"]

CONFIDENCE = 0.95
RESAMPLES = 2000  # of an interval that is reported; its ends move by a few percent of its width with the seed
QUICK_RESAMPLES = 400  # of the stopping rule, which asks for the width alone, and asks often
# Between the smallest and the largest of n samples lies the median with probability 1 - 2^(1-n): 94 % for
# five. So fewer than six samples carry no 95 % interval, whatever a bootstrap makes of them.
MIN_SAMPLES = 6


@dataclass(frozen=True)
class Estimate:
    """A number, its 95 % interval, the samples behind it and how it was made of them.

    The interval of fewer than `MIN_SAMPLES` samples is unknown: both ends are NaN.
    """

    value: float
    ci_low: float
    ci_high: float
    n_samples: int
    statistic: str | None


def without_interval(value: float, n_samples: int = 1, statistic: str | None = None) -> Estimate:
    """A number of which no interval is known."""
    return Estimate(float(value), math.nan, math.nan, n_samples, statistic)


def median_estimate(
    samples: ArrayLike, seed: int = 0, *, n_resamples: int = RESAMPLES, statistic: str = "median"
) -> Estimate:
    """Median of `samples` with its interval. Raises ValueError if there is none or one is not finite."""
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"a median needs finite samples in one dimension, got {values}")
    value = float(np.median(values))
    if values.size < MIN_SAMPLES:
        return Estimate(value, math.nan, math.nan, values.size, statistic)
    if np.ptp(values) == 0.0:
        return Estimate(value, value, value, values.size, statistic)
    low, high = bootstrap((values,), np.median, seed, n_resamples=n_resamples, vectorized=True)
    return Estimate(value, low, high, values.size, statistic)


def bootstrap(
    samples: tuple[NDArray[np.float64], ...], statistic: Callable[..., Any], seed: int, **options: Any
) -> tuple[float, float]:
    """Ends of the 95 % percentile bootstrap interval of a statistic; `options` are SciPy's."""
    options = {"n_resamples": RESAMPLES, "confidence_level": CONFIDENCE, "method": "percentile", **options}
    found = scipy.stats.bootstrap(samples, statistic, rng=np.random.default_rng(seed), **options)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def paired_ratio(
    base: ArrayLike, other: ArrayLike, seed: int = 0, *, n_resamples: int = RESAMPLES
) -> Estimate:
    """Speed-up of `other` over `base`: the median of the ratios base/other of each round.

    `base[i]` and `other[i]` are times of one round, taken moments apart, so a clock that drifts over rounds
    cancels in each ratio; it would not cancel in a ratio of two medians. Raises ValueError if they are not
    aligned or not positive times.
    """
    first, second = np.asarray(base, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired samples must be aligned by round, got {first.shape} and {second.shape}")
    if not ((first > 0).all() and (second > 0).all()):
        raise ValueError("paired samples must be positive times")
    return median_estimate(first / second, seed, n_resamples=n_resamples, statistic="median_paired_ratio")


def rate(amount: float, time: Estimate) -> Estimate:
    """`amount` per time; the interval's ends swap."""
    return Estimate(
        amount / time.value, amount / time.ci_high, amount / time.ci_low, time.n_samples, time.statistic
    )


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """The same number in another unit."""
    value, low, high = (factor * number for number in (estimate.value, estimate.ci_low, estimate.ci_high))
    return replace(estimate, value=value, ci_low=low, ci_high=high)


def median(samples: ArrayLike) -> float:
    """The median alone, where no interval is asked for."""
    return float(np.median(np.asarray(samples, dtype=np.float64)))


def relative_half_width(estimate: Estimate) -> float:
    """Half the interval over the value; infinite while the interval is unknown or the value is zero."""
    width = (estimate.ci_high - estimate.ci_low) / 2.0
    if not math.isfinite(width) or estimate.value == 0.0:
        return math.inf
    return width / abs(estimate.value)
