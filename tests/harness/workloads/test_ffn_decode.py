"""The ffn_decode workload on the CPU: rotated copies, forward only."""

from dataclasses import replace

import pytest
import torch
from recorder import Recorder, point

from harness.measure import ffn, launch, roofline
from harness.sweep.model import Measure, Timing
from harness.sweep.point import Point
from harness.workloads import ffn_decode
from harness.workloads.job import Job
from harness.workloads.profiler_check import check_against_profiler
from moc.config import FfnShape
from moc.layers.int8 import quantize_rows
from moc.methods import METHODS

D, D_FFN = 16, 48
# Dense and selecting methods that say they read int8 weights, for a device without such kernels.
NARROW_DENSE = replace(METHODS["dense"], row_bytes=METHODS["dense_int8"].row_bytes)
NARROW_MOC = replace(METHODS["moc_reference"], row_bytes=METHODS["moc_int8"].row_bytes)
NARROW = "test_ffn_decode:NARROW_DENSE", "test_ffn_decode:NARROW_MOC"


def decode(method: str, selection: str | None = None, batch: int = 1, **changes: object) -> Point:
    return point(method, selection, workload="ffn_decode", batch=batch, seq_len=1, **changes)


def run(*points: Point) -> Recorder:
    recorder = Recorder()
    measure = Measure(timing=Timing(rel_ci=0.99, max_seconds=5.0))
    ffn_decode.run(Job("s", "r", 1, points, measure, "cpu", "."), recorder)
    return recorder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small cache flush and made-up ceilings: nothing here depends on either."""
    monkeypatch.setattr(launch, "MAX_CPU_FLUSH_BYTES", 2**16)
    monkeypatch.setattr(
        roofline, "ensure_ceilings", lambda device: roofline.Ceilings(1e9, {"fp32": 1e9, "bf16": 1e9})
    )


def test_a_group_is_measured_whole() -> None:
    """Dense and selecting methods get latency, rate, ratio and roofline, and pass the gate on few tokens."""
    found = run(decode("dense"), decode("moc_reference", "nm:2:8"), decode("ffn_rivals:exact"))
    assert set(found.finished.values()) == {("ok", "")}
    for rows in found.rows.values():
        expected = {"latency_us", "tokens_per_s", "speedup_vs_best_dense", "flops", "min_bytes"}
        assert expected | {"pct_of_roofline", "max_rel_err", "compile_s"} == set(rows)
        assert rows["tokens_per_s"]["value"] == pytest.approx(1e6 / rows["latency_us"]["value"])
        assert 1.0 < rows["latency_us"]["value"] < 1e5


def test_the_floor_counts_the_channels_that_some_token_needs() -> None:
    """One token of nm:2:8 needs a quarter of the up and down rows; a dense output needs all of them."""
    found = run(decode("dense"), decode("moc_reference", "nm:2:8"), decode("act_prune", "nm:2:8"))
    rows = {name: values["min_bytes"]["value"] for name, values in found.rows.items()}
    ends = 2 * D * 4
    assert rows["dense"] == 3 * D * D_FFN * 4 + ends
    assert rows["act_prune nm:2:8"] == rows["dense"]
    assert rows["moc_reference nm:2:8"] == (D_FFN + 2 * D_FFN // 4) * D * 4 + ends
    flops = found.rows["moc_reference nm:2:8"]["flops"]["value"]
    assert flops == 2 * D * (D_FFN + 2 * D_FFN // 4)


def test_a_batch_needs_the_union_of_its_tokens_channels() -> None:
    """Sixteen tokens choose different channels, so together they need more than one token does."""
    one = run(decode("moc_reference", "nm:2:8")).rows["moc_reference nm:2:8"]
    many = run(decode("moc_reference", "nm:2:8", batch=16)).rows["moc_reference nm:2:8"]
    gained = many["min_bytes"]["value"] - one["min_bytes"]["value"] - 15 * 2 * D * 4
    assert 2 * D * 4 * D_FFN // 4 < gained <= 2 * D * 4 * (D_FFN - D_FFN // 4)


def test_the_floor_counts_weights_as_wide_as_the_method_reads_them() -> None:
    """An int8 weight is a byte and each row has a scale of four; x and y are as wide as ever."""
    found = run(decode(NARROW[0]), decode(NARROW[1], "nm:2:8"))
    rows = {name: values["min_bytes"]["value"] for name, values in found.rows.items()}
    ends = 2 * D * 4
    assert rows[NARROW[0]] == 3 * D_FFN * (D + 4) + ends
    assert rows[f"{NARROW[1]} nm:2:8"] == (D_FFN + 2 * D_FFN // 4) * (D + 4) + ends


def test_row_bytes_of_the_registry() -> None:
    """What a method says a row takes is what its weights take, whatever the dtype of the layer."""
    rows, scales = quantize_rows(torch.randn(D_FFN, D))
    for name, method in METHODS.items():
        for itemsize in (2, 4):
            wanted = rows.nbytes + scales.nbytes if name.endswith("int8") else D_FFN * D * itemsize
            assert D_FFN * method.row_bytes(D, itemsize) == wanted, name


@pytest.mark.parametrize(
    ("others", "least"),
    [
        ([], 3 * D_FFN * D * 4),
        ([decode("moc_reference", "nm:2:8")], (D_FFN + 2 * D_FFN // 4) * D * 4),
        # 16 tokens together need more channels, but whether they do is not known beforehand
        ([decode("moc_reference", "topk:6", batch=16)], (D_FFN + 2 * 6) * D * 4),
        ([decode("moc_reference", "threshold:9.0:0.5")], D_FFN * D * 4),
        ([decode(NARROW[0]), decode("moc_reference", "topk:0.75")], 3 * D_FFN * (D + 4)),
        ([decode(NARROW[0]), decode(NARROW[1], "topk:6")], (D_FFN + 2 * 6) * (D + 4)),
        ([decode("moc_reference", "topk:99")], 3 * D_FFN * D * 4),  # unsupported
    ],
)
def test_the_leanest_method_decides_the_rotation(
    others: list[Point], least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many copies as the method that surely reads the least of each needs; it is blamed if they do not
    fit."""
    asked: list[float] = []

    def refuse(read_bytes: float, device: torch.device) -> int:
        asked.append(read_bytes)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(ffn, "rotated_copies", refuse)
    recorder, dense = Recorder(), decode("dense", batch=others[0].batch if others else 1)
    job = Job("s", "r", 1, (*others, dense), Measure(), "cpu", ".")
    with pytest.raises(torch.OutOfMemoryError):
        ffn_decode.run(job, recorder)
    assert asked == [least]
    supported = [p for p in others if p.selection != "topk:99"]
    blamed = supported[-1] if supported and least < 3 * D_FFN * (D + 4) else (*supported, dense)[0]
    wanted = f"{blamed.method} {blamed.selection}" if blamed.selection else blamed.method
    assert recorder.events[-1] == ("start", wanted)


def test_a_wrong_method_is_caught_on_one_token() -> None:
    """5 % too much is `wrong` in decoding too."""
    found = run(decode("ffn_rivals:scaled"), decode("dense"))
    assert found.finished["ffn_rivals:scaled"][0] == "wrong"
    assert "latency_us" not in found.rows["ffn_rivals:scaled"]


def test_out_of_memory_and_unsupported_are_typed() -> None:
    """The rest of the group is measured without those that cannot."""
    found = run(
        decode("ffn_rivals:big_at_once"),
        decode("ffn_rivals:one_matrix"),
        decode("moc_reference", "topk:99"),
        decode("dense"),
    )
    statuses = {name: status for name, (status, _detail) in found.finished.items()}
    assert statuses == {
        "ffn_rivals:big_at_once": "oom",
        "ffn_rivals:one_matrix": "unsupported",
        "moc_reference topk:99": "unsupported",
        "dense": "ok",
    }


def test_depth_is_refused() -> None:
    """Decoding is of one layer; another depth is not silently ignored."""
    found = run(decode("dense", n_layers=2))
    assert found.finished["dense"] == ("unsupported", "ffn_decode measures one layer, not n_layers=2")


def test_the_profiler_check_needs_cuda() -> None:
    """Without kernels there is nothing to compare with."""
    with pytest.raises(ValueError, match="needs a CUDA device"):
        check_against_profiler(FfnShape(D, D_FFN), 1, "bf16", torch.device("cpu"))


def test_the_rotation_outgrows_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA the other copies alone fill four times the L2, for small and for large weights."""

    class Properties:
        L2_cache_size = 50 * 2**20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    for size in (4 * 2**20, 67 * 2**20, 1400 * 2**20):
        copies = launch.rotated_copies(size, torch.device("cuda"))
        assert (copies - 1) * size >= 4 * 50 * 2**20
        assert (copies - 2) * size < 4 * 50 * 2**20
