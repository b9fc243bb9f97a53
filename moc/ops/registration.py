"""What custom operators of feed-forward networks share: gradients by autograd, and counts of flops.

PyTorch's counter cannot look into an opaque operator, so the matrix products of each are declared here: three
in forward, six in backward, each 2 * T * d * d_ffn. Selection and elementwise work count nowhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.utils.flop_counter import register_flop_formula


def register_ffn(forward: CustomOpDef, backward: CustomOpDef, n_kept: int) -> None:
    """Register the gradients and the flops of `forward` (x, w_gate, w_up, w_down, *options) -> (y, *others).

    They are `backward` (dy, x, *kept, w_gate, w_up, w_down), where `kept` are the first `n_kept` of `others`.
    The last option, if there are any, says whether anything is kept: without it a gradient is a ValueError.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, w_gate, w_up, w_down, *options = inputs
        ctx.mark_non_differentiable(*output[1:])
        check_kept(forward, *options)
        ctx.save_for_backward(x, *output[1 : 1 + n_kept], w_gate, w_up, w_down)
        ctx.n_options = len(options)

    def gradients(ctx: Any, dy: Tensor, *_no_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*backward(dy.contiguous(), *ctx.saved_tensors), *[None] * ctx.n_options)

    forward.register_autograd(gradients, setup_context=setup_context)
    register_flops(forward, backward)


def empty_gradients(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Results of a backward operator, without values: dx like x; dw_gate, dw_up, dw_down like the weight."""
    return x.new_empty(x.shape), *(weight.new_empty(weight.shape) for _ in range(3))  # type: ignore[return-value]


def check_kept(operator: CustomOpDef, *options: object) -> None:
    """Raise ValueError if the last option, which says whether anything is kept for backward, is false."""
    if options and not options[-1]:
        raise ValueError(f"{operator} was called with keep=False on inputs that require a gradient")


def register_flops(forward: CustomOpDef, backward: CustomOpDef) -> None:
    """Register the flops of operators whose arguments begin with x, w_gate and with dy, x.

    w_down is the last tensor of those of `backward`.
    """

    @register_flop_formula(forward._opoverload.overloadpacket)
    def forward_flops(x: torch.Size, w_gate: torch.Size, *_: object, **__: object) -> int:
        return 3 * 2 * x.numel() * w_gate[0]

    @register_flop_formula(backward._opoverload.overloadpacket)
    def backward_flops(dy: torch.Size, x: torch.Size, *others: object, **__: object) -> int:
        w_down = [shape for shape in others if isinstance(shape, torch.Size)][-1]
        return 6 * 2 * x.numel() * w_down[0]
