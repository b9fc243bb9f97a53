"""The judge of `mocbench compare`: what intervals say, the second look, and samples of two runs."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.measure.stats import paired_ratio
from harness.regression.compare.stored import compare_samples
from harness.regression.compare.verdict import RULES, Change, Rule, final, judge, unpaired_speedup

GPU = RULES["cuda"]


def judged(low: float, high: float, base_ms: float = 1.0) -> str:
    """The verdict on an interval, in percent."""
    return judge(Change((low + high) / 200, low / 100, high / 100), base_ms, GPU)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.5, 0.5, "SAME"),
        (-1.4, 1.4, "SAME"),
        (2.6, 3.4, "SLOW"),
        (-3.4, -2.6, "FAST"),
        (1.4, 4.0, "AMBG"),
        (-4.0, -1.4, "AMBG"),
        (-2.0, 2.0, "AMBG"),
        (900.0, 1000.0, "SLOW"),
    ],
)
def test_the_whole_interval_decides(low: float, high: float, verdict: str) -> None:
    """SLOW and FAST need the whole interval beyond the limit, SAME needs it within; else it is open."""
    assert judged(low, high) == verdict


def test_what_the_clock_cannot_see_is_the_same() -> None:
    """A difference below the floor is never told, however narrow its interval; above the floor it is."""
    floor_us = 1e3 * GPU.floor_ms
    assert judged(2.9, 3.1, base_ms=0.9 * floor_us / 31) == "SAME"
    assert judged(2.9, 3.1, base_ms=1.1 * floor_us / 29) == "SLOW"
    assert judged(-3.1, -2.9, base_ms=0.9 * floor_us / 31) == "SAME"


def test_no_interval_is_no_verdict() -> None:
    """Too few samples for an interval leave it open, however large the change."""
    assert judge(Change(9.0, math.nan, math.nan), 1.0, GPU) == "AMBG"
    assert str(Change(9.0, math.nan, math.nan)) == "+900.0 %"


def test_slow_is_looked_at_twice() -> None:
    """SLOW stands only if the next look is SLOW too, else it is open; another verdict needs no second."""
    assert final(["SLOW"]) is None
    assert final(["SLOW", "SLOW"]) == "SLOW"
    assert [final(["SLOW", second]) for second in ("SAME", "AMBG", "FAST")] == ["AMBG"] * 3
    assert [final([only]) for only in ("SAME", "FAST", "AMBG")] == ["SAME", "FAST", "AMBG"]
    assert final(["AMBG", "SLOW"]) is None
    assert final(["AMBG", "SLOW", "SLOW"]) == "SLOW"
    assert final(["AMBG", "SAME"]) == "SAME"


@given(st.floats(-0.5, 2.0), st.floats(0.0, 0.2), st.floats(0.01, 100.0))
def test_base_and_head_exchanged_exchange_fast_and_slow(value: float, width: float, base_ms: float) -> None:
    """What is slower one way round is faster the other way round, and the rest stays what it is."""
    change = Change(value, (1 + value) / (1 + width) - 1, (1 + value) * (1 + width) - 1)
    back = Change(1 / (1 + value) - 1, 1 / (1 + change.high) - 1, 1 / (1 + change.low) - 1)
    rule = Rule(0.03, 0.0, 1.0)
    exchanged = {"SLOW": "FAST", "FAST": "SLOW"}
    verdict = judge(change, base_ms, rule)
    near = min(abs(abs(math.log1p(end)) - math.log1p(rule.limit)) for end in (change.low, change.high))
    if near > 1e-9:  # rounding decides at the limit itself
        assert judge(back, base_ms, rule) == exchanged.get(verdict, verdict)


def rounds(change: float, count: int, seed: int, noise: float = 0.004) -> tuple[np.ndarray, np.ndarray]:
    """Times of paired rounds with a common drift: head takes `change` longer; now and then one is far off."""
    random = np.random.default_rng(seed)
    drift = 1 + 0.05 * np.sin(np.arange(count))
    base, head = (drift * (1 + noise * random.standard_normal(count)) for _ in range(2))
    base[random.random(count) < 0.05] *= 3
    return base, head * (1 + change)


def test_three_percent_are_told_and_nothing_is_left_alone() -> None:
    """Of 60 paired comparisons each, no change is always SAME, 3 % always SLOW, -3 % always FAST."""
    for change, verdict in ((0.0, "SAME"), (0.03, "SLOW"), (-0.03, "FAST")):
        for seed in range(60):
            ratio = paired_ratio(*rounds(change, 40, seed), seed)
            assert judge(Change.of(ratio), 1.0, GPU) == verdict


def test_samples_of_two_runs() -> None:
    """Unpaired runs are judged by the ratio of medians, whose interval holds the true change."""
    random = np.random.default_rng(1)
    base, head = random.normal(1, 0.01, 200), random.normal(1.1, 0.01, 150)
    speedup = unpaired_speedup(base, head)
    assert speedup.ci_low < 1 / 1.1 < speedup.ci_high
    assert speedup.n_samples == 150
    outcome = compare_samples("x", base, head, GPU)
    assert (outcome.verdict, outcome.looks) == ("SLOW", ("SLOW", "SLOW"))
    assert compare_samples("x", base, base[::-1], GPU).verdict == "SAME"
    assert compare_samples("x", head, base, GPU).verdict == "FAST"


def test_a_run_that_was_slow_for_a_while_is_not_slow() -> None:
    """If only one half of the samples on disk is slower, there is no second look that agrees."""
    steady = np.random.default_rng(2).normal(1, 0.001, 100)
    late = steady.copy()
    late[40:] *= 1.2
    outcome = compare_samples("x", steady, late, GPU)
    assert outcome.verdict == "AMBG"
    assert outcome.note == "slower, but the halves of the samples say SAME and SLOW"
    assert compare_samples("x", steady[:10], 2 * steady[:10], GPU).note.startswith("slower, but too few")


def test_times_must_be_times() -> None:
    """No samples, or a time that is not positive, are refused."""
    for wrong in ([], [1.0, 0.0], [[1.0]]):
        with pytest.raises(ValueError, match="positive times"):
            unpaired_speedup(wrong, [1.0])
