"""What the passes between the GEMMs are built from: device functions over a tile of a token's channels.

A tile is [ROWS, 32] channels. `bits` int32 [ROWS], a word of the bitmask for each row of the tile, says which
of them are kept.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton.language as tl

from moc.kernels.primitives import bits_before, jit, largest, popcount, running_total, total


@jit
def bits_set(bits):
    """Whether each channel is kept: [ROWS, 32]."""
    return ((bits[:, None] >> tl.arange(0, 32)[None, :]) & 1) != 0


@jit
def places(bits, n_kept, ASM: tl.constexpr):
    """Where the kept channels stand among the pairs of their token, `n_kept` of which lie before this tile.

    Returns (pairs before each row of the tile [ROWS, 1], pairs before each channel in its row [ROWS, 32]).
    """
    b_count = popcount(bits, ASM)
    b_before = n_kept + running_total(b_count, 0) - b_count
    b_offset = bits_before(bits[:, None], tl.arange(0, 32)[None, :], ASM)
    return b_before[:, None], b_offset


@jit
def bits_of_part(score, kth, inside, left, ASM: tl.constexpr):
    """Kept channels of a tile of a row that programs share: scores above the K-th largest, or equal to it.

    Of those equal to it the first `left` are kept. Returns (bits, how many are equal).
    """
    b_bit = (1 << tl.arange(0, 32))[None, :]
    b_equal = (score == kth) & inside
    b_words = total(tl.where(b_equal, b_bit, 0), 1)
    b_count = popcount(b_words, ASM)
    b_before = (running_total(b_count, 0) - b_count)[:, None]
    b_equal &= b_before + bits_before(b_words[:, None], tl.arange(0, 32)[None, :], ASM) < left
    b_kept = tl.where((score > kth) | b_equal, b_bit, 0)
    return total(b_kept, 1), total(b_count, 0)


@jit
def fp8_scale(row_ptr, F: tl.constexpr, PIECE: tl.constexpr):
    """What to divide a row by so that its largest magnitude is that of float8_e4m3fn, 448."""
    # Of the whole row, not of the kept channels, which are not known yet: a float's relative precision does
    # not depend on its scale, and the range of float8_e4m3fn leaves room for 15 octaves.
    b_index = tl.arange(0, PIECE)
    b_largest = tl.full((PIECE,), 0.0, tl.float32)
    for start in range(0, F, PIECE):
        b_x = tl.load(row_ptr + start + b_index, mask=start + b_index < F, other=0.0)
        b_largest = tl.maximum(b_largest, tl.abs(b_x.to(tl.float32)))
    top = largest(b_largest, 0)
    return tl.where(top > 0, top * (1 / 448.0), 1.0)


@jit
def clear_pairs(pairs_ptr, begin, end):
    """Zeros in the pairs of a row from number `begin` to `end`."""
    for start in range(begin, end, 32):
        b_place = start + tl.arange(0, 32)
        b_zero = tl.full((32,), 0.0, tl.float32).to(pairs_ptr.dtype.element_ty)
        tl.store(pairs_ptr + 2 * b_place, b_zero, mask=b_place < end)
        tl.store(pairs_ptr + 2 * b_place + 1, b_zero, mask=b_place < end)
