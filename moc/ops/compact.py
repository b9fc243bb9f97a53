"""Selection and compact storage in plain PyTorch, with no synchronisation between CPU and GPU.

What a Mixture-of-Channels layer keeps per token: K values in ascending channel order, and one bit per
channel. Every step has static shapes (no `nonzero`, no boolean indexing), so it runs inside a CUDA graph.
Bitmask layout: channel c is bit c % 32 of word c // 32, unused high bits of the last word are zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moc.selection import Selection, n_words

ALIGN = 64  # elements: row strides stay a multiple of 128 bytes, which cuBLAS's fast path wants


def keep_mask(g: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    """What `moc.reference.select_mask` and `overflow_count` give, for a GPU: (bool [T, d_ffn], int64 scalar).

    NaN ranks as plus infinity: such a gate is kept and so reaches the output. Minus infinity ranks as the
    lowest finite number.
    """
    k = selection.k(g.shape[1])
    overflow = torch.zeros((), dtype=torch.int64, device=g.device)
    score = g
    if selection.rule == "topk_abs":
        # In float64 and rounded to float32, as the reference: vectorised float32 code may round the same gate
        # differently at two places of a row, and equal gates must tie.
        score = F.silu(g.double()).abs_().float()
    lowest, highest = torch.finfo(score.dtype).min, float("inf")
    score = torch.nan_to_num(score, nan=highest, posinf=highest, neginf=lowest)
    if selection.rule == "nm":
        assert selection.n is not None
        assert selection.m is not None
        return _largest_of_banks(score, selection.n, selection.m), overflow
    mask = _largest_of_row(score, k)
    if selection.rule == "threshold":
        wanted = score.to(torch.promote_types(score.dtype, torch.float32)) > selection.threshold_f32
        overflow = (wanted.sum(dim=-1) - k).clamp_(min=0).sum()
        mask &= wanted
    return mask, overflow


def _largest_of_row(score: Tensor, k: int) -> Tensor:
    """Mask of the `k` largest of each row: all above the k-th largest, then the first that equal it.

    `torch.topk` promises no order among equals, so its indices are not used.
    """
    if k == score.shape[1]:
        return torch.ones_like(score, dtype=torch.bool)
    largest = score.topk(k, dim=-1, sorted=False).values
    kth = largest.amin(dim=-1, keepdim=True)
    n_ties = (largest == kth).sum(dim=-1, keepdim=True, dtype=torch.int32)
    ties = score == kth
    return (score > kth) | (ties & (_running_count(ties) <= n_ties))


def _largest_of_banks(score: Tensor, n: int, m: int) -> Tensor:
    """Mask of the `n` largest in each bank of `m` neighbours, none of which is minus infinity.

    In n rounds, each of which takes the largest of every bank (`max` returns the first of equals). On an H100
    at [65536, 2048] a sort or top-k of such short rows takes 6 to 32 ms, and a round about 0.2 ms.
    """
    n_tokens, d_ffn = score.shape
    n_banks = -(-d_ffn // m)
    taken = float("-inf")  # loses to every score; also fills up the tail bank
    lanes = F.pad(score, (0, n_banks * m - d_ffn), value=taken)
    # Position within the bank comes first, so that a reduction over it reads neighbouring addresses.
    lanes = lanes.view(n_tokens, n_banks, m).permute(2, 0, 1).contiguous()
    mask = torch.zeros_like(lanes, dtype=torch.bool)
    for _ in range(n):
        best = lanes.max(dim=0, keepdim=True).indices
        mask.scatter_(0, best, True)  # a tail bank with nothing left gives its first channel, kept already
        lanes.scatter_(0, best, taken)
    return mask.permute(1, 2, 0).reshape(n_tokens, n_banks * m)[:, :d_ffn]


def _running_count(mask: Tensor) -> Tensor:
    """Inclusive running count of true values along the last dimension, in the narrowest sufficient dtype."""
    narrow = mask.shape[-1] < torch.iinfo(torch.int16).max
    return mask.cumsum(dim=-1, dtype=torch.int16 if narrow else torch.int32)


def kept_channels(mask: Tensor, k: int) -> Tensor:
    """Indices of the true channels of each row, ascending: int64 [T, k].

    A row with fewer than `k` true channels is filled up with d_ffn, one past the last channel; of a row with
    more, the first `k` are listed.
    """
    count = _running_count(mask)
    nth = torch.arange(1, k + 1, dtype=count.dtype, device=mask.device)
    return torch.searchsorted(count, nth.expand(mask.shape[0], k).contiguous())


def gather_compact(full: Tensor, channels: Tensor) -> Tensor:
    """Values of `full` [T, d_ffn] at `channels` [T, k] of `kept_channels`; zero where a row has no more."""
    d_ffn = full.shape[1]
    return full.gather(1, channels.clamp(max=d_ffn - 1)).masked_fill_(channels == d_ffn, 0)


class Expander:
    """Writes compact tensors [T, k] back to full width, zero elsewhere, reusing one buffer.

    The tensor that `expand` returns is a view of that buffer and is valid until the next call.
    """

    def __init__(self, channels: Tensor, d_ffn: int, dtype: torch.dtype) -> None:
        # At least one column more than channels: there the filling of short rows lands.
        width = (d_ffn // ALIGN + 1) * ALIGN
        self._buffer = torch.zeros(channels.shape[0], width, dtype=dtype, device=channels.device)
        self._channels = channels
        self._d_ffn = d_ffn

    def expand(self, compact: Tensor) -> Tensor:
        """`compact` [T, k] at its channels of [T, d_ffn]."""
        self._buffer.scatter_(1, self._channels, compact)
        return self._buffer[:, : self._d_ffn]


def pack_bitmask(mask: Tensor) -> Tensor:
    """bool [T, d_ffn] -> int32 [T, n_words(d_ffn)]."""
    n_tokens, d_ffn = mask.shape
    words = n_words(d_ffn)
    # Eight bytes of 0 or 1, read as one integer x = sum of b_i * 2^(8 i), become one byte: the product with
    # sum of 2^(56 - 7 i) holds b_i at bit 56 + i, with no carry into those bits.
    padded = mask.new_zeros(n_tokens, words * 32)  # of its own, since a view's strides may not be whole words
    padded[:, :d_ffn] = mask
    eights = padded.view(torch.int64)
    octets = (eights * 0x0102040810204080 >> 56).to(torch.uint8)
    return octets.view(torch.int32).view(n_tokens, words)


def unpack_bitmask(bitmask: Tensor, d_ffn: int) -> Tensor:
    """int32 [T, n_words(d_ffn)] -> bool [T, d_ffn]."""
    octets = bitmask.view(torch.uint8).unsqueeze(-1)
    bits = (octets >> torch.arange(8, dtype=torch.uint8, device=bitmask.device)) & 1
    return bits.view(bitmask.shape[0], bitmask.shape[1] * 32)[:, :d_ffn].bool()
