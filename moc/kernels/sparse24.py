"""2:4 sparse matrices (two of any four neighbours in a row are stored), as sparse tensor cores take them.

A matrix [T, width] is kept as values [T, width / 2], two of each group of four channels, and as metadata,
which says which two: 4 bits a group, the index of the first in the low two. On compute capability 9.0 a tile
of 64 rows and 32 columns (one word of the bitmask per row) has its metadata in 256 bytes on end. The 4 bits
of row r and group c of the tile are, counted in fours, at

    8 groups      c0 -> 4, c1 -> 8, c2 -> 2
    64 rows       r0 -> 16, r1 -> 32, r2 -> 64, r3 -> 1, r4 -> 128, r5 -> 256

with c0 the lowest bit of c; so rows r and r + 8 share a byte. Tiles are ordered by column, then by row. This
layout was found bit by bit from what `torch._cslt_compress` writes on an H100; the GPU tests compare the two.

If a group keeps fewer than two channels, the metadata names two that include them, and the value of the other
is zero. The two indices follow from the group's bits of the bitmask alone, with a, b, c, d the bits of the
first to the fourth channel: the second is d ? 3 : c ? 2 : 1, the first c & d ? 2 : b & (c | d) ? 1 : 0.
"""

# mypy: disable-error-code="no-untyped-def, no-redef"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from moc.kernels.primitives import jit, launching_on

TILE_ROWS, TILE_COLUMNS = 64, 32
_TILE_WORDS = 64  # int32 words of metadata


@dataclass(frozen=True)
class Sparse24:
    """A sparse matrix [n_rows, width] of 16-bit values, as cuSPARSELt takes it: values, then metadata.

    buffer: uint8, at least `compressed_bytes(n_rows, width)`, of which the first are used.
    """

    buffer: Tensor
    n_rows: int
    width: int
    dtype: torch.dtype

    @property
    def values(self) -> Tensor:
        """[n_rows, width / 2], a view."""
        return self.buffer[: self.n_rows * self.width].view(self.dtype).view(self.n_rows, -1)

    @property
    def metadata(self) -> Tensor:
        """int32 [n_rows / 64, width / 32, 64], a view."""
        used = self.buffer[self.n_rows * self.width : compressed_bytes(self.n_rows, self.width)]
        return used.view(torch.int32).view(self.n_rows // TILE_ROWS, self.width // TILE_COLUMNS, _TILE_WORDS)


def compressed_bytes(n_rows: int, width: int) -> int:
    """Bytes of a `Sparse24`; n_rows and width are whole numbers of tiles."""
    return n_rows * width + n_rows * width // 8


@jit
def two_of_four(values, bits, ROWS: tl.constexpr):
    """Two of each four neighbours, [ROWS, 16], of values [ROWS, 32] that are zero where `bits` [ROWS] is."""
    b_even, b_odd = tl.split(tl.reshape(values, [ROWS, 8, 2, 2]))
    b_0, b_2 = tl.split(b_even)
    b_1, b_3 = tl.split(b_odd)
    b_group = bits[:, None] >> (4 * tl.arange(0, 8))[None, :]
    b_second = tl.where((b_group & 8) != 0, b_3, tl.where((b_group & 4) != 0, b_2, b_1))
    b_upper = (b_group & 12) != 0
    b_first = tl.where(((b_group & 2) != 0) & b_upper, b_1, b_0)
    b_first = tl.where((b_group & 12) == 12, b_2, b_first)
    return tl.reshape(tl.join(b_first, b_second), [ROWS, 16])


@jit
def _indices(word):
    """The metadata of the eight groups of a word of the bitmask, 4 bits each, group 0 lowest."""
    EACH: tl.constexpr = 0x11111111
    b_1 = (word >> 1) & EACH
    b_2 = (word >> 2) & EACH
    b_3 = (word >> 3) & EACH
    b_upper = b_2 | b_3
    b_low = (b_1 & b_upper) | ((b_2 & b_3) << 1)
    return b_low | ((b_3 | (b_2 ^ EACH)) << 2) | (b_upper << 3)


@jit
def _spread(indices, low: tl.constexpr):
    """Groups low, low + 4, low + 1, low + 5 of a word of metadata, each in the low half of a byte."""
    b_indices = indices >> (4 * low)
    b_half = (b_indices & 0xF) | ((b_indices >> 8) & 0xF00)
    return b_half | ((b_indices & 0xF0) << 12) | ((b_indices & 0xF00000) << 4)


@jit(do_not_specialize=["words"])
def metadata_kernel(
    bitmask_ptr,  # [T, words] int32
    metadata_ptr,  # [T / 64, COPIES * words, 64] int32
    words,
    COPIES: tl.constexpr,  # matrices of this bitmask side by side
    BLOCK: tl.constexpr,  # words
):
    row = tl.program_id(0).to(tl.int64)
    b_word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b_pair = tl.arange(0, 32)  # of rows r and r + 8
    b_row = row * 64 + ((b_pair & 7) | ((b_pair & 24) << 1))
    b_ptr = bitmask_ptr + b_row[:, None] * words + b_word[None, :]
    b_inside = (b_word < words)[None, :]
    b_low = _indices(tl.load(b_ptr, mask=b_inside, other=0))
    b_high = _indices(tl.load(b_ptr + 8 * words, mask=b_inside, other=0))
    b_first = _spread(b_low, 0) | (_spread(b_high, 0) << 4)
    b_second = _spread(b_low, 2) | (_spread(b_high, 2) << 4)
    b_ptr = metadata_ptr + (row * COPIES * words + b_word[None, :]) * 64 + 2 * b_pair[:, None]
    for copy in tl.static_range(COPIES):
        tl.store(b_ptr + copy * words * 64, b_first, mask=b_inside)
        tl.store(b_ptr + copy * words * 64 + 1, b_second, mask=b_inside)


BLOCK, NUM_WARPS = 8, 4


def metadata_pass(bitmask: Tensor, sparse: Sparse24) -> None:
    """Fill `sparse.metadata` from a bitmask int32 [T, words] of its channels.

    `sparse.width` is one or more times the channels: as many matrices of the same bitmask side by side.
    Raises ValueError if they do not fit.
    """
    n_tokens, words = bitmask.shape
    copies, rest = divmod(sparse.width, TILE_COLUMNS * words)
    if n_tokens != sparse.n_rows or n_tokens % TILE_ROWS or rest or not copies:
        raise ValueError(
            f"a bitmask of shape {tuple(bitmask.shape)} does not fit [{sparse.n_rows}, {sparse.width}]"
            f" in tiles of [{TILE_ROWS}, {TILE_COLUMNS}]"
        )
    if n_tokens == 0:
        return
    with launching_on(bitmask):
        metadata_kernel[(n_tokens // TILE_ROWS, -(-words // BLOCK))](
            bitmask, sparse.metadata, words, copies, BLOCK, num_warps=NUM_WARPS
        )
