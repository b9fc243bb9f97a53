"""Which channels of a row are kept: device functions, used inside the select pass of `passes.py`.

Global rules (`topk`, `topk_abs`, `threshold`) search for the row's K-th largest score. The row is read once
and stays in registers. The search counts how many scores are at least x, for some values of x. A bf16 or fp16
row stays packed, two channels per register, and one instruction compares both, so a count costs 3/4
instruction per channel and one warp reduction. Bisection would need up to 16 counts (32 for float32).
Instead the first x is a guess from mean and deviation of a piece of the row, and each later one is
interpolated between the counts at both ends of the interval: about 4 counts for normally distributed gates, 7
for heavy-tailed ones. After some misses the interval is bisected, so the search always ends.

Of channels equal to the K-th largest the lowest are kept. In a program that handles the whole row they end at
a *cut*: a channel is kept if its score is above the K-th largest, or if it is equal and the channel is at
most the cut. To find the cut a part of the row is read again, from L1. A program that handles some channels
of a row only needs the number of equal ones before its own: one count. Bytes: itemsize * d_ffn per row.

Scores are searched by *key*: the bits of a float as an integer in the order of the floats. NaN ranks as
infinity. `nm` rules are local to a bank: see `banks.py`.
"""

# mypy: disable-error-code="no-untyped-def, no-redef, assignment, misc"
# ruff: noqa: SIM300 - capitals are compile-time constants, often on the left

from __future__ import annotations

import functools
import math

import torch
import triton.language as tl

from moc.kernels.primitives import jit, largest, ranked, running_total, total

# The number of a rule, as kernels take it.
TOPK, TOPK_ABS, NM, THRESHOLD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
RULE_NUMBERS = {"topk": 0, "topk_abs": 1, "nm": 2, "threshold": 3}
INTERPOLATIONS = tl.constexpr(8)  # counts of a search, before each further one halves what is left


@functools.cache
def first_key(threshold: float | None, dtype: torch.dtype) -> int:
    """Key of the smallest score that may be kept: of minus infinity, or the next above `threshold`."""
    if threshold is None:
        return _key(torch.tensor(-math.inf, dtype=dtype))
    nearest = torch.tensor(threshold, dtype=torch.float64).to(dtype)
    if nearest == 0:
        nearest = torch.zeros_like(nearest)  # minus zero has another key and is the same number
    return _key(nearest) + int(nearest.double().item() <= threshold)


def _key(value: torch.Tensor) -> int:
    bits = value.view(torch.int16 if value.element_size() == 2 else torch.int32).item()
    return int(bits) if bits >= 0 else int(bits) ^ (0x7FFF if value.element_size() == 2 else 0x7FFFFFFF)


@jit
def key_bits(key, DTYPE: tl.constexpr):
    """The bits, in an int32, of the float of type DTYPE that has this key."""
    if DTYPE.primitive_bitwidth == 16:
        return (key ^ ((key >> 31) & 0x7FFF)) & 0xFFFF
    else:
        return key ^ ((key >> 31) & 0x7FFFFFFF)


@jit
def key_score(key, DTYPE: tl.constexpr):
    """The float of type DTYPE that has this key, as float32."""
    if DTYPE.primitive_bitwidth == 16:
        return key_bits(key, DTYPE).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    else:
        return key_bits(key, DTYPE).to(tl.float32, bitcast=True)


@jit
def score_of(gate, RULE: tl.constexpr, ASM: tl.constexpr):
    """The score a global rule ranks by, float32: the gate, or abs(silu(gate)) rounded from float64.

    Rounded from float64 because the reference's is: in float32 two gates may swap.
    """
    if RULE == TOPK_ABS:
        b_gate = gate.to(tl.float64)
        return ranked(tl.abs(b_gate / (1.0 + tl.exp(-b_gate))).to(tl.float32), ASM)
    else:
        return ranked(gate.to(tl.float32), ASM)


@jit
def _piece(
    row_ptr,
    start,
    F: tl.constexpr,
    PIECE: tl.constexpr,
    FULL: tl.constexpr,
    RULE: tl.constexpr,
    PACKED: tl.constexpr,
    ASM: tl.constexpr,
):
    """The scores of PIECE channels from `start`, minus infinity past F; FULL: none is past F.

    PACKED: int32 [PIECE / 2], two neighbouring channels each. Else float32 [PIECE].
    """
    if PACKED:
        b_channel = 2 * tl.arange(0, PIECE // 2)
        b_ptr = row_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + start // 2 + tl.arange(0, PIECE // 2)
        if FULL:
            return tl.load(b_ptr)
        else:
            return padded_pairs(b_ptr, b_channel, F - start, F % 2 == 1, row_ptr.dtype.element_ty)
    else:
        b_inside = tl.arange(0, PIECE) < F - start
        b_gate = tl.load(row_ptr + start + tl.arange(0, PIECE), mask=b_inside, other=0.0)
        return tl.where(b_inside, score_of(b_gate, RULE, ASM), float("-inf"))


@jit
def padded_pairs(ptr, channel, end, ODD: tl.constexpr, DTYPE: tl.constexpr):
    """Pairs of gates at `ptr`, of channels `channel` and the next; minus infinity from `end`, maybe ODD."""
    MINUS_INF: tl.constexpr = 0xFF80 if DTYPE == tl.bfloat16 else 0xFC00
    b_pairs = tl.load(ptr, mask=channel < end, other=0)
    if ODD:
        b_last = (b_pairs & 0xFFFF) | ((MINUS_INF << 16) - (1 << 32))
        b_pairs = tl.where(channel == end - 1, b_last, b_pairs)
    return tl.where(channel < end, b_pairs, ((MINUS_INF << 16) - (1 << 32)) | MINUS_INF)


@jit
def count_from(pieces, key, DTYPE: tl.constexpr, PACKED: tl.constexpr, ASM: tl.constexpr):
    """How many scores of a row are at least the float with this key (above minus infinity)."""
    if PACKED:
        b_twice = key_bits(key, DTYPE) * 0x10001
        b_sum = compare_pairs(pieces[0], b_twice, False, DTYPE, ASM)
        for i in tl.static_range(1, len(pieces)):
            b_sum += compare_pairs(pieces[i], b_twice, False, DTYPE, ASM)
        return pairs_counted(total(b_sum, 0))
    else:
        b_score = key_score(key, DTYPE)
        b_sum = (pieces[0] >= b_score).to(tl.int32)
        for i in tl.static_range(1, len(pieces)):
            b_sum += (pieces[i] >= b_score).to(tl.int32)
        return total(b_sum, 0)


@jit
def compare_pairs(pairs, twice, ABOVE: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Per half of a word: -1 where a gate is at least (ABOVE: more than) that of `twice`, or NaN; else 0."""
    if ASM:
        RELATION: tl.constexpr = "set.gtu.u32" if ABOVE else "set.geu.u32"
        TYPE: tl.constexpr = ".bf16x2" if DTYPE == tl.bfloat16 else ".f16x2"
        return tl.inline_asm_elementwise(
            RELATION + TYPE + " $0, $1, $2;", "=r,r,r", [pairs, twice], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        b_low = half(pairs, DTYPE) < half(twice, DTYPE)
        b_high = half(pairs >> 16, DTYPE) < half(twice >> 16, DTYPE)
        if ABOVE:
            b_low |= half(pairs, DTYPE) == half(twice, DTYPE)
            b_high |= half(pairs >> 16, DTYPE) == half(twice >> 16, DTYPE)
        return tl.where(b_low, 0, 0xFFFF) | tl.where(b_high, 0, -65536)


@jit
def larger_pairs(pairs, others, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Per half of a word the larger of two gates; NaN if either is."""
    if ASM and DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [pairs, others], dtype=tl.int32, is_pure=True, pack=1
        )
    elif ASM:
        return tl.inline_asm_elementwise(
            "max.NaN.f16x2 $0, $1, $2;", "=r,r,r", [pairs, others], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        b_low = half(pairs, DTYPE) < half(others, DTYPE)
        b_high = half(pairs >> 16, DTYPE) < half(others >> 16, DTYPE)
        b_low = b_low | (half(others, DTYPE) != half(others, DTYPE))
        b_high = b_high | (half(others >> 16, DTYPE) != half(others >> 16, DTYPE))
        return tl.where(b_low, others, pairs) & 0xFFFF | tl.where(b_high, others, pairs) & -65536


@jit
def half(word, DTYPE: tl.constexpr):
    return (word & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@jit
def pairs_counted(n):
    """Channels counted by a sum of `compare_pairs`, which modulo 2**32 is ((low - high) << 16) - low."""
    b_low = -n & 0xFFFF
    return 2 * b_low - ((n + b_low) >> 16)


@jit
def row_threshold(
    row_ptr,
    K,
    first,
    quantile,
    begin,
    F: tl.constexpr,
    PIECE: tl.constexpr,
    RULE: tl.constexpr,
    PACKED: tl.constexpr,
    GUESS: tl.constexpr,
    ASM: tl.constexpr,
):
    """(score, cut, overflow) of a row: what is above `score`, or equal and at a channel <= cut, is kept.

    At most K channels are kept, none with a key below `first`, exactly K if that many are left; `overflow` is
    how many more there were, counted for `threshold` only. If `begin` is an even channel, not None:
    (score, ties, overflow), where of the channels from there on that equal `score` the first `ties` are kept.
    """
    if RULE == TOPK_ABS:
        DTYPE: tl.constexpr = tl.float32
    else:
        DTYPE: tl.constexpr = row_ptr.dtype.element_ty
    # The key of infinity is its bits.
    INFINITY: tl.constexpr = 0x7F800000 if DTYPE == tl.float32 else 0x7F80 if DTYPE == tl.bfloat16 else 0x7C00
    b_pieces = ()
    for start in tl.static_range(0, F, PIECE):
        b_piece = _piece(row_ptr, start, F, PIECE, start + PIECE <= F, RULE, PACKED, ASM)
        b_pieces = b_pieces + (b_piece,)  # noqa: RUF005 - Triton knows no starred expressions
    low = first  # at least min(K, d_ffn) scores are at least the float with this key: n_low of them
    n_low = F
    high = INFINITY + 1  # fewer than K are at least this: n_high
    n_high = 0
    overflow = 0
    if RULE == THRESHOLD:
        n_low = count_from(b_pieces, low, DTYPE, PACKED, ASM)
        overflow = tl.maximum(n_low - K, 0)
        if n_low <= K:
            high = low + 1
    middle = _middle(low, high)
    step = 0
    if GUESS and F >= PIECE:
        # Where the K-th largest would be if scores were normal: a handful of counts instead of one per bit.
        # Steps away from the guess grow by four, from an eighth of an octave, until it lies in between; from
        # then on the counts at both ends say where.
        step = 1 << (DTYPE.fp_mantissa_width - 3)
        middle = tl.maximum(
            low + 1, tl.minimum(_guess(b_pieces[0], quantile, PIECE, DTYPE, PACKED), high - 1)
        )
    rounds = 0
    while low + 1 < high:
        n = count_from(b_pieces, middle, DTYPE, PACKED, ASM)
        if n >= K:
            low = middle
            n_low = n
            if n == K:  # every tie is kept, so that there is nothing left to find
                high = middle + 1
                n_high = 0
        else:
            high = middle
            n_high = n
        middle = _middle(low, high)
        if GUESS and F >= PIECE:
            if n_low == F:
                middle = high - tl.minimum(high - middle, step)
            elif n_high == 0:
                middle = low + tl.minimum(middle - low, step)
            elif rounds < INTERPOLATIONS:
                middle = _between(low, high, n_low, n_high, K)
            step = tl.minimum(step * 4, 1 << 28)
            rounds += 1
    score = key_score(low, DTYPE)
    if begin is None:
        last = F - 1
        if n_low > K:
            last = _nth_equal(row_ptr, low, K - n_high, F, PIECE, RULE, PACKED, DTYPE, ASM)
        return score, last, overflow
    else:
        ties = F
        if n_low > K:
            ties = K - n_high - _equal_before(b_pieces, low, begin, PIECE, PACKED, DTYPE, ASM)
        return score, ties, overflow


@jit
def _between(low, high, n_low, n_high, K):
    """The key that K scores would reach if they lay evenly between `low` and `high`, which it never is."""
    share = (n_low - K).to(tl.float32) / (n_low - n_high).to(tl.float32)
    b_key = low.to(tl.float32) + share * (high.to(tl.float32) - low.to(tl.float32))
    return tl.maximum(low + 1, tl.minimum(b_key.to(tl.int32), high - 1))


@jit
def _equal_before(
    pieces, key, begin, PIECE: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr
):
    """How many channels before `begin`, which is even, have this key."""
    INFINITY: tl.constexpr = 0x7F80 if DTYPE == tl.bfloat16 else 0x7C00  # of 16 bits
    b_sum = tl.full((PIECE // 2 if PACKED else PIECE,), 0, tl.int32)
    for i in tl.static_range(0, len(pieces)):
        if PACKED:
            b_from = compare_pairs(pieces[i], key_bits(key, DTYPE) * 0x10001, False, DTYPE, ASM)
            # NaN ranks as infinity, and is at least anything here.
            above = key_bits(tl.minimum(key + 1, INFINITY), DTYPE) * 0x10001
            b_above = compare_pairs(pieces[i], above, False, DTYPE, ASM)
            b_equal = b_from - tl.where(key < INFINITY, b_above, 0)
            b_sum += tl.where(i * PIECE + 2 * tl.arange(0, PIECE // 2) < begin, b_equal, 0)
        else:
            b_before = i * PIECE + tl.arange(0, PIECE) < begin
            b_sum += (b_before & (pieces[i] == key_score(key, DTYPE))).to(tl.int32)
    n = total(b_sum, 0)
    return pairs_counted(n) if PACKED else n


@jit
def _middle(low, high):
    # rounded down; the sum of two keys of float32 may exceed an int32
    return (low & high) + ((low ^ high) >> 1)


@jit
def _guess(piece, quantile, PIECE: tl.constexpr, DTYPE: tl.constexpr, PACKED: tl.constexpr):
    """Key of mean + quantile * deviation of a piece's scores; anything if they are not finite."""
    if PACKED:
        b_low = half(piece, DTYPE)
        b_high = half(piece >> 16, DTYPE)
        b_sums = tl.join(b_low + b_high, b_low * b_low + b_high * b_high)
    else:
        b_sums = tl.join(piece, piece * piece)
    mean, square = tl.split(total(b_sums, 0) / PIECE)  # one reduction: warps wait for each other once
    guess = mean + quantile * tl.sqrt(tl.maximum(square - mean * mean, 0.0))
    if DTYPE.primitive_bitwidth == 16:
        bits = guess.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
        key = bits ^ ((bits >> 31) & 0x7FFF)
    else:
        bits = guess.to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    # All lanes have the same key; an integer reduction lets the compiler know, so that the search does not
    # diverge.
    return largest(tl.full((32,), 0, tl.int32) + key, 0)


@jit
def _nth_equal(
    row_ptr,
    key,
    nth,
    F: tl.constexpr,
    PIECE: tl.constexpr,
    RULE: tl.constexpr,
    PACKED: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):
    """The nth channel, from 1, whose score has this key; there must be that many."""
    start = 0
    if F > PIECE:
        n = _count_equal(row_ptr, start, key, F, PIECE, RULE, PACKED, DTYPE, ASM)
        while (n < nth) & (start + PIECE < F):  # the bound ends the search whatever the row holds
            nth -= n
            start = tl.multiple_of(start + PIECE, PIECE)
            n = _count_equal(row_ptr, start, key, F, PIECE, RULE, PACKED, DTYPE, ASM)
    b_scores = _piece(row_ptr, start, F, PIECE, False, RULE, False, ASM)
    b_so_far = running_total((b_scores == key_score(key, DTYPE)).to(tl.int32), 0)
    return start + total((b_so_far < nth).to(tl.int32), 0)


@jit
def _count_equal(
    row_ptr,
    start,
    key,
    F: tl.constexpr,
    PIECE: tl.constexpr,
    RULE: tl.constexpr,
    PACKED: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):
    b_pieces = (_piece(row_ptr, start, F, PIECE, False, RULE, PACKED, ASM),)
    INFINITY: tl.constexpr = 0x7F800000 if DTYPE == tl.float32 else 0x7F80 if DTYPE == tl.bfloat16 else 0x7C00
    n_above = count_from(b_pieces, tl.minimum(key + 1, INFINITY), DTYPE, PACKED, ASM)
    return count_from(b_pieces, key, DTYPE, PACKED, ASM) - tl.where(key < INFINITY, n_above, 0)
