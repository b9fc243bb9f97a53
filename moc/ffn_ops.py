"""The Mixture-of-Channels operator on Triton kernels and cuBLAS, opaque to torch.compile.

    forward    [g u] = x [w_gate; w_up].T    select pass: z, pairs, bitmask    y = z w_down
    backward   dz = dy w_down.T    expand pass: [dg du], z
               dx = [dg du] [w_gate; w_up]    dw_gate, dw_up = [dg du].T x    dw_down = z.T dy

Both work through the tokens in chunks of two sizes. What stands between a GEMM and its pass ([g u], dz) is a
small chunk long, so that the pass finds it in the L2 cache and its own writes drain during the next GEMM.
What feeds the GEMMs after the pass (z, [dg du]) is a large chunk long, so that they are efficient; a long
batch has at least two of those, so that no buffer of full width d_ffn is as long as it.

Kept per token, x apart: K pairs (g, u) in the dtype of x and a bitmask of d_ffn / 8 bytes; with `fp8` K pairs
in 2 bytes and two float32 scales.

The weights are three tensors. If w_gate and w_up lie side by side in memory (`moc.triton_layers` arranges it)
one GEMM takes both. Else forward takes two GEMMs, which moves no byte more, and backward joins them once per
call (8 d d_ffn bytes at 16 bits). dw_gate and dw_up are views of one tensor. Weight gradients are summed over
the large chunks in their own dtype: at most MAX_CHUNKS - 1 roundings more than in one GEMM, in bf16 0.1 %
each of what is summed so far, where a float32 sum would double the traffic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moc.compact import n_words
from moc.ops import autocast_cast, check_ffn_inputs
from moc.selection import Selection, parse_selection

if TYPE_CHECKING:
    from moc.kernels.between import Kept

# Bytes that a GEMM leaves for its pass, and of one [tokens, d_ffn] that the passes leave for the GEMMs.
SMALL_CHUNK_BYTES = 96 << 20
LARGE_CHUNK_BYTES = 192 << 20
MIN_CHUNKS, MAX_CHUNKS = 2, 8  # large ones, of a batch longer than
LONG_BATCH = 4096  # tokens; a shorter one is a single large chunk
CHUNK_MULTIPLE = 128  # tokens: a whole number of a GEMM's tiles
_ALIGN = 64  # channels: rows start at multiples of 128 bytes, which cuBLAS's fast path and wide accesses want


def triton_moc_ffn(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, selection: Selection, fp8: bool = False
) -> tuple[Tensor, Tensor]:
    """Mixture-of-Channels SwiGLU (arXiv 2511.09323, section 3), differentiable by x and the weights.

    Arguments, results and errors as `moc.ops.moc_ffn`, except that the dtype is one of bfloat16, float16 and
    float32, d_ffn at most 65534, and the device a GPU, or the CPU where Triton interprets its kernels (no GPU
    there, or TRITON_INTERPRET=1). `fp8` keeps gate and up of the kept channels in float8_e4m3fn: y is the
    same, gradients differ by the rounding of g and u, about 3 %; needs compute capability 8.9.
    """
    weights = w_gate, w_up, w_down
    x, w_gate, w_up, w_down = autocast_cast(x, *weights)
    check_ffn_inputs(x, w_gate, w_up, w_down)
    if w_gate is not weights[0]:  # cast for autocast: into one tensor, which costs nothing once compiled
        w_gate, w_up = torch.cat((w_gate, w_up)).split(w_gate.shape[0])
    selection.k(w_gate.shape[0])  # raises here, where the caller is, if K exceeds d_ffn
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w_gate, w_up, w_down))
    y, *_kept, overflow = _forward(x, w_gate, w_up, w_down, str(selection), fp8, keep)
    return y, overflow


@dataclass(frozen=True)
class Chunk:
    """A large chunk of tokens and the small ones it consists of."""

    start: int
    stop: int
    small: list[tuple[int, int]]  # (start, stop), in tokens of the whole batch


def plan(n_tokens: int, large_bytes: int, small_bytes: int) -> list[Chunk]:
    """The chunks of a batch, given the bytes per token that LARGE_ and SMALL_CHUNK_BYTES are about."""
    large = 1
    if n_tokens > LONG_BATCH:
        large = min(MAX_CHUNKS, max(MIN_CHUNKS, round(n_tokens * large_bytes / LARGE_CHUNK_BYTES)))
    return [
        Chunk(start, stop, split(start, stop, round((stop - start) * small_bytes / SMALL_CHUNK_BYTES)))
        for start, stop in split(0, n_tokens, large)
    ]


def split(start: int, stop: int, count: int) -> list[tuple[int, int]]:
    """At most `count` ranges from start to stop, equal multiples of CHUNK_MULTIPLE but for the last."""
    length = -(-(stop - start) // (max(1, count) * CHUNK_MULTIPLE)) * CHUNK_MULTIPLE
    return [(first, min(first + length, stop)) for first in range(start, stop, max(1, length))]


def _longest(chunks: list[Chunk]) -> tuple[int, int]:
    """Tokens of the longest large chunk and of the longest small one."""
    return (
        max((chunk.stop - chunk.start for chunk in chunks), default=0),
        max((stop - start for chunk in chunks for start, stop in chunk.small), default=0),
    )


def _padded(d_ffn: int) -> int:
    return -(-d_ffn // _ALIGN) * _ALIGN


@torch.library.custom_op("moc::triton_ffn_forward", mutates_args=())
def _forward(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, selection: str, fp8: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y like x, pairs [T, K, 2], scales [T, 2], bitmask [T, words], overflow); what is not kept is empty."""
    from moc.kernels.between import select_pass  # Triton is loaded when it is first needed

    rule, d_ffn = parse_selection(selection), w_gate.shape[0]
    y, pairs, scales, bitmask, overflow = _empty_outputs(x, w_gate, rule, fp8, keep)
    overflow.zero_()
    x, flat_y = x.reshape(-1, x.shape[-1]), y.view(-1, x.shape[-1])
    width, size = _padded(d_ffn), x.element_size()
    kept = _kept(pairs, scales, bitmask) if keep else None
    joined = _side_by_side(w_gate, w_up)
    chunks = plan(x.shape[0], width * size, 2 * width * size)
    large, small = _longest(chunks)
    z_buffer, gu_buffer = x.new_empty(large, width), x.new_empty(small, 2 * width)
    z_buffer[:, d_ffn:] = 0  # oneDNN's bf16 GEMM reads a column too many, and NaN * 0 is NaN
    with torch.autocast(x.device.type, enabled=False):
        for chunk in chunks:
            z = z_buffer[: chunk.stop - chunk.start, :d_ffn]
            for start, stop in chunk.small:
                gu = gu_buffer[: stop - start]
                g, u = gu[:, :d_ffn], gu[:, width : width + d_ffn]
                if joined is not None:
                    torch.mm(x[start:stop], joined.T, out=gu)
                else:
                    torch.mm(x[start:stop], w_gate.T, out=g)
                    torch.mm(x[start:stop], w_up.T, out=u)
                rows = slice(start - chunk.start, stop - chunk.start)
                select_pass(g, u, z[rows], rule, kept.rows(start, stop) if kept else None, overflow)
            torch.mm(z, w_down, out=flat_y[chunk.start : chunk.stop])
    return y, pairs, scales, bitmask, overflow


def _side_by_side(w_gate: Tensor, w_up: Tensor) -> Tensor | None:
    """[w_gate; w_up] as one tensor [2 d_ffn, d] if they lie so in memory and need no padding, else None."""
    d_ffn, d = w_gate.shape
    if (
        w_gate.is_contiguous()
        and w_up.is_contiguous()
        and w_up.untyped_storage().data_ptr() == w_gate.untyped_storage().data_ptr()
        and w_up.storage_offset() == w_gate.storage_offset() + d_ffn * d
        and d_ffn == _padded(d_ffn)
    ):
        return w_gate.as_strided((2 * d_ffn, d), (d, 1))
    return None


def _joined(w_gate: Tensor, w_up: Tensor) -> Tensor:
    """[w_gate; 0; w_up; 0], each padded to a multiple of _ALIGN rows."""
    joined = _side_by_side(w_gate, w_up)
    if joined is None:
        d_ffn, d = w_gate.shape
        joined = w_gate.new_empty(2, _padded(d_ffn), d)
        joined[0, :d_ffn], joined[1, :d_ffn], joined[:, d_ffn:] = w_gate, w_up, 0
        joined = joined.flatten(0, 1)
    return joined


@_forward.register_fake
def _(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, selection: str, fp8: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(x, w_gate, parse_selection(selection), fp8, keep)


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


def _kept(pairs: Tensor, scales: Tensor, bitmask: Tensor) -> Kept:
    from moc.kernels.between import Kept

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
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx like x, dw_gate and dw_up in one [2, padded d_ffn, d], dw_down [d_ffn, d])."""
    from moc.kernels.between import expand_pass

    d_ffn, d = w_gate.shape
    dx, dw_gu, dw_down = _empty_gradients(x, w_gate)
    dy, x, flat_dx = dy.reshape(-1, d), x.reshape(-1, d), dx.view(-1, d)
    n_tokens, width, size = x.shape[0], _padded(d_ffn), x.element_size()
    kept = _kept(pairs, scales, bitmask)
    w_gu, dw_joined = _joined(w_gate, w_up), dw_gu.flatten(0, 1)
    chunks = plan(n_tokens, width * size, width * size)
    large, small = _longest(chunks)
    dgu_buffer, z_buffer = x.new_empty(large, 2 * width), x.new_empty(large, width)
    dz_buffer = x.new_empty(small, width)
    if n_tokens == 0:
        dw_gu.zero_()
        dw_down.zero_()
    with torch.autocast(x.device.type, enabled=False):
        for chunk in chunks:
            tokens = slice(chunk.start, chunk.stop)
            dgu, z = dgu_buffer[: chunk.stop - chunk.start], z_buffer[: chunk.stop - chunk.start]
            for start, stop in chunk.small:
                dz, rows = dz_buffer[: stop - start, :d_ffn], slice(start - chunk.start, stop - chunk.start)
                torch.mm(dy[start:stop], w_down.T, out=dz)
                expand_pass(dz, kept.rows(start, stop), dgu[rows, :width], dgu[rows, width:], z[rows])
            torch.mm(dgu, w_gu, out=flat_dx[tokens])
            if chunk.start == 0:
                torch.mm(dgu.T, x[tokens], out=dw_joined)
                torch.mm(z[:, :d_ffn].T, dy[tokens], out=dw_down)
            else:
                dw_joined.addmm_(dgu.T, x[tokens])
                dw_down.addmm_(z[:, :d_ffn].T, dy[tokens])
    return dx, dw_gu, dw_down


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    pairs: Tensor,
    scales: Tensor,
    bitmask: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(x, w_gate)


def _empty_gradients(x: Tensor, w_gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d_ffn, d = w_gate.shape
    return x.new_empty(x.shape), x.new_empty(2, _padded(d_ffn), d), x.new_empty(d_ffn, d)


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, str, bool, bool],
    output: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> None:
    x, w_gate, w_up, w_down, _selection, _fp8, keep = inputs
    _y, pairs, scales, bitmask, overflow = output
    ctx.mark_non_differentiable(pairs, scales, bitmask, overflow)
    if not keep:
        raise ValueError(
            "moc::triton_ffn_forward was called with keep=False on inputs that require a gradient"
        )
    ctx.save_for_backward(x, pairs, scales, bitmask, w_gate, w_up, w_down)


def _autograd(
    ctx: torch.autograd.function.FunctionCtx, dy: Tensor, *_no_gradients: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None, None]:
    x, pairs, scales, bitmask, w_gate, w_up, w_down = ctx.saved_tensors  # type: ignore[attr-defined]
    dx, dw_gu, dw_down = _backward(dy.contiguous(), x, pairs, scales, bitmask, w_gate, w_up, w_down)
    d_ffn = w_gate.shape[0]
    return dx, dw_gu[0, :d_ffn], dw_gu[1, :d_ffn], dw_down, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


# PyTorch's counter cannot look into an opaque op: three matrix products in forward, six in backward.
@register_flop_formula(torch.ops.moc.triton_ffn_forward)
def _forward_flops(x_shape: torch.Size, w_gate_shape: torch.Size, *_: object, **__: object) -> int:
    return 3 * 2 * x_shape.numel() * w_gate_shape[0]


@register_flop_formula(torch.ops.moc.triton_ffn_backward)
def _backward_flops(dy_shape: torch.Size, x_shape: torch.Size, *shapes: object, **__: object) -> int:
    w_down_shape = shapes[-1]
    assert isinstance(w_down_shape, torch.Size)
    return 6 * 2 * x_shape.numel() * w_down_shape[0]
