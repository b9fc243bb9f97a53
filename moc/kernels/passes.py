"""The passes between the GEMMs of a Mixture-of-Channels layer.

select (forward)   reads g and u; writes z = mask * silu(g) * u, and what backward needs: the kept pairs
                   (g, u) in ascending channel order, and a bitmask. Per row 6 d_ffn + 4 K + d_ffn / 8
                   bytes at 16 bits: 37.8 KB at d_ffn 5504, K 1032.
expand (backward)  reads dz = dy @ w_down.T, the pairs and the bitmask; writes dg and du, zero off the mask,
                   and z. Per row 8 d_ffn + 4 K + d_ffn / 8 bytes: 48.8 KB.

If a product uses a 2:4 sparse left matrix (`sparse24.py`), select writes the values of z in that form instead
(d_ffn bytes less), and expand writes those of [dg du] in addition to the dense ones, which the weight
gradients need (2 d_ffn bytes more).

A program handles one token's row, in tiles of ROWS x 32 channels: a row of a tile is one word of the bitmask,
and the position of a kept channel among the pairs is a running count of bits. In most cases a program is one
warp, so that reductions stay inside it; many programs per multiprocessor hide the latencies.
"""

# mypy: disable-error-code="no-untyped-def, no-redef"

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
import triton.language as tl
from torch import Tensor

from moc.config import MAX_D_FFN
from moc.dtypes import KERNEL_DTYPES, torch_dtypes
from moc.kernels.banks import BISECT, CHUNK, bits_in_banks, bits_of_chunk, way
from moc.kernels.pass_parts import bits_of_part, bits_set, clear_pairs, fp8_scale, places
from moc.kernels.primitives import (
    INTERPRETED,
    capability_of,
    check_device,
    jit,
    kept_bit,
    launching_on,
    load_pairs,
    popcount,
    sigmoid,
    store_pairs,
    total,
)
from moc.kernels.selection import NM, RULE_NUMBERS, THRESHOLD, TOPK_ABS, first_key, row_threshold, score_of
from moc.kernels.sparse24 import TILE_COLUMNS, two_of_four
from moc.selection import Selection

_DTYPES = torch_dtypes(KERNEL_DTYPES)
# Arguments whose values the kernels are not compiled for.
_SELECT_VALUES = ["g_stride", "u_stride", "z_stride", "K", "first", "quantile"]
_EXPAND_VALUES = ["dz_stride", "dg_stride", "du_stride", "z_stride", "K"]


@dataclass(frozen=True)
class Kept:
    """What is kept of T tokens between forward and backward.

    pairs [T, K, 2]: gate and up of the kept channels, ascending; rows that keep fewer (`threshold`) end in
    zeros. bitmask [T, ceil(d_ffn / 32)] int32: channel c is bit c % 32 of word c // 32. scales [T, 2]
    float32, of fp8 pairs: what gate and up were divided by.
    """

    pairs: Tensor
    bitmask: Tensor
    scales: Tensor | None = None

    def rows(self, tokens: slice) -> Kept:
        """Those of some tokens, as views."""
        scales = None if self.scales is None else self.scales[tokens]
        return Kept(self.pairs[tokens], self.bitmask[tokens], scales)


@dataclass(frozen=True)
class Tiling:
    """How a pass is laid out: constants its kernel is compiled for."""

    num_warps: int
    rows: int  # words of the bitmask, of 32 channels each, in a tile
    vector: int  # neighbouring channels in a lane, at most 8
    guess: bool = True  # select: start the search where a normal distribution has its K-th largest
    part: int = 0  # select, with nothing kept: channels of a row that a program writes; 0: all of them
    chunk: int = CHUNK  # select: channels whose banks `banks.BISECT` searches at once


@jit(do_not_specialize=_SELECT_VALUES)
def select_fwd_kernel(
    g_ptr,  # [T, g_stride]
    u_ptr,  # [T, u_stride]
    z_ptr,  # [T, z_stride], may be u; SPARSE: the values of 2:4 sparse z, [T, F / 2]
    pairs_ptr,  # [T, K, 2], or None if nothing is kept
    scales_ptr,  # [T, 2] float32, or None
    bitmask_ptr,  # [T, ceil(F / 32)] int32, or None
    overflow_ptr,  # int64 scalar: added to for THRESHOLD, else set to zero
    g_stride,
    u_stride,
    z_stride,
    K,
    first,
    quantile,
    F: tl.constexpr,
    PART: tl.constexpr,
    RULE: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    WAY: tl.constexpr,
    CHUNK: tl.constexpr,
    KEEP: tl.constexpr,
    SPARSE: tl.constexpr,
    FP8: tl.constexpr,
    PACKED: tl.constexpr,
    GUESS: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    ASM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    DTYPE: tl.constexpr = g_ptr.dtype.element_ty
    BYTES: tl.constexpr = VECTOR * DTYPE.primitive_bitwidth // 8
    WORDS: tl.constexpr = (F + 31) // 32
    g_ptr = tl.multiple_of(g_ptr + row * g_stride, BYTES)
    u_ptr = tl.multiple_of(u_ptr + row * u_stride, BYTES)
    z_ptr = tl.multiple_of(z_ptr + row * z_stride, BYTES)

    begin = tl.program_id(1) * PART
    end = tl.minimum(begin + PART, F) if PART else F
    if RULE != NM:
        # `last`: the last channel kept of those equal to the score, or, in a part, how many are.
        score, last, overflow = row_threshold(
            g_ptr, K, first, quantile, begin if PART else None, F, PIECE, RULE, PACKED, GUESS, ASM
        )
        if RULE == THRESHOLD:  # noqa: SIM102 - the outer condition is decided when compiling
            if (overflow > 0) & (tl.program_id(1) == 0):
                tl.atomic_add(overflow_ptr, overflow.to(tl.int64), sem="relaxed")
    if RULE != THRESHOLD:
        tl.store(overflow_ptr, tl.full((), 0, tl.int64), (row == 0) & (tl.program_id(1) == 0))
    if FP8:
        g_scale = fp8_scale(g_ptr, F, PIECE)
        u_scale = fp8_scale(u_ptr, F, PIECE)
        tl.store(scales_ptr + row * 2, g_scale)
        tl.store(scales_ptr + row * 2 + 1, u_scale)
    if KEEP:
        pairs_ptr += row * K * 2
        bitmask_ptr += row * WORDS

    b_bit = tl.arange(0, 32)
    b_word = tl.arange(0, ROWS)
    b_at = b_word[:, None] * 32 + b_bit[None, :]  # [ROWS, 32], a channel's place in its tile
    b_half_at = b_word[:, None] * 16 + tl.arange(0, 16)[None, :]
    n_kept = 0
    if RULE == NM and WAY == BISECT:
        b_chunk = tl.full((CHUNK // 32,), 0, tl.int32)  # the kept channels of this tile and of others
    for start in range(begin, end, ROWS * 32):
        if RULE == NM and WAY == BISECT:  # noqa: SIM102 - as above
            if start % CHUNK == 0:
                b_chunk = bits_of_chunk(g_ptr, start // 2, F, N, M, CHUNK, ASM)
        b_inside = b_at < F - start
        # Past F: never above a score, and equal to it only beyond the cut.
        b_g = tl.load(g_ptr + start + b_at, mask=b_inside, other=float("-inf"))
        b_u = tl.load(u_ptr + start + b_at, mask=b_inside, other=0.0)
        if RULE == NM and WAY == BISECT:
            b_bits = tl.gather(b_chunk, start % CHUNK // 32 + b_word, 0)
        elif RULE == NM:
            b_bits = bits_in_banks(g_ptr, b_g, start, F, ROWS, N, M, WAY, ASM)
        else:
            b_score = score_of(b_g, RULE, ASM)
            if RULE == TOPK_ABS:
                b_score = tl.where(b_inside, b_score, float("-inf"))
            if PART:
                b_bits, n_equal = bits_of_part(b_score, score, b_inside, last, ASM)
                if PART > ROWS * 32:
                    last -= n_equal
            else:
                b_kept = kept_bit(b_score, score, b_at, last - start, (1 << b_bit)[None, :], ASM)
                b_bits = total(b_kept, 1)
        # [ROWS] words say it all; what follows tests their bits, so that no predicate lives long.
        b_keep = bits_set(b_bits)
        b_gate = b_g.to(tl.float32)
        b_up = b_u.to(tl.float32)
        if KEEP:
            if FP8:
                b_g = b_gate * (1.0 / g_scale)
                b_u = b_up * (1.0 / u_scale)
            b_before, b_offset = places(b_bits, n_kept, ASM)
            store_pairs(pairs_ptr, b_before, b_offset, b_g, b_u, b_keep, ASM)
            tl.store(bitmask_ptr + start // 32 + b_word, b_bits, mask=b_word < WORDS - start // 32)
            n_kept += total(popcount(b_bits, ASM), 0)
        b_z = b_gate * sigmoid(b_gate, ASM) * tl.where(b_keep, b_up, 0.0)
        if SPARSE:
            b_half = two_of_four(b_z.to(DTYPE), b_bits, ROWS)
            tl.store(z_ptr + start // 2 + b_half_at, b_half, mask=b_half_at < (F - start) // 2)
        else:
            tl.store(z_ptr + start + b_at, b_z.to(DTYPE), mask=b_inside)
    if KEEP and RULE == THRESHOLD:
        clear_pairs(pairs_ptr, n_kept, K)


@jit(do_not_specialize=_EXPAND_VALUES)
def expand_bwd_kernel(
    dz_ptr,  # [T, dz_stride]
    pairs_ptr,  # [T, K, 2]
    scales_ptr,  # [T, 2] float32, or None
    bitmask_ptr,  # [T, ceil(F / 32)] int32
    dg_ptr,  # [T, dg_stride], PADDED columns are written
    du_ptr,  # [T, du_stride], likewise
    z_ptr,  # [T, z_stride], likewise; may be dz
    sparse_ptr,  # [T, PADDED], the values of 2:4 sparse [dg du], or None
    dz_stride,
    dg_stride,
    du_stride,
    z_stride,
    K,
    F: tl.constexpr,
    PADDED: tl.constexpr,
    SPARSE: tl.constexpr,
    FP8: tl.constexpr,
    ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    ASM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    DTYPE: tl.constexpr = dz_ptr.dtype.element_ty
    BYTES: tl.constexpr = VECTOR * DTYPE.primitive_bitwidth // 8
    WORDS: tl.constexpr = (F + 31) // 32
    dz_ptr = tl.multiple_of(dz_ptr + row * dz_stride, BYTES)
    dg_ptr = tl.multiple_of(dg_ptr + row * dg_stride, BYTES)
    du_ptr = tl.multiple_of(du_ptr + row * du_stride, BYTES)
    z_ptr = tl.multiple_of(z_ptr + row * z_stride, BYTES)
    pairs_ptr += row * K * 2
    bitmask_ptr += row * WORDS
    if FP8:
        g_scale = tl.load(scales_ptr + row * 2)
        u_scale = tl.load(scales_ptr + row * 2 + 1)

    b_bit = tl.arange(0, 32)
    b_word = tl.arange(0, ROWS)
    b_at = b_word[:, None] * 32 + b_bit[None, :]  # [ROWS, 32], a channel's place in its tile
    b_half_at = b_word[:, None] * 16 + tl.arange(0, 16)[None, :]
    if SPARSE:
        sparse_ptr += row * PADDED
    n_kept = 0
    for start in range(0, PADDED, ROWS * 32):
        b_bits = tl.load(bitmask_ptr + start // 32 + b_word, mask=b_word < WORDS - start // 32, other=0)
        b_dz = tl.load(dz_ptr + start + b_at, mask=b_at < F - start, other=0.0).to(tl.float32)
        b_before, b_offset = places(b_bits, n_kept, ASM)
        b_keep = bits_set(b_bits)
        b_g, b_u = load_pairs(pairs_ptr, b_before, b_offset, b_keep, ASM)
        n_kept += total(popcount(b_bits, ASM), 0)
        b_gate = b_g.to(tl.float32)
        b_up = b_u.to(tl.float32)
        if FP8:
            b_gate = b_gate * g_scale
            b_up = b_up * u_scale
        # Off the mask g = u = 0, so that dg, du and z are zero, unless dz is infinite.
        b_dz = tl.where(b_keep, b_dz, 0.0)
        b_sigmoid = sigmoid(b_gate, ASM)
        b_silu = b_gate * b_sigmoid
        # d silu / d g = sigmoid * (1 + g * (1 - sigmoid)) = sigmoid + silu * (1 - sigmoid)
        b_dg = b_dz * b_up * (b_sigmoid + b_silu * (1.0 - b_sigmoid))
        b_du = b_dz * b_silu
        b_z = b_silu * b_up
        tl.store(dg_ptr + start + b_at, b_dg.to(DTYPE), mask=b_at < PADDED - start)
        tl.store(du_ptr + start + b_at, b_du.to(DTYPE), mask=b_at < PADDED - start)
        tl.store(z_ptr + start + b_at, b_z.to(DTYPE), mask=b_at < PADDED - start)
        if SPARSE:
            b_inside = b_half_at < (PADDED - start) // 2
            b_ptr = sparse_ptr + start // 2 + b_half_at
            tl.store(b_ptr, two_of_four(b_dg.to(DTYPE), b_bits, ROWS), mask=b_inside)
            tl.store(b_ptr + PADDED // 2, two_of_four(b_du.to(DTYPE), b_bits, ROWS), mask=b_inside)


def select_pass(
    g: Tensor,
    u: Tensor,
    z: Tensor,
    selection: Selection,
    kept: Kept | None,
    overflow: Tensor,
    tiling: Tiling | None = None,
    sparse: bool = False,
) -> None:
    """Select channels by the gates `g`, write z = mask * silu(g) * u, and fill `kept` if given.

    g, u and z (which may be u) are [T, d_ffn] of bfloat16, float16 or float32, each row contiguous. With
    `sparse`, z is the values of a `Sparse24`, [T, d_ffn / 2] of 16 bits; that needs a rule of at most two
    channels in four (`Selection.two_of_four`) and d_ffn a multiple of 32. `kept` is for these T tokens; to
    `overflow`, an int64 scalar, the channels that the cap of a `threshold` rule left out are added, and other
    rules set it to 0. A NaN gate ranks as plus infinity. Raises ValueError for inputs that do not fit.
    """
    _check(g=g, u=u, z=z)
    n_tokens, d_ffn = g.shape
    k = selection.k(d_ffn)
    if sparse:
        _check_sparse(z, d_ffn)
        if not selection.two_of_four:
            raise ValueError(f"selection {selection} may keep more than two of four neighbouring channels")
    if n_tokens == 0:
        return
    vector = _vector(g, u, z)
    size = g.element_size()
    packed = size == 2 and vector >= 2 and capability_of(g.device) >= (9, 0)  # which can compare pairs
    tiling = tiling or select_tiling(d_ffn, selection, packed, few=kept is None and n_tokens <= FEW_TOKENS)
    fp8 = kept is not None and kept.scales is not None
    if fp8:
        _check_fp8(g.device)
    stored = (kept.pairs, kept.scales, kept.bitmask) if kept else (None, None, None)
    first = 0 if selection.rule == "topk_abs" else first_key(selection.threshold, g.dtype)
    quantile = NormalDist().inv_cdf(1 - (k - 0.5) / d_ffn)
    with launching_on(g):
        select_fwd_kernel[(n_tokens, -(-d_ffn // tiling.part) if tiling.part else 1)](
            g, u, z, *stored, overflow, g.stride(0), u.stride(0), z.stride(0), k, first, quantile,
            **select_constants(d_ffn, selection, size, packed, vector, kept is not None, fp8, tiling, sparse),
            ASM=not INTERPRETED, num_warps=tiling.num_warps,
        )  # fmt: skip


def expand_pass(
    dz: Tensor,
    kept: Kept,
    dg: Tensor,
    du: Tensor,
    z: Tensor,
    tiling: Tiling | None = None,
    sparse: Tensor | None = None,
) -> None:
    """From dz = dy @ w_down.T and what select kept: write dg, du and z, zero off the mask.

    dz is [T, d_ffn]; dg, du and z (which may share memory with dz) are [T, width] with width >= d_ffn, and
    zero beyond d_ffn; rows contiguous. `sparse`, if given, is the values of a `Sparse24` of [dg du], [T,
    width]; that needs a rule of at most two channels in four and width a multiple of 32. Raises ValueError
    for inputs that do not fit.
    """
    _check(dz=dz, dg=dg, du=du, z=z)
    n_tokens, d_ffn = dz.shape
    width = dg.shape[1]
    if not du.shape == z.shape == dg.shape or width < d_ffn:
        shapes = ", ".join(str(tuple(t.shape)) for t in (dg, du, z))
        raise ValueError(f"dg, du and z of shapes {shapes} do not fit dz {tuple(dz.shape)}")
    if sparse is not None:
        _check_sparse(sparse, 2 * width)
    if n_tokens == 0:
        return
    fp8 = kept.scales is not None
    if fp8:
        _check_fp8(dz.device)
    tiling = tiling or EXPAND_TILING
    with launching_on(dz):
        expand_bwd_kernel[(n_tokens,)](
            dz, kept.pairs, kept.scales, kept.bitmask, dg, du, z, sparse,
            dz.stride(0), dg.stride(0), du.stride(0), z.stride(0), kept.pairs.shape[1],
            **expand_constants(d_ffn, width, _vector(dz, dg, du, z), fp8, tiling, sparse is not None),
            ASM=not INTERPRETED, num_warps=tiling.num_warps,
        )  # fmt: skip


def select_constants(
    d_ffn: int,
    selection: Selection,
    itemsize: int,
    packed: bool,
    vector: int,
    keep: bool,
    fp8: bool,
    tiling: Tiling,
    sparse: bool = False,
) -> dict[str, int]:
    """What the select kernel is compiled for; `packed`: gates are of 16 bits and can be compared in pairs."""
    n, m = selection.n, selection.m
    return {
        "F": d_ffn,
        "PART": tiling.part,
        "RULE": RULE_NUMBERS[selection.rule],
        "N": n or 0,
        "M": m or 0,
        "WAY": way(n, m, itemsize, packed) if n and m else 0,
        "CHUNK": tiling.chunk,
        "KEEP": keep,
        "SPARSE": sparse,
        "FP8": fp8,
        "PACKED": packed and selection.rule != "topk_abs",
        "GUESS": tiling.guess,
        "PIECE": 512 * tiling.num_warps,
        "ROWS": tiling.rows,
        "VECTOR": min(tiling.vector, vector),
    }


def expand_constants(
    d_ffn: int, width: int, vector: int, fp8: bool, tiling: Tiling, sparse: bool = False
) -> dict[str, int]:
    """What the expand kernel is compiled for."""
    return {
        "F": d_ffn,
        "PADDED": width,
        "SPARSE": sparse,
        "FP8": fp8,
        "ROWS": tiling.rows,
        "VECTOR": min(tiling.vector, vector),
    }


def select_tiling(d_ffn: int, selection: Selection, packed: bool, few: bool = False) -> Tiling:
    """The tiling of the select pass; `packed`: gates are of 16 bits and can be compared in pairs.

    `few`: for so few tokens, with nothing kept, that one program per token would leave most of the GPU idle.
    Measured by harness/tuning on an H100 (docs/measured.md, 2026-11-26).
    """
    if few:
        return _tiling_of_few(d_ffn, selection, packed)
    if selection.rule == "nm":
        return Tiling(num_warps=1, rows=16 if (selection.m or 0) >= 32 else 8, vector=8)
    # The row is held by one warp up to so many channels.
    channels = 32 * (48 if selection.rule == "topk_abs" else 192 if packed else 96)
    num_warps = min(16, 1 << max(0, math.ceil(math.log2(d_ffn / channels))))
    num_warps = 4 if num_warps == 2 else num_warps
    return Tiling(num_warps=num_warps, rows=8 * num_warps, vector=8)


def _tiling_of_few(d_ffn: int, selection: Selection, packed: bool) -> Tiling:
    """A token's row is shared by programs, each of which searches the K-th largest for itself."""
    if selection.rule == "nm":
        n, m = selection.n or 1, selection.m or 1
        if way(n, m, 2 if packed else 4, packed) == BISECT.value:
            return Tiling(num_warps=1, rows=4, vector=8, part=128, chunk=128)
        return Tiling(num_warps=1, rows=8, vector=8, part=256)
    num_warps = 4 if d_ffn <= 8192 else 8
    return Tiling(num_warps, rows=4 * num_warps, vector=4, part=128 * num_warps)


FEW_TOKENS = 64
EXPAND_TILING = Tiling(num_warps=2, rows=16, vector=8)


def _vector(*rows: Tensor) -> int:
    """How many neighbouring channels every row allows to access at once: 8, 4, 2 or 1."""
    alignment = math.gcd(*(math.gcd(t.data_ptr(), t.stride(0) * t.element_size()) for t in rows))
    return math.gcd(8, max(1, alignment // rows[0].element_size()))


def _check(**rows: Tensor) -> None:
    first = next(iter(rows.values()))
    for name, tensor in rows.items():
        if tensor.dim() != 2 or tensor.shape[0] != first.shape[0]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected [{first.shape[0]}, channels]")
        if tensor.dtype not in _DTYPES or tensor.dtype != first.dtype:
            raise ValueError(
                f"{name} has dtype {tensor.dtype}; supported: {', '.join(map(str, _DTYPES))}, alike"
            )
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise ValueError(
                f"{name} has strides {tensor.stride()}: the channels of a token must be contiguous"
            )
        if tensor.shape[1] > MAX_D_FFN:
            raise ValueError(f"{name} has {tensor.shape[1]} channels; at most {MAX_D_FFN} are supported")
        check_device(name, tensor)


def _check_sparse(values: Tensor, width: int) -> None:
    """Whether these can be the values of a 2:4 sparse matrix of `width` columns."""
    if values.element_size() != 2 or width % TILE_COLUMNS:
        raise ValueError(
            f"a 2:4 sparse matrix has 16-bit values and a multiple of {TILE_COLUMNS} columns, not"
            f" {values.dtype} and {width}"
        )
    if values.shape[1] != width // 2 or not values.is_contiguous():
        raise ValueError(
            f"values of a 2:4 sparse matrix of {width} columns have shape {tuple(values.shape)} and strides"
            f" {values.stride()}; expected [T, {width // 2}], contiguous"
        )


def _check_fp8(device: torch.device) -> None:
    if capability_of(device) < (8, 9):
        raise ValueError("fp8 needs a GPU of compute capability 8.9 or higher")
