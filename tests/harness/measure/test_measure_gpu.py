"""What only a GPU can show: that graphs, flushes, backlogs and memory passes do what they are said to."""

import gc
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from recorder import Recorder, point
from torch import Tensor

from harness.measure import gate, memory, roofline, selftest, stats
from harness.measure.clocks import ClockReader
from harness.measure.ffn import TrainingCalls, ffn_weights, natural_tensors
from harness.measure.launch import TimedMethod
from harness.measure.stats import Verdict
from harness.measure.timing import PairedTimes, TimingSettings, open_sampler, time_paired
from harness.regression.compare.verdict import RULES, judge_rounds
from harness.sweep.model import Measure, Timing
from harness.workloads import ffn_train
from harness.workloads.job import Job
from harness.workloads.profiler_check import check_against_profiler
from moc.config import FfnShape
from moc.layers.dense import DenseFFN
from moc.methods import METHODS
from moc.selection import parse_selection

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")
SHAPE = FfnShape(d_model=1024, d_ffn=2816)
TOKENS = 8192


def dense_calls(shape: FfnShape = SHAPE, tokens: int = TOKENS) -> TrainingCalls:
    tensors = natural_tensors(shape, tokens, torch.bfloat16, CUDA, seed=0)
    layer = DenseFFN(shape).to(CUDA, torch.bfloat16)
    return TrainingCalls(layer, list(layer.parameters()), tensors.x.requires_grad_(), tensors.dy)


def median_ms(call: Callable[[], object], mode: str) -> float:
    times = time_paired([TimedMethod("a", call)], TimingSettings(max_seconds=5), CUDA, mode)
    assert times.mode == mode, times.notes
    return stats.median(times.samples["a"])


def test_graphs_and_eager_launches_agree_on_work_that_fills_the_device() -> None:
    """With launches hidden either way, the mode of launching makes little difference to large work."""
    calls = dense_calls()
    graph, launched = median_ms(calls.step, "graph_cold"), median_ms(calls.step, "launch_cold")
    assert graph == pytest.approx(launched, rel=0.05)


def test_eager_timing_of_tiny_work_holds_no_launch_gaps() -> None:
    """Twenty tiny kernels take their own few microseconds each, not the host's launch time each."""
    x = torch.randn(256, device=CUDA)

    def tiny() -> None:
        for _ in range(20):
            x.mul_(1.0)

    assert median_ms(tiny, "launch_cold") < 20 * 0.004
    assert median_ms(tiny, "graph_cold") < 20 * 0.004


def test_a_flushed_cache_is_cold_and_a_replayed_one_is_hot() -> None:
    """Reading 16 MiB twice in a row is faster than after a flush."""
    x = torch.randn(4 * 2**20, device=CUDA)
    assert median_ms(lambda: x.sum(), "graph_cold") > 1.2 * median_ms(lambda: x.sum(), "graph_hot")


def test_forward_and_backward_alone_add_up_to_about_the_step() -> None:
    """Backward is timed on its own graph of saved tensors, made anew before each replay."""
    calls = dense_calls()
    methods = {
        "forward": TimedMethod("a", calls.forward),
        "backward": TimedMethod("a", calls.backward, calls.prepare_backward),
        "step": TimedMethod("a", calls.step),
    }
    times: dict[str, PairedTimes] = {
        name: time_paired([item], TimingSettings(max_seconds=5), CUDA) for name, item in methods.items()
    }
    parts = {name: stats.median(item.samples["a"]) for name, item in times.items()}
    assert all(item.mode == "graph_cold" for item in times.values())
    assert parts["forward"] + parts["backward"] == pytest.approx(parts["step"], rel=0.1)
    assert 1.5 < parts["backward"] / parts["forward"] < 3.0


def test_work_that_waits_sends_all_to_eager_launches_and_is_named() -> None:
    """Work that waits is found out, all are launched eagerly, and graphs still work afterwards."""
    calls = dense_calls()

    def waits() -> float:
        return float(calls.forward().detach().sum())

    methods = [TimedMethod("dense", calls.step), TimedMethod("waits", waits)]
    times = time_paired(methods, TimingSettings(max_seconds=5), CUDA)
    assert times.mode == "launch_cold"
    assert "waits cannot be captured" in times.notes[0]
    assert any("waits waits for the device" in note for note in times.notes)
    assert not any("dense waits" in note for note in times.notes)
    assert median_ms(calls.step, "graph_cold") > 0


def test_a_capture_that_fails_midway_leaves_the_process_usable() -> None:
    """Waiting that no warm-up call shows breaks the capture itself; the allocator works on as before."""
    x = torch.randn(2**24, device=CUDA)

    def waits_when_captured() -> None:
        y = x * 2
        if torch.cuda.is_current_stream_capturing():
            float(y[0])

    times = time_paired([TimedMethod("a", waits_when_captured)], TimingSettings(max_seconds=2), CUDA)
    assert times.mode == "launch_cold"
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    junk = torch.empty(2**28, device=CUDA, dtype=torch.uint8)
    held = torch.cuda.memory_reserved()
    del junk
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= held - 2**28
    assert median_ms(lambda: x * 2, "graph_cold") > 0


def test_the_shared_pool_holds_one_rivals_temporaries_at_a_time() -> None:
    """Eight graphs of the same work need no more memory than two (one is captured beside nothing)."""
    reserved = []
    for count in (2, 8):
        calls = dense_calls()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
        methods = [TimedMethod(str(number), calls.step) for number in range(count)]
        time_paired(methods, TimingSettings(max_rounds=4), CUDA)
        reserved.append(torch.cuda.max_memory_reserved() - before)
    assert reserved[1] <= 1.01 * reserved[0]


def test_conditions_are_read_while_timing() -> None:
    """Clock, temperature and throttle reasons come with the samples."""
    reading = ClockReader(CUDA).read()
    if reading is None:
        pytest.skip("no NVML on this machine")
    assert 100 < reading.sm_clock_mhz < 5000
    assert 0 < reading.temperature_c < 120
    times = time_paired([TimedMethod("a", dense_calls().step)], TimingSettings(max_rounds=10), CUDA)
    assert all(block is not None for block in times.conditions)


def test_saved_bytes_are_what_the_allocator_holds_after_forward() -> None:
    """Autograd's count and the allocator agree for dense, and a tensor hidden from autograd shows."""
    layer = DenseFFN(SHAPE).to(CUDA, torch.bfloat16)
    x = torch.randn(TOKENS, SHAPE.d_model, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    layer(x)
    saved = memory.saved_bytes(lambda: layer(x), layer.parameters(), [x])
    assert saved.activation_bytes == (TOKENS * SHAPE.d_model + 4 * TOKENS * SHAPE.d_ffn) * 2
    output = x.numel() * 2
    assert memory.hidden_bytes(memory.peak_bytes(lambda: layer(x)), output, saved) < 2**20

    class Hides(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            ctx.kept = torch.zeros(8 * 2**20, device=x.device, dtype=torch.uint8)
            return x * 2

        @staticmethod
        def backward(ctx, dy: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            return dy * 2

    def forward() -> Tensor:
        return Hides.apply(x)

    hiding = memory.saved_bytes(forward, [], [x])
    assert memory.hidden_bytes(memory.peak_bytes(forward), output, hiding) >= 8 * 2**20


def test_an_output_that_nobody_wrote_is_caught_by_poisoned_memory() -> None:
    """A method that leaves a row of a fresh tensor unwritten fails, although stale memory might look
    right.
    """

    class Unwritten(DenseFFN):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            out = torch.empty_like(y)
            out[:-1] = y[:-1]
            return out

    layer = Unwritten(SHAPE).to(CUDA, torch.bfloat16)
    weights = ffn_weights(layer, SHAPE)
    result = gate.check(layer, weights, METHODS["dense"].reference, None, TOKENS, seed=0)
    assert not result.ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rule", ["topk:0.1875", "topk_abs:0.1875", "nm:2:8", "threshold:0.5:0.25"])
def test_right_methods_pass_the_gate_on_the_device(rule: str, dtype: torch.dtype) -> None:
    """cuBLAS's order of summation, split K and narrow partial sums stay within the tolerance."""
    selection = parse_selection(rule)
    for name in ("moc_reference", "dense"):
        method = METHODS[name]
        chosen = selection if method.takes_selection else None
        layer = method.make(SHAPE, chosen).to(CUDA, dtype)
        result = gate.check(layer, ffn_weights(layer, SHAPE), method.reference, chosen, TOKENS, seed=0)
        assert result.ok, result.detail
        assert result.max_rel_err < 0.8 * gate.TOLERANCE[dtype]


# inductor points out that TF32 is off, which is meant: float32 here means float32
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
def test_ffn_train_measures_eager_compiled_and_sparse_methods() -> None:
    """A whole group on the device: typed, right, timed by graphs, with allocator memory."""
    common = {"d_model": 512, "d_ffn": 1408, "batch": 8, "seq_len": 512, "dtype": "bf16"}
    points = [point(name, **common) for name in ("dense", "dense_compiled", "dense_gu", "dense_recompute")]
    points += [point("moc_reference", rule, **common) for rule in ("topk:0.1875", "nm:2:8")]
    recorder = Recorder()
    settings = Measure(timing=Timing(rel_ci=0.05, max_seconds=5.0))
    ffn_train.run(Job("s", "r", 1, tuple(points), settings, "cuda", "."), recorder)
    assert {status for status, _detail in recorder.finished.values()} == {"ok"}
    for name, rows in recorder.rows.items():
        assert rows["step_ms"]["timing_mode"] == "graph_cold", (name, rows["step_ms"])
        assert rows["peak_allocated_bytes"]["value"] > rows["transient_peak_bytes"]["value"] >= 0
    for name, wide in (("dense", 4), ("dense_gu", 2), ("dense_recompute", 0)):
        saved = recorder.rows[name]["saved_activation_bytes_per_token"]["value"]
        assert saved == (512 + wide * 1408) * 2


@pytest.mark.parametrize("mode", ["graph_cold", "graph_rotated", "launch_cold"])
def test_a_sampler_keeps_what_its_method_reads(mode: str) -> None:
    """Whoever holds the sampler alone can go on sampling: a graph does not keep the tensors it reads."""
    x = torch.randn(1 << 20, device=CUDA)
    alive = weakref.ref(x)
    sampler, _notes = open_sampler([TimedMethod("a", lambda x=x: x + 1)], CUDA, mode)
    del x
    gc.collect()
    assert alive() is not None
    assert sampler.sample("a") > 0


def test_decode_latency_agrees_with_the_profiler() -> None:
    """Events around a replay and the profiler's kernel times, gaps between them included, agree to 5 %."""
    check = check_against_profiler(FfnShape(4096, 11008), 1, "bf16", CUDA)
    assert abs(check.difference) < 0.05
    assert check.busy_us <= check.span_us


def test_a_method_is_the_same_as_itself_and_three_percent_are_found() -> None:
    """Thirty trials of each on a dense step: no more than one false alarm, no more than one miss."""
    call = selftest.dense_training_step(CUDA, "60m", tokens=16384, dtype="bf16")
    rule = RULES["cuda"]

    def judge(take: Callable[[int], PairedTimes], seed: int) -> Verdict:
        return judge_rounds(take, rule, seed=seed)[0]

    same, slow = selftest.run_self_test(call, CUDA, rule.timing(0), 30, judge, injected=(0.0, 0.03))
    assert same.same >= 29
    assert slow.slow >= 29
    assert slow.median_ratio == pytest.approx(1 / 1.03, abs=0.004)


def test_measured_ceilings_bound_what_is_measured_below_them() -> None:
    """A dense step reaches a share of the floor between a third and all of it."""
    ceilings = roofline.measure_ceilings(CUDA)
    calls = dense_calls()
    traffic = roofline.train_min_bytes(SHAPE, TOKENS, 2, (SHAPE.d_model + 4 * SHAPE.d_ffn) * 2)
    assert traffic is not None
    flops = 18 * TOKENS * SHAPE.n_params() / 3
    floor = roofline.floor_ms(flops, traffic.step, ceilings, "bf16")
    share = roofline.pct_of_roofline(floor, median_ms(calls.step, "graph_cold"))
    assert share is not None
    assert 33 < share < 102
    assert np.isfinite(list(ceilings.gemm_flop_per_s.values())).all()
