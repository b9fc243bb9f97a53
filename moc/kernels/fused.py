"""`nm` selection in the epilogue of the gate-up GEMM: g and u never reach memory.

gate_up_nm_fwd   [g u] = x [w_gate; w_up].T, selection, z, pairs and bitmask in one kernel. Reads x and the
                 weights as a GEMM does and writes 2 d_ffn + 4 K + d_ffn / 8 bytes per row. Against GEMM and
                 select pass that is 8 d_ffn bytes per row less: 44 KB at d_ffn 5504, or 0.24 ms for 16384
                 tokens at 3 TB/s.

A program computes the same BLOCK_N channels of gate and up for BLOCK_M tokens. A bank lies in one tile, so
the place of a kept channel among its row's pairs is known: n times its bank, plus its rank by channel in the
bank. For 16-bit dtypes, m = 8 or 16, n <= 4 and d_ffn a multiple of BLOCK_N.

Not used by the layer: `tune.py` times it. Its epilogue is about 4000 instructions per warp on a tile whose
GEMM takes as long as 31,000 cycles of the tensor cores, with nothing to overlap it.
"""

# mypy: disable-error-code="no-untyped-def, no-redef, assignment, misc"

from __future__ import annotations

from dataclasses import dataclass

import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moc.kernels.between import Kept
from moc.kernels.primitives import (
    INTERPRETED,
    jit,
    largest,
    launching_on,
    ranked,
    running_total,
    sigmoid,
    store_pairs,
    total,
)
from moc.selection import Selection

_LEAST = tl.constexpr(-(1 << 31))


@dataclass(frozen=True)
class GemmTiling:
    """Tile of the fused GEMM: tokens, channels (of gate and of up), depth; and its pipeline."""

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    num_warps: int = 8
    num_stages: int = 3
    group: int = 8  # tiles of tokens that share a tile of weights in the L2 cache


@jit(do_not_specialize=["T", "z_stride", "K"])
def gate_up_nm_fwd_kernel(
    x_desc,  # [T, D] in tiles [BLOCK_M, BLOCK_K]
    w_gate_desc,  # [F, D] in tiles [BLOCK_N, BLOCK_K]
    w_up_desc,
    z_ptr,  # [T, z_stride]
    pairs_ptr,  # [T, K, 2]
    bitmask_ptr,  # [T, F / 32] int32
    T,
    z_stride,
    K,
    D: tl.constexpr,
    F: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    ASM: tl.constexpr,
):
    # Programs that run at the same time share tiles of x and of the weights.
    tiles_m = (T + BLOCK_M - 1) // BLOCK_M
    TILES_N: tl.constexpr = F // BLOCK_N
    first_m = tl.program_id(0) // (GROUP * TILES_N) * GROUP
    group_m = tl.minimum(tiles_m - first_m, GROUP)
    tile_m = first_m + tl.program_id(0) % (GROUP * TILES_N) % group_m
    tile_n = tl.program_id(0) % (GROUP * TILES_N) // group_m

    b_gate = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    b_up = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for k in range(0, D, BLOCK_K):
        b_x = x_desc.load([tile_m * BLOCK_M, k])
        b_gate = tl.dot(b_x, w_gate_desc.load([tile_n * BLOCK_N, k]).T, b_gate)
        b_up = tl.dot(b_x, w_up_desc.load([tile_n * BLOCK_N, k]).T, b_up)

    DTYPE: tl.constexpr = z_ptr.dtype.element_ty
    BANKS: tl.constexpr = BLOCK_N // M
    b_g = b_gate.to(DTYPE)
    b_u = b_up.to(DTYPE)
    # As in banks.py: integers in the order of the gates, made unique by the place in the bank.
    b_place = tl.arange(0, BLOCK_N) % M
    b_bits = (ranked(b_g.to(tl.float32), ASM) + 0.0).to(tl.int32, bitcast=True)
    b_key = (b_bits ^ ((b_bits >> 31) & 0x7FFFE000)) | (M - 1 - b_place)[None, :]
    b_key = tl.reshape(b_key, (BLOCK_M, BANKS, M))
    b_left = b_key
    for _ in tl.static_range(N - 1):
        b_left = tl.where(b_left == largest(b_left, 2)[:, :, None], _LEAST, b_left)
    b_keep = (b_key >= largest(b_left, 2)[:, :, None]).to(tl.int32)
    b_rank = running_total(b_keep, 2) - b_keep
    b_rank = tl.reshape(b_rank + (N * tl.arange(0, BANKS))[None, :, None], (BLOCK_M, BLOCK_N))
    b_keep = tl.reshape(b_keep, (BLOCK_M, BLOCK_N))

    b_row = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    b_inside = (b_row < T)[:, None]
    b_channel = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_first = (b_row * K + tile_n * (BANKS * N))[:, None]
    store_pairs(pairs_ptr, b_first, b_rank, b_g, b_u, b_inside & (b_keep != 0), False, ASM)
    b_words = tl.reshape(b_keep << (tl.arange(0, BLOCK_N) % 32)[None, :], (BLOCK_M, BLOCK_N // 32, 32))
    b_word_at = b_row[:, None] * (F // 32) + tile_n * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32)[None, :]
    tl.store(bitmask_ptr + b_word_at, total(b_words, 2), mask=b_inside)
    b_gate = b_g.to(tl.float32)
    b_z = b_gate * sigmoid(b_gate, ASM) * tl.where(b_keep != 0, b_u.to(tl.float32), 0.0)
    tl.store(z_ptr + b_row[:, None] * z_stride + b_channel[None, :], b_z.to(DTYPE), mask=b_inside)


def gate_up_nm(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    selection: Selection,
    kept: Kept,
    z: Tensor,
    tiling: GemmTiling | None = None,
) -> None:
    """z = mask * silu(x w_gate.T) * (x w_up.T) [T, d_ffn] and what backward keeps, for an `nm` rule.

    x is [T, d], the weights [d_ffn, d], contiguous, of float16 or bfloat16. Raises ValueError for a rule or a
    shape that the kernel cannot take (see the module's docstring).
    """
    tiling = tiling or GemmTiling()
    n_tokens, d = x.shape
    d_ffn = w_gate.shape[0]
    n, m = selection.n, selection.m
    if n is None or m is None or n > 4 or m not in (8, 16) or d_ffn % tiling.block_n or x.element_size() != 2:
        raise ValueError(f"{selection} of {d_ffn} channels in {x.dtype} does not fit the fused kernel")
    if n_tokens == 0:
        return
    tokens, channels = [tiling.block_m, tiling.block_k], [tiling.block_n, tiling.block_k]
    tiles = -(-n_tokens // tiling.block_m) * (d_ffn // tiling.block_n)
    with launching_on(x):
        gate_up_nm_fwd_kernel[(tiles,)](
            TensorDescriptor.from_tensor(x, tokens),
            TensorDescriptor.from_tensor(w_gate, channels),
            TensorDescriptor.from_tensor(w_up, channels),
            z,
            kept.pairs,
            kept.bitmask,
            n_tokens,
            z.stride(0),
            kept.pairs.shape[1],
            D=d,
            F=d_ffn,
            N=n,
            M=m,
            BLOCK_M=tiling.block_m,
            BLOCK_N=tiling.block_n,
            BLOCK_K=tiling.block_k,
            GROUP=tiling.group,
            ASM=not INTERPRETED,
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
        )
