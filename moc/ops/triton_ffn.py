"""The Mixture-of-Channels operator on Triton kernels and cuBLAS, opaque to torch.compile.

    forward    [g u] = x [w_gate; w_up].T    select pass: z, pairs, bitmask    y = z w_down
    backward   dz = dy w_down.T    expand pass: [dg du], z
               dx = [dg du] [w_gate; w_up]    dw_gate, dw_up = [dg du].T x    dw_down = z.T dy

Both process the tokens in chunks, at least two for a long batch, so that buffers of full width d_ffn hold one
chunk, not the batch: [g u] in forward, with z in the place of u, and [dg du] and z in backward, with z in the
place of dz. Shorter chunks, which would leave [g u] in the L2 cache for the pass, cost the GEMMs more time
than they save the passes (docs/measured.md, 2026-11-26).

If a rule keeps at most two of any four neighbouring channels (`nm:2:8`), z and [dg du] are 2:4 sparse: where
that pays, y and dx are products on sparse tensor cores (`moc.ops.cusparselt`), 1.4 times as fast, of what the
passes write in that form (`moc.kernels.sparse24`). The weight gradients sum over tokens, where nothing is
sparse.

Kept per token, x apart: K pairs (g, u) in the dtype of x and a bitmask of d_ffn / 8 bytes; with `fp8` K pairs
in 2 bytes and two float32 scales.

Weights of a wider dtype than x, as under autocast, are cast in forward and again in backward. That moves
18 d d_ffn bytes and saves the 6 d d_ffn bytes per layer that casts kept until backward would take.

If w_gate and w_up lie side by side in memory (`moc.layers.moc` places them so) one GEMM uses both. Otherwise
forward runs two GEMMs, which move the same bytes, and backward copies the two side by side once per call
(8 d d_ffn bytes at 16 bits). dw_gate and dw_up are views of one tensor. Weight gradients are summed over the
chunks in their own dtype: at most seven roundings more than in one GEMM, each 0.1 % of the sum so far in
bf16; a float32 sum would double the traffic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moc.config import FfnShape
from moc.ops.compact import ALIGN
from moc.ops.inputs import autocast_cast, check_ffn_inputs, side_by_side
from moc.ops.registration import check_kept, register_flops
from moc.selection import Selection, n_words, parse_selection

if TYPE_CHECKING:
    from moc.kernels.passes import Kept, Tiling
    from moc.kernels.sparse24 import Sparse24

Weights = tuple[Tensor, Tensor, Tensor]  # w_gate, w_up, w_down
# From here on 2:4 sparse products pay (docs/measured.md, 2026-11-26); shorter chunks were not measured.
SPARSE_D_MODEL, SPARSE_TOKENS = 768, 4096


@dataclass(frozen=True)
class Chunking:
    """How the tokens of a batch are split into chunks."""

    chunk_bytes: int = 192 << 20  # of one [tokens, d_ffn]
    fewest: int = 2  # chunks of a long batch
    most: int = 8
    long_batch: int = 4096  # tokens; a batch that is not longer is a single chunk
    multiple: int = 128  # tokens: a whole number of a GEMM's tiles

    def chunks(self, n_tokens: int, token_bytes: int) -> list[slice]:
        """The chunks of a batch, given the bytes of one token's [d_ffn]."""
        count = 1
        if n_tokens > self.long_batch:
            count = min(self.most, max(self.fewest, round(n_tokens * token_bytes / self.chunk_bytes)))
        length = -(-n_tokens // (count * self.multiple)) * self.multiple  # equal but for the last
        return [slice(start, min(start + length, n_tokens)) for start in range(0, n_tokens, max(1, length))]


@dataclass(frozen=True)
class Layout:
    """How a training step is split into chunks and its passes are laid out.

    A tiling that is None is chosen by `moc.kernels.passes`.
    """

    chunking: Chunking = Chunking()
    select: Tiling | None = None
    expand: Tiling | None = None


LAYOUT = Layout()  # of the operator; measured by harness/tuning/passes.py (docs/measured.md, 2026-11-26)


def triton_moc_ffn(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, selection: Selection, fp8: bool = False
) -> tuple[Tensor, Tensor]:
    """Mixture-of-Channels SwiGLU (arXiv 2511.09323, section 3), differentiable by x and the weights.

    Arguments, results and errors as `moc.ops.moc_ffn`, except that the dtype is one of bfloat16, float16 and
    float32, d_ffn at most 65534, and the device a GPU, or the CPU where Triton interprets its kernels (no GPU
    there, or TRITON_INTERPRET=1). `fp8` keeps gate and up of the kept channels in float8_e4m3fn: y is the
    same, gradients differ by the rounding of g and u, about 3 %; needs compute capability 8.9.
    """
    (x,) = autocast_cast(x)  # the operator casts the weights
    check_ffn_inputs(x, w_gate, w_up, w_down)
    selection.k(w_gate.shape[0])  # raises here, where the caller is, if K exceeds d_ffn
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w_gate, w_up, w_down))
    y, *_kept, overflow = _forward(x, w_gate, w_up, w_down, str(selection), fp8, keep)
    return y, overflow


def backward_scratch_bytes(shape: FfnShape, selection: Selection | None, n_tokens: int, itemsize: int) -> int:
    """Bytes a backward pass allocates beside dx and one weight gradient.

    They are [dg du] and z of one chunk, [dg du] again if it is also stored as 2:4 sparse, the two other
    weight gradients, and a copy of w_gate and w_up side by side in case they do not lie so.
    """
    token_bytes = _padded(shape.d_ffn) * itemsize
    length = _longest(LAYOUT.chunking.chunks(n_tokens, token_bytes))
    scratch = token_bytes * (3 * length + 4 * shape.d_model)
    if selection is not None and selection.two_of_four and _may_be_sparse(shape, length, itemsize):
        # values, metadata an eighth of that, and as much again, which cuSPARSELt asks for as workspace
        scratch += 10 * length * 2 * shape.d_ffn // 8
    return scratch


def _may_be_sparse(shape: FfnShape, n_tokens: int, itemsize: int) -> bool:
    """Whether 2:4 sparse products pay for chunks of so many tokens, on a GPU that makes them."""
    d, d_ffn = shape.d_model, shape.d_ffn
    pays = d >= SPARSE_D_MODEL and n_tokens >= SPARSE_TOKENS
    return pays and itemsize == 2 and d % 16 == 0 and d_ffn == _padded(d_ffn)


def _is_sparse(x: Tensor, w_down: Tensor, n_tokens: int) -> bool:
    """Whether x's GPU can, and should, make 2:4 sparse products with these weights, of so many tokens."""
    d_ffn, d = w_down.shape
    if not (x.is_cuda and _may_be_sparse(FfnShape(d, d_ffn), n_tokens, x.element_size())):
        return False
    from moc.ops import cusparselt

    return w_down.is_contiguous() and w_down.data_ptr() % 16 == 0 and cusparselt.usable(x.device)


def _sparse_rows(buffer: Tensor | None, tokens: slice, width: int, dtype: torch.dtype) -> Sparse24 | None:
    """A sparse matrix for these tokens, in the buffer if there is one and the tokens are whole tiles."""
    from moc.kernels.sparse24 import TILE_ROWS, Sparse24

    n_tokens = tokens.stop - tokens.start
    if buffer is None or n_tokens % TILE_ROWS:
        return None
    return Sparse24(buffer, n_tokens, width, dtype)


def _sparse_buffer(x: Tensor, n_tokens: int, width: int) -> Tensor:
    from moc.kernels.sparse24 import compressed_bytes

    return x.new_empty(compressed_bytes(n_tokens, width), dtype=torch.uint8)


def _longest(chunks: list[slice]) -> int:
    return max((chunk.stop - chunk.start for chunk in chunks), default=0)


def _padded(d_ffn: int) -> int:
    return -(-d_ffn // ALIGN) * ALIGN


@torch.library.custom_op("moc::triton_ffn_forward", mutates_args=())
def _forward(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, selection: str, fp8: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y like x, pairs [T, K, 2], scales [T, 2], bitmask [T, words], overflow); what is not kept is empty."""
    return forward_in_chunks(x, (w_gate, w_up, w_down), parse_selection(selection), fp8, keep, LAYOUT)


def forward_in_chunks(
    x: Tensor, weights: Weights, rule: Selection, fp8: bool, keep: bool, layout: Layout
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the operator of `triton_moc_ffn` computes, with its results, in a given layout."""
    from moc.kernels.passes import select_pass
    from moc.kernels.sparse24 import metadata_pass
    from moc.ops.cusparselt import sparse_mm

    d_ffn = weights[0].shape[0]
    y, pairs, scales, bitmask, overflow = _empty_outputs(x, weights[0], rule, fp8, keep)
    if rule.rule == "threshold" or x.numel() == 0:
        overflow.zero_()  # else the select pass does it
    x, flat_y = x.reshape(-1, x.shape[-1]), y.view(-1, x.shape[-1])
    w_gate, w_up, w_down = _cast(x.dtype, *weights)
    width, size = _padded(d_ffn), x.element_size()
    kept = _kept((pairs, scales, bitmask)) if keep else None
    joined = _whole_tiles(w_gate, w_up)
    chunks = layout.chunking.chunks(x.shape[0], width * size)
    buffer = x.new_empty(_longest(chunks), 2 * width)
    halves = None
    if kept is not None and rule.two_of_four and _is_sparse(x, w_down, _longest(chunks)):
        halves = _sparse_buffer(x, _longest(chunks), d_ffn)
    buffer[:, width + d_ffn :] = 0  # oneDNN's bf16 GEMM reads a column too many, and NaN * 0 is NaN
    with torch.autocast(x.device.type, enabled=False):
        for chunk in chunks:
            gu = buffer[: chunk.stop - chunk.start]
            g, u = gu[:, :d_ffn], gu[:, width : width + d_ffn]
            if joined is not None:
                torch.mm(x[chunk], joined.T, out=gu)
            else:
                torch.mm(x[chunk], w_gate.T, out=g)
                torch.mm(x[chunk], w_up.T, out=u)
            rows = kept.rows(chunk) if kept else None
            sparse = _sparse_rows(halves, chunk, d_ffn, x.dtype)
            if sparse is not None and rows is not None:
                select_pass(g, u, sparse.values, rule, rows, overflow, layout.select, sparse=True)
                metadata_pass(rows.bitmask, sparse)
                sparse_mm(sparse, w_down, flat_y[chunk])
            else:
                select_pass(g, u, u, rule, rows, overflow, layout.select)
                torch.mm(u, w_down, out=flat_y[chunk])  # u is z now
    return y, pairs, scales, bitmask, overflow


def _cast(dtype: torch.dtype, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Weights:
    """The weights in this dtype; if that takes a copy, w_gate and w_up lie side by side."""
    if w_gate.dtype == w_up.dtype == w_down.dtype == dtype:
        return w_gate, w_up, w_down
    joined = w_gate.new_empty(2, *w_gate.shape, dtype=dtype)
    joined[0], joined[1] = w_gate, w_up
    return joined[0], joined[1], w_down.to(dtype)


def _whole_tiles(w_gate: Tensor, w_up: Tensor) -> Tensor | None:
    """[w_gate; w_up] as one tensor [2 d_ffn, d] if they lie so in memory and need no padding, else None."""
    return side_by_side(w_gate, w_up) if w_gate.shape[0] == _padded(w_gate.shape[0]) else None


def _joined(w_gate: Tensor, w_up: Tensor) -> Tensor:
    """[w_gate; 0; w_up; 0], each padded to a multiple of ALIGN rows."""
    joined = _whole_tiles(w_gate, w_up)
    if joined is None:
        d_ffn, d = w_gate.shape
        joined = w_gate.new_empty(2, _padded(d_ffn), d)
        joined[0, :d_ffn], joined[1, :d_ffn], joined[:, d_ffn:] = w_gate, w_up, 0
        joined = joined.flatten(0, 1)
    return joined


_forward.register_fake(
    lambda x, w_gate, w_up, w_down, selection, fp8, keep: _empty_outputs(
        x, w_gate, parse_selection(selection), fp8, keep
    )
)


def _empty_outputs(
    x: Tensor, w_gate: Tensor, rule: Selection, fp8: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n_tokens, d_ffn = math.prod(x.shape[:-1]), w_gate.shape[0]
    k = rule.k(d_ffn) if keep else 0
    return (
        x.new_empty(x.shape),
        x.new_empty((n_tokens, k, 2), dtype=torch.float8_e4m3fn if fp8 else x.dtype),
        x.new_empty((n_tokens, 2 if fp8 and keep else 0), dtype=torch.float32),
        x.new_empty((n_tokens, n_words(d_ffn) if keep else 0), dtype=torch.int32),
        x.new_empty((), dtype=torch.int64),
    )


def _kept(kept: tuple[Tensor, Tensor, Tensor]) -> Kept:
    from moc.kernels.passes import Kept

    pairs, scales, bitmask = kept
    return Kept(pairs, bitmask, scales if scales.shape[1] else None)


@torch.library.custom_op("moc::triton_ffn_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    pairs: Tensor,
    scales: Tensor,
    bitmask: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    two_of_four: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx like x, dw_gate and dw_up in one [2, padded d_ffn, d], dw_down [d_ffn, d])."""
    kept, weights = (pairs, scales, bitmask), (w_gate, w_up, w_down)
    return backward_in_chunks(dy, x, kept, weights, two_of_four, LAYOUT)


def backward_in_chunks(
    dy: Tensor,
    x: Tensor,
    kept_tensors: tuple[Tensor, Tensor, Tensor],
    weights: Weights,
    two_of_four: bool,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `forward_in_chunks` from what it kept, in a given layout."""
    from moc.kernels.passes import expand_pass
    from moc.kernels.sparse24 import metadata_pass
    from moc.ops.cusparselt import sparse_mm

    d_ffn, d = weights[0].shape
    dx, dw_gu, dw_down = _empty_gradients(x, weights[0])
    w_gate, w_up, w_down = _cast(x.dtype, *weights)
    dy, x, flat_dx = dy.reshape(-1, d), x.reshape(-1, d), dx.view(-1, d)
    n_tokens, width, size = x.shape[0], _padded(d_ffn), x.element_size()
    kept = _kept(kept_tensors)
    w_gu, dw_joined = _joined(w_gate, w_up), dw_gu.flatten(0, 1)
    chunks = layout.chunking.chunks(n_tokens, width * size)
    dgu_buffer, z_buffer = x.new_empty(_longest(chunks), 2 * width), x.new_empty(_longest(chunks), width)
    halves = None
    if two_of_four and _is_sparse(x, w_down, _longest(chunks)):
        halves = _sparse_buffer(x, _longest(chunks), 2 * d_ffn)
    if n_tokens == 0:
        dw_gu.zero_()
        dw_down.zero_()
    with torch.autocast(x.device.type, enabled=False):
        for chunk in chunks:
            dgu, z = dgu_buffer[: chunk.stop - chunk.start], z_buffer[: chunk.stop - chunk.start]
            torch.mm(dy[chunk], w_down.T, out=z[:, :d_ffn])  # dz, in whose place z comes
            sparse, rows = _sparse_rows(halves, chunk, 2 * d_ffn, x.dtype), kept.rows(chunk)
            values = None if sparse is None else sparse.values
            expand_pass(z[:, :d_ffn], rows, dgu[:, :width], dgu[:, width:], z, layout.expand, values)
            if sparse is not None:
                metadata_pass(rows.bitmask, sparse)
                sparse_mm(sparse, w_gu, flat_dx[chunk])
            else:
                torch.mm(dgu, w_gu, out=flat_dx[chunk])
            if chunk.start == 0:
                torch.mm(dgu.T, x[chunk], out=dw_joined)
                torch.mm(z[:, :d_ffn].T, dy[chunk], out=dw_down)
            else:
                dw_joined.addmm_(dgu.T, x[chunk])
                dw_down.addmm_(z[:, :d_ffn].T, dy[chunk])
    return dx, dw_gu, dw_down


_backward.register_fake(lambda dy, x, pairs, scales, bitmask, w_gate, *_: _empty_gradients(x, w_gate))


def _empty_gradients(x: Tensor, w_gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d_ffn, d = w_gate.shape
    return x.new_empty(x.shape), x.new_empty(2, _padded(d_ffn), d), x.new_empty(d_ffn, d)


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, str, bool, bool],
    output: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> None:
    x, w_gate, w_up, w_down, selection, _fp8, keep = inputs
    _y, pairs, scales, bitmask, overflow = output
    ctx.mark_non_differentiable(pairs, scales, bitmask, overflow)
    check_kept(_forward, keep)
    ctx.save_for_backward(x, pairs, scales, bitmask, w_gate, w_up, w_down)
    ctx.two_of_four = parse_selection(selection).two_of_four  # type: ignore[attr-defined]


def _autograd(
    ctx: torch.autograd.function.FunctionCtx, dy: Tensor, *_no_gradients: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None, None]:
    x, pairs, scales, bitmask, w_gate, w_up, w_down = ctx.saved_tensors  # type: ignore[attr-defined]
    two_of_four: bool = ctx.two_of_four  # type: ignore[attr-defined]
    dx, dw_gu, dw_down = _backward(
        dy.contiguous(), x, pairs, scales, bitmask, w_gate, w_up, w_down, two_of_four
    )
    d_ffn = w_gate.shape[0]
    dw_gate, dw_up = dw_gu[0, :d_ffn].to(w_gate.dtype), dw_gu[1, :d_ffn].to(w_up.dtype)
    return dx, dw_gate, dw_up, dw_down.to(w_down.dtype), None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
register_flops(_forward, _backward)
