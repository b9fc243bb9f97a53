"""A dense SwiGLU layer that keeps g and u in fp8, and its custom operators.

Among dense methods that do not recompute matrix products it keeps the fewest bytes: x, and one byte for each
element of g and u.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moc.layers.base import FfnWeights
from moc.ops.inputs import autocast_cast, check_ffn_inputs
from moc.ops.registration import empty_gradients, register_ffn

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max  # 448


class Fp8FFN(FfnWeights):
    """Dense SwiGLU that keeps x, and g and u as fp8 (e4m3) with one float32 scale per token for each.

    The output is exact. Gradients are computed from g and u rounded to three mantissa bits, a relative error
    of about 2.6 % each (Frobenius norm).
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_model] -> [..., d_model]. Raises ValueError for a shape or dtype that does not fit."""
        x, w_gate, w_up, w_down = autocast_cast(x, self.w_gate, self.w_up, self.w_down)
        check_ffn_inputs(x, w_gate, w_up, w_down)
        flat = x.reshape(-1, x.shape[-1])
        y, *_ = torch.ops.moc.dense_fp8_forward(flat, w_gate, w_up, w_down)
        return y.reshape(x.shape)


def to_fp8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(fp8 [T, n], scale float32 [T, 1]) with tensor = fp8 * scale up to rounding; a zero row has scale 1."""
    wide = tensor.float()
    largest = wide.abs().amax(dim=1, keepdim=True)
    scale = torch.where(largest > 0, largest / FP8_MAX, 1.0)
    return (wide / scale).to(FP8), scale


@torch.library.custom_op("moc::dense_fp8_forward", mutates_args=())
def _dense_fp8_forward(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y [T, d], g and u as bytes of fp8 [T, d_ffn], their scales float32 [T, 1])."""
    with torch.autocast(x.device.type, enabled=False):
        g, u = x @ w_gate.T, x @ w_up.T
        y = F.silu(g).mul_(u) @ w_down
        g8, g_scale = to_fp8(g)
        u8, u_scale = to_fp8(u)
        # As bytes: much of PyTorch, its own operator checks among it, knows no arithmetic on fp8.
        return y, g8.view(torch.uint8), u8.view(torch.uint8), g_scale, u_scale


@_dense_fp8_forward.register_fake
def _(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide, tokens = (x.shape[0], w_gate.shape[0]), x.shape[0]
    g8, u8 = (x.new_empty(wide, dtype=torch.uint8) for _ in range(2))
    g_scale, u_scale = (x.new_empty((tokens, 1), dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), g8, u8, g_scale, u_scale


@torch.library.custom_op("moc::dense_fp8_backward", mutates_args=())
def _dense_fp8_backward(
    dy: Tensor,
    x: Tensor,
    g8: Tensor,
    u8: Tensor,
    g_scale: Tensor,
    u_scale: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx [T, d], dw_gate, dw_up, dw_down [d_ffn, d]) from what forward kept."""
    with torch.autocast(x.device.type, enabled=False):
        g = (g8.view(FP8).float() * g_scale).to(x.dtype)
        u = (u8.view(FP8).float() * u_scale).to(x.dtype)
        silu = F.silu(g)
        dw_down = (silu * u).T @ dy
        dz = dy @ w_down.T
        du = silu.mul_(dz)
        dw_up, dx = du.T @ x, du @ w_up
        dg = torch.ops.aten.silu_backward(dz.mul_(u), g)
        return dx.addmm_(dg, w_gate), dg.T @ x, dw_up, dw_down


_dense_fp8_backward.register_fake(
    lambda dy, x, g8, u8, g_scale, u_scale, w_gate, *_: empty_gradients(x, w_gate)
)
register_ffn(_dense_fp8_forward, _dense_fp8_backward, n_kept=4)
