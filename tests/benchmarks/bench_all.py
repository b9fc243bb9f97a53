"""`make bench`: every benchmark of `harness.regression.benchmarks`, timed by itself and kept by
pytest-benchmark.

The name of this file keeps it out of `make test`.

Time is device time with known caches (`harness.measure.launch`), not the wall clock around a call. It reaches
pytest-benchmark through its own interface, a timer: one that stands still but for what the sampler measured.
"""

import time

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from harness.measure.clocks import ClockReader
from harness.measure.launch import load_libraries
from harness.measure.timing import open_sampler
from harness.regression.benchmarks import benchmarks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BENCHMARKS = benchmarks(DEVICE.type)
# With what getting ready takes, all of them stay below three minutes on two cores.
SECONDS = {"cuda": 3.0, "cpu": 8.0}[DEVICE.type]
LEAST_ROUNDS, MOST_ROUNDS = 12, 300


class DeviceClock:
    """A timer that shows how long the device has worked, in seconds."""

    def __init__(self) -> None:
        self._now = 0.0

    def read(self) -> float:
        """See `pytest_benchmark`: a call before and one after every round."""
        return self._now

    def add(self, ms: float) -> None:
        """The device worked for so long."""
        self._now += ms / 1e3


CLOCK = DeviceClock()


@pytest.fixture(scope="module", autouse=True)
def _ready() -> None:
    """Libraries are loaded before the first benchmark; on a CPU there is one thread."""
    if DEVICE.type == "cpu":
        torch.set_num_threads(1)
    load_libraries(DEVICE, torch.float32)


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.benchmark(timer=CLOCK.read)
def test_time(name: str, benchmark: BenchmarkFixture) -> None:
    """One benchmark, as many rounds as its share of the time allows."""
    measured = BENCHMARKS[name]
    method = measured.open(DEVICE)
    sampler, notes = open_sampler([method], DEVICE, measured.mode)
    begin = time.perf_counter()
    sampler.sample(method.name)
    rounds = int(SECONDS / (time.perf_counter() - begin))
    benchmark.pedantic(
        lambda: CLOCK.add(sampler.sample(method.name)),
        rounds=max(LEAST_ROUNDS, min(MOST_ROUNDS, rounds)),
    )
    conditions = ClockReader(DEVICE).read()
    benchmark.extra_info.update(benchmark=name, mode=sampler.mode, notes=notes)
    if benchmark.stats is not None:  # none with --benchmark-disable
        benchmark.extra_info["tokens_per_s"] = measured.tokens / benchmark.stats.stats.median
    if conditions is not None:
        benchmark.extra_info["sm_clock_mhz"] = conditions.sm_clock_mhz
        benchmark.extra_info["throttle_reasons"] = list(conditions.throttle_reasons)
