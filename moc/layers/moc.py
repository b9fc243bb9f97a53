"""Mixture-of-Channels layers: in plain PyTorch, on Triton kernels, and the activation-pruning control."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moc.config import FfnShape
from moc.layers.base import FfnWeights
from moc.ops.decode import decodes, moc_decode
from moc.ops.inputs import place_side_by_side
from moc.ops.torch_ffn import act_prune_ffn, moc_ffn
from moc.ops.triton_ffn import triton_moc_ffn
from moc.selection import Selection


class MoCFFN(FfnWeights):
    """Mixture-of-Channels SwiGLU that keeps x, compact g and u and a bitmask; see
    `moc.ops.torch_ffn.moc_ffn`.

    For a few tokens on a CPU, without gradients, only the rows of w_up and w_down that are kept are read; see
    `moc.ops.gather`. With a `threshold` rule the buffer `overflow_count` (int64, not in the state dict) sums
    the channels that the cap left out over all forward calls, including those repeated by activation
    checkpointing; zero it to reset. Raises ValueError if K exceeds d_ffn.
    """

    overflow_count: Tensor

    def __init__(self, shape: FfnShape, selection: Selection) -> None:
        super().__init__(shape)
        selection.k(shape.d_ffn)  # raises here rather than in the first forward
        self.selection = selection
        if selection.rule == "threshold":
            self.register_buffer("overflow_count", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_model] -> [..., d_model]. Raises ValueError for a shape or dtype that does not fit."""
        y, overflow = moc_ffn(x, self.w_gate, self.w_up, self.w_down, self.selection)
        self._count(overflow)
        return y

    def _count(self, overflow: Tensor) -> None:
        if self.selection.rule == "threshold":
            self.overflow_count.add_(overflow)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, selection={self.selection}"


class ActPruneFFN(MoCFFN):
    """Dense output, MoC's storage: only the selected channels reach backward; see
    `moc.ops.torch_ffn.act_prune_ffn`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_model] -> [..., d_model]. Raises ValueError for a shape or dtype that does not fit."""
        y, overflow = act_prune_ffn(x, self.w_gate, self.w_up, self.w_down, self.selection)
        self._count(overflow)
        return y


class TritonMoCFFN(MoCFFN):
    """Mixture-of-Channels SwiGLU on Triton kernels; see `moc.ops.triton_ffn.triton_moc_ffn`, also for `fp8`.

    A few tokens without gradients are computed by `moc.ops.decode.moc_decode`; `moc.ops.decode.decode_path`
    says up to how many.
    """

    def __init__(self, shape: FfnShape, selection: Selection, fp8: bool = False) -> None:
        super().__init__(shape, selection)
        self.fp8 = fp8
        self.freeze()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TritonMoCFFN:
        # What .to(), .cuda() and their like go through: it moves each parameter on its own.
        super()._apply(fn, recurse)
        self.freeze()
        return self

    def freeze(self) -> None:
        """Place w_gate and w_up side by side in memory, so that one GEMM can use both without a copy.

        Where they are placed otherwise (by FSDP, or an assignment of data) the operator makes a copy.
        """
        gate, up = self.w_gate.data, self.w_up.data
        if type(gate) is type(up) is Tensor and gate.dtype == up.dtype and gate.device == up.device:
            place_side_by_side(self.w_gate, self.w_up)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_model] -> [..., d_model]. Raises ValueError for what the kernels cannot do."""
        weights = self.w_gate, self.w_up, self.w_down
        if decodes(x, *weights, self.selection):
            y, overflow = moc_decode(x, *weights, self.selection)
        else:
            y, overflow = triton_moc_ffn(x, *weights, self.selection, self.fp8)
        self._count(overflow)
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, fp8={self.fp8}"
