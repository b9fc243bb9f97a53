"""Dense SwiGLU layers, which differ in what they keep for backward and in how they use matrix products.

`DenseFFN`      eager PyTorch: keeps x, g, u, silu(g) and z.
`RecomputeFFN`  keeps x and runs forward again in backward.
`DenseGuFFN`    keeps x, g and u.
`FusedFFN`      one matrix product for gate and up; for torch.compile, which fuses the elementwise operations.
`LigerFFN`      Liger's SwiGLU kernel: keeps x, g and u (optional extra `liger`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moc.config import FfnShape
from moc.layers.base import FfnWeights
from moc.ops.inputs import autocast_cast, check_ffn_inputs, place_side_by_side
from moc.ops.torch_ffn import dense_gu_ffn


class DenseFFN(FfnWeights):
    """SwiGLU as eager PyTorch writes it; autograd keeps x, g, u, silu(g) and z, that is x + 4 * T * d_ffn."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_model] -> [..., d_model]. Raises ValueError for a shape or dtype that does not fit."""
        # Cast before use: autocast would cast x once for each of the two products and keep both copies.
        x, w_gate, w_up, w_down = autocast_cast(x, self.w_gate, self.w_up, self.w_down)
        check_ffn_inputs(x, w_gate, w_up, w_down)
        z = F.silu(F.linear(x, w_gate)) * F.linear(x, w_up)
        return F.linear(z, w_down.T)


class RecomputeFFN(DenseFFN):
    """DenseFFN under activation checkpointing: autograd keeps x, and backward runs the forward again."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_model] -> [..., d_model]. Raises as DenseFFN."""
        # Nothing in it draws random numbers, so the generator's state need not be saved (that would
        # synchronise).
        return checkpoint(super().forward, x, use_reentrant=False, preserve_rng_state=False)


class DenseGuFFN(FfnWeights):
    """Dense SwiGLU that keeps x, g and u, that is x + 2 * T * d_ffn; see `moc.ops.dense_gu_ffn`."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_model] -> [..., d_model]. Raises ValueError for a shape or dtype that does not fit."""
        return dense_gu_ffn(x, self.w_gate, self.w_up, self.w_down)


class FusedFFN(FfnWeights):
    """SwiGLU with one product for gate and up: x @ [w_gate; w_up].T, split in halves.

    The two weights remain separate parameters, so state dicts are interchangeable. Concatenating them moves
    4 * d_ffn * d elements per step: 90 MB, or about 0.03 ms, at 2048/5504. Under autocast it costs nothing,
    because the cast to the narrow dtype writes them side by side. In decoding it would double the time, so
    `freeze` places them side by side once.
    """

    def __init__(self, shape: FfnShape) -> None:
        super().__init__(shape)
        self._w_gate_up: Tensor | None = None  # the storage of both weights, once frozen

    def freeze(self) -> None:
        """Place w_gate and w_up side by side in memory; calls without gradients then use them as one matrix.

        In-place writes, such as those of `load_state_dict`, stay visible. `.to()`, copying and pickling undo
        it.
        """
        self._w_gate_up = place_side_by_side(self.w_gate, self.w_up)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedFFN:
        self._w_gate_up = None
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_w_gate_up": None}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_model] -> [..., d_model]. Raises ValueError for a shape or dtype that does not fit."""
        x, w_down = autocast_cast(x, self.w_down)
        w_gate_up = self._w_gate_up  # [2 * d_ffn, d_model]
        if w_gate_up is None or torch.is_grad_enabled():
            w_gate_up = torch.cat([self.w_gate, self.w_up])
        w_gate_up = w_gate_up.to(x.dtype)
        check_ffn_inputs(x, w_gate_up[: self.shape.d_ffn], w_gate_up[self.shape.d_ffn :], w_down)
        g, u = F.linear(x, w_gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(g) * u, w_down.T)


class LigerFFN(FfnWeights):
    """SwiGLU with Liger's Triton kernel for silu(g) * u, eager as its users run it. CUDA only."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_model] -> [..., d_model]. Raises ImportError without the extra `liger`."""
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        x, w_gate, w_up, w_down = autocast_cast(x, self.w_gate, self.w_up, self.w_down)
        check_ffn_inputs(x, w_gate, w_up, w_down)
        z = LigerSiLUMulFunction.apply(F.linear(x, w_gate), F.linear(x, w_up))
        return F.linear(z, w_down.T)
