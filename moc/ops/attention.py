"""The decoding step of attention as an operator, opaque to torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from moc.dtypes import KERNEL_DTYPES, torch_dtypes

_DTYPES = torch_dtypes(KERNEL_DTYPES)
HEAD_DIMS = (16, 32, 64, 128, 256)  # that the kernel takes: powers of two


def takes_step(qkv: Tensor, keys: Tensor) -> bool:
    """Whether `attend_step` can be used: a GPU, and a head width and dtype that the kernel takes."""
    return qkv.is_cuda and qkv.dtype in _DTYPES and keys.shape[-1] in HEAD_DIMS


@torch.library.custom_op("moc::attend_step", mutates_args=("keys", "values"))
def attend_step(
    qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Causal attention of one new token per sequence over a cache, which gets the token's key and value.

    qkv [B, 1, 3 d_model], the three projections one after the other; cos and sin [1, head_dim] float32 of the
    token's position; position [1] int64, how many tokens the cache holds; keys and values [B, n_heads,
    max_len, head_dim] of the dtype of qkv, contiguous, written at `position`. Returns [B, 1, d_model]. Sums
    and softmax are in float32. No gradients. Nothing checks that the position lies in the cache.
    """
    from moc.kernels.attend import attend_step_pass  # Triton is loaded when it is first needed

    y = _empty(qkv, keys)
    attend_step_pass(qkv.contiguous(), cos, sin, position, keys, values, y)
    return y


def _empty(qkv: Tensor, keys: Tensor) -> Tensor:
    return qkv.new_empty(keys.shape[0], 1, keys.shape[1] * keys.shape[3])


attend_step.register_fake(lambda qkv, cos, sin, position, keys, values: _empty(qkv, keys))
