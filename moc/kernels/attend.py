"""One decoding step of attention: rotary positions, the cache's new entry, and attention, in one kernel.

The kernel reads q, k and v of one token per sequence and the cached keys and values before it, once, and
writes a key, a value and the output: 4 head_dim bytes per head and cached token at 16 bits. At batch 1 and a
few hundred tokens that is a microsecond of traffic; separate kernels for rotation, both writes, mask and
attention take several times as long to start and end. The number of cached tokens is read on the device, and
the cache is read only so far.

A program handles one head of one sequence and loops over the cache in blocks. Each position in a block has
its own online softmax over that position of all blocks, so that warps exchange nothing until the end. There
the softmaxes are merged with the new token, which never leaves the registers.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from moc.kernels.primitives import jit, largest, launching_on, total

BLOCK = 64  # cached tokens at a time: of keys and values 16 KB each at a head width of 128
LOWEST = tl.constexpr(-1e30)  # below every score, and finite, so that differences are


@jit(do_not_specialize=["heads", "max_len", "scale"])
def attend_step_kernel(
    qkv_ptr,  # [B, 3, heads, D]
    cos_ptr,  # [D] float32
    sin_ptr,
    position_ptr,  # int64 scalar: tokens in the cache so far
    keys_ptr,  # [B, heads, max_len, D]
    values_ptr,
    y_ptr,  # [B, heads, D]
    heads,
    max_len,
    scale,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    position = tl.load(position_ptr).to(tl.int32)
    lanes = tl.arange(0, D)
    partner = (lanes + D // 2) % D
    dtype = qkv_ptr.dtype.element_ty
    b_cos = tl.load(cos_ptr + lanes)
    b_sin = tl.load(sin_ptr + lanes) * tl.where(lanes < D // 2, -1.0, 1.0)

    q_ptr = qkv_ptr + (row.to(tl.int64) * 3 * heads + head) * D
    k_ptr, v_ptr = q_ptr + heads * D, q_ptr + 2 * heads * D
    b_q = tl.load(q_ptr + lanes).to(tl.float32) * b_cos + tl.load(q_ptr + partner).to(tl.float32) * b_sin
    b_k = tl.load(k_ptr + lanes).to(tl.float32) * b_cos + tl.load(k_ptr + partner).to(tl.float32) * b_sin
    b_q, b_k = b_q.to(dtype), b_k.to(dtype)  # rounded as they are where the rotation is a pass of its own
    b_v = tl.load(v_ptr + lanes)
    start_of_head = tl.program_id(0).to(tl.int64) * max_len * D
    keys_ptr += start_of_head
    values_ptr += start_of_head
    tl.store(keys_ptr + position * D + lanes, b_k)
    tl.store(values_ptr + position * D + lanes, b_v)

    b_q = b_q.to(tl.float32) * scale  # [D]
    b_max = tl.full([BLOCK], LOWEST, tl.float32)
    b_sum = tl.full([BLOCK], 0.0, tl.float32)
    b_y = tl.full([BLOCK, D], 0.0, tl.float32)
    for start in range(0, position, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        places = tokens[:, None] * D + lanes[None, :]
        seen = tokens < position
        b_keys = tl.load(keys_ptr + places, mask=seen[:, None], other=0.0).to(tl.float32)
        b_values = tl.load(values_ptr + places, mask=seen[:, None], other=0.0).to(tl.float32)
        b_scores = tl.where(seen, total(b_keys * b_q[None, :], 1), -float("inf"))
        b_new = tl.maximum(b_max, b_scores)
        b_weights = tl.exp(b_scores - b_new)
        b_shrink = tl.exp(b_max - b_new)
        b_sum = b_sum * b_shrink + b_weights
        b_y = b_y * b_shrink[:, None] + b_values * b_weights[:, None]
        b_max = b_new
    score = total(b_q * b_k.to(tl.float32), 0)
    top = tl.maximum(largest(b_max, 0), score)
    own = tl.exp(score - top)
    b_share = tl.exp(b_max - top)
    b_out = total(b_y * b_share[:, None], 0) + own * b_v.to(tl.float32)
    b_out = b_out / (total(b_sum * b_share, 0) + own)
    tl.store(y_ptr + tl.program_id(0).to(tl.int64) * D + lanes, b_out.to(dtype))


def attend_step_pass(
    qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, keys: Tensor, values: Tensor, y: Tensor
) -> None:
    """Launch it; arguments as `moc.ops.attention.attend_step`, y [B, heads, D] written."""
    batch, heads, max_len, d = keys.shape
    with launching_on(qkv):
        attend_step_kernel[(batch * heads,)](
            qkv, cos, sin, position, keys, values, y, heads, max_len, d**-0.5, D=d, BLOCK=BLOCK, num_warps=4
        )
