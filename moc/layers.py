"""Feed-forward layers: one class per way of computing or keeping SwiGLU, all with the same parameters.

Every layer holds w_gate, w_up and w_down [d_ffn, d_model] in this order, so state dicts are interchangeable,
and `init_weights` fills them from a seed alone, so that rivals start from the same weights.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moc.config import FfnShape
from moc.ops import act_prune_ffn, autocast_cast, check_ffn_inputs, dense_gu_ffn, moc_ffn
from moc.selection import Selection

INIT_STD = 0.02  # of every matrix, as `initializer_range` of Hugging Face's LlamaConfig


def init_weights(module: nn.Module, seed: int) -> None:
    """Fill every parameter of `module` in place from `seed`: matrices normal(0, 0.02), vectors (norms) one.

    A parameter's values depend on the seed, its name and its shape only: not on the method, on the other
    parameters, on the device or on PyTorch's global generator. So the same model with another feed-forward
    method, even one from outside, starts from the same weights. Parameters on the meta device, which have no
    values, are passed over.
    """
    # In threads because drawing is serial and takes 10 s per 1e9 weights, in every process of a sweep.
    with ThreadPoolExecutor() as pool:
        named = {name: p for name, p in module.named_parameters() if not p.is_meta}
        list(pool.map(_fill, named.keys(), named.values(), repeat(seed)))


@torch.no_grad()
def _fill(name: str, parameter: nn.Parameter, seed: int) -> None:
    if parameter.dim() < 2:
        parameter.fill_(1.0)
        return
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
    parameter.copy_(values.normal_(0.0, INIT_STD, generator=generator))


class FfnWeights(nn.Module):
    """The parameters all feed-forward layers share; weights start as `init_weights(layer, seed=0)`."""

    def __init__(self, shape: FfnShape) -> None:
        super().__init__()
        self.shape = shape
        self.w_gate = nn.Parameter(torch.empty(shape.d_ffn, shape.d_model))
        self.w_up = nn.Parameter(torch.empty(shape.d_ffn, shape.d_model))
        self.w_down = nn.Parameter(torch.empty(shape.d_ffn, shape.d_model))
        init_weights(self, seed=0)

    def freeze(self) -> None:
        """Derive from the weights what makes calls without gradients faster; nothing in most layers.

        To be called again when a weight has been replaced.
        """

    def extra_repr(self) -> str:
        return f"d_model={self.shape.d_model}, d_ffn={self.shape.d_ffn}"


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


class MoCFFN(FfnWeights):
    """Mixture-of-Channels SwiGLU that keeps x, compact g and u and a bitmask; see `moc.ops.moc_ffn`.

    A few tokens on a CPU, without gradients, read only the rows of w_up and w_down that they keep; see
    `moc.gather`. With a `threshold` rule the buffer `overflow_count` (int64, not in the state dict) adds up
    the channels that the cap left out, over all forward calls, those repeated by activation checkpointing
    included; zero it to start anew. Raises ValueError if K exceeds d_ffn.
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
    """Dense output, MoC's storage: only the selected channels reach backward; see `moc.ops.act_prune_ffn`."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_model] -> [..., d_model]. Raises ValueError for a shape or dtype that does not fit."""
        y, overflow = act_prune_ffn(x, self.w_gate, self.w_up, self.w_down, self.selection)
        self._count(overflow)
        return y
