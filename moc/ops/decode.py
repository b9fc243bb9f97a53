"""Decoding operators: a feed-forward network for a few tokens, without gradients.

The time of one token is bound by the bytes of the weights, and Mixture-of-Channels reads only those rows of
w_up and w_down that some token keeps. With more tokens few rows remain that no token keeps; `decode_path`
says from how many tokens on a layer uses GEMMs over all rows, with the select pass between them, instead.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from moc.config import MAX_D_FFN
from moc.dtypes import DECODE_DTYPES, torch_dtypes
from moc.ops.inputs import autocast_cast, check_ffn_inputs, compute_dtype
from moc.selection import Selection, parse_selection

_DTYPES = torch_dtypes(DECODE_DTYPES)


def decode_path(selection: Selection, d_ffn: int, tokens: int, dtype: torch.dtype) -> Literal["rows", "gemm"]:
    """How `moc` computes a forward pass without gradients.

    `rows`: the decoding kernels, which read the kept rows of w_up and w_down only. `gemm`: GEMMs over all
    rows, and the select pass.
    """
    few = 1 <= tokens <= most_tokens(selection, d_ffn)
    return "rows" if few and dtype in _DTYPES and d_ffn <= MAX_D_FFN else "gemm"


def most_tokens(selection: Selection, d_ffn: int) -> int:
    """The most tokens for which the decoding kernels are faster; see docs/measured.md, 2026-11-26.

    One token, except for wide banks, of which several tokens leave the most rows unread.
    """
    if (selection.m or 0) < 32:
        return 1
    return 8 if d_ffn >= 8192 else 4


def decodes(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, selection: Selection) -> bool:
    """Whether a layer takes `moc_decode`: no gradient is wanted, and `decode_path` says `rows`."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, w_gate, w_up, w_down)):
        return False
    tokens = math.prod(x.shape[:-1])
    return decode_path(selection, w_gate.shape[0], tokens, compute_dtype(x)) == "rows"


def moc_decode(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, selection: Selection
) -> tuple[Tensor, Tensor]:
    """Mixture-of-Channels SwiGLU (arXiv 2511.09323, section 3) of 1 to 16 tokens, without gradients.

    x [..., d] of bfloat16 or float16; w_gate, w_up, w_down [d_ffn, d] of the same dtype, or under
    torch.autocast cast to its dtype first. Returns y [..., d] and the overflow, an int64 scalar: channels
    that the cap of a `threshold` rule left out (0 for other rules). Channels are ranked by gates rounded to
    the dtype of x; if a kernel of its own computes the gates, z uses the rounded gates, too. Bits of y may
    differ between runs for one token, unless torch.use_deterministic_algorithms is on. Raises ValueError for
    shapes, dtypes or devices that do not fit, and if K exceeds d_ffn.
    """
    x, w_gate, w_up, w_down = autocast_cast(x, w_gate, w_up, w_down)
    check_ffn_inputs(x, w_gate, w_up, w_down)
    selection.k(w_gate.shape[0])  # raises here, where the caller is, if K exceeds d_ffn
    return _decode(x, w_gate, w_up, w_down, str(selection))


def int8_decode(
    x: Tensor, rows: Tensor, scales: Tensor, selection: Selection | None
) -> tuple[Tensor, Tensor]:
    """SwiGLU with int8 weights of 1 to 16 tokens, without gradients; selection None: dense.

    x [..., d] of bfloat16 or float16; rows int8 [3, d_ffn, d], those of w_gate, w_up and w_down, and scales
    float32 [3, d_ffn], what they are multiplied by. Products are those of x and the int8 numbers, summed in
    float32 and scaled after. Results and errors as `moc_decode`.
    """
    (x,) = autocast_cast(x)
    if selection is not None:
        selection.k(rows.shape[1])
    return _decode_int8(x, rows, scales, "" if selection is None else str(selection))


@torch.library.custom_op("moc::decode", mutates_args=())
def _decode(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, selection: str) -> tuple[Tensor, Tensor]:
    """(y like x, overflow)."""
    from moc.kernels.decode_launch import Rows, decode_pass  # Triton is loaded when it is first needed

    y, overflow = _empty_outputs(x)
    weights = (w_gate.contiguous(), w_up.contiguous(), w_down.contiguous())
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    decode_pass(flat, Rows(*weights), parse_selection(selection), y.view(flat.shape), overflow)
    return y, overflow


@torch.library.custom_op("moc::decode_int8", mutates_args=())
def _decode_int8(x: Tensor, rows: Tensor, scales: Tensor, selection: str) -> tuple[Tensor, Tensor]:
    """(y like x, overflow); selection "" is the dense network."""
    from moc.kernels.decode_launch import Rows, decode_pass

    y, overflow = _empty_outputs(x)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    rule = parse_selection(selection) if selection else None
    gate, up, down = rows.unbind()
    decode_pass(flat, Rows(gate, up, down, scales), rule, y.view(flat.shape), overflow)
    return y, overflow


def _empty_outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((), dtype=torch.int64)


_decode.register_fake(lambda x, *_: _empty_outputs(x))
_decode_int8.register_fake(lambda x, *_: _empty_outputs(x))
