"""The referee's self-test: false alarms and found slow-downs, on simulated and on real work."""

import time

import numpy as np
import pytest
import torch

from harness.measure import selftest, stats
from harness.measure.timing import TimingSettings, run_rounds

CPU = torch.device("cpu")


def simulated_trials(injected: float, noise: float, trials: int) -> selftest.SelfTestRow:
    """Trials at the default settings on made-up times with a common drift and independent noise."""
    rng = np.random.default_rng(7)
    now = [0.0]

    def sample(name: str) -> float:
        now[0] += 0.01
        drift = 1.0 + 0.1 * np.sin(now[0])
        return (1.0 + injected * (name == "slow")) * drift * (1.0 + noise * abs(rng.standard_normal()))

    outcomes = []
    for trial in range(trials):
        times = run_rounds(
            ["base", "slow"],
            ["base"],
            sample,
            TimingSettings(max_seconds=1e9, seed=trial),
            mode="simulated",
            read=lambda: None,
        )
        ratio = stats.paired_ratio(times.samples["base"], times.samples["slow"], trial, n_resamples=400)
        outcomes.append((ratio, times.stopped == "cap"))
    return selftest.tally(injected, outcomes, stats.DEFAULT_THRESHOLD)


@pytest.mark.parametrize("noise", [0.003, 0.01])
def test_at_the_default_settings_a_method_is_the_same_as_itself(noise: float) -> None:
    """At most 2 in 100 trials of a method against itself are called anything but SAME."""
    row = simulated_trials(0.0, noise, trials=100)
    assert row.same >= 98
    assert row.capped == 0


@pytest.mark.parametrize("noise", [0.003, 0.01, 0.03])
def test_at_the_default_settings_three_percent_are_found(noise: float) -> None:
    """A true slow-down of 3 % is called SLOW in at least 95 of 100 trials, also on noisy data."""
    row = simulated_trials(0.03, noise, trials=100)
    assert row.slow >= 95
    assert row.fast == row.same == 0
    assert row.median_ratio == pytest.approx(1 / 1.03, abs=0.003)


def test_one_percent_is_never_called_a_large_change() -> None:
    """1 % lies within the threshold of 2 %: it is SAME or ambiguous, hardly ever SLOW, never FAST."""
    row = simulated_trials(0.01, 0.003, trials=100)
    assert row.slow <= 5
    assert row.fast == 0


def test_the_table_of_a_real_call_on_the_cpu() -> None:
    """The self-test runs on real work: a slow-down of 60 % is found every time, and its size is right."""

    def work() -> None:
        end = time.perf_counter_ns() + 300_000
        while time.perf_counter_ns() < end:
            pass

    settings = TimingSettings(rel_ci=0.02, max_seconds=2.0)
    same, slow = selftest.run_self_test(work, CPU, settings, trials=2, injected=(0.0, 0.6))
    assert same.slow + same.fast == 0
    assert slow.slow == 2
    assert slow.median_ratio == pytest.approx(1 / 1.6, rel=0.05)


def test_the_default_call_is_a_dense_training_step() -> None:
    """It gives the four gradients of a dense layer of the preset's shape."""
    gradients = selftest.dense_training_step(CPU, "1m", tokens=8, dtype="fp32")()
    assert [list(g.shape) for g in gradients] == [[8, 128], [384, 128], [384, 128], [384, 128]]
