"""Feed-forward layers with int8 weights for decoding: symmetric, one scale per channel and matrix.

Only weights are int8; activations keep the dtype of x, and sums are in float32. A channel is one row of each
matrix, so the kernels multiply its scale into its gate, its up projection or its element of z.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moc.config import FfnShape
from moc.layers.base import FfnWeights
from moc.ops.decode import int8_decode
from moc.reference import FfnGrads, dense_forward_backward, moc_forward_backward
from moc.selection import Selection

INT8_DECODE_TOKENS = 16  # the most that the decoding kernels take
_LARGEST = 127.0  # of the int8 numbers used: symmetric, so -128 is not


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [rows, d], float32 scales [rows]) of a weight [rows, d] of any float dtype.

    scale = the row's largest magnitude / 127, and each number is rounded to the nearest multiple of it, ties
    to even: an error of at most half a scale. A row of zeros has scale 1.
    """
    wide = weight.float()
    largest = wide.abs().amax(dim=1)
    scales = torch.where(largest > 0, largest / _LARGEST, 1.0)
    return (wide / scales[:, None]).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8), scales


def dequantize_rows(rows: Tensor, scales: Tensor) -> Tensor:
    """The weight that int8 rows [rows, d] and their scales [rows] represent, exactly: float64 [rows, d]."""
    return rows.double() * scales.double()[:, None]


def int8_reference(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, dy: Tensor, selection: Selection | None
) -> FfnGrads:
    """The reference of `dense_int8` and `moc_int8`: that of the quantised weights in `moc.reference`.

    `dense_forward_backward` without a selection, else `moc_forward_backward`, whose errors it raises.
    """
    w_gate, w_up, w_down = (dequantize_rows(*quantize_rows(w)) for w in (w_gate, w_up, w_down))
    if selection is None:
        return dense_forward_backward(x, w_gate, w_up, w_down, dy)
    return moc_forward_backward(x, w_gate, w_up, w_down, dy, selection)


class Int8FFN(FfnWeights):
    """SwiGLU with int8 weights, dense or Mixture-of-Channels, without gradients.

    w_gate, w_up and w_down are parameters as in every other layer. They are quantised when int8 weights are
    first needed, and again after a change (`load_state_dict`, `.to()`, an assignment of data or an in-place
    write). Compiled code cannot detect a change, so call `freeze` after the last one. Up to
    INT8_DECODE_TOKENS tokens use the decoding kernels; more tokens (a prompt) use GEMMs on weights that are
    converted back in each call, which is slower than GEMMs on 16-bit weights.
    """

    def __init__(self, shape: FfnShape, selection: Selection | None = None) -> None:
        super().__init__(shape)
        if selection is not None:
            selection.k(shape.d_ffn)  # raises here rather than in the first forward
        self.selection = selection
        self._rows: Tensor | None = None  # int8 [3, d_ffn, d]
        self._scales: Tensor | None = None  # float32 [3, d_ffn]
        self._made_from: tuple[tuple[int, int], ...] = ()

    def freeze(self) -> None:
        """Quantise the parameters as they are now."""
        weights = (self.w_gate, self.w_up, self.w_down)
        with torch.no_grad():
            pairs = [quantize_rows(weight) for weight in weights]
            self._rows = torch.stack([rows for rows, _ in pairs])
            self._scales = torch.stack([scales for _, scales in pairs])
        self._made_from = self._fingerprint()

    def _fingerprint(self) -> tuple[tuple[int, int], ...]:
        # The address changes with an assignment of data, the version with a write in place.
        return tuple((w.data_ptr(), w._version) for w in (self.w_gate, self.w_up, self.w_down))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_model] -> [..., d_model]. Raises ValueError for a shape or dtype that does not fit."""
        if not torch.compiler.is_compiling() and self._made_from != self._fingerprint():
            self.freeze()
        if self._rows is None or self._scales is None:
            raise ValueError("call freeze() before torch.compile: the int8 weights are not made yet")
        if 1 <= math.prod(x.shape[:-1]) <= INT8_DECODE_TOKENS:
            y, _overflow = int8_decode(x, self._rows, self._scales, self.selection)
            return y
        return self._with_wide_weights(x)

    def _with_wide_weights(self, x: Tensor) -> Tensor:
        from moc.ops.triton_ffn import triton_moc_ffn

        assert self._rows is not None
        assert self._scales is not None
        w_gate, w_up, w_down = (self._rows * self._scales[:, :, None]).to(x.dtype).unbind()
        if self.selection is not None:
            return triton_moc_ffn(x, w_gate, w_up, w_down, self.selection)[0]
        return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down.T)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, selection={self.selection}"
