"""Environment records, conditions, counts and ceilings."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from harness.measure import clocks, roofline
from harness.measure.clocks import ClockReader, Conditions, any_throttled, median_sm_clock
from harness.measure.environment import device_name, environment_record
from harness.measure.ffn import FfnTensors, TrainingCalls, ffn_weights, natural_tensors
from harness.measure.roofline import Ceilings
from moc.config import FfnShape
from moc.layers.dense import DenseFFN, RecomputeFFN
from moc.layers.moc import MoCFFN
from moc.selection import parse_selection

CPU = torch.device("cpu")
SHAPE = FfnShape(d_model=16, d_ffn=40)


def test_the_record_says_what_was_measured_with() -> None:
    """Versions, machine and revision are there, as JSON, and no host or user name."""
    record = environment_record("cpu")
    assert record["torch"] == torch.__version__
    assert record["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"triton", "scipy", "cpu_model", "cpu_cores", "ram_bytes", "git_revision", "git_dirty"} <= set(
        record
    )
    assert record["device_name"] == device_name("cpu")
    assert record["device_name"].startswith("CPU: ")
    assert record["ram_bytes"] > 2**28
    assert str(Path.home()) not in json.dumps(record)


def test_the_identity_is_equal_for_equal_environments_and_changes_with_any_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """env_id joins rows of one environment and tells it from one with another PyTorch."""
    first, again = environment_record("cpu"), environment_record("cpu")
    assert first == again
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert environment_record("cpu")["env_id"] != first["env_id"]


def test_without_a_gpu_there_are_no_conditions() -> None:
    """On the CPU the reader says nothing rather than failing."""
    assert ClockReader(CPU).read() is None
    assert median_sm_clock([None, None]) is None
    assert any_throttled([None]) is None


class FakeNvml:
    """The part of pynvml that is read, with one card whose power cannot be told."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.asked: list[str] = []

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked.append(uuid)
        return "handle"

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        raise self.NVMLError

    def nvmlDeviceGetClockInfo(self, handle: str, which: int) -> int:
        return {1: 1980, 2: 2619}[which]

    def nvmlDeviceGetTemperature(self, handle: str, which: int) -> int:
        return 41

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return 0x1 | 0x4 | 0x20


def test_conditions_are_read_by_the_uuid_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The card is found by UUID, since NVML numbers cards its own way; what it does not tell is None."""
    nvml = FakeNvml()
    monkeypatch.setattr(clocks, "open_nvml", lambda: nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(uuid="12-ab"))
    found = ClockReader(torch.device("cuda")).read()
    assert nvml.asked == ["GPU-12-ab"]
    assert found == Conditions(1980.0, 2619.0, 41.0, None, ("sw_power_cap", "sw_thermal_slowdown"))
    assert any_throttled([None, found]) is True


def test_idling_and_set_clocks_are_not_throttling() -> None:
    """Only reasons that slow a busy card count."""
    assert clocks.throttle_names(0x1 | 0x2 | 0x10 | 0x100) == ()
    assert clocks.throttle_names(0x8 | 0x40 | 0x80) == (
        "hw_slowdown",
        "hw_thermal_slowdown",
        "hw_power_brake",
    )


def test_training_traffic_by_hand() -> None:
    """The bytes of a tiny step, counted tensor by tensor."""
    weights, x, kept = 3 * 16 * 40 * 2, 10 * 16 * 2, 10 * 4 * 40 * 2
    found = roofline.train_min_bytes(SHAPE, 10, 2, saved_bytes_per_token=(16 + 4 * 40) * 2)
    assert found is not None
    assert found.forward == (x + weights) + (x + kept)
    assert found.backward == (x + weights + x + kept) + (x + weights)
    assert found.step == found.forward + found.backward
    assert roofline.train_min_bytes(SHAPE, 10, 2, None) is None


def test_decoding_traffic_by_hand() -> None:
    """All gate rows, the kept up and down rows, x and y."""
    assert roofline.decode_min_bytes(SHAPE, 3, 2, channels_read=8) == (40 + 8 + 8 + 3 + 3) * 16 * 2


def test_flops_are_those_of_the_matrix_products() -> None:
    """Dense: 18 T d d_ffn a step; recomputing adds the two products before the activation."""
    x, dy = torch.randn(10, 16, requires_grad=True), torch.randn(10, 16)
    unit = 2 * 10 * 16 * 40
    assert roofline.count_flops(lambda: DenseFFN(SHAPE)(x).backward(dy)) == 9 * unit
    assert roofline.count_flops(lambda: RecomputeFFN(SHAPE)(x).backward(dy)) == 11 * unit


def test_flops_of_an_unregistered_custom_op_are_unknown_rather_than_free() -> None:
    """An op the counter cannot see into makes the count None."""

    @torch.library.custom_op("mocbench_test::square", mutates_args=())
    def square(x: torch.Tensor) -> torch.Tensor:
        return x @ x

    assert roofline.count_flops(lambda: square(torch.randn(4, 4))) is None
    assert roofline.count_flops(lambda: torch.randn(4, 4) @ torch.randn(4, 4)) == 2 * 4**3


def test_the_floor_is_the_longer_of_work_and_traffic() -> None:
    """Compute-bound, traffic-bound, and unknown, in milliseconds and percent."""
    ceilings = Ceilings(copy_bytes_per_s=1e12, gemm_flop_per_s={"bf16": 1e15})
    assert roofline.floor_ms(2e12, 1e9, ceilings, "bf16") == pytest.approx(2.0)
    assert roofline.floor_ms(1e11, 5e9, ceilings, "bf16") == pytest.approx(5.0)
    assert roofline.pct_of_roofline(5.0, 20.0) == pytest.approx(25.0)
    for unknown in (
        roofline.floor_ms(None, 1e9, ceilings, "bf16"),
        roofline.floor_ms(1e9, None, ceilings, "bf16"),
        roofline.floor_ms(1e9, 1e9, None, "bf16"),
        roofline.floor_ms(1e9, 1e9, ceilings, "fp8"),
    ):
        assert unknown is None
    assert roofline.pct_of_roofline(None, 1.0) is None


def test_ceilings_are_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second ask reads the file; a broken file is measured anew."""
    monkeypatch.setenv("MOCBENCH_CACHE", str(tmp_path))
    measured = []

    def measure(device: torch.device) -> Ceilings:
        measured.append(device)
        return Ceilings(1e10, {"fp32": 1e11})

    monkeypatch.setattr(roofline, "measure_ceilings", measure)
    assert roofline.stored_ceilings(CPU) is None
    assert roofline.ensure_ceilings(CPU) == roofline.ensure_ceilings(CPU) == Ceilings(1e10, {"fp32": 1e11})
    assert measured == [CPU]
    (path,) = tmp_path.rglob("*.json")
    stored = json.loads(path.read_text())
    assert stored["environment"]["env_id"]
    path.write_text(json.dumps({"copy_bytes_per_s": "fast"}))
    roofline.ensure_ceilings(CPU)
    assert len(measured) == 2
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOCBENCH_CACHE", str(tmp_path / "file"))  # no folder can be made there
    assert roofline.ensure_ceilings(CPU) == Ceilings(1e10, {"fp32": 1e11})


def test_measured_ceilings_are_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy and a product at small sizes give rates of the right order and all dtypes."""
    monkeypatch.setattr(roofline, "_COPY_BYTES", {"cpu": 2**22})
    monkeypatch.setattr(roofline, "_GEMM_SIZE", {"cpu": 128})
    found = roofline.measure_ceilings(CPU)
    assert 1e8 < found.copy_bytes_per_s < 1e12
    assert set(found.gemm_flop_per_s) == {"bf16", "fp16", "fp32", "fp64"}
    assert 1e8 < found.gemm_flop_per_s["fp32"] < 1e13


def test_natural_tensors_have_unit_gates_and_repeat_for_a_seed() -> None:
    """Gates have a standard deviation near one, whatever the width, and no tensor is all zeros."""
    shape = FfnShape(d_model=256, d_ffn=512)
    first, again = (natural_tensors(shape, 64, torch.float32, CPU, seed=4) for _ in range(2))
    assert float((first.x @ first.w_gate.T).std()) == pytest.approx(1.0, rel=0.05)
    for name in FfnTensors.__dataclass_fields__:
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert bool((getattr(first, name) != 0).any())


def test_a_module_of_other_parameters_is_refused() -> None:
    """A rival needs exactly the weights of a SwiGLU, and is told which are wrong."""
    good = DenseFFN(SHAPE)
    assert list(ffn_weights(good, SHAPE)) == ["w_gate", "w_up", "w_down"]
    with pytest.raises(ValueError, match=r"w_gate is \[40, 16\]; \[d_ffn, d_model\] is \[40, 8\]"):
        ffn_weights(good, FfnShape(8, 40))
    with pytest.raises(ValueError, match="no parameter w_gate; it has weight"):
        ffn_weights(torch.nn.Linear(16, 40, bias=False), SHAPE)
    good.scale = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="parameters beside w_gate, w_up, w_down: scale"):
        ffn_weights(good, SHAPE)


def test_the_parts_of_a_step_agree_with_the_whole() -> None:
    """Forward then backward give the gradients of the step, and each backward needs its own forward."""
    layer = MoCFFN(SHAPE, parse_selection("topk:0.25"))
    tensors = natural_tensors(SHAPE, 8, torch.float32, CPU, seed=0)
    x = tensors.x.requires_grad_()
    calls = TrainingCalls(layer, list(layer.parameters()), x, tensors.dy)
    whole = calls.step()
    calls.prepare_backward()
    for one, other in zip(calls.backward(), whole, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="prepare_backward"):
        calls.backward()
    assert x.grad is None
    assert calls.forward().grad_fn is not None
