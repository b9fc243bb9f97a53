"""Mixture-of-Channels for one or few tokens on a CPU: only the kept rows of w_up and w_down are read.

Bytes: all of w_gate, and 2 K d elements of w_up and w_down instead of 2 d_ffn d. PyTorch has no product with
selected rows of a matrix, so rows are gathered first, as many at a time as fit in the cache. The product then
reads the copy from the cache, and each row is read from memory once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 2 << 20  # of rows copied at a time
# Where it is faster than computing all channels; measured on two cores of an AMD EPYC, one thread, fp32 and
# bf16, 2026-11-26, see docs/measured.md.
MOST_TOKENS = 8
LEAST_BYTES = 5 << 18  # of w_up per token: below, the calls cost more than the reading
LARGEST_SHARE = 1 / 3  # of the channels, kept by one token


def pays(x: Tensor, w_up: Tensor, k: int) -> bool:
    """Whether reading only the kept rows is faster for x [T, d] than computing all channels."""
    tokens, d_ffn = len(x), len(w_up)
    if x.device.type != "cpu" or not 1 <= tokens <= MOST_TOKENS:
        return False
    return w_up.nbytes >= LEAST_BYTES * tokens and k <= LARGEST_SHARE * d_ffn


def kept_rows_output(x: Tensor, g: Tensor, mask: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """y [T, d] = (mask * silu(g) * (x @ w_up.T)) @ w_down, from the rows that some token of mask keeps.

    x [T, d], g and mask [T, d_ffn], w_up and w_down [d_ffn, d], one float dtype. Sums of chunks are in
    float32 or wider.
    """
    channels = mask.any(dim=0).nonzero().squeeze(1)
    silu = F.silu(g[:, channels]).masked_fill_(mask[:, channels].logical_not_(), 0)
    rows = max(1, CHUNK_BYTES // (w_up.shape[1] * w_up.element_size()))
    copied = w_up.new_empty(min(rows, len(channels)), w_up.shape[1])
    y = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    for chunk, factor in zip(channels.split(rows), silu.split(rows, dim=1), strict=True):
        up = torch.index_select(w_up, 0, chunk, out=copied[: len(chunk)])
        z = (x @ up.T).mul_(factor)
        down = torch.index_select(w_down, 0, chunk, out=copied[: len(chunk)])
        y += z @ down
    return y.to(x.dtype)
