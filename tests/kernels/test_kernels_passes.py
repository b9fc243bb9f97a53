"""The select and expand passes alone: which channels, what is kept, what is written; every rule and dtype."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, poisoned, rows
from torch import Tensor

from moc.kernels.banks import BISECT, EXTRACT, RANK, way
from moc.kernels.passes import EXPAND_TILING, Kept, Tiling, expand_pass, select_pass, select_tiling
from moc.ops.compact import unpack_bitmask
from moc.reference import overflow_count, select_mask
from moc.selection import Selection, parse_selection

# Relative error of one rounding. Triton's interpreter cuts bf16 off instead of rounding: 2**-7 at worst.
ROUNDING = {"bf16": 8e-3, "fp16": 5e-4, "fp32": 3e-7}
RULES = ["topk:0.1875", "topk_abs:0.25", "nm:2:8", "nm:6:7", "nm:12:64", "nm:9:16", "threshold:0.5:0.25"]
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda text: text.replace(":", "_"))
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def select(g: Tensor, u: Tensor, rule: Selection, tiling: Tiling | None = None) -> tuple[Tensor, Kept, int]:
    """(z, what is kept, overflow); g and u stay as they are."""
    g, z = g.clone(memory_format=torch.preserve_format), u.clone(memory_format=torch.preserve_format)
    kept = poisoned(*g.shape[:1], rule.k(g.shape[1]), g.shape[1], g.dtype, str(g.device))
    overflow = torch.zeros((), dtype=torch.int64, device=g.device)
    select_pass(g, z, z, rule, kept, overflow, tiling)
    return z, kept, int(overflow)


def gathered(full: Tensor, mask: Tensor, k: int) -> Tensor:
    """The masked values of each row in ascending channel order, filled up with zeros to k."""
    out = torch.zeros(full.shape[0], k, dtype=full.dtype, device=full.device)
    for row in range(full.shape[0]):
        values = full[row, mask[row]]
        out[row, : len(values)] = values
    return out


def assert_selected(g: Tensor, u: Tensor, rule: Selection, tiling: Tiling | None = None) -> None:
    """The pass on g and u agrees with the reference: exactly in what it keeps, to rounding in z."""
    z, kept, overflow = select(g, u, rule, tiling)
    mask, k = select_mask(g, rule), rule.k(g.shape[1])
    assert torch.equal(unpack_bitmask(kept.bitmask, g.shape[1]), mask)
    assert torch.equal(kept.pairs[..., 0], gathered(g, mask, k))
    assert torch.equal(kept.pairs[..., 1], gathered(u, mask, k))
    assert overflow == int(overflow_count(g, rule))
    expected = mask * F.silu(g.double()) * u.double()
    name = next(name for name, dtype in DTYPES.items() if dtype == g.dtype)
    assert not z[~mask].any()
    smallest = 2.0**-24 * z.numel() ** 0.5  # fp16 cannot round finer than this
    assert float((z.double() - expected).norm()) <= ROUNDING[name] * float(expected.norm()) + smallest


@each_dtype
@each_rule
@pytest.mark.parametrize(("n_tokens", "d_ffn"), [(3, 200), (2, 75)], ids=["T3-f200", "T2-f75"])
def test_selects_what_the_reference_selects(
    n_tokens: int, d_ffn: int, rule: str, dtype: str, device: str
) -> None:
    """Bitmask, kept pairs and overflow are the reference's exactly, and z to one rounding."""
    assert_selected(*rows(n_tokens, d_ffn, DTYPES[dtype], device), parse_selection(rule))


@each_dtype
@pytest.mark.parametrize("rule", ["topk:0.1875", "nm:2:8", "nm:12:64", "threshold:-0.5:0.25"])
def test_rows_of_several_pieces(rule: str, dtype: str, device: str) -> None:
    """A row longer than a piece and a tile, with a tail, is selected as one."""
    assert_selected(*rows(2, 1241, DTYPES[dtype], device), parse_selection(rule))


@settings(deadline=None, max_examples=60)
@given(
    rule=st.sampled_from(
        [
            *("topk:1", "topk:3", "topk:0.5", "topk:1.0", "topk_abs:2"),
            *("nm:1:2", "nm:3:5", "nm:4:8", "nm:5:16", "nm:1:64"),
            *("threshold:-1.0:3", "threshold:0.25:0.3", "threshold:7.0:2"),
        ]
    ),
    n_tokens=st.integers(1, 2),
    d_ffn=st.integers(3, 90),
    offset=st.integers(0, 3),
    dtype=st.sampled_from(list(DTYPES)),
    levels=st.sampled_from([1, 2, 5, 1000]),
    seed=st.integers(0, 2**31),
)
def test_any_row(
    rule: str, n_tokens: int, d_ffn: int, offset: int, dtype: str, levels: int, seed: int
) -> None:
    """Any rule on any short row: ties of every degree, both zeros, and rows that start anywhere in memory."""
    generator = torch.Generator().manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    storage = torch.zeros(2, n_tokens, d_ffn + offset, dtype=DTYPES[dtype], device=device)
    g, u = storage[:, :, offset:]
    g.copy_(torch.randint(-levels, levels + 1, g.shape, generator=generator) / levels)
    g[g == 0] *= -1.0 if seed % 2 else 1.0
    u.copy_(torch.randn(u.shape, generator=generator))
    assert_selected(g, u, parse_selection(rule))


@each_dtype
@pytest.mark.parametrize("rule", ["topk:0.2", "nm:2:8", "nm:12:64", "nm:3:5"])
def test_ties_go_to_the_lowest_channel(rule: str, dtype: str, device: str) -> None:
    """Of a row of equal gates, minus zero equal to zero, the first K channels (of each bank) are kept."""
    g, u = rows(2, 200, DTYPES[dtype], device)
    g.fill_(0.0)
    g[:, ::3] = -0.0
    assert_selected(g, u, parse_selection(rule))
    _z, kept, _overflow = select(g, u, parse_selection("topk:0.2"))
    assert unpack_bitmask(kept.bitmask, 200)[0].nonzero().flatten().tolist() == list(range(40))


@pytest.mark.parametrize("value", [math.inf, -math.inf, 3.0e38, 1.0e-40], ids=str)
def test_extreme_gates(value: float, device: str) -> None:
    """Infinite, huge and subnormal gates are ranked as the reference ranks them."""
    g, u = rows(2, 75, torch.bfloat16, device)
    g[0, 5::7] = value
    g[1] = value
    for rule in ("topk:9", "nm:2:8", "nm:12:64", "threshold:0.0:9"):
        _z, kept, _overflow = select(g, u, parse_selection(rule))
        assert torch.equal(unpack_bitmask(kept.bitmask, 75), select_mask(g, parse_selection(rule))), rule


@each_dtype
@pytest.mark.parametrize("shift", [-1.0, 0.0, 1.0])
def test_gates_of_every_magnitude(dtype: str, shift: float, device: str) -> None:
    """Rows whose gates span the range of the dtype, far from any normal distribution."""
    g, u = rows(2, 600, DTYPES[dtype], device)
    # Short of subnormal bf16, which Triton's interpreter reads wrongly.
    span = torch.rand(2, 600, dtype=torch.float64) * 68 - 30
    g.copy_((torch.randn(2, 600).double() + shift) * 10.0 ** (span / (5 if dtype == "fp16" else 1)))
    for rule in ("topk:0.02", "topk:0.5", "topk:0.99", "threshold:-1e30:0.5", "nm:2:8"):
        _z, kept, _overflow = select(g, u, parse_selection(rule))
        assert torch.equal(unpack_bitmask(kept.bitmask, 600), select_mask(g, parse_selection(rule))), rule


@each_dtype
@each_rule
def test_nan_is_kept_and_nothing_is_written_beyond_a_row(rule: str, dtype: str, device: str) -> None:
    """A NaN gate is kept and makes z NaN; a row of NaN keeps no more than K and harms no neighbour."""
    selection = parse_selection(rule)
    g, u = rows(3, 200, DTYPES[dtype], device)
    expected = select_mask(g, selection)
    g[1] = math.nan
    g[2, 100] = math.nan
    z, kept, _overflow = select(g, u, selection)
    mask = unpack_bitmask(kept.bitmask, 200)
    assert torch.equal(mask[0], expected[0])
    assert int(mask[1].sum()) == selection.k(200)
    assert mask[2, 100]
    assert z[2, 100].isnan()
    assert z[1][mask[1]].isnan().all()


@pytest.mark.parametrize("method", [RANK, EXTRACT, BISECT], ids=["rank", "extract", "bisect"])
def test_every_way_through_a_bank(method: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three ways to rank a bank agree with the reference where all of them apply."""
    monkeypatch.setattr("moc.kernels.passes.way", lambda *_: method)
    for rule in ("nm:3:32", "nm:4:64"):
        assert_selected(*rows(2, 200, torch.bfloat16, device), parse_selection(rule))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("rule", ["nm:12:64", "nm:9:32"])
def test_several_chunks_of_banks(rule: str, dtype: str, device: str) -> None:
    """The search in chunks agrees with the reference: a tail, ties, both zeros, infinity, NaN."""
    if device == "cpu" and (rule, dtype) == ("nm:9:32", "fp16"):
        pytest.skip("interpreted, nothing differs from another case")
    selection, d_ffn = parse_selection(rule), 2048 + 72
    g, u = rows(1, d_ffn, DTYPES[dtype], device)
    g[:, 64:192] = (g[:, 64:192] * 2).round() / 2
    g[:, 192:256] = -0.0
    g[:, 192:256:3] = 0.0
    g[:, 256:320] = -math.inf
    g[:, 320:512:5] = math.inf
    expected = select_mask(g, selection)
    g[:, 320:512:10] = math.nan
    _z, kept, _overflow = select(g, u, selection)
    assert torch.equal(unpack_bitmask(kept.bitmask, d_ffn), expected)
    assert torch.equal(kept.pairs[..., 1], gathered(u, expected, selection.k(d_ffn)))


def test_tuned_ways_are_taken() -> None:
    """2:8 of 16-bit gates and 12:64 of packed ones take the tuned ways; anything else the general one."""
    assert way(2, 8, itemsize=2, packed=False) == EXTRACT
    assert way(12, 64, itemsize=2, packed=True) == BISECT
    assert way(2, 8, itemsize=4, packed=False) == RANK
    assert way(12, 64, itemsize=2, packed=False) == RANK
    assert way(6, 8, itemsize=2, packed=True) == way(5, 12, itemsize=2, packed=True) == RANK


@pytest.mark.parametrize(
    "tiling",
    [
        Tiling(1, 16, 1),
        Tiling(1, 16, 2, guess=False),
        Tiling(2, 32, 8),
        Tiling(4, 64, 4),
    ],
    ids=str,
)
def test_tilings_do_not_matter(tiling: Tiling, device: str) -> None:
    """Warps, tile, vector width and the guess change nothing but speed."""
    for rule in ("topk:0.1875", "nm:2:8", "nm:12:64"):
        assert_selected(*rows(1, 1100, torch.bfloat16, device), parse_selection(rule), tiling)


@each_dtype
@each_rule
def test_a_row_shared_by_programs_is_the_same_row(rule: str, dtype: str, device: str) -> None:
    """Few tokens with nothing kept: each program writes its part, with ties across parts, and counts once."""
    selection = parse_selection(rule)
    g, u = rows(2, 1300, DTYPES[dtype], device)
    g.copy_((4 * g).round() / 4)
    z = torch.full_like(g, math.nan)
    overflow = torch.full((), 0 if selection.rule == "threshold" else 99, dtype=torch.int64, device=device)
    select_pass(g, u, z, selection, None, overflow)
    mask = select_mask(g, selection)
    expected = mask * F.silu(g.double()) * u.double()
    assert not z[~mask].any()
    assert float((z.double() - expected).norm() / expected.norm()) < ROUNDING[dtype]
    assert int(overflow) == int(overflow_count(g, selection))


@each_dtype
@pytest.mark.parametrize("rule", ["topk", "topk_abs", "threshold:-2"])
def test_the_last_tie_kept_may_be_at_any_part_s_edge(rule: str, dtype: str, device: str) -> None:
    """A row shared by programs, all gates equal: the first K, whichever programs they belong to."""
    g = torch.full((1, 1300), -1.0, dtype=DTYPES[dtype], device=device)
    overflow = torch.zeros((), dtype=torch.int64, device=device)
    for k in (1, 128, 129, 511, 512, 513, 514, 1024, 1025, 1299, 1300):
        z = torch.full_like(g, math.nan)
        select_pass(g, torch.ones_like(g), z, parse_selection(f"{rule}:{k}"), None, overflow)
        assert torch.equal((z != 0)[0], torch.arange(1300, device=device) < k), k


@pytest.mark.parametrize(
    ("rule", "packed", "limit"),
    [("topk:0.1", True, 192), ("topk:0.1", False, 96), ("topk_abs:0.1", False, 48)],
)
def test_held_rows_fit_registers(rule: str, packed: bool, limit: int) -> None:
    """A longer row gets more warps, enough to hold it."""
    warps = []
    for d_ffn in (200, 1408, 5504, 11008, 24576):
        warps.append(select_tiling(d_ffn, parse_selection(rule), packed).num_warps)
        assert d_ffn <= 32 * warps[-1] * limit
    assert warps[0] == 1
    assert warps == sorted(warps)
    assert select_tiling(24576, parse_selection("nm:2:8"), packed).num_warps == 1


def expand(kept: Kept, dz: Tensor, width: int, tiling: Tiling) -> tuple[Tensor, Tensor, Tensor]:
    """(z, dg, du), each [T, width], out of buffers filled with NaN."""
    full = torch.full((dz.shape[0], 3 * width), math.nan, dtype=dz.dtype, device=dz.device)
    dg, du, z = full.split(width, dim=1)
    expand_pass(dz, kept, dg, du, z, tiling)
    return z, dg, du


@each_dtype
@pytest.mark.parametrize("d_ffn", [200, 75, 600], ids="f{}".format)
def test_expands_what_select_kept(d_ffn: int, dtype: str, device: str) -> None:
    """dg, du and z are those of float64 autograd on the kept channels and zero elsewhere."""
    rule, width = parse_selection("topk:0.3"), -(-d_ffn // 64) * 64
    g, u = rows(3, d_ffn, DTYPES[dtype], device)
    _z, kept, _overflow = select(g, u, rule)
    dz = torch.randn(3, d_ffn).to(g)
    mask = select_mask(g, rule)
    gate, up = g.double().requires_grad_(), u.double().requires_grad_()
    expected = mask * F.silu(gate) * up
    wanted = (expected.detach(), *torch.autograd.grad(expected, (gate, up), dz.double()))
    for tiling in (EXPAND_TILING, replace(EXPAND_TILING, rows=8)):
        for actual, right in zip(expand(kept, dz, width, tiling), wanted, strict=True):
            assert not actual[:, d_ffn:].any()
            assert not actual[:, :d_ffn][~mask].any()
            error = (actual[:, :d_ffn].double() - right).norm() / right.norm()
            assert float(error) <= ROUNDING[dtype]


def test_infinite_dz_stays_off_the_mask(device: str) -> None:
    """A gradient that overflowed on a channel that was not kept does not spread."""
    g, u = rows(2, 75, torch.float16, device)
    _z, kept, _overflow = select(g, u, parse_selection("topk:9"))
    dz = torch.full((2, 75), math.inf, dtype=torch.float16, device=device)
    _z, dg, du = expand(kept, dz, 128, EXPAND_TILING)
    off = ~unpack_bitmask(kept.bitmask, 75)
    assert not dg[:, :75][off].any()
    assert not du[:, :75][off].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g, u: (g.double(), u.double()), r"g has dtype torch\.float64; supported: torch\.bfloat16"),
        (lambda g, u: (g, u.float()), r"u has dtype torch\.float32"),
        (lambda g, u: (g, u[:1]), r"u has shape \(1, 75\), expected \[2, channels\]"),
        (lambda g, u: (g.T.contiguous().T, u), r"g has strides \(1, 2\): the channels .* contiguous"),
        (lambda g, u: (g.new_zeros(1, 65535), u[:1]), r"g has 65535 channels; at most 65534"),
    ],
    ids=["dtype", "mixed", "shape", "strides", "channels"],
)
def test_inputs_that_do_not_fit(change: object, message: str, device: str) -> None:
    """What the kernels cannot take is named, with what they can."""
    g, u = change(*rows(2, 75, torch.bfloat16, device))  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        select_pass(g, u, u, parse_selection("topk:3"), None, torch.zeros((), dtype=torch.int64))
