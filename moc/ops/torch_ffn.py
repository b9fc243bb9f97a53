"""Feed-forward operators in PyTorch, opaque to torch.compile: they choose what is kept for backward.

`moc_ffn`       Mixture-of-Channels: keeps x, compact g and u [T, K] and a bitmask [T, ceil(d_ffn / 32)].
`act_prune_ffn` dense output, the same storage: backward sees the selected channels only.
`dense_gu_ffn`  dense: keeps x, g and u [T, d_ffn], and recomputes silu(g) and z.

All three are SwiGLU with channel-major weights: y = (mask * silu(x @ w_gate.T) * (x @ w_up.T)) @ w_down.
Weights are kept by reference. Second derivatives are not defined. Temporaries have the full width d_ffn; only
what is kept between forward and backward is compact.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moc.ops.compact import Expander, gather_compact, keep_mask, kept_channels, pack_bitmask, unpack_bitmask
from moc.ops.gather import kept_rows_output, pays
from moc.ops.inputs import autocast_cast, check_ffn_inputs
from moc.ops.registration import empty_gradients, register_ffn
from moc.selection import Selection, n_words, parse_selection


def moc_ffn(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, selection: Selection
) -> tuple[Tensor, Tensor]:
    """Mixture-of-Channels SwiGLU (arXiv 2511.09323, section 3), differentiable by x and the weights.

    x [..., d]; w_gate, w_up, w_down [d_ffn, d]; all of one dtype of float16, bfloat16, float32, float64, or
    under torch.autocast cast to its dtype first, as F.linear would. Returns y [..., d] and the overflow, an
    int64 scalar: channels that the cap of a `threshold` rule left out (0 for other rules). A NaN gate is kept
    and so reaches y. Raises ValueError for shapes or dtypes that do not fit, and if K exceeds d_ffn.
    """
    return _compact_ffn(x, w_gate, w_up, w_down, selection, masked=True)


def act_prune_ffn(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, selection: Selection
) -> tuple[Tensor, Tensor]:
    """Dense SwiGLU that keeps only the selected channels for backward; arguments and result as `moc_ffn`.

    The control for Mixture-of-Channels: the same rule applied to the same gates and the same bytes kept, but
    y is dense, and the gradients are those of the masked function.
    """
    return _compact_ffn(x, w_gate, w_up, w_down, selection, masked=False)


def dense_gu_ffn(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """Dense SwiGLU, exact, that keeps x, g and u and recomputes the rest in backward; y [..., d].

    Arguments and errors as `moc_ffn`.
    """
    x, w_gate, w_up, w_down = autocast_cast(x, w_gate, w_up, w_down)
    check_ffn_inputs(x, w_gate, w_up, w_down)
    y, _g, _u = _dense_gu_forward(x.reshape(-1, x.shape[-1]), w_gate, w_up, w_down)
    return y.view(x.shape)


def _compact_ffn(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, selection: Selection, masked: bool
) -> tuple[Tensor, Tensor]:
    x, w_gate, w_up, w_down = autocast_cast(x, w_gate, w_up, w_down)
    check_ffn_inputs(x, w_gate, w_up, w_down)
    selection.k(w_gate.shape[0])  # raises here, where the caller is, if K exceeds d_ffn
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w_gate, w_up, w_down))
    flat = x.reshape(-1, x.shape[-1])
    y, _g, _u, _bitmask, overflow = _moc_forward(flat, w_gate, w_up, w_down, str(selection), masked, keep)
    return y.view(x.shape), overflow


# --- Mixture-of-Channels: moc::ffn_forward and moc::ffn_backward ---


@torch.library.custom_op("moc::ffn_forward", mutates_args=())
def _moc_forward(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, selection: str, masked: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y [T, d], g [T, K], u [T, K], bitmask [T, words], overflow); without `keep`, g, u, bitmask are empty.

    `masked` says whether y is that of the masked function or dense (act_prune).
    """
    rule, d_ffn = parse_selection(selection), w_gate.shape[0]
    with torch.autocast(x.device.type, enabled=False):
        g = x @ w_gate.T
        mask, overflow = keep_mask(g, rule)
        if masked and not keep and pays(x, w_up, rule.k(d_ffn)):
            y = kept_rows_output(x, g, mask, w_up, w_down)
            return y, *_nothing_kept(x), overflow
        u = x @ w_up.T
        if keep:
            channels = kept_channels(mask, rule.k(d_ffn))
            g_compact, u_compact = gather_compact(g, channels), gather_compact(u, channels)
            bitmask = pack_bitmask(mask)
            del channels
        else:
            g_compact, u_compact, bitmask = _nothing_kept(x)
        z = F.silu(g, inplace=True).mul_(u)
        del u
        if masked:
            z.masked_fill_(mask.logical_not_(), 0)
        return z @ w_down, g_compact, u_compact, bitmask, overflow


def _nothing_kept(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    g_compact, u_compact = x.new_empty(len(x), 0), x.new_empty(len(x), 0)
    return g_compact, u_compact, x.new_empty((len(x), 0), dtype=torch.int32)


@_moc_forward.register_fake
def _(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, selection: str, masked: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n_tokens, d_ffn = x.shape[0], w_gate.shape[0]
    k = parse_selection(selection).k(d_ffn) if keep else 0
    return (
        x.new_empty(n_tokens, x.shape[1]),
        x.new_empty(n_tokens, k),
        x.new_empty(n_tokens, k),
        x.new_empty((n_tokens, n_words(d_ffn) if keep else 0), dtype=torch.int32),
        x.new_empty((), dtype=torch.int64),
    )


@torch.library.custom_op("moc::ffn_backward", mutates_args=())
def _moc_backward(
    dy: Tensor,
    x: Tensor,
    g_compact: Tensor,
    u_compact: Tensor,
    bitmask: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx [T, d], dw_gate, dw_up, dw_down [d_ffn, d]) of the masked function, from what forward kept."""
    d_ffn = w_gate.shape[0]
    with torch.autocast(x.device.type, enabled=False):
        channels = kept_channels(unpack_bitmask(bitmask, d_ffn), g_compact.shape[1])
        # Elementwise work on [T, K] in at least float32: one rounding instead of one per operation.
        wide = torch.promote_types(x.dtype, torch.float32)
        dz = gather_compact(dy @ w_down.T, channels).to(wide)
        g, u = g_compact.to(wide), u_compact.to(wide)
        sigmoid = torch.sigmoid(g)
        silu = g * sigmoid
        z = (silu * u).to(x.dtype)
        du = (dz * silu).to(x.dtype)
        dg = (dz * u * sigmoid * (1 + g * (1 - sigmoid))).to(x.dtype)
        del dz, g, u, sigmoid, silu

        expander = Expander(channels, d_ffn, x.dtype)
        dw_down = expander.expand(z).T @ dy
        dg_full = expander.expand(dg)
        dw_gate, dx = dg_full.T @ x, dg_full @ w_gate
        du_full = expander.expand(du)
        dw_up = du_full.T @ x
        return dx.addmm_(du_full, w_up), dw_gate, dw_up, dw_down


_moc_backward.register_fake(lambda dy, x, g, u, bitmask, w_gate, *_: empty_gradients(x, w_gate))
register_ffn(_moc_forward, _moc_backward, n_kept=3)


# --- dense, keeping g and u: moc::dense_gu_forward and moc::dense_gu_backward ---


@torch.library.custom_op("moc::dense_gu_forward", mutates_args=())
def _dense_gu_forward(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [T, d], g [T, d_ffn], u [T, d_ffn])."""
    with torch.autocast(x.device.type, enabled=False):
        g, u = x @ w_gate.T, x @ w_up.T
        return F.silu(g).mul_(u) @ w_down, g, u


@_dense_gu_forward.register_fake
def _(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = (x.shape[0], w_gate.shape[0])
    return x.new_empty(x.shape[0], x.shape[1]), x.new_empty(wide), x.new_empty(wide)


@torch.library.custom_op("moc::dense_gu_backward", mutates_args=())
def _dense_gu_backward(
    dy: Tensor, x: Tensor, g: Tensor, u: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx [T, d], dw_gate, dw_up, dw_down [d_ffn, d]), operation by operation what eager autograd does."""
    with torch.autocast(x.device.type, enabled=False):
        silu = F.silu(g)
        dw_down = (silu * u).T @ dy
        dz = dy @ w_down.T
        du = silu.mul_(dz)
        dw_up, dx = du.T @ x, du @ w_up
        del du, silu
        dg = torch.ops.aten.silu_backward(dz.mul_(u), g)
        return dx.addmm_(dg, w_gate), dg.T @ x, dw_up, dw_down


_dense_gu_backward.register_fake(lambda dy, x, g, u, w_gate, *_: empty_gradients(x, w_gate))
register_ffn(_dense_gu_forward, _dense_gu_backward, n_kept=2)
