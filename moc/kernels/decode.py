"""Decoding kernels: a Mixture-of-Channels (or dense int8) FFN for 1 to 16 tokens.

At these sizes nearly all traffic is weights. A row of a weight is one channel, which is read whole or not at
all: all rows of w_gate, and those rows of w_up and w_down that some token keeps. Bytes at 16 bits, one token:
2 d (d_ffn + 2 K), 30.9 MB at d 2048, d_ffn 5504, K 1032 where dense moves 67.6 MB; at 8 bits half of that.

gate      gates [T, d_ffn], rounded to the dtype of x.
cut       per token the K-th largest score and up to which channel equal ones are kept (global rules).
channels  a block of channels: its gates (computed here, or read), which of them are kept, up, and
          z = silu(gate) * up; then either z is stored, or multiplied by the kept rows of w_down and added
          to y by float atomics, and the last program to finish writes y in its dtype.
down      y = z w_down, over the rows with a z. A column block is split over programs; the last of them to
          finish adds the parts in a fixed order.

clear     zeros for the sums of `channels`, where no other kernel comes before it.

`decode_launch.py` says which of them compute a layer. The first kernel of a layer starts when all work before
it is done. With PDL (programmatic dependent launch) each later kernel starts while the one before it still
runs, and waits at the point where it needs its results.
"""

# mypy: disable-error-code="no-untyped-def, no-redef"

from __future__ import annotations

import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from moc.kernels.decode_parts import (
    add_rows,
    clear,
    gathered,
    is_last,
    keep_in_banks,
    load_rows,
    matches,
    narrowed,
    prefetch,
    product,
    silu_times,
    wait,
)
from moc.kernels.primitives import jit, running_total, total
from moc.kernels.selection import NM, THRESHOLD, row_threshold, score_of

ALL = tl.constexpr(4)  # beside the rules of selection.py: every channel, the dense network


@jit(do_not_specialize=["n_zeros"])
def decode_clear_kernel(zeros_ptr, n_zeros, PDL: tl.constexpr):
    """Zeros [n_zeros] int32."""
    if PDL:
        gdc_launch_dependents()
    clear(zeros_ptr, n_zeros, 1024)


@jit(do_not_specialize=["T", "F", "n_zeros"])
def decode_gate_kernel(
    x_ptr,  # [T, D]
    gate_ptr,  # w_gate [F, D], of the dtype of x or int8
    scale_ptr,  # [F] float32, or None
    g_ptr,  # [T, g_stride], written
    zeros_ptr,  # [n_zeros] int32, written: what later kernels add to
    overflow_ptr,  # int64 scalar, set to zero
    T,
    D,
    F,
    g_stride,
    n_zeros,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
    PDL: tl.constexpr,
    ASM: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    b_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b_inside = b_row < F
    clear(zeros_ptr, n_zeros, 256)
    tl.store(overflow_ptr, tl.full((), 0, tl.int64), tl.program_id(0) == 0)
    b_gate = product(
        x_ptr, gate_ptr, scale_ptr, b_row, b_inside,
        T, D, TOKENS, ROWS, COLUMNS, EVEN, STAGES, UNROLL, ASM,
    )  # fmt: skip
    b_token = tl.arange(0, TOKENS)
    b_mask = (b_token < T)[:, None] & b_inside[None, :]
    tl.store(
        g_ptr + b_token[:, None] * g_stride + b_row[None, :],
        narrowed(b_gate, x_ptr.dtype.element_ty, ASM),
        b_mask,
    )


@jit(do_not_specialize=["g_stride", "K", "first", "quantile"])
def decode_cut_kernel(
    g_ptr,  # [T, g_stride]
    cut_ptr,  # [T, 2] int32, written: the bits of the K-th largest score, and the cut
    overflow_ptr,  # int64 scalar, added to
    g_stride,
    K,
    first,
    quantile,
    F: tl.constexpr,
    RULE: tl.constexpr,
    PACKED: tl.constexpr,
    PIECE: tl.constexpr,
    PDL: tl.constexpr,
    ASM: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    wait(PDL)
    token = tl.program_id(0)
    g_ptr = tl.multiple_of(g_ptr + token * g_stride, 16)
    score, cut, overflow = row_threshold(g_ptr, K, first, quantile, None, F, PIECE, RULE, PACKED, True, ASM)
    tl.store(cut_ptr + 2 * token, score.to(tl.int32, bitcast=True))
    tl.store(cut_ptr + 2 * token + 1, cut)
    if RULE == THRESHOLD:
        tl.atomic_add(overflow_ptr, overflow.to(tl.int64), sem="relaxed")


@jit(do_not_specialize=["T", "F", "g_stride", "K", "first", "quantile", "n_zeros"])
def decode_channels_kernel(
    x_ptr,  # [T, D]
    gate_ptr,  # w_gate, w_up, w_down [F, D], of the dtype of x or int8; w_gate None if g is given
    up_ptr,
    down_ptr,  # None if z is wanted
    gate_scale_ptr,  # [F] float32, or None, likewise the next two
    up_scale_ptr,
    down_scale_ptr,
    g_ptr,  # [T, g_stride], or None: gates are computed here
    cut_ptr,  # [T, 2], see decode_cut_kernel; or None: found here, for one token
    overflow_ptr,  # int64 scalar: zero if gates are computed here, written if the cut is found here; or None
    z_ptr,  # [T, F] float32, written; or None
    sum_ptr,  # [T, D] float32, zero; or None
    ticket_ptr,  # int32, zero; or None
    zeros_ptr,  # [n_zeros] int32, written: what the down kernel adds to
    y_ptr,  # [T, D], written; or None
    T,
    D,
    g_stride,
    K,
    first,
    quantile,
    n_zeros,
    F,
    ROW: tl.constexpr,
    RULE: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    PACKED: tl.constexpr,
    PIECE: tl.constexpr,
    TOKENS: tl.constexpr,
    BANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UP_COLUMNS: tl.constexpr,
    DOWN_COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
    ASM: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    CHANNELS: tl.constexpr = BANKS * WIDTH
    # A bank of M channels takes WIDTH places, the next power of two.
    b_at = tl.arange(0, CHANNELS)
    b_channel = (tl.program_id(0) * BANKS + b_at // WIDTH) * M + b_at % WIDTH
    b_inside = (b_at % WIDTH < M) & (b_channel < F)
    b_channel = b_channel.to(tl.int64)
    b_token = tl.arange(0, TOKENS)
    b_there = (b_token < T)[:, None] & b_inside[None, :]
    if g_ptr is None:
        b_gate = product(
            x_ptr, gate_ptr, gate_scale_ptr, b_channel, b_inside,
            T, D, TOKENS, CHANNELS, COLUMNS, EVEN, STAGES, UNROLL, ASM,
        )  # fmt: skip
        if z_ptr is None:
            wait(PDL)  # for zeros
    else:
        wait(PDL)
        b_gate = tl.load(g_ptr + b_token[:, None] * g_stride + b_channel[None, :], b_there, 0.0)
        b_gate = b_gate.to(tl.float32)
    if z_ptr is not None:
        clear(zeros_ptr, n_zeros, 128)
    if g_ptr is None and overflow_ptr is not None:
        tl.store(overflow_ptr, tl.full((), 0, tl.int64), tl.program_id(0) == 0)

    if RULE == ALL:
        b_up = product(
            x_ptr, up_ptr, up_scale_ptr, b_channel, b_inside,
            T, D, TOKENS, CHANNELS, COLUMNS, EVEN, STAGES, UNROLL, ASM,
        )  # fmt: skip
        b_z = silu_times(b_gate, b_up, ASM)
        tl.store(z_ptr + b_token[:, None] * F + b_channel[None, :], b_z, b_there)
    else:
        if RULE == NM:
            b_rounded = narrowed(b_gate, DTYPE, ASM).to(tl.float32)
            b_keep = keep_in_banks(b_rounded, b_inside, TOKENS, BANKS, N, WIDTH, ASM)
        else:
            b_keep = _keep_from_cut(
                b_gate, b_channel, b_inside, g_ptr, cut_ptr, overflow_ptr, T, K, first, quantile,
                ROW, RULE, PACKED, PIECE, TOKENS, CHANNELS, ASM,
            )  # fmt: skip
        b_keep &= (b_token < T)[:, None]
        b_gate = tl.where(b_keep, b_gate, 0.0)
        b_any = total(b_keep.to(tl.int32), 0) > 0  # [CHANNELS]: some token keeps it
        if SLOTS < CHANNELS:
            b_before = running_total(b_any.to(tl.int32), 0) - b_any.to(tl.int32)
            n_kept = total(b_any.to(tl.int32), 0)
            if z_ptr is not None:  # rows of channels that no token keeps
                b_none = (b_token < T)[:, None] & (b_inside & (b_any == 0))[None, :]
                b_zero = tl.full((TOKENS, CHANNELS), 0.0, tl.float32)
                tl.store(z_ptr + b_token[:, None] * F + b_channel[None, :], b_zero, b_none)
        else:
            b_before = b_any
            n_kept = 1
        # Programs with the same channels share the kept ones.
        for done in range(tl.program_id(1) * SLOTS, n_kept, tl.num_programs(1) * SLOTS):
            b_row, b_used, b_stored, b_chosen = _kept_rows(
                b_gate, b_channel, b_inside, b_any, b_before, done, n_kept, SLOTS, CHANNELS
            )
            if AHEAD and ASM:
                prefetch(up_ptr, b_row, b_used, D, AHEAD)
                if z_ptr is None:
                    prefetch(down_ptr, b_row, b_used, D, AHEAD)
            b_up = product(
                x_ptr, up_ptr, up_scale_ptr, b_row, b_used,
                T, D, TOKENS, SLOTS, UP_COLUMNS, EVEN, STAGES, UNROLL, ASM,
            )  # fmt: skip
            b_z = silu_times(b_chosen, b_up, ASM)
            if z_ptr is not None:
                b_wanted = (b_token < T)[:, None] & b_stored[None, :]
                tl.store(z_ptr + b_token[:, None] * F + b_row[None, :], b_z, b_wanted)
            else:
                _add_down(
                    sum_ptr, down_ptr, down_scale_ptr, b_z, b_row, b_used,
                    T, D, DTYPE, TOKENS, SLOTS, DOWN_COLUMNS, UNROLL, ASM,
                )  # fmt: skip
        if z_ptr is None:  # noqa: SIM102 - the outer condition is decided when compiling
            if is_last(ticket_ptr, tl.num_programs(0) * tl.num_programs(1)):
                for start in range(0, T * D, 4096):  # large: a program alone waits for each step
                    b_out = start + tl.arange(0, 4096)
                    b_total = tl.load(sum_ptr + b_out, b_out < T * D, 0.0, cache_modifier=".cg")
                    tl.store(y_ptr + b_out, narrowed(b_total, DTYPE, ASM), b_out < T * D)


@jit
def _keep_from_cut(
    b_gate,
    b_channel,
    b_inside,
    g_ptr,
    cut_ptr,
    overflow_ptr,
    T,
    K,
    first,
    quantile,
    ROW: tl.constexpr,
    RULE: tl.constexpr,
    PACKED: tl.constexpr,
    PIECE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Which gates [TOKENS, CHANNELS] a global rule keeps, by the cut of their row: read, or found here."""
    b_mine = score_of(b_gate, RULE, ASM)
    if cut_ptr is None:
        begin = tl.program_id(0) * CHANNELS
        score, ties, overflow = row_threshold(
            g_ptr, K, first, quantile, begin, ROW, PIECE, RULE, PACKED, True, ASM
        )
        if RULE == THRESHOLD:
            tl.store(overflow_ptr, overflow.to(tl.int64), tl.program_id(0) == 0)
        b_equal = ((b_mine == score) & b_inside[None, :]).to(tl.int32)
        b_keep = (b_equal > 0) & (running_total(b_equal, 1) <= ties)
        b_score = score
    else:
        b_token = tl.arange(0, TOKENS)
        b_score = tl.load(cut_ptr + 2 * b_token, b_token < T, 0).to(tl.float32, bitcast=True)[:, None]
        b_cut = tl.load(cut_ptr + 2 * b_token + 1, b_token < T, -1)
        b_keep = (b_mine == b_score) & (b_channel[None, :] <= b_cut[:, None])
    return ((b_mine > b_score) | b_keep) & b_inside[None, :]


@jit
def _kept_rows(
    b_gate, b_channel, b_inside, b_any, b_before, done, n_kept, SLOTS: tl.constexpr, CHANNELS: tl.constexpr
):
    """The next kept channels: their rows, which rows to load, which z to store, their gates [TOKENS, SLOTS].

    With fewer slots than channels the kept rows number `done` to `done` + SLOTS, side by side; else all rows,
    of which the kept ones are loaded.
    """
    if SLOTS < CHANNELS:
        b_match = matches(b_any, b_before, done, SLOTS)
        b_used = done + tl.arange(0, SLOTS) < n_kept
        b_row = total(tl.where(b_match, b_channel[None, :], 0), 1)
        return b_row, b_used, b_used, gathered(b_gate, b_match)
    else:
        return b_channel, b_any, b_inside, b_gate


@jit
def _add_down(
    sum_ptr,
    down_ptr,
    scale_ptr,
    b_z,
    b_row,
    b_used,
    T,
    D,
    DTYPE: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
    ASM: tl.constexpr,
):
    """Add z [TOKENS, SLOTS] times rows of w_down to the sums [T, D], by float atomics."""
    if scale_ptr is not None:
        b_z *= tl.load(scale_ptr + b_row, b_used, 0.0)[None, :]
    b_token = tl.arange(0, TOKENS)
    b_column = tl.arange(0, COLUMNS)
    for start in tl.range(0, D, COLUMNS, loop_unroll_factor=UNROLL):
        b_here = b_column < D - start
        b_w = load_rows(down_ptr, b_row, b_used, start + b_column, b_here, D)
        b_y = tl.full((SLOTS if TOKENS == 1 else TOKENS, COLUMNS), 0.0, tl.float32)
        b_y = add_rows(b_y, b_z, b_w, DTYPE, TOKENS, SLOTS, ASM)
        if TOKENS == 1:
            b_y = total(b_y, 0)[None, :]
        b_sum_ptr = sum_ptr + b_token[:, None] * D + start + b_column[None, :]
        tl.atomic_add(b_sum_ptr, b_y, (b_token < T)[:, None] & b_here[None, :], sem="relaxed")


@jit(do_not_specialize=["T", "F", "BLOCKS"])
def decode_down_kernel(
    z_ptr,  # [T, F] float32
    down_ptr,  # w_down [F, D], of the dtype of y or int8
    scale_ptr,  # [F] float32, or None
    parts_ptr,  # [splits, T, D] float32, written
    tickets_ptr,  # int32 [column blocks], zero
    y_ptr,  # [T, D], written
    T,
    D,
    F,
    BLOCKS,
    DENSE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
    ASM: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    wait(PDL)
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    split = tl.program_id(0)
    b_column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    b_here = b_column < D
    b_token = tl.arange(0, TOKENS)
    # One token: one sum per lane, added up over lanes at the end, so that no step waits for other warps.
    b_sum = tl.full((SLOTS if TOKENS == 1 else TOKENS, COLUMNS), 0.0, tl.float32)
    for block in tl.range(BLOCKS, num_stages=STAGES):
        b_row = (split * BLOCKS + block) * ROWS + tl.arange(0, ROWS)
        b_inside = b_row < F
        b_there = (b_token < T)[:, None] & b_inside[None, :]
        b_z = tl.load(z_ptr + b_token[:, None] * F + b_row[None, :], b_there, 0.0)
        if scale_ptr is not None:
            b_z *= tl.load(scale_ptr + b_row, b_inside, 0.0)[None, :]
        if SLOTS < ROWS:  # the rows with a z side by side
            b_any = total((b_z != 0.0).to(tl.int32), 0) > 0
            b_before = running_total(b_any.to(tl.int32), 0) - b_any.to(tl.int32)
            n_kept = total(b_any.to(tl.int32), 0)
            for done in range(0, n_kept, SLOTS):
                b_match = matches(b_any, b_before, done, SLOTS)
                b_used = done + tl.arange(0, SLOTS) < n_kept
                b_kept = total(tl.where(b_match, b_row[None, :], 0), 1).to(tl.int64)
                b_w = load_rows(down_ptr, b_kept, b_used, b_column, b_here, D)
                b_sum = add_rows(b_sum, gathered(b_z, b_match), b_w, DTYPE, TOKENS, SLOTS, ASM)
        else:  # all rows, those with a z loaded
            if not DENSE:
                b_inside = total((b_z != 0.0).to(tl.int32), 0) > 0
            b_w = load_rows(down_ptr, b_row.to(tl.int64), b_inside, b_column, b_here, D)
            b_sum = add_rows(b_sum, b_z, b_w, DTYPE, TOKENS, SLOTS, ASM)
    if TOKENS == 1:
        b_sum = total(b_sum, 0)[None, :]
    b_at = b_token[:, None] * D + b_column[None, :]
    b_mask = (b_token < T)[:, None] & b_here[None, :]
    tl.store(parts_ptr + split * T * D + b_at, b_sum, b_mask)
    n_splits = tl.num_programs(0)
    if is_last(tickets_ptr + tl.program_id(1), n_splits):
        b_y = tl.full((TOKENS, COLUMNS), 0.0, tl.float32)
        if TOKENS == 1:  # several parts at once: a program alone waits for each step
            b_part = tl.arange(0, 16)
            for other in range(0, n_splits, 16):
                b_wanted = (b_part < n_splits - other)[:, None] & b_here[None, :]
                b_parts_ptr = parts_ptr + (other + b_part)[:, None] * D + b_column[None, :]
                b_parts = tl.load(b_parts_ptr, b_wanted, 0.0, cache_modifier=".cg")
                b_y += total(b_parts, 0)[None, :]
            tl.store(y_ptr + b_column, narrowed(tl.reshape(b_y, (COLUMNS,)), DTYPE, ASM), b_here)
        else:
            for other in tl.range(0, n_splits, loop_unroll_factor=4):
                b_y += tl.load(parts_ptr + other * T * D + b_at, b_mask, 0.0, cache_modifier=".cg")
            tl.store(y_ptr + b_at, narrowed(b_y, DTYPE, ASM), b_mask)
