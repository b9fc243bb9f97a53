"""Whether a model decodes what it should: logits of cached, stepwise decoding against full forwards.

Tokens cannot be compared: rounding moves a gate past its neighbour, another channel is kept, and at a close
call another token is the likeliest, after which the texts have nothing in common. So the tokens are given
(teacher forcing), and the *logits* of each place are compared by relative error over the vocabulary:

- with the method's own forward over the whole sequence without a cache, and
- with the truth: the same weights, activations in float32 (float64 for a method in float32), and the
  feed-forward network in float64 by `moc.reference`, which rounds gates only where channels are chosen.

How much error is right depends on the depth and on how many choices of channels rounding swaps, which in bf16
is the larger part (about 0.5 % of the kept channels of a layer, each worth a percent of its output and more).
So it is not guessed but measured: the truth's own code is run once more with activations in the dtype of the
method. Its error is that of one right implementation in this dtype; another rounds at other places (it stores
g, u and z besides, and its products add up in another order), so its error is another draw of the same size
or somewhat more. `SPREAD` times that is allowed, and the gate's tolerance for one layer on top, where the
measured error may be nothing.

The median over the places judges, since a wrong cache, position or mask is wrong at nearly every place, while
in fp32 a single swapped channel is a thousand times the rounding error at the one place where it happens. One
place alone is wrong if its logits have nothing to do with the truth's: two independent vectors differ by 1.41
of their size, `UNRELATED` is far below, and far above what swapped channels do.

What a layer computes in detail is not judged here, where the depth blurs it, but by `harness.measure.gate`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.measure.ffn import FfnTensors
from harness.measure.gate import TOLERANCE
from harness.workloads.generate_model import ffn_tensors
from moc.config import LlamaConfig
from moc.decoding import GreedyDecoder
from moc.llama import Block, Llama
from moc.methods import Reference
from moc.selection import Selection

SPREAD = 3.0
UNRELATED = 0.5
_CHUNK_ROWS = 512  # tokens of a float64 feed-forward pass at a time


@dataclass(frozen=True)
class Truth:
    """Logits [rows, places, vocabulary] of the truth, and the errors of its own code in a method's dtype."""

    logits: Tensor
    rounding: Tensor  # relative error of each place, [rows, places]


@dataclass(frozen=True)
class DecodeGate:
    """What came of it: the median error against the truth, and what is wrong, if anything."""

    median_error: float
    places: int
    detail: str

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.detail


class _ReferenceFFN(nn.Module):
    """The feed-forward network of `moc.reference` on weights of any dtype, float64 inside."""

    def __init__(self, reference: Reference, selection: Selection | None, weights: FfnTensors) -> None:
        super().__init__()
        self._call = reference, selection, weights

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_model] -> [..., d_model] of the dtype of x."""
        reference, selection, ffn = self._call
        parts = [
            reference(rows, ffn.w_gate, ffn.w_up, ffn.w_down, torch.zeros_like(rows), selection).y
            for rows in x.reshape(-1, x.shape[-1]).split(_CHUNK_ROWS)
        ]
        return torch.cat(parts).to(x.dtype).view(x.shape)


def find_truth(
    config: LlamaConfig,
    weights: dict[str, Tensor],
    tokens: Tensor,
    first: int,
    reference: Reference,
    selection: Selection | None,
) -> Truth:
    """The truth about the places `first` and after of `tokens` [rows, S]; see the module."""
    dtype = weights["head"].dtype
    wide = torch.float32 if dtype.itemsize < 4 else torch.float64

    def logits(of: torch.dtype) -> Tensor:
        return _reference_logits(config, weights, tokens, first, reference, selection, of)

    truth = logits(wide)
    return Truth(truth, relative_errors(logits(dtype), truth) if dtype != wide else truth.new_zeros(1))


@torch.no_grad()
def _reference_logits(
    config: LlamaConfig,
    weights: dict[str, Tensor],
    tokens: Tensor,
    first: int,
    reference: Reference,
    selection: Selection | None,
    dtype: torch.dtype,
) -> Tensor:
    """Logits with activations in `dtype`; a wider copy of the weights exists for one layer at a time."""
    with torch.device("meta"):
        shell = Llama(config, nn.Identity)  # for its tables of positions
    rotation = tuple(table[: tokens.shape[1]].to(tokens.device) for table in (shell.cos, shell.sin))
    x = F.embedding(tokens, weights["embedding"]).to(dtype)
    delta = torch.zeros_like(x)
    for layer in range(config.n_layers):
        with torch.device("meta"):
            block = Block(config, _ReferenceFFN(reference, selection, ffn_tensors(weights, layer)))
        prefix = f"layers.{layer}."
        state = {name: weights[prefix + name].to(dtype) for name in block.state_dict()}
        block.load_state_dict(state, assign=True)
        x, delta = block(x, delta, rotation)
    hidden = F.rms_norm(x + delta, (config.d_model,), weights["norm.weight"].to(dtype), config.norm_eps)
    return F.linear(hidden[:, first:], weights["head"].to(dtype))


@torch.no_grad()
def decoded_logits(decoder: GreedyDecoder, tokens: Tensor, first: int) -> Tensor:
    """Logits [batch, S - first, vocabulary] at the places `first` and after, decoded one token at a time."""
    found = [decoder.prefill(tokens[:, : first + 1]).clone()]
    for place in range(first + 1, tokens.shape[1]):
        decoder.token.copy_(tokens[:, place : place + 1])
        found.append(decoder.step().clone())
    return torch.stack(found, dim=1)


@torch.no_grad()
def forward_logits(model: Llama, tokens: Tensor, first: int) -> Tensor:
    """The same logits from one forward over the whole sequence, without a cache."""
    return F.linear(model(tokens)[:, first:], model.head)


def relative_errors(found: Tensor, truth: Tensor) -> Tensor:
    """Error of each place relative to its logits' size, [rows, places]; infinite where something is NaN."""
    difference = (found.to(truth.dtype) - truth).norm(dim=-1)
    return (difference / truth.norm(dim=-1)).nan_to_num(nan=float("inf"))


def check_decoding(
    decoder: GreedyDecoder, tokens: Tensor, first: int, rows: Tensor, truth: Callable[[], Truth]
) -> DecodeGate:
    """Judge a decoder on `tokens` [batch, S], of which `first` + 1 are the prompt; see the module.

    The truth is known for some `rows` of the batch; the method's own forward is compared for all.
    """
    known = truth()
    found = decoded_logits(decoder, tokens, first)
    own = relative_errors(found, forward_logits(decoder.model, tokens, first).to(known.logits.dtype))
    true = relative_errors(found[rows], known.logits)
    rounding = float(known.rounding.median()), float(known.rounding.max())
    allowed = TOLERANCE[found.dtype] + SPREAD * rounding[0]
    allowed_once = max(UNRELATED, SPREAD * rounding[1])
    problems = []
    for errors, other in ((own, "its own forward without a cache"), (true, "the reference")):
        median, worst = float(errors.median()), float(errors.max())
        if not median <= allowed:
            problems.append(f"decoded logits are off {other} by {median:.1e} (median), allowed {allowed:.1e}")
        elif not worst <= allowed_once:
            problems.append(
                f"decoded logits of one token are off {other} by {worst:.2f}, allowed {allowed_once:.2f}"
            )
    return DecodeGate(float(true.median()), true.numel(), "; ".join(problems))
