"""The generate workload on the CPU at tiny shapes: whole models, one set of weights, decoding in turns."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from recorder import Recorder, point
from torch import Tensor

from harness.errors import SpecError
from harness.measure import launch
from harness.measure.ffn import with_weights
from harness.measure.launch import CpuSampler, TimedMethod
from harness.run.plan import units
from harness.sweep.grid import expand
from harness.sweep.load import load_sweep, parse_sweep
from harness.sweep.model import Measure, Timing
from harness.sweep.point import Point
from harness.sweep.support import unsupported_reason
from harness.workloads import generate
from harness.workloads.generate_gate import check_decoding, find_truth, relative_errors
from harness.workloads.generate_model import ffn_tensors, model_on, random_weights
from harness.workloads.job import Job
from moc.config import LlamaConfig
from moc.decoding import GreedyDecoder
from moc.llama import Llama
from moc.methods import METHODS, get_method
from moc.selection import parse_selection

CPU = torch.device("cpu")
CONFIG = LlamaConfig("tiny", 32, 96, n_layers=3, n_heads=4, vocab_size=97, max_seq_len=64)
PROMPT, NEW, BATCH = 10, 4, 3


def gen(method: str, selection: str | None = None, **changes: object) -> Point:
    shape = {"d_model": 32, "d_ffn": 96, "n_layers": 3, "n_heads": 4, "vocab_size": 97}
    values = {"workload": "generate", "batch": BATCH, "seq_len": PROMPT, **shape, **changes}
    return point(method, selection, **values)


def run(*points: Point, **settings: object) -> Recorder:
    recorder = Recorder()
    measure = Measure(timing=Timing(rel_ci=0.99, max_seconds=0.3), **settings)  # type: ignore[arg-type]
    generate.run(Job("s", "r", 1, points, measure, "cpu", "."), recorder)
    return recorder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small cache flush and few new tokens: nothing here depends on either."""
    monkeypatch.setattr(launch, "MAX_CPU_FLUSH_BYTES", 2**16)
    monkeypatch.setattr(generate, "NEW_TOKENS", NEW)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_group_is_measured_whole(dtype: str) -> None:
    """Dense and selecting methods get every row, and rates and ratios follow from the samples."""
    points = (
        gen("dense", dtype=dtype),
        gen("moc_reference", "topk:0.1875", dtype=dtype),
        gen("act_prune", "nm:2:8", dtype=dtype),
        gen("generate_rivals:with_buffer", dtype=dtype),
    )
    found = run(*points)
    assert {status for status, _ in found.finished.values()} <= {"ok", "unstable"}
    assert len(found.finished) == 4
    for name, rows in found.rows.items():
        assert set(rows) == {
            "latency_ms",
            "time_to_first_token_ms",
            "tokens_per_s",
            "speedup_vs_best_dense",
            "compile_s",
            "max_rel_err",
            "logits_rel_err",
            "peak_rss_over_start_bytes",
        }
        assert rows["tokens_per_s"]["value"] == pytest.approx(BATCH * 1e3 / rows["latency_ms"]["value"])
        assert rows["logits_rel_err"]["n_samples"] == BATCH * (NEW + 1)
        assert len(found.raw[name]["latency_ms"]) == rows["latency_ms"]["n_samples"]
    dense = [found.rows[name]["speedup_vs_best_dense"]["value"] for name in found.rows if "moc" not in name]
    assert 1.0 in dense
    selecting = found.rows["moc_reference topk:0.1875"]["logits_rel_err"]["value"]
    assert 0 < selecting < (1e-5 if dtype == "fp32" else 0.1)


def test_standing_memory_is_in_the_peak() -> None:
    """The peak holds the weights, once, and the method's own cache, at least."""
    rows = run(gen("dense"), gen("moc_reference", "nm:2:8")).rows
    cache = 2 * 3 * BATCH * 64 * 32 * 4
    for found in rows.values():
        assert found["peak_rss_over_start_bytes"]["value"] >= CONFIG.n_params() * 4 + cache
        weights = f"weights {CONFIG.n_params() * 4} bytes, cache {cache} bytes"
        assert weights in found["peak_rss_over_start_bytes"]["detail"]


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("ffn_rivals:scaled", "with 3 tokens natural.y off by 5"),
        ("generate_rivals:sees_neighbours", "decoded logits are off its own forward without a cache"),
        ("generate_rivals:wrong_for_one", "decoded logits are off the reference"),
    ],
)
def test_a_wrong_method_has_no_speed(method: str, reason: str) -> None:
    """5 % too much, a look at other tokens, a wrong decoding step: each is `wrong`, the rest is measured."""
    found = run(gen(method), gen("dense"))
    status, detail = found.finished[method]
    assert status == "wrong"
    assert reason in detail
    assert "latency_ms" not in found.rows[method]
    assert found.finished["dense"][0] in ("ok", "unstable")


def test_out_of_memory_and_unsupported_are_typed() -> None:
    """The rest of the group is measured without those that cannot."""
    found = run(
        gen("ffn_rivals:big_at_once"),
        gen("ffn_rivals:one_matrix"),
        gen("moc_reference", "topk:99"),
        gen("dense"),
    )
    statuses = {name: status for name, (status, _detail) in found.finished.items()}
    assert statuses.pop("dense") in ("ok", "unstable")
    assert statuses == {
        "ffn_rivals:big_at_once": "oom",
        "ffn_rivals:one_matrix": "unsupported",
        "moc_reference topk:99": "unsupported",
    }


REFUSING = replace(METHODS["dense"], name="refusing", generate_refusal="it is slow there")


def test_a_method_may_decline_generation() -> None:
    """It is `unsupported` with its reason here and in the plan, and decodes as a bare layer; int8 does so."""
    own = gen("test_generate:REFUSING")
    status, detail = run(own, gen("dense")).finished["test_generate:REFUSING"]
    assert (status, detail) == ("unsupported", "method refusing does not generate: it is slow there")
    assert unsupported_reason(own, "cpu") == detail
    for method, rule in (("dense_int8", None), ("moc_int8", "nm:2:8")):
        whole = gen(method, rule, dtype="bf16")
        assert "does not generate" in unsupported_reason(whole, "cuda")
        layer = replace(whole, workload="ffn_decode", n_layers=1, seq_len=1)
        assert unsupported_reason(layer, "cuda") is None


def models(method: str, rule: str | None, dtype: torch.dtype = torch.float64) -> tuple[Llama, dict]:
    """A model of the method on random weights, and the weights."""
    weights = random_weights(CONFIG, dtype, CPU, seed=3)
    selection = parse_selection(rule) if rule else None
    layer = METHODS[method].make(CONFIG.ffn, selection).to(dtype)
    ffns = [with_weights(layer, ffn_tensors(weights, number)) for number in range(CONFIG.n_layers)]
    return model_on(CONFIG, weights, ffns), weights


def test_all_models_share_one_set_of_weights() -> None:
    """No parameter of any method's model is a copy, and all are filled with different values."""
    weights = random_weights(CONFIG, torch.float32, CPU, seed=0)
    given = {name: weight.data_ptr() for name, weight in weights.items()}
    for method in ("dense", "moc_reference"):
        layer = METHODS[method].make(CONFIG.ffn, parse_selection("nm:2:8"))
        ffns = [with_weights(layer, ffn_tensors(weights, number)) for number in range(CONFIG.n_layers)]
        model = model_on(CONFIG, weights, ffns)
        GreedyDecoder(model, 1, 8)
        assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == given
        assert not any(parameter.requires_grad for parameter in model.parameters())
    matrices = [weight for weight in weights.values() if weight.dim() == 2]
    assert len({float(matrix.sum()) for matrix in matrices}) == len(matrices)


@pytest.mark.parametrize(("method", "rule"), [("dense", None), ("moc_reference", "topk:0.1875")])
def test_the_truth_is_the_models_function(method: str, rule: str | None) -> None:
    """In float64 a right model's logits are the truth's, so the two codes agree on all but rounding."""
    model, weights = models(method, rule)
    tokens = torch.randint(97, (2, 9))
    selection = parse_selection(rule) if rule else None
    truth = find_truth(CONFIG, weights, tokens, 4, METHODS[method].reference, selection)
    expected = F.linear(model(tokens), model.head)[:, 4:]
    assert truth.logits.shape == expected.shape
    assert float(relative_errors(expected, truth.logits).max()) < 1e-12


def test_the_rounding_of_a_narrow_dtype_is_measured() -> None:
    """In bf16 the truth's own code is off by more than one rounding and by less than a wrong model."""
    _, weights = models("dense", None, torch.bfloat16)
    tokens = torch.randint(97, (2, 9))
    truth = find_truth(CONFIG, weights, tokens, 4, METHODS["dense"].reference, None)
    assert truth.rounding.shape == (2, 5)
    assert 2.0**-9 < float(truth.rounding.median()) < 0.05


def _late(place: Callable[..., tuple], *arguments: Tensor) -> tuple:
    x, rotation, positions, mask = place(*arguments)
    return (
        x,
        tuple(table.roll(1, dims=0) if len(table) > 1 else -table for table in rotation),
        positions,
        mask,
    )


def _sees_ahead(place: Callable[..., tuple], *arguments: Tensor) -> tuple:
    x, rotation, positions, mask = place(*arguments)
    return x, rotation, positions, torch.zeros_like(mask)


def _forgets(place: Callable[..., tuple], *arguments: Tensor) -> tuple:
    x, rotation, positions, mask = place(*arguments)
    mask = mask.clone()
    mask[:, :3] = float("-inf")
    return x, rotation, positions, mask


def _writes_beside(place: Callable[..., tuple], *arguments: Tensor) -> tuple:
    x, rotation, positions, mask = place(*arguments)
    return x, rotation, positions + 1 if len(positions) == 1 else positions, mask


@pytest.mark.parametrize("fault", [None, _late, _sees_ahead, _forgets, _writes_beside])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_wrong_cache_is_found(fault: Callable[..., tuple] | None, dtype: torch.dtype) -> None:
    """Wrong rotations, a mask too wide or too narrow, and a key at the wrong place are told from rounding."""
    model, weights = models("moc_reference", "topk:0.1875", dtype)
    decoder = GreedyDecoder(model, 2, 16)
    if fault is not None:
        place = model.place
        decoder._start = lambda model, *arguments: fault(place, *arguments)
    tokens, selection = torch.randint(97, (2, 16)), parse_selection("topk:0.1875")
    found = check_decoding(
        decoder,
        tokens,
        9,
        torch.tensor([0, 1]),
        lambda: find_truth(CONFIG, weights, tokens, 9, METHODS["moc_reference"].reference, selection),
    )
    assert found.ok == (fault is None), found.detail


def test_one_wrong_row_of_a_batch_is_found() -> None:
    """A cache that mixes up two rows of many is wrong although most places are right."""
    model, weights = models("dense", None, torch.float32)
    decoder = GreedyDecoder(model, 5, 16)
    layer = decoder._layer

    def swapped(block: object, x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        x, delta = layer(block, x, *rest)
        return x, delta if x.shape[1] > 1 else delta[[0, 1, 2, 4, 3]]

    decoder._layer = swapped
    tokens = torch.randint(97, (5, 16))
    truth = find_truth(CONFIG, weights, tokens[:2], 9, METHODS["dense"].reference, None)
    found = check_decoding(decoder, tokens, 9, torch.tensor([0, 1]), lambda: truth)
    assert "decoded logits of one token are off its own forward" in found.detail


def test_a_repeated_call_is_prepared_once_and_timed_per_run() -> None:
    """A sample of a loop runs `prepare` once and `call` as often as said; its time is that of one run."""
    done: list[str] = []
    sampler = CpuSampler()
    method = TimedMethod("a", lambda: done.append("call"), lambda: done.append("prepare"), calls=2, repeats=5)
    sampler.add(method)
    done.clear()
    sampler.sample("a")
    assert done == ["prepare", *["call"] * 5]
    assert method.units == 10


SWEEP = """\
version: 1
name: g
workload: generate
axes:
  preset: [1m, 4m]
  batch: [1, 4]
  method: [dense, moc_reference]
  selection: ["topk:0.1875", "nm:2:8"]
fixed: {seq_len: 16, dtype: fp32}
"""


def test_a_sweep_of_it_becomes_groups_of_whole_models() -> None:
    """Points have the preset's depth, heads and the default vocabulary; methods share a process."""
    part = parse_sweep(SWEEP, "s.yaml").parts[0]
    points = expand(part)
    assert len(points) == 2 * 2 * 3
    assert {(p.n_layers, p.n_heads, p.vocab_size) for p in points} == {(4, 4, 32000)}
    assert [len(unit.points) for unit in units(part, points, points)] == [3] * 4
    assert all(p.data_id is None and p.train_tokens is None for p in points)


def test_a_sweep_of_it_needs_a_prompt_length() -> None:
    """Without `seq_len` the mistake is one line."""
    with pytest.raises(SpecError, match="axes needs seq_len and one of batch or tokens"):
        parse_sweep(SWEEP.replace("seq_len: 16, ", ""), "s.yaml")


@pytest.mark.parametrize("name", ["generate_h100", "generate_quick"])
def test_the_sweeps_that_come_with_it_are_valid(name: str, request: pytest.FixtureRequest) -> None:
    """Every point of the shipped sweeps can be expanded, and each group has a dense method."""
    sweep = load_sweep(request.config.rootpath / "sweeps" / f"{name}.yaml")
    for part in sweep.parts:
        points = expand(part)
        for unit in units(part, points, points):
            assert any(get_method(p.method).is_dense for p in unit.points)
