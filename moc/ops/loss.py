"""Cross-entropy over a large vocabulary, with the logits of only one chunk of tokens in memory at a time.

The logits of all tokens take several GB at the sizes of a sweep and would hide the memory that a feed-forward
method saves, so every method of a whole-model comparison uses this loss. The gradients of the mean loss are
computed in *forward*, from the logits of each chunk (as Liger's fused linear cross-entropy does, arXiv
2410.10989): recomputing logits in backward would need a fourth product of tokens x d x vocabulary in addition
to those of logits, d_hidden and d_weight. In exchange d_hidden and d_weight are kept until backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moc.dtypes import KERNEL_DTYPES, torch_dtypes
from moc.ops.inputs import autocast_cast

_KERNEL_DTYPES = torch_dtypes(KERNEL_DTYPES)
CHUNK_TOKENS = 2048  # at a vocabulary of 32000: 262 MB of float32 logits
IGNORE_INDEX = -100  # targets that count neither in the mean nor in the gradient, as in F.cross_entropy


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits = hidden @ weight.T, differentiable by `hidden` and `weight`.

    hidden [..., d] and weight [vocabulary, d] of one float dtype, or cast to torch.autocast's; targets [...]
    int64, IGNORE_INDEX where nothing is to be predicted. Softmax in float32 (float64 for float64 inputs);
    scalar of that dtype, NaN if every target is ignored. Raises ValueError for shapes or dtypes that do not
    fit.
    """
    hidden, weight = autocast_cast(hidden, weight)
    _check(hidden, weight, targets)
    keep = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    flat = hidden.reshape(-1, hidden.shape[-1])
    loss, _scale, _d_hidden, _d_weight = _mean_cross_entropy(flat, weight, targets.reshape(-1), keep)
    return loss


@torch.no_grad()
def token_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of every token, [...] float32 (float64 for float64 inputs), without gradient.

    Arguments and errors as `chunked_cross_entropy`; 0 where the target is IGNORE_INDEX.
    """
    hidden, weight = autocast_cast(hidden, weight)
    _check(hidden, weight, targets)
    flat = hidden.reshape(-1, hidden.shape[-1])
    return _token_cross_entropy(flat, weight, targets.reshape(-1)).view(targets.shape)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    if weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}: must be [..., d], [vocabulary, d]"
        )
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)}, hidden has {tuple(hidden.shape[:-1])} tokens"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"targets have dtype {targets.dtype}, expected torch.int64")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden has dtype {hidden.dtype}, weight {weight.dtype}: they must be the same")


def _softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _nats_of_chunk(hidden: Tensor, weight: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """One chunk: (nats per token [C], 0 where ignored; d nats / d logits [C, vocabulary] if `gradient`).

    The gradient is softmax - one-hot in the dtype of `hidden`. The caller must leave out the rows of ignored
    tokens, whose values are undefined. Without `gradient` the second tensor is undefined.
    """
    logits = hidden @ weight.T
    if logits.is_cuda and logits.dtype in _KERNEL_DTYPES:
        # imported here because Triton is there on Linux only, and nothing else in this module needs it
        from moc.kernels.cross_entropy import cross_entropy_in_place

        return cross_entropy_in_place(logits, targets, IGNORE_INDEX, gradient), logits
    log_p = F.log_softmax(logits, dim=-1, dtype=_softmax_dtype(hidden.dtype))
    del logits
    target = targets.clamp(min=0).unsqueeze(1)
    log_p_target = log_p.gather(1, target)
    nats = -log_p_target.squeeze(1).masked_fill(targets == IGNORE_INDEX, 0)
    if gradient:
        # expm1, because softmax - 1 in low precision loses what is left of a confident token
        log_p = log_p.exp_().to(hidden.dtype).scatter_(1, target, log_p_target.expm1().to(hidden.dtype))
    return nats, log_p


@torch.library.custom_op("moc::token_cross_entropy", mutates_args=())
def _token_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    nats = hidden.new_empty(hidden.shape[0], dtype=_softmax_dtype(hidden.dtype))
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            nats[part], _ = _nats_of_chunk(hidden[part], weight, targets[part], gradient=False)
    return nats


_token_cross_entropy.register_fake(
    lambda hidden, weight, targets: hidden.new_empty(len(hidden), dtype=_softmax_dtype(hidden.dtype))
)


@torch.library.custom_op("moc::mean_cross_entropy", mutates_args=())
def _mean_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mean nats, 1 / tokens counted, d_hidden of the *sum* of nats, d_weight of the mean).

    d_hidden is left unscaled because a mean over many tokens would underflow in float16. Without `keep` both
    gradients are empty.
    """
    wide = _softmax_dtype(hidden.dtype)
    total = hidden.new_zeros((), dtype=wide)
    scale = (targets != IGNORE_INDEX).sum().to(wide).reciprocal_()
    d_hidden = torch.empty_like(hidden) if keep else hidden.new_empty(0)
    d_weight = torch.zeros_like(weight, dtype=wide) if keep else weight.new_empty(0)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            nats, d_logits = _nats_of_chunk(hidden[part], weight, targets[part], gradient=keep)
            total += nats.sum()
            if keep:
                ignored = (targets[part] == IGNORE_INDEX).unsqueeze(1)
                d_hidden[part] = (d_logits @ weight).masked_fill_(ignored, 0)
                d_weight += d_logits.T @ hidden[part].masked_fill(ignored, 0)
            del d_logits  # before the next chunk's logits
        return total * scale, scale, d_hidden, (d_weight * scale).to(weight.dtype) if keep else d_weight


@_mean_cross_entropy.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = _softmax_dtype(hidden.dtype)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty((), dtype=wide),
        torch.empty_like(hidden) if keep else hidden.new_empty(0),
        torch.empty_like(weight) if keep else weight.new_empty(0),
    )


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Tensor, Tensor, bool],
    output: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    if not inputs[3]:
        raise ValueError("moc::mean_cross_entropy: keep=False on inputs that require a gradient")
    _loss, scale, d_hidden, d_weight = output
    ctx.mark_non_differentiable(scale, d_hidden, d_weight)
    ctx.save_for_backward(scale, d_hidden, d_weight)


def _autograd(
    ctx: torch.autograd.function.FunctionCtx, d_loss: Tensor, *_no_gradients: Tensor | None
) -> tuple[Tensor, Tensor, None, None]:
    scale, d_hidden, d_weight = ctx.saved_tensors  # type: ignore[attr-defined]
    # The factors are scalars, so they do not widen the dtype of what they multiply.
    return d_hidden * (d_loss * scale), d_weight * d_loss, None, None


_mean_cross_entropy.register_autograd(_autograd, setup_context=_setup_context)
