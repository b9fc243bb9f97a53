"""Device functions of the decoding kernels, over rows of the weights.

If TOKENS is 1, products are summed lane by lane in float32; if it is 16, they run on the tensor cores.
"""

# mypy: disable-error-code="no-untyped-def, no-redef"
# ruff: noqa: SIM300 - capitals are compile-time constants, often on the left

from __future__ import annotations

import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from moc.kernels.primitives import jit, largest, ranked, sigmoid, total

_LEAST = tl.constexpr(-(1 << 31))


@jit
def prefetch(w_ptr, b_row, b_used, D, PIECES: tl.constexpr):
    """Ask for rows of w to be brought into the L2 cache, each in PIECES requests.

    Rows times PIECES should be the threads of the program: with fewer, several would ask for the same.
    """
    BYTES: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth // 8
    size = tl.cdiv(D * BYTES, PIECES * 16) * 16
    b_start = tl.arange(0, PIECES) * size
    b_size = (tl.minimum(size, D * BYTES - b_start) & -16)[None, :] * b_used.to(tl.int32)[:, None]
    b_address = ((w_ptr + b_row * D).to(tl.int64)[:, None] + b_start[None, :]) & -16
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.gt.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2;"
        " mov.b32 $0, 0; }",
        "=r,l,r", [b_address, b_size], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@jit
def wait(PDL: tl.constexpr):
    """Wait for the kernel before, if this one was launched while that one was still running."""
    if PDL:
        gdc_wait()


@jit
def narrowed(x, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """float32 to DTYPE, rounded to nearest even."""
    if not ASM and DTYPE == tl.bfloat16:  # the interpreter drops the low half
        b_bits = x.to(tl.int32, bitcast=True)
        x = ((b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@jit
def product(
    x_ptr,
    w_ptr,
    scale_ptr,
    b_row,
    b_inside,
    T,
    D,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
    ASM: tl.constexpr,
):
    """x [T, D] times the rows `b_row` (int64 [ROWS]) of w: float32 [TOKENS, ROWS], zero where not inside.

    Multiplied by the scales of the rows, if there are any (`scale_ptr` is not None).
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    b_column = tl.arange(0, COLUMNS)
    b_w_ptr = w_ptr + b_row[:, None] * D + b_column[None, :]
    if TOKENS == 1:
        b_parts = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
        for start in tl.range(0, D, COLUMNS, num_stages=STAGES, loop_unroll_factor=UNROLL):
            if EVEN:
                b_x = tl.load(x_ptr + start + b_column)
                b_w = tl.load(b_w_ptr + start, b_inside[:, None], 0.0, eviction_policy="evict_first")
            else:
                b_here = b_column < D - start
                b_x = tl.load(x_ptr + start + b_column, b_here, 0.0)
                b_mask = b_inside[:, None] & b_here[None, :]
                b_w = tl.load(b_w_ptr + start, b_mask, 0.0, eviction_policy="evict_first")
            b_parts += b_w.to(tl.float32) * b_x.to(tl.float32)[None, :]
        b_sum = total(b_parts, 1)[None, :]
    else:
        b_token = tl.arange(0, TOKENS)
        b_x_ptr = x_ptr + b_token[:, None] * D + b_column[None, :]
        b_sum = tl.full((TOKENS, ROWS), 0.0, tl.float32)
        for start in tl.range(0, D, COLUMNS, num_stages=STAGES):
            b_here = b_column < D - start
            b_x = tl.load(b_x_ptr + start, (b_token < T)[:, None] & b_here[None, :], 0.0)
            b_mask = b_inside[:, None] & b_here[None, :]
            b_w = tl.load(b_w_ptr + start, b_mask, 0.0, eviction_policy="evict_first")
            if ASM:
                b_sum = tl.dot(b_x, tl.trans(b_w.to(DTYPE)), b_sum)
            else:  # the interpreter multiplies the bits of bf16 numbers
                b_sum += tl.dot(b_x.to(tl.float32), tl.trans(b_w.to(tl.float32)))
    if scale_ptr is not None:
        b_sum *= tl.load(scale_ptr + b_row, b_inside, 0.0)[None, :]
    return b_sum


@jit
def load_rows(w_ptr, b_row, b_used, b_column, b_here, D):
    """Some columns of the rows `b_row` (int64) of w, zero where not used or not here."""
    b_mask = b_used[:, None] & b_here[None, :]
    b_w_ptr = w_ptr + b_row[:, None] * D + b_column[None, :]
    return tl.load(b_w_ptr, b_mask, 0.0, eviction_policy="evict_first")


@jit
def add_rows(
    b_sum, b_z, b_w, DTYPE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, ASM: tl.constexpr
):
    """b_sum plus z [TOKENS, ROWS] times w [ROWS, COLUMNS]; for one token row by row: [ROWS, COLUMNS]."""
    if TOKENS == 1:
        return b_sum + tl.reshape(b_z, (ROWS,))[:, None] * b_w.to(tl.float32)
    elif ASM:
        return tl.dot(b_z.to(DTYPE), b_w.to(DTYPE), b_sum)
    else:
        return b_sum + tl.dot(narrowed(b_z, DTYPE, ASM).to(tl.float32), b_w.to(tl.float32))


@jit
def keep_in_banks(
    b_gate,
    b_inside,
    TOKENS: tl.constexpr,
    BANKS: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    ASM: tl.constexpr,
):
    """Which of [TOKENS, BANKS * WIDTH] gates are among the N largest of their bank."""
    b_place = tl.arange(0, WIDTH)
    b_score = tl.where(b_inside[None, :], ranked(b_gate, ASM), float("-inf"))
    if TOKENS == 1:
        # Nothing outside beats anything inside: those channels are the last of their bank.
        b_score = tl.reshape(b_score, (BANKS, WIDTH))
        b_tie = b_place[None, None, :] < b_place[None, :, None]
        b_mine, b_theirs = b_score[:, :, None], b_score[:, None, :]
        b_beats = (b_theirs > b_mine) | ((b_theirs == b_mine) & b_tie)
        b_keep = tl.reshape(total(b_beats.to(tl.int32), 2) < N, (TOKENS, BANKS * WIDTH))
        return b_keep & b_inside[None, :]
    else:
        # A 16-bit float has 13 low zero bits as a float32. As an integer in the order of the floats, with the
        # place in the bank in its low bits, no two are equal. Adding zero unites the zeros.
        b_bits = (b_score + 0.0).to(tl.int32, bitcast=True)
        b_key = tl.reshape(b_bits ^ ((b_bits >> 31) & 0x7FFFE000), (TOKENS * BANKS, WIDTH))
        b_key = b_key | (WIDTH - 1 - b_place)[None, :]
        b_outside = tl.broadcast_to((b_inside == 0)[None, :], (TOKENS, BANKS * WIDTH))
        b_key = tl.where(tl.reshape(b_outside, (TOKENS * BANKS, WIDTH)), _LEAST, b_key)
        b_left = b_key
        for _ in range(N - 1):
            b_left = tl.where(b_left == largest(b_left, 1)[:, None], _LEAST, b_left)
        b_keep = (b_key >= largest(b_left, 1)[:, None]) & (b_key != _LEAST)
        return tl.reshape(b_keep, (TOKENS, BANKS * WIDTH))


@jit
def matches(b_keep, b_before, first, SLOTS: tl.constexpr):
    """[SLOTS, CHANNELS]: whether a channel is the kept one number first + slot."""
    return b_keep[None, :] & (b_before[None, :] == first + tl.arange(0, SLOTS)[:, None])


@jit
def gathered(b_values, b_match):
    """Values [TOKENS, CHANNELS] of the matching channels: [TOKENS, SLOTS], zero for a slot without one."""
    return total(tl.where(b_match[None, :, :], b_values[:, None, :], 0.0), 2)


@jit
def silu_times(b_gate, b_up, ASM: tl.constexpr):
    """silu(gate) * up; zero where the gate is, whatever up is."""
    return tl.where(b_gate != 0.0, b_gate * sigmoid(b_gate, ASM) * b_up, 0.0)


@jit
def is_last(ticket_ptr, count):
    """Whether this is the last of `count` programs to come here; if so it sees what all others wrote."""
    tl.debug_barrier()  # what other threads of this program wrote, too
    return tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == count - 1


@jit
def clear(zeros_ptr, n_zeros, BLOCK: tl.constexpr):
    """Fill with zeros, shared among the programs."""
    stride = tl.num_programs(0) * BLOCK
    for start in range(tl.program_id(0) * BLOCK, n_zeros, stride):
        b_at = start + tl.arange(0, BLOCK)
        tl.store(zeros_ptr + b_at, 0, mask=b_at < n_zeros)
