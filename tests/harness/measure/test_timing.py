"""Paired timing: order, stopping, failures, and the launch logic on a simulated GPU."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from harness.measure import launch, stats
from harness.measure.launch import CudaSampler, TimedMethod
from harness.measure.timing import (
    MODES,
    MethodFailed,
    TimingSettings,
    half_widths,
    open_sampler,
    order_of_pair,
    run_rounds,
    time_paired,
)
from harness.sweep.catalog import FIELD

CPU = torch.device("cpu")
NAMES = ["a", "b", "c", "d"]


def simulate(sample: Callable[[str], float], names: list[str], **settings: object) -> object:
    """Run the loop over made-up times, on a clock that the times themselves advance."""
    now = [0.0]

    def advance(name: str) -> float:
        elapsed = sample(name)
        now[0] += elapsed / 1e3
        return elapsed

    return run_rounds(
        names,
        names[:1],
        advance,
        dataclasses.replace(TimingSettings(), **settings),
        mode="simulated",
        read=lambda: None,
        clock=lambda: now[0],
    )


def test_a_pair_of_rounds_is_a_palindrome_in_which_all_have_the_same_mean_place() -> None:
    """ABBA: the second round of a pair reverses the first, so a steady drift favours nobody."""
    for pair in range(20):
        order = order_of_pair(NAMES, pair, seed=3)
        assert order == order[::-1]
        for name in NAMES:
            assert sum(place for place, other in enumerate(order) if other == name) == len(order) - 1


def test_over_many_pairs_nobody_always_follows_the_same_rival() -> None:
    """Each ordered pair of methods is adjacent about equally often within rounds."""
    followers: Counter[tuple[str, str]] = Counter()
    for pair in range(600):
        order = order_of_pair(NAMES, pair, seed=0)[: len(NAMES)]
        followers.update(itertools.pairwise(order))
    assert len(followers) == 12
    assert max(followers.values()) < 1.4 * min(followers.values())


def test_the_order_depends_on_the_seed_alone() -> None:
    """The same seed gives the same order, another seed another one."""
    orders = [[order_of_pair(NAMES, pair, seed) for pair in range(10)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_samples_are_aligned_by_round() -> None:
    """Sample i of every method was taken in round i."""
    calls = []

    def sample(name: str) -> float:
        calls.append(name)
        return 1.0 + len(calls)

    times = simulate(sample, NAMES, min_rounds=6, max_rounds=6)
    for name in NAMES:
        rounds = [(int(value) - 2) // len(NAMES) for value in times.samples[name]]
        assert rounds == list(range(6))


def test_a_falling_clock_biases_sequential_timing_but_not_paired_timing() -> None:
    """With a device that slows by 20 % during the run, a true 2 % is measured as 2 %."""
    rng = np.random.default_rng(1)
    count = [0]

    def sample(name: str) -> float:
        count[0] += 1
        drift = 1.0 + 0.2 * min(1.0, count[0] / 400)
        return {"base": 1.02, "other": 1.0}[name] * drift * (1 + 0.003 * rng.standard_normal())

    times = simulate(sample, ["base", "other"], rel_ci=1e-9, max_rounds=200, max_seconds=1e9)
    ratio = stats.paired_ratio(times.samples["base"], times.samples["other"])
    assert ratio.ci_low < 1.02 < ratio.ci_high
    assert stats.relative_half_width(ratio) < 0.001
    halves = times.samples["base"][:100], times.samples["other"][100:]
    assert np.median(halves[0]) / np.median(halves[1]) < 0.95  # one after the other: wrong by 7 %


def test_timing_stops_as_soon_as_every_interval_is_narrow_enough() -> None:
    """Quiet data stop at the minimum, noisier data later, and what was reached is below what was wanted."""
    rounds = {}
    for noise in (0.001, 0.03):
        rng = np.random.default_rng(4)
        times = simulate(
            lambda name, rng=rng, noise=noise: 10 * (1 + noise * rng.standard_normal()),
            NAMES,
            rel_ci=0.01,
            max_seconds=1e9,
        )
        assert times.stopped == "ci"
        assert max(times.half_widths.values()) <= 0.01
        assert all(times.unsettled(name, TimingSettings()) == "" for name in NAMES)
        rounds[noise] = len(times.samples["a"])
    assert rounds[0.001] == TimingSettings().min_rounds
    assert 40 < rounds[0.03] < 400


def test_at_the_time_cap_timing_says_what_it_reached() -> None:
    """Noise that cannot be averaged away in the time given ends at the cap, with the reason per method."""
    rng = np.random.default_rng(4)
    settings = TimingSettings(max_seconds=2.0)
    times = simulate(lambda name: 10 * rng.uniform(0.5, 1.5), NAMES, max_seconds=2.0)
    assert times.stopped == "cap"
    assert 2.0 <= times.seconds < 2.0 + 8 * 0.015
    assert times.unsettled("b", settings).endswith("after 2 s, wanted 1.0%")


def test_too_few_rounds_never_count_as_settled() -> None:
    """Two rounds agree by luck: with fewer than the minimum nobody is settled, however narrow it looks."""
    times = simulate(lambda name: 5000.0, ["a", "b"], max_seconds=1.0)
    assert len(times.samples["a"]) == 2
    assert times.stopped == "cap"
    assert "2 rounds" in times.unsettled("a", TimingSettings())


def test_the_reference_of_a_width_is_the_fastest_other_anchor() -> None:
    """A method's width is of its ratio to the fastest anchor but itself; alone, of its median."""
    rng = np.random.default_rng(0)
    noise = 1 + 0.05 * rng.standard_normal(50)
    samples = {"dense": 2 * noise, "moc": 1 * noise, "slow": 9 * (1 + 0.05 * rng.standard_normal(50))}
    widths = half_widths(samples, ["dense"], seed=0)
    assert widths["moc"] == pytest.approx(0.0, abs=1e-12)  # moves with dense exactly
    assert widths["dense"] == pytest.approx(0.0, abs=1e-12)  # no other anchor: the fastest other is moc
    assert widths["slow"] > 0.01
    alone = half_widths({"dense": 2 * noise}, ["dense"], seed=0)["dense"]
    assert alone == pytest.approx(
        stats.relative_half_width(stats.median_estimate(2 * noise, 0, n_resamples=stats.QUICK_RESAMPLES))
    )


def test_a_failing_method_is_named_with_its_own_error() -> None:
    """Whoever raises while sampled is named, and running out of memory is told from other errors."""

    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    def broken() -> None:
        raise KeyError("lost")

    for work, expected in ((out_of_memory, True), (broken, False)):
        with pytest.raises(MethodFailed, match="bad: ") as caught:
            time_paired([TimedMethod("good", lambda: None), TimedMethod("bad", work)], TimingSettings(), CPU)
        assert caught.value.name == "bad"
        assert caught.value.out_of_memory is expected
        assert caught.value.__cause__ is not None


def test_on_the_cpu_every_method_is_prepared_and_called_alike() -> None:
    """Each call has its own prepare before it, all get the same number, and a unit's time is per unit."""
    log: list[str] = []
    started: list[str] = []

    def method(name: str, calls: int) -> TimedMethod:
        return TimedMethod(
            name, lambda: log.append(f"{name} call"), lambda: log.append(f"{name} prepare"), calls=calls
        )

    settings = TimingSettings(min_rounds=4, max_rounds=4)
    times = time_paired([method("a", 1), method("b", 50)], settings, CPU, on_start=started.append)
    assert started == ["a", "b"]
    assert Counter(log) == Counter(
        {f"{n} {w}": 4 + launch.CPU_WARMUP_CALLS for n in "ab" for w in ("prepare", "call")}
    )
    assert all(log[i].endswith("prepare") == (i % 2 == 0) for i in range(len(log)))
    assert times.mode == "cpu"
    assert (times.samples["b"] < times.samples["a"]).mean() > 0.5


def test_a_sample_does_not_hold_the_time_of_giving_its_result_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call returns is released after the clock was read."""
    events: list[str] = []

    class Result:
        def __del__(self) -> None:
            events.append("released")

    def read_clock() -> int:
        events.append("clock")
        return 1000 * len(events)

    monkeypatch.setattr(launch, "time", SimpleNamespace(perf_counter_ns=read_clock))
    time_paired([TimedMethod("a", Result)], TimingSettings(min_rounds=4, max_rounds=4), CPU)
    assert events == ["clock", "clock", "released"] * (4 + launch.CPU_WARMUP_CALLS)


def test_a_sweep_names_modes_that_there_are() -> None:
    """The modes of a sweep file are modes of the timer; the rotated ones are the workloads' own choice."""
    assert set(MODES) - set(FIELD["timing_mode"].choices) == {"graph_rotated", "launch_rotated"}
    assert set(FIELD["timing_mode"].choices) < set(MODES)


@pytest.mark.parametrize(
    ("methods", "mode", "message"),
    [
        ([], "auto", "distinct names"),
        ([TimedMethod("a", int), TimedMethod("a", int)], "auto", "distinct names"),
        ([TimedMethod("a", int)], "warm", "not one of auto, graph_cold"),
    ],
)
def test_bad_requests_are_refused(methods: list[TimedMethod], mode: str, message: str) -> None:
    """No method, a name twice, and an unknown mode raise a line that says so."""
    with pytest.raises(ValueError, match=message):
        time_paired(methods, TimingSettings(), CPU, mode)


class SimulatedGpu:
    """A host that queues work and a device that does it in order, on one time line in milliseconds."""

    def __init__(self) -> None:
        self.host = 0.0
        self.device = 0.0
        self.capturing = False
        self.sync_mode = "default"
        self.watched = True  # whether the debug mode sees that work waits

    def kernel(self, duration: float, host_cost: float = 0.01) -> None:
        if self.capturing:
            self.device += duration
            return
        self.host += host_cost
        self.device = max(self.device, self.host) + duration

    def wait(self) -> None:
        if self.sync_mode == "error" and self.watched:
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.capturing:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        self.host = max(self.host, self.device)

    def event(self, enable_timing: bool) -> SimpleNamespace:
        event = SimpleNamespace(at=0.0)

        def record() -> None:
            self.host += 0.002
            event.at = max(self.device, self.host)

        def synchronize() -> None:
            self.host = max(self.host, event.at)

        event.record = record
        event.query = lambda: event.at <= self.host
        event.synchronize = synchronize
        event.elapsed_time = lambda other: other.at - event.at
        return event


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimulatedGpu:
    """torch.cuda replaced, as far as the samplers use it, by a simulated device."""
    device = SimulatedGpu()

    class Graph:
        def __init__(self) -> None:
            self.start = 0.0
            self.duration = 0.0

        def replay(self) -> None:
            device.kernel(self.duration)

    @contextmanager
    def capture(graph: Graph, pool: object) -> Iterator[None]:
        before = (device.host, device.device)
        device.capturing = True
        device.host = device.device = 0.0
        try:
            yield
            graph.duration = device.device
        finally:
            device.capturing = False
            device.host, device.device = before

    stream = SimpleNamespace(wait_stream=lambda other: None)
    replacements = {
        "_sleep": lambda cycles: device.kernel(cycles / 2e6),
        "Event": device.event,
        "CUDAGraph": Graph,
        "graph": capture,
        "graph_pool_handle": lambda: object(),
        "Stream": lambda: stream,
        "stream": lambda s: nullcontext(),
        "current_stream": lambda: stream,
        "set_stream": lambda s: None,
        "current_device": lambda: 0,
        "set_sync_debug_mode": lambda mode: setattr(device, "sync_mode", mode),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
    }
    for name, value in replacements.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return device


def test_launch_gaps_do_not_show_in_an_eager_sample(gpu: SimulatedGpu) -> None:
    """Ten kernels of 0.1 ms, launched every 0.3 ms, take 1 ms and not 3: they queue behind a spin."""
    sampler = CudaSampler(torch.device("cuda"), "launch_rotated")
    sampler.add(TimedMethod("a", lambda: [gpu.kernel(0.1, host_cost=0.3) for _ in range(10)]))
    assert [sampler.sample("a") for _ in range(5)] == pytest.approx([1.0] * 5)
    assert sampler.host_bound() == []


def test_work_that_waits_for_the_device_is_named(gpu: SimulatedGpu) -> None:
    """A call that synchronises in its middle cannot be queued whole; its gaps stay in and it is named."""

    def waits() -> None:
        gpu.kernel(0.1)
        gpu.wait()
        gpu.kernel(0.1, host_cost=0.5)

    methods = [TimedMethod("waits", waits), TimedMethod("fine", lambda: gpu.kernel(0.1))]
    times = time_paired(methods, TimingSettings(max_rounds=10), torch.device("cuda"), mode="launch_rotated")
    assert times.notes == ("waits waits for the device, so launch gaps are in its time",)
    assert np.median(times.samples["waits"]) == pytest.approx(0.7, abs=0.02)
    assert np.median(times.samples["fine"]) == pytest.approx(0.1)


def test_a_graph_is_timed_by_its_replay_and_per_unit(gpu: SimulatedGpu) -> None:
    """A captured call of four units takes its kernels' time over four, whatever launching costs."""
    sampler, notes = open_sampler(
        [TimedMethod("a", lambda: [gpu.kernel(0.2, host_cost=3.0) for _ in range(4)], calls=4)],
        torch.device("cuda"),
        "graph_rotated",
    )
    assert (sampler.mode, notes) == ("graph_rotated", [])
    assert sampler.sample("a") == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("watched", "reason"),
    [(True, "it waits for the device"), (False, "operation not permitted when stream is capturing")],
)
def test_one_that_cannot_be_captured_sends_all_to_eager_launches_and_says_so(
    gpu: SimulatedGpu, watched: bool, reason: str
) -> None:
    """Rivals are never compared across launch modes: one without a graph changes the mode of everybody."""
    gpu.watched = watched

    def waits() -> None:
        gpu.kernel(0.1)
        gpu.wait()

    methods = [TimedMethod("fine", lambda: gpu.kernel(0.1)), TimedMethod("waits", waits)]
    sampler, notes = open_sampler(methods, torch.device("cuda"), "graph_rotated")
    assert sampler.mode == "launch_rotated"
    assert notes == [f"all launched eagerly, since waits cannot be captured in a CUDA graph: {reason}"]
    assert sampler.sample("fine") == pytest.approx(0.1)
    assert gpu.sync_mode == "default"


def test_graphs_that_do_not_fit_in_memory_send_all_to_eager_launches(gpu: SimulatedGpu) -> None:
    """All methods' graphs at once may be too much where one eager call at a time is not."""

    def greedy() -> None:
        if gpu.capturing:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        gpu.kernel(0.1)

    sampler, notes = open_sampler([TimedMethod("greedy", greedy)], torch.device("cuda"), "graph_rotated")
    assert sampler.mode == "launch_rotated"
    assert "greedy: OutOfMemoryError: CUDA out of memory." in notes[0]


def test_an_error_of_the_work_itself_is_not_taken_for_a_failed_capture(gpu: SimulatedGpu) -> None:
    """A call that raises on its own, before any capture, fails under its name in every mode."""
    with pytest.raises(MethodFailed, match="bad: KeyError"):
        open_sampler([TimedMethod("bad", lambda: {}["x"])], torch.device("cuda"), "graph_rotated")


def test_a_first_call_that_compiles_is_told_from_a_steady_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call's wall time and the faster of two later ones come back apart."""
    durations = iter([5.0, 0.3, 0.2])
    now = [0.0]
    monkeypatch.setattr(launch.time, "perf_counter", lambda: now[0])

    def call() -> None:
        now[0] += next(durations)

    assert launch.first_call_seconds(TimedMethod("a", call), CPU) == pytest.approx((5.0, 0.2))
