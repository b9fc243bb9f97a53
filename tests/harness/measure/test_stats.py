"""Intervals against closed forms and simulated data with known answers."""

import math

import numpy as np
import pytest
import scipy.stats

from harness.measure import stats
from harness.measure.stats import Estimate


def test_median_interval_agrees_with_order_statistics() -> None:
    """The bootstrap interval of a median is close to the exact binomial one from order statistics."""
    values = np.sort(np.random.default_rng(5).lognormal(size=201))
    found = stats.median_estimate(values, seed=1)
    low, high = scipy.stats.binom.ppf([0.025, 0.975], 201, 0.5).astype(int)
    assert found.value == values[100]
    assert found.ci_low == pytest.approx(values[low], rel=0.02)
    assert found.ci_high == pytest.approx(values[high], rel=0.02)
    assert (found.n_samples, found.statistic) == (201, "median")


def test_paired_interval_covers_the_truth_under_drift_that_hides_it_from_unpaired_data() -> None:
    """Under a common drift of 30 % the paired interval is narrow and covers the true ratio 9 times in 10."""
    truth, covered, widths, unpaired = 1.03, 0, [], []
    rng = np.random.default_rng(0)
    for trial in range(200):
        drift = 1.0 + 0.3 * np.sin(np.linspace(0, 2 * np.pi, 40) + rng.uniform(0, 6))
        base = truth * drift * (1 + 0.01 * rng.standard_normal(40))
        other = drift * (1 + 0.01 * rng.standard_normal(40))
        found = stats.paired_ratio(base, other, seed=trial, n_resamples=400)
        covered += found.ci_low <= truth <= found.ci_high
        widths.append(stats.relative_half_width(found))
        unpaired.append(stats.relative_half_width(stats.median_estimate(base, trial, n_resamples=100)))
    assert 180 <= covered <= 199
    assert max(widths) < 0.015
    assert min(unpaired) > 0.05


def test_same_seed_gives_the_same_interval() -> None:
    """An estimate is a function of samples and seed alone."""
    values = np.random.default_rng(2).normal(10, 1, 50)
    assert stats.median_estimate(values, 7) == stats.median_estimate(values, 7)
    assert stats.median_estimate(values, 7) != stats.median_estimate(values, 8)


def test_constant_samples_have_a_width_of_zero() -> None:
    """Repeated exact values, on which BCa fails, give an interval of one point."""
    found = stats.median_estimate([2.0] * 12)
    assert (found.value, found.ci_low, found.ci_high) == (2.0, 2.0, 2.0)
    assert stats.relative_half_width(found) == 0.0


@pytest.mark.parametrize("count", [1, 2, 5])
def test_too_few_samples_have_no_interval(count: int) -> None:
    """Below six samples no 95 % interval of a median exists, so none is claimed."""
    found = stats.median_estimate([1.0 + 0.001 * i for i in range(count)])
    assert math.isnan(found.ci_low)
    assert math.isnan(found.ci_high)
    assert stats.relative_half_width(found) == math.inf


@pytest.mark.parametrize("samples", [[], [1.0, math.nan], [1.0, math.inf], [[1.0, 2.0]]])
def test_samples_that_have_no_median_are_refused(samples: list[float]) -> None:
    """Nothing, NaN, infinity and tables raise."""
    with pytest.raises(ValueError, match="finite samples"):
        stats.median_estimate(samples)


def test_pairs_must_be_aligned_and_positive() -> None:
    """Ratios of unlike lengths or of times that are not positive raise."""
    with pytest.raises(ValueError, match="aligned"):
        stats.paired_ratio([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="positive"):
        stats.paired_ratio([1.0, 2.0], [1.0, 0.0])


def test_rate_swaps_the_ends_of_the_interval() -> None:
    """Tokens per second of a time interval: the slow end becomes the low end."""
    found = stats.rate(1000.0, Estimate(2.0, 1.0, 4.0, 9, "median"))
    assert (found.value, found.ci_low, found.ci_high) == (500.0, 250.0, 1000.0)
    scaled = stats.scaled(Estimate(2.0, 1.0, 4.0, 9, "median"), 1e3)
    assert (scaled.value, scaled.ci_low, scaled.ci_high, scaled.n_samples) == (2e3, 1e3, 4e3, 9)
