"""The decoding kernels: values and choice of channels, for every way to lay them out."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moc import parse_selection
from moc.kernels.decode_launch import DecodeTiling, DownTile, Rows, Tile, decode_pass, decode_tiling
from moc.reference import dense_forward, moc_forward, overflow_count, select_mask
from moc.selection import Selection

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"bf16": 6e-3, "fp16": 8e-4}  # relative Frobenius error: gates, z and y are rounded once each
RULES = ["nm:2:8", "nm:12:64", "nm:3:5", "topk:0.1875", "topk_abs:0.25", "threshold:0.1:0.2"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GATHERED, MASKED = DownTile(32, 32, 16, blocks=2), DownTile(16, 64, 16, num_warps=2, stages=2)
# Ways to lay a layer out, by the number of tokens they can take.
LOCAL = {
    "atomics": DecodeTiling(64, 64, 16, 32, 32),
    "atomics masked": DecodeTiling(64, 32, 64, 32, 16, ahead=True, pdl=True),
    "parts": DecodeTiling(64, 64, 16, 64, 64, down=GATHERED),
    "parts masked": DecodeTiling(64, 16, 64, 16, 16, stages=3, down=MASKED),
}
ANY = {
    "gate atomics": DecodeTiling(
        32, 64, 16, 32, 64, gate=Tile(16, 32, unroll=2), cut_apart=True, ahead=True, pdl=True
    ),
    "gate parts": DecodeTiling(
        16, 64, 16, 32, 64, gate=Tile(16, 64, stages=3), down=GATHERED, cut_apart=True
    ),
}


def weights(d_ffn: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    """Normal weights, so that gates are of order one."""
    return [(torch.randn(d_ffn, d) / d**0.5).to(DEVICE, dtype) for _ in range(3)]


def run(
    x: Tensor, tensors: list[Tensor], selection: Selection | None, tiling: DecodeTiling | None = None
) -> tuple[Tensor, Tensor | None, int]:
    """(y, z, overflow) of the kernels, whose outputs hold NaN and nonsense before."""
    y, overflow = torch.full_like(x, float("nan")), torch.full((), -77, dtype=torch.int64, device=x.device)
    z = decode_pass(x, Rows(*tensors), selection, y, overflow if selection else None, tiling)
    return y, z, int(overflow)


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / (1e-30 + expected.norm()))


def ways(selection: Selection, tokens: int) -> dict[str, DecodeTiling | None]:
    found = {"default": None, **ANY}
    if selection.rule == "nm":
        found |= LOCAL
        found["gate parts"] = replace(ANY["gate parts"], channels=64)
        found["gate atomics"] = replace(ANY["gate atomics"], channels=64, slots=64)
        found["gate shared"] = replace(ANY["gate parts"], channels=64, parts=2)
    elif tokens == 1 and selection.rule != "topk_abs":
        found["cut inside"] = replace(ANY["gate atomics"], cut_apart=False)
    return found


@pytest.mark.parametrize(
    ("rule", "dtype", "tokens"),
    [
        *((rule, "fp16" if rule in ("topk:0.1875", "nm:3:5") else "bf16", 1) for rule in RULES),
        *((rule, "bf16", 3) for rule in RULES if rule not in ("topk_abs:0.25", "nm:3:5")),
    ],
    ids=lambda value: str(value).replace(":", "_"),
)
def test_every_way_agrees_with_the_reference(rule: str, dtype: str, tokens: int) -> None:
    """Whatever the layout, y, the channels with a z and the overflow are the reference's.

    So they are with NaN in the w_up and w_down rows of channels that no token keeps: these are not used.
    """
    selection, (d_ffn, d) = parse_selection(rule), (101, 24)
    tensors = weights(d_ffn, d, DTYPES[dtype])
    x = torch.randn(tokens, d).to(DEVICE, DTYPES[dtype])
    expected = moc_forward(x, *tensors, selection)
    gates = (x.double() @ tensors[0].double().T).to(x.dtype)
    mask = select_mask(gates, selection)
    for tensor in tensors[1:]:
        tensor[~mask.any(dim=0)] = float("nan")
    for name, tiling in ways(selection, tokens).items():
        y, z, overflow = run(x, tensors, selection, tiling)
        assert error(y, expected) < TOLERANCE[dtype], name
        assert z is None or torch.equal(z != 0, mask), name
        assert overflow == int(overflow_count(gates, selection)), name


@pytest.mark.parametrize("tokens", [2, 5, 16])
@pytest.mark.parametrize("rule", ["nm:2:8", "topk:0.3"], ids=lambda text: text.replace(":", "_"))
def test_any_number_of_tokens(rule: str, tokens: int) -> None:
    """2 to 16 tokens give each token what it gets alone, up to rounding."""
    selection, tensors = parse_selection(rule), weights(74, 40, torch.bfloat16)
    x = torch.randn(tokens, 40).to(DEVICE, torch.bfloat16)
    y, _z, _overflow = run(x, tensors, selection)
    for token in range(tokens):
        assert error(y[token], moc_forward(x[token : token + 1], *tensors, selection)[0]) < TOLERANCE["bf16"]


@settings(max_examples=6)
@given(
    rule=st.sampled_from(
        ["topk:1", "topk:0.5", "topk_abs:0.3", "nm:1:2", "nm:7:9", "nm:20:33", "threshold:0.0:0.2"]
    ),
    tokens=st.sampled_from([1, 2]),
    d=st.integers(1, 40),
    d_ffn=st.integers(3, 100),
    seed=st.integers(0, 2**31),
)
def test_equal_gates_go_to_the_lowest_channel(rule: str, tokens: int, d: int, d_ffn: int, seed: int) -> None:
    """Whole-number gates, exact in bf16 and full of ties: exactly the reference's channels, of any shape."""
    torch.manual_seed(seed)
    selection = parse_selection(rule)
    x = torch.randint(-1, 2, (tokens, d)).to(DEVICE, torch.bfloat16)
    w_gate = torch.randint(-1, 2, (d_ffn, d)).to(DEVICE, torch.bfloat16)
    w_up = torch.ones_like(w_gate) * 0.5
    x[:, 0], w_up[:, 0] = 1, 90  # up is not zero
    mask = select_mask((x.double() @ w_gate.double().T).to(x.dtype), selection)
    tiling = replace(ANY["gate parts"], channels=64)
    for name, way in {"parts": tiling, "default": None}.items():
        y, z, _overflow = run(x, [w_gate, w_up, torch.ones_like(w_gate)], selection, way)
        gates = x.double() @ w_gate.double().T
        wanted = mask & (gates != 0)  # a gate of zero has no z
        assert z is None or torch.equal(z != 0, wanted), name
        expected = moc_forward(x, w_gate, w_up, torch.ones_like(w_gate), selection)
        scale = 1e-30 + (mask * gates * 95).abs().sum()
        assert float((y.double() - expected).abs().max() / scale) < TOLERANCE["bf16"], name


@pytest.mark.parametrize("gate", [-1.0, float("inf")])
@pytest.mark.parametrize("rule", ["topk", "topk_abs", "threshold:-2"])
def test_the_last_tie_kept_may_be_at_any_program_s_edge(rule: str, gate: float) -> None:
    """One token whose gates are all equal: the first K channels, whichever programs they belong to."""
    x, tensors = torch.ones(1, 8, device=DEVICE).bfloat16(), weights(100, 8, torch.bfloat16)
    tensors[0].fill_(gate / 8)
    tensors[2].fill_(1)
    for k in (1, 32, 33, 63, 64, 65, 96, 97, 100):
        tensors[1].fill_(1 / 8)
        tensors[1][k:] = float("nan")  # would show if it were used
        y, _z, _overflow = run(x, tensors, parse_selection(f"{rule}:{k}"))
        expected = k * torch.nn.functional.silu(gate * x)
        assert torch.allclose(y, expected, rtol=TOLERANCE["bf16"], atol=0), k


@pytest.mark.parametrize(
    "rule", ["nm:2:8", "nm:12:64", "topk:0.1875"], ids=lambda text: text.replace(":", "_")
)
def test_weights_as_training_leaves_them(rule: str) -> None:
    """Heavy-tailed rows of correlated channels, with gates from 1e-3 to 1e3, agree with the reference."""
    selection, (d_ffn, d) = parse_selection(rule), (160, 64)
    common = torch.randn(8, d)
    rows = torch.randn(d_ffn, 8) @ common + torch.randn(d_ffn, d)
    sizes = torch.exp(1.5 * torch.randn(d_ffn, 1))
    w_gate = (rows * sizes / d**0.5).to(DEVICE, torch.bfloat16)
    tensors = [w_gate, *weights(d_ffn, d, torch.bfloat16)[1:]]
    for tokens in (1, 4):
        x = torch.randn(tokens, d).to(DEVICE, torch.bfloat16)
        y, _z, _overflow = run(x, tensors, selection)
        assert error(y, moc_forward(x, *tensors, selection)) < TOLERANCE["bf16"]


@pytest.mark.parametrize("tokens", [1, 3])
def test_all_channels_make_the_dense_network(tokens: int) -> None:
    """K = d_ffn and the dense form are the same network."""
    tensors = weights(75, 40, torch.bfloat16)
    x = torch.randn(tokens, 40).to(DEVICE, torch.bfloat16)
    expected = dense_forward(x, *tensors)
    assert error(run(x, tensors, parse_selection("topk:1.0"))[0], expected) < TOLERANCE["bf16"]
    assert error(run(x, tensors, None)[0], expected) < TOLERANCE["bf16"]


def test_a_nan_gate_reaches_y() -> None:
    """A NaN gate ranks as plus infinity and is kept, so that y shows it."""
    tensors = weights(96, 32, torch.bfloat16)
    tensors[0][50] = float("nan")
    x = torch.randn(1, 32).to(DEVICE, torch.bfloat16)
    for rule in ("nm:2:8", "topk:3"):
        assert run(x, tensors, parse_selection(rule))[0].isnan().all(), rule


@pytest.mark.parametrize("rule", ["nm:2:8", "topk:0.1875"], ids=lambda text: text.replace(":", "_"))
def test_deterministic_mode_repeats_every_bit(rule: str) -> None:
    """With torch.use_deterministic_algorithms y is the same, bit for bit, in every run."""
    selection, tensors = parse_selection(rule), weights(70, 24, torch.bfloat16)
    x = torch.randn(1, 24).to(DEVICE, torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        first = run(x, tensors, selection)
        assert first[1] is not None  # no float atomics
        assert all(
            torch.equal(run(x, tensors, selection)[0], first[0]) for _ in range(5 if DEVICE == "cuda" else 1)
        )
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_cannot_be_launched_is_refused() -> None:
    """Too many tokens, another dtype, and layouts that a rule cannot have are errors that say so."""
    tensors, topk = weights(64, 32, torch.bfloat16), parse_selection("topk:4")
    x = torch.randn(17, 32).to(DEVICE, torch.bfloat16)
    with pytest.raises(ValueError, match="17 tokens; the decoding kernels take 1 to 16"):
        run(x, tensors, topk)
    with pytest.raises(ValueError, match=r"x has dtype torch\.float32"):
        run(x[:1].float(), tensors, topk)
    with pytest.raises(ValueError, match="topk:4 ranks all gates"):
        run(x[:1], tensors, topk, LOCAL["atomics"])
    with pytest.raises(ValueError, match="topk:4 of 2 tokens needs cut_apart"):
        run(x[:2], tensors, topk, replace(ANY["gate parts"], cut_apart=False))
    with pytest.raises(ValueError, match="dense network needs the down kernel"):
        run(x[:1], tensors, None, LOCAL["atomics"])


@pytest.mark.parametrize("d_ffn", [1408, 5504, 11008, 28672])
@pytest.mark.parametrize("rule", [*RULES, None], ids=str)
def test_every_shape_has_a_tiling(rule: str | None, d_ffn: int) -> None:
    """Default tilings hold whole banks and sizes Triton takes: powers of two, 16 for tensor cores."""
    selection = parse_selection(rule) if rule else None
    for tokens in (1, 16):
        tiling = decode_tiling(d_ffn, selection, tokens)
        sizes = [tiling.channels, tiling.slots, tiling.columns, tiling.up_columns, tiling.down_columns]
        assert all(size & (size - 1) == 0 for size in sizes)
        assert tokens == 1 or min(sizes) >= 16
        assert selection is None or selection.m is None or tiling.channels >= selection.m
