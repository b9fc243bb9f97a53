"""The referee's self-test: false alarms and found slow-downs, on simulated and on real work."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch

from harness.measure import selftest
from harness.measure.stats import Verdict
from harness.measure.timing import PairedTimes, TimingSettings
from harness.regression.compare.checkouts import Child, Pair
from harness.regression.compare.verdict import RULES, judge_rounds

CPU = torch.device("cpu")


def compares_judge(device: str) -> selftest.Judge:
    """The judge of `mocbench compare` with its rule for a device, as `mocbench doctor` takes it."""
    return lambda take, seed: judge_rounds(take, RULES[device], seed=seed)[0]


def simulated_trials(injected: float, noise: float, trials: int) -> selftest.SelfTestRow:
    """Trials by the rule for GPUs on made-up times with a common drift and independent noise."""
    rng = np.random.default_rng(7)
    now = [0.0]

    def sample(side: str) -> float:
        now[0] += 0.01
        drift = 1.0 + 0.1 * np.sin(now[0])
        return (1.0 + injected * (side == "head")) * drift * (1.0 + noise * abs(rng.standard_normal()))

    found = []
    for number in range(trials):
        settings = dataclasses.replace(RULES["cuda"].timing(number), max_seconds=1e9)
        judge = compares_judge("cuda")
        found.append(selftest.run_trial(sample, judge, settings, "simulated", lambda: None))
    return selftest.tally(injected, found)


@pytest.mark.parametrize("noise", [0.003, 0.01])
def test_a_method_is_the_same_as_itself(noise: float) -> None:
    """At most 2 in 100 trials of a method against itself are called anything but SAME."""
    row = simulated_trials(0.0, noise, trials=100)
    assert row.same >= 98
    assert row.capped == 0


@pytest.mark.parametrize("noise", [0.003, 0.01, 0.03])
def test_three_percent_are_found(noise: float) -> None:
    """A true slow-down of 3 % is called SLOW in at least 95 of 100 trials, also on noisy data."""
    row = simulated_trials(0.03, noise, trials=100 if noise < 0.03 else 40)
    assert row.slow >= 0.95 * row.trials
    assert row.fast == row.same == 0
    assert row.median_ratio == pytest.approx(1 / 1.03, abs=0.003)


def test_one_percent_is_never_called_a_large_change() -> None:
    """1 % lies within the limit of 1.5 %: it is SAME or ambiguous, hardly ever SLOW, never FAST."""
    row = simulated_trials(0.01, 0.003, trials=100)
    assert row.slow <= 5
    assert row.fast == 0


class Side:
    """A side of a comparison without a process: its times follow from how often it was opened."""

    def __init__(self, times: tuple[float, ...], jitter: float = 0.0) -> None:
        self.times, self.jitter, self.look, self.calls = times, jitter, 0, 0

    def sample(self) -> float:
        """The time of this look, more by `jitter` in every other pair of rounds."""
        self.calls += 1
        return self.times[min(self.look, len(self.times) - 1)] * (1 + self.jitter * (self.calls // 2 % 2))

    def listen(self) -> dict[str, Any]:
        """See `harness.regression.compare.checkouts.Child`."""
        return {"benchmarks": ["x"], "environment": {}}

    def ask(self, do: str, attempt: int = 0, **_: Any) -> dict[str, Any]:
        """See `harness.regression.compare.checkouts.Child`."""
        if do == "open":
            self.look = attempt
            return {"mode": "simulated", "notes": [], "units": 1, "tokens": 1}
        return {"ms": self.sample()} if do == "sample" else {"conditions": None}


@pytest.mark.parametrize(
    ("head", "verdict"),
    [
        ((10.0,), "SAME"),
        ((12.0,), "SLOW"),
        ((9.0,), "FAST"),
        ((12.0, 10.0), "AMBG"),  # a second look disagrees
        ((10.49, 10.0), "SAME"),  # near the limit, hence looked at again
        ((10.49,), "AMBG"),
        ((0.0013,), "SAME"),  # below the grain of the clock
    ],
)
def test_the_self_test_and_compare_give_the_same_verdict(head: tuple[float, ...], verdict: str) -> None:
    """The judge that `mocbench doctor` certifies says of the same samples what `mocbench compare` says."""
    base = (10.0,) if head[0] > 1 else (0.001,)
    sides = {"base": Side(base), "head": Side(head, 0.002)}
    pair = Pair(cast(Child, sides["base"]), cast(Child, sides["head"]), "cpu", {})
    assert pair.measure("x", 0).verdict == verdict

    again = {"base": Side(base), "head": Side(head, 0.002)}

    def judge(take: Callable[[int], PairedTimes], seed: int) -> Verdict:
        def take_elsewhere(look: int) -> PairedTimes:
            for side in again.values():
                side.look = look
            return take(look)

        return compares_judge("cpu")(take_elsewhere, seed)

    settings = RULES["cpu"].timing(seed=0)
    trial = selftest.run_trial(lambda side: again[side].sample(), judge, settings, "s", lambda: None)
    assert trial.verdict == verdict
    assert {name: side.calls for name, side in again.items()} == {n: s.calls for n, s in sides.items()}


def test_the_table_of_a_real_call_on_the_cpu() -> None:
    """The self-test runs on real work: a slow-down of 60 % is found every time, and its size is right."""

    def work() -> None:
        end = time.perf_counter_ns() + 300_000
        while time.perf_counter_ns() < end:
            pass

    settings, judge = TimingSettings(rel_ci=0.02, max_seconds=2.0), compares_judge("cpu")
    same, slow = selftest.run_self_test(work, CPU, settings, 2, judge, injected=(0.0, 0.6))
    assert same.slow + same.fast == 0
    assert slow.slow == 2
    assert slow.median_ratio == pytest.approx(1 / 1.6, rel=0.05)


def test_the_default_call_is_a_dense_training_step() -> None:
    """It gives the four gradients of a dense layer of the preset's shape."""
    gradients = selftest.dense_training_step(CPU, "1m", tokens=8, dtype="fp32")()
    assert [list(g.shape) for g in gradients] == [[8, 128], [384, 128], [384, 128], [384, 128]]
