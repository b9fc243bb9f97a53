"""Cross-entropy of rows of logits and its gradient, in place, in one Triton kernel.

Bytes: each logit is read once from memory and again, mostly from L2, and the gradient overwrites it: 4 bytes
of traffic per bf16 logit, where PyTorch's separate operations move about 20.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from moc.kernels.primitives import jit, largest, launching_on, total

BLOCK = 4096  # logits a program holds at a time


@jit(do_not_specialize=["ignore_index"])
def cross_entropy_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # [C, vocabulary]
    targets_ptr,  # [C] int64
    nats_ptr,  # [C] float32
    vocabulary,
    row_stride,
    ignore_index,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    counted = target != ignore_index
    inside = (target >= 0) & (target < vocabulary)
    # Read before anything is written over it; the reductions below are barriers.
    b_target = tl.load(logits_ptr + target, mask=inside, other=float("nan")).to(tl.float32)

    b_max = -float("inf")
    b_sum = 0.0
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        b_x = tl.load(logits_ptr + columns, mask=columns < vocabulary, other=-float("inf")).to(tl.float32)
        b_new = tl.maximum(b_max, largest(b_x, 0))
        b_sum = b_sum * tl.exp(b_max - b_new) + total(tl.exp(b_x - b_new), 0)
        b_max = b_new
    b_log_sum = b_max + tl.log(b_sum)
    tl.store(nats_ptr + row, tl.where(counted, b_log_sum - b_target, 0.0))

    if GRADIENT:
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            b_x = tl.load(logits_ptr + columns, mask=columns < vocabulary, other=0.0).to(tl.float32)
            b_d = tl.exp(b_x - b_log_sum) - tl.where(columns == target, 1.0, 0.0)
            tl.store(logits_ptr + columns, b_d.to(logits_ptr.dtype.element_ty), mask=columns < vocabulary)


def cross_entropy_in_place(logits: Tensor, targets: Tensor, ignore_index: int, gradient: bool) -> Tensor:
    """Nats of `targets` [C] int64 under softmax of `logits` [C, vocabulary]: float32 [C], 0 if ignored.

    With `gradient`, softmax - one-hot (softmax alone in ignored rows) replaces the logits; arithmetic is in
    float32 whatever their dtype. A target outside the vocabulary gives NaN.
    """
    n_tokens, vocabulary = logits.shape
    nats = logits.new_empty(n_tokens, dtype=torch.float32)
    with launching_on(logits):
        cross_entropy_kernel[(n_tokens,)](
            logits, targets, nats, vocabulary, logits.stride(0), ignore_index,
            GRADIENT=gradient, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return nats
