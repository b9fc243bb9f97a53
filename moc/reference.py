"""Reference: dense and Mixture-of-Channels feed-forward networks in plain PyTorch, slow and obvious.

Every function accepts any float dtype and computes in float64. Only one thing depends on the dtype of the
inputs: channels are selected by gates *rounded to the dtype of x*, as in an implementation in that dtype. So
with bf16 tensors these functions give the float64 reference of a bf16 implementation, and nearly equal gates
do not lead to different channels. Do not upcast before calling.

Notation (arXiv 2511.09323, section 3): x [T, d]; w_gate, w_up, w_down [d_ffn, d], all channel-major.

    g = x @ w_gate.T    u = x @ w_up.T    m = select(g)    z = m * silu(g) * u    y = z @ w_down
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moc.selection import Selection


@dataclass(frozen=True)
class FfnGrads:
    """Output and gradients of one feed-forward network, float64.

    y and dx are [T, d]; dw_gate, dw_up and dw_down are [d_ffn, d].
    """

    y: Tensor
    dx: Tensor
    dw_gate: Tensor
    dw_up: Tensor
    dw_down: Tensor


def select_mask(g: Tensor, selection: Selection) -> Tensor:
    """Which channels of gates `g` [T, d_ffn] the rule keeps: bool [T, d_ffn].

    Equal gates: the lowest channel index wins. `topk_abs` ranks by abs(silu(g)) rounded to float32, and
    `threshold` compares with its number rounded to float32, so that implementations can agree exactly.
    Raises ValueError if a gate is NaN, if `g` is not two-dimensional, or if K exceeds d_ffn.
    """
    if g.dim() != 2:
        raise ValueError(f"gates must be [T, d_ffn], got shape {tuple(g.shape)}")
    n_nan = int(torch.isnan(g).sum())
    if n_nan:
        raise ValueError(f"{n_nan} of {g.numel()} gates are NaN; a rule cannot rank them")
    d_ffn = g.shape[1]
    k = selection.k(d_ffn)
    if selection.rule == "nm":
        assert selection.n is not None
        assert selection.m is not None
        banks = [
            _largest(g[:, start : start + selection.m], selection.n) for start in range(0, d_ffn, selection.m)
        ]
        return torch.cat(banks, dim=1)
    if selection.rule == "topk_abs":
        # One silu per distinct value: vectorised code may round the same gate differently at two places,
        # and equal gates must tie.
        values, place = torch.unique(g, return_inverse=True)
        return _largest(F.silu(values.double()).abs().float()[place], k)
    if selection.rule == "threshold":
        return _largest(g, k) & (g.double() > selection.threshold_f32)
    return _largest(g, k)


def overflow_count(g: Tensor, selection: Selection) -> Tensor:
    """Channels above the threshold that its cap left out, over all rows: int64 scalar, 0 for other rules."""
    if selection.rule != "threshold":
        return torch.zeros((), dtype=torch.int64, device=g.device)
    wanted = (g.double() > selection.threshold_f32).sum(dim=1)
    return (wanted - selection.k(g.shape[1])).clamp(min=0).sum()


def dense_forward(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """Dense SwiGLU, y [T, d] in float64."""
    g, u = x.double() @ w_gate.double().T, x.double() @ w_up.double().T
    return (F.silu(g) * u) @ w_down.double()


def dense_forward_backward(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, dy: Tensor) -> FfnGrads:
    """Dense SwiGLU and its gradients for `dy` [T, d], the gradient of the loss by y."""
    everything = torch.ones(x.shape[0], w_gate.shape[0], dtype=torch.bool, device=x.device)
    return _forward_backward(x, w_gate, w_up, w_down, dy, everything, everything)


def moc_forward(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, selection: Selection) -> Tensor:
    """Mixture-of-Channels SwiGLU, y [T, d] in float64. Raises as `select_mask` does."""
    g, u = x.double() @ w_gate.double().T, x.double() @ w_up.double().T
    mask = select_mask(g.to(x.dtype), selection)
    return (mask * F.silu(g) * u) @ w_down.double()


def moc_forward_backward(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, dy: Tensor, selection: Selection
) -> FfnGrads:
    """Mixture-of-Channels SwiGLU and its gradients for `dy` [T, d], the gradient of the loss by y.

    Exact for the masked function; the choice of channels itself has no gradient. Raises as `select_mask`
    does.
    """
    mask = select_mask((x.double() @ w_gate.double().T).to(x.dtype), selection)
    return _forward_backward(x, w_gate, w_up, w_down, dy, mask, mask)


def act_prune_forward_backward(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, dy: Tensor, selection: Selection
) -> FfnGrads:
    """Dense SwiGLU whose backward uses only the selected channels' activations (the `act_prune` control).

    The output is exact, the gradients are those of the masked function: what pruning *saved* activations
    gives. Raises as `select_mask` does.
    """
    mask = select_mask((x.double() @ w_gate.double().T).to(x.dtype), selection)
    return _forward_backward(x, w_gate, w_up, w_down, dy, torch.ones_like(mask), mask)


def _largest(score: Tensor, k: int) -> Tensor:
    """The min(k, columns) largest of each row, the lowest column first among equals: bool like `score`."""
    order = torch.sort(score, dim=1, descending=True, stable=True).indices
    mask = torch.zeros_like(score, dtype=torch.bool)
    return mask.scatter_(1, order[:, :k], torch.ones_like(mask))


def _forward_backward(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    dy: Tensor,
    forward_mask: Tensor,
    backward_mask: Tensor,
) -> FfnGrads:
    x, w_gate, w_up, w_down, dy = (t.double() for t in (x, w_gate, w_up, w_down, dy))
    g, u = x @ w_gate.T, x @ w_up.T
    silu, sigmoid = F.silu(g), torch.sigmoid(g)
    y = (forward_mask * silu * u) @ w_down
    dz = (dy @ w_down.T) * backward_mask
    du = dz * silu
    dg = dz * u * sigmoid * (1 + g * (1 - sigmoid))
    z = backward_mask * silu * u
    return FfnGrads(y=y, dx=dg @ w_gate + du @ w_up, dw_gate=dg.T @ x, dw_up=du.T @ x, dw_down=z.T @ dy)
