"""`nm` selection: which n gates of each bank of m neighbouring channels are the largest. Device functions.

A tail bank of t < m channels keeps min(n, t). There are three algorithms, all exact; of equal gates the
lowest channel wins:

RANK     any n and m, any dtype: each channel counts the channels of its bank with a larger gate, which are
         read again from L1: m comparisons per channel.
EXTRACT  n <= 4, m a power of two, 16-bit gates: the bank's largest is removed n - 1 times.
BISECT   m = 32 or 64, 16-bit gates: the bank's nth largest is searched by counting, two channels packed in a
         register. The search starts four octaves below the bank's largest, above which the nth largest
         nearly always lies: 10 rounds instead of 16. It handles 2048 channels at once, whole banks in a
         lane, so that no count crosses lanes; the following tiles take their words of bits from it.
"""

# mypy: disable-error-code="no-untyped-def, no-redef, assignment"
# ruff: noqa: SIM300 - capitals are compile-time constants, often on the left

from __future__ import annotations

import triton.language as tl

from moc.kernels.primitives import jit, largest, popcount, ranked, total
from moc.kernels.selection import compare_pairs, half, key_bits, larger_pairs, padded_pairs, pairs_counted

RANK, EXTRACT, BISECT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
CHUNK = 2048  # channels whose banks BISECT searches at once: 32 banks of 64, one in each lane
_LEAST = tl.constexpr(-(1 << 31))


def way(n: int, m: int, itemsize: int, packed: bool) -> int:
    """The fastest for n:m; `packed`: gates are of 16 bits and can be compared in pairs."""
    if m & (m - 1) == 0:
        if n <= 4 and itemsize == 2:
            return EXTRACT.value
        if m >= 32 and packed:
            return BISECT.value
    return RANK.value


@jit
def bits_in_banks(
    row_ptr,
    b_gate,
    start,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    WAY: tl.constexpr,
    ASM: tl.constexpr,
):
    """The channels of a tile that are kept, as the bits of [ROWS] words, by RANK or EXTRACT.

    The tile is the channels from `start`, a multiple of ROWS * 32, of the row at `row_ptr`; `b_gate`
    [ROWS, 32] are its gates, minus infinity past F.
    """
    if WAY == EXTRACT:
        return _extract(b_gate, start, F, ROWS, N, M, ASM)
    else:
        return _rank(row_ptr, b_gate, start, F, ROWS, N, M, ASM)


@jit
def _word(keep):
    """bool [ROWS, 32] as the bits of [ROWS] words."""
    return total(tl.where(keep, (1 << tl.arange(0, 32))[None, :], 0), 1)


@jit
def _rank(
    row_ptr,
    b_gate,
    start,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    ASM: tl.constexpr,
):
    b_channel = start + tl.arange(0, ROWS)[:, None] * 32 + tl.arange(0, 32)[None, :]
    b_score = ranked(b_gate.to(tl.float32), ASM)
    b_bank = b_channel - b_channel % M
    b_beaten_by = tl.full((ROWS, 32), 0, tl.int32)
    for j in range(M):
        b_other = b_bank + j
        b_theirs = tl.load(row_ptr + b_other, mask=b_other < F, other=0.0)
        b_theirs = ranked(b_theirs.to(tl.float32), ASM)
        b_beats = (b_theirs > b_score) | ((b_theirs == b_score) & (b_other < b_channel))
        b_beaten_by += (b_beats & (b_other < F)).to(tl.int32)
    return _word((b_beaten_by < N) & (b_channel < F))


@jit
def _extract(
    b_gate, start, F: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr, M: tl.constexpr, ASM: tl.constexpr
):
    b_banks = tl.reshape(b_gate, (ROWS * 32 // M, M))
    b_place = tl.arange(0, M)
    # A 16-bit float has at least 13 low zero bits as a float32. As an integer in the order of the floats,
    # with the place in the bank in its low bits, no two channels of a bank are equal. Adding zero unites
    # the zeros.
    b_bits = (ranked(b_banks.to(tl.float32), ASM) + 0.0).to(tl.int32, bitcast=True)
    b_key = (b_bits ^ ((b_bits >> 31) & 0x7FFFE000)) | (M - 1 - b_place)[None, :]
    if F % (ROWS * 32) != 0:
        b_channel = start + tl.arange(0, ROWS * 32 // M)[:, None] * M + b_place[None, :]
        b_key = tl.where(b_channel < F, b_key, _LEAST)
    b_left = b_key
    for _ in tl.static_range(N - 1):
        b_left = tl.where(b_left == largest(b_left, 1)[:, None], _LEAST, b_left)
    b_keep = b_key >= largest(b_left, 1)[:, None]
    if F % (ROWS * 32) != 0:
        b_keep = b_keep & (b_key != _LEAST)
    return _word(tl.reshape(b_keep, (ROWS, 32)))


@jit
def _lowest(b_equal, b_count, b_wanted):
    """Of the `b_count` bits set in words [BANKS, words] the lowest `b_wanted`, none if negative."""
    b_all = b_wanted >= b_count  # nearly always
    b_wanted = tl.where(b_all, 0, tl.maximum(b_wanted, 0))
    b_keep = tl.where(b_all, b_equal, 0)
    while largest(largest(b_wanted, 1), 0) > 0:
        b_lowest = tl.where(b_wanted > 0, b_equal & -b_equal, 0)
        b_keep |= b_lowest
        b_equal ^= b_lowest
        b_wanted -= 1
    return b_keep


@jit
def bits_of_chunk(
    row_ptr, pair, F: tl.constexpr, N: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr, ASM: tl.constexpr
):
    """The kept of CHUNK channels, from 2 * `pair` on, as the bits of [CHUNK / 32] words, by BISECT."""
    DTYPE: tl.constexpr = row_ptr.dtype.element_ty
    BANKS: tl.constexpr = CHUNK // M
    OCTAVE: tl.constexpr = 128 if DTYPE == tl.bfloat16 else 1024
    INFINITY: tl.constexpr = 0x7F80 if DTYPE == tl.bfloat16 else 0x7C00
    b_pieces = ()
    for i in tl.static_range(M // 8):
        b_pieces = b_pieces + (_piece_of_banks(row_ptr, pair, i, F, BANKS, M, CHUNK, DTYPE),)  # noqa: RUF005
    b_low = _nth_of_banks(b_pieces, N, BANKS, OCTAVE, INFINITY, DTYPE, ASM)
    b_from = _words_of(b_pieces, b_low, False, BANKS, M, DTYPE, ASM)  # [BANKS, M / 32]
    if F % CHUNK != 0:
        b_channel = tl.arange(0, BANKS)[:, None] * M + tl.arange(0, M // 32)[None, :] * 32
        b_inside = tl.minimum(tl.maximum(F - 2 * pair - b_channel, 0), 32)
        b_from &= tl.where(b_inside == 32, -1, (1 << (b_inside & 31)) - 1)
    if largest(total(popcount(b_from, ASM), 1), 0) > N:
        b_above = _words_of(b_pieces, b_low, True, BANKS, M, DTYPE, ASM)
        b_above = tl.where(b_low[:, None] < INFINITY, b_above, 0)  # NaN ranks as infinity
        b_equal = b_from ^ b_above
        b_count = popcount(b_equal, ASM)
        b_wanted = (N - total(popcount(b_above, ASM), 1))[:, None]
        if M == 64:  # what the first word has the second need not; a scan would say the same
            b_before = total(b_count, 1)[:, None] - b_count
            b_wanted -= tl.where(tl.arange(0, 2)[None, :] == 1, b_before, 0)
        b_from = b_above | _lowest(b_equal, b_count, b_wanted)
    return tl.reshape(b_from, (CHUNK // 32,))


@jit
def _piece_of_banks(
    row_ptr,
    pair,
    i: tl.constexpr,
    F: tl.constexpr,
    BANKS: tl.constexpr,
    M: tl.constexpr,
    CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The i-th four pairs of each bank [BANKS, 4], minus infinity from F on."""
    PADDING: tl.constexpr = -0x7F0080 if DTYPE == tl.bfloat16 else -0x3FF0400
    b_pair = tl.arange(0, BANKS)[:, None] * (M // 2) + tl.arange(0, 4)[None, :] + 4 * i
    b_ptr = row_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + pair + b_pair
    if F % CHUNK == 0:
        return tl.load(b_ptr)
    elif F % 2 == 0:
        # Compared as pairs and not as channels, so that the compiler sees that four lie on one side of F.
        return tl.load(b_ptr, mask=b_pair < F // 2 - pair, other=PADDING)
    else:
        return padded_pairs(b_ptr, 2 * b_pair, F - 2 * pair, True, DTYPE)


@jit
def _words_of(
    pieces,
    b_key,
    ABOVE: tl.constexpr,
    BANKS: tl.constexpr,
    M: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Which channels of a bank are at least the float with its key, or ABOVE it: [BANKS, M / 32] words.

    NaN is above all.
    """
    b_twice = (key_bits(b_key, DTYPE) * 0x10001)[:, None]
    if M == 64:
        b_first = _word_of(pieces, 0, b_twice, ABOVE, DTYPE, ASM)
        return tl.join(b_first, _word_of(pieces, 4, b_twice, ABOVE, DTYPE, ASM))
    else:
        return _word_of(pieces, 0, b_twice, ABOVE, DTYPE, ASM)[:, None]


@jit
def _word_of(
    pieces, first: tl.constexpr, b_twice, ABOVE: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr
):
    b_bits = (0x10001 << tl.arange(0, 4))[None, :]
    b_word = tl.full(pieces[0].shape, 0, tl.int32)
    for i in tl.static_range(4):
        b_word |= compare_pairs(pieces[first + i], b_twice, ABOVE, DTYPE, ASM) & (b_bits << (4 * i))
    b_word = total(b_word, 1)
    # The even channels are in the low half, the odd ones in the high half: shuffle them together.
    b_swap = (b_word ^ (b_word >> 8)) & 0x0000FF00
    b_word ^= b_swap ^ (b_swap << 8)
    b_swap = (b_word ^ (b_word >> 4)) & 0x00F000F0
    b_word ^= b_swap ^ (b_swap << 4)
    b_swap = (b_word ^ (b_word >> 2)) & 0x0C0C0C0C
    b_word ^= b_swap ^ (b_swap << 2)
    b_swap = (b_word ^ (b_word >> 1)) & 0x22222222
    return b_word ^ b_swap ^ (b_swap << 1)


@jit
def _nth_of_banks(
    pieces,
    N: tl.constexpr,
    BANKS: tl.constexpr,
    OCTAVE: tl.constexpr,
    INFINITY: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Key [BANKS] of a bank's nth largest, or another from which on there are exactly N."""
    b_top = pieces[0]
    for i in tl.static_range(1, len(pieces)):
        b_top = larger_pairs(b_top, pieces[i], DTYPE, ASM)
    b_top = tl.maximum(ranked(half(b_top, DTYPE), ASM), ranked(half(b_top >> 16, DTYPE), ASM))
    b_top = (largest(b_top, 1) + 0.0).to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
    b_high = (b_top ^ ((b_top >> 31) & 0x7FFF)) + 1  # fewer than N gates of the bank have this key or more
    b_low = tl.full((BANKS,), -INFINITY - 1, tl.int32)  # at least N have this key or more, or all there are
    b_middle = tl.maximum(b_high - 4 * OCTAVE, -INFINITY)
    while largest(b_high - b_low, 0) > 1:
        b_twice = (key_bits(b_middle, DTYPE) * 0x10001)[:, None]
        b_n = compare_pairs(pieces[0], b_twice, False, DTYPE, ASM)
        for i in tl.static_range(1, len(pieces)):
            b_n += compare_pairs(pieces[i], b_twice, False, DTYPE, ASM)
        b_n = pairs_counted(total(b_n, 1))
        # A bank that is done has middle = low, and stays as it is.
        b_below = (b_n < N) & (b_low < b_middle)
        b_high = tl.where(b_below, b_middle, b_high)
        b_low = tl.where(b_below, b_low, b_middle)
        b_high = tl.where(b_n == N, b_low + 1, b_high)
        b_middle = (b_low + b_high) >> 1
    return b_low
