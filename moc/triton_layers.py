"""The Mixture-of-Channels layer on Triton kernels, with the parameters of every other layer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from moc.config import FfnShape
from moc.decode_ops import decodes, moc_decode
from moc.ffn_ops import triton_moc_ffn
from moc.layers import MoCFFN
from moc.ops import place_side_by_side
from moc.selection import Selection


class TritonMoCFFN(MoCFFN):
    """Mixture-of-Channels SwiGLU on Triton kernels; see `moc.ffn_ops.triton_moc_ffn`, also for `fp8`.

    A few tokens without gradients take `moc.decode_ops.moc_decode`; `moc.decode_ops.decode_path` says how
    many.
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
        """Let one GEMM take w_gate and w_up without a copy.

        Where something else places them (FSDP, another assignment of data) the operator copes, at the cost of
        a copy.
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


def moc_ffn(shape: FfnShape, selection: Selection | None) -> TritonMoCFFN:
    """Factory of the method `moc`. Raises ValueError without a selection."""
    return TritonMoCFFN(shape, _required(selection))


def moc_fp8_ffn(shape: FfnShape, selection: Selection | None) -> TritonMoCFFN:
    """Factory of the method `moc_fp8`. Raises ValueError without a selection."""
    return TritonMoCFFN(shape, _required(selection), fp8=True)


def _required(selection: Selection | None) -> Selection:
    if selection is None:
        raise ValueError("this method needs a selection, such as topk:0.1875")
    return selection


moc_ffn.takes_selection = moc_fp8_ffn.takes_selection = True  # type: ignore[attr-defined]
moc_ffn.compile = moc_fp8_ffn.compile = True  # type: ignore[attr-defined]
