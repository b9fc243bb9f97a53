"""Inputs of the correctness gate on which every precision must choose the same channels.

The difficulty: a bf16 method chooses channels from rounded gates, or from unrounded ones in an accumulator,
or from gates another GEMM rounded differently; in natural data one to thirty channels lie within one rounding
of the K-th value, so right methods differ in a few channels of almost every token, by several percent of the
output's norm. A tolerance wide enough for that would hide a wrong K. So the data of a selecting method leaves
nothing to rounding:

- `ties`: gates are exact in every supported dtype, and many are *equal*. Whoever accumulates in at least
  bf16 gets the same numbers whatever the order of summation, so K, the rule and the order of ties are checked
  with no allowance at all. Neighbouring gates differ in the last bit of a bf16, and K-th values are positive,
  negative and near zero.
- `gap`: real-valued gates with a wide gap where the rule cuts, so the numerics of gates are tested too.

A method without a selection gets natural data. Each builder here checks what it promises.
"""

from __future__ import annotations

import torch

from harness.measure.ffn import FfnTensors, natural_tensors, normal
from moc.config import FfnShape
from moc.reference import select_mask
from moc.selection import Selection

_TIES_STD = 16.0  # of the integers that gates are made of
_TIES_LIFT = 129.0  # from here to 256, neighbouring integers are neighbouring bf16 numbers
_TIES_UNIT = 2.0**-7  # makes gates of order one, exactly
_GAP = 1.5  # half the distance between chosen and other gates: silu is far from linear there
_GAP_NOISE = 0.15  # their spread; even 6 deviations keep chosen gates above 0.6, where abs(silu) ranks alike
_GAP_GROUPS = 8  # different choices of channels
_GAP_INPUT = 1.1  # size of x along a group's own direction; no short binary fraction, so it rounds
_CHUNK = 2**24  # gates judged at once


def ties(
    shape: FfnShape, tokens: int, dtype: torch.dtype, device: torch.device, seed: int, rule: Selection
) -> FfnTensors:
    """Integers times a power of two for gates, full of ties; weights and dy that show single channels.

    x is plus or minus a power of two that differs between tokens, and w_gate minus one, zero or one, times
    2**-7. A constant column lifts the gates of some tokens to about +1, of others to -1 (not for `topk_abs`,
    whose score has its minimum there), and of others not at all. No integer exceeds 256, partial sums
    included, so all are exact in bf16. Channel i is written to column i mod d alone, by a w_down row with one
    entry, and dy has one entry in up to d tokens: so elements of y and dw_down are single channels' values,
    and one wrong channel in one token is an error of 100 % somewhere, not of 1/sqrt(K) of a norm.
    """
    generator = torch.Generator(device).manual_seed(seed)
    base = natural_tensors(shape, tokens, dtype, device, seed)
    d, d_ffn = shape.d_model, shape.d_ffn

    token = torch.arange(tokens, device=device)
    x = torch.randint(0, 2, (tokens, d), generator=generator, device=device).mul_(2).sub_(1).to(dtype)
    lifts = torch.tensor([1.0, 1.0 if rule.rule == "topk_abs" else -1.0, 0.0], device=device)
    x[:, 0] = lifts[token % 3].to(dtype)
    x *= torch.tensor([0.5, 1.0, 2.0, 4.0], device=device)[token % 4, None].to(dtype)

    density = min(1.0, _TIES_STD**2 / d)
    draw = torch.rand((d_ffn, d), generator=generator, device=device)
    w_gate = ((draw < density / 2).to(dtype) - (draw > 1 - density / 2).to(dtype)) * _TIES_UNIT
    w_gate[:, 0] = _TIES_LIFT * _TIES_UNIT

    channels = torch.arange(d_ffn, device=device)
    w_down = torch.zeros_like(base.w_down)
    w_down[channels, channels % d] = torch.where(channels % 2 == 0, 1.0, -2.0).to(dtype)

    shown = min(tokens, d)
    dy = torch.zeros_like(base.dy)
    rows = torch.arange(shown, device=device) * tokens // shown
    dy[rows, torch.arange(shown, device=device)] = 1.0

    tensors = FfnTensors(w_gate=w_gate, w_up=base.w_up, w_down=w_down, x=x, dy=dy)
    _require_decided(tensors, rule)
    return tensors


def gap(
    shape: FfnShape, tokens: int, dtype: torch.dtype, device: torch.device, seed: int, rule: Selection
) -> FfnTensors:
    """Gates near plus or minus 1.5 (about the threshold, if the rule has one), and never in between.

    The rule itself chooses a random set of channels for each of a few groups of tokens; a token has one entry
    along its group's direction, which lifts that set and lowers the rest, and noise everywhere else.
    """
    generator = torch.Generator(device).manual_seed(seed)
    base = natural_tensors(shape, tokens, dtype, device, seed)
    d, d_ffn = shape.d_model, shape.d_ffn
    groups = max(1, min(_GAP_GROUPS, d // 4))
    centre = rule.threshold_f32 if rule.rule == "threshold" else 0.0

    scores = torch.randn((groups, d_ffn), generator=generator, device=device)
    if rule.rule == "threshold":
        # Any number of channels up to the cap may pass, so let it differ between groups.
        counts = [max(1, rule.k(d_ffn) * (group + 1) // groups) for group in range(groups)]
        ranks = scores.argsort(dim=1).argsort(dim=1)
        chosen = ranks < torch.tensor(counts, device=device)[:, None]
    else:
        chosen = select_mask(scores, rule)

    x = base.x.clone()
    x[:, :groups] = 0
    x[torch.arange(tokens, device=device), torch.arange(tokens, device=device) % groups] = _GAP_INPUT
    w_gate = torch.empty((d_ffn, d), dtype=dtype, device=device)
    lift = torch.where(chosen, centre + _GAP, centre - _GAP) / _GAP_INPUT
    w_gate[:, :groups] = lift.T.to(dtype)
    if d > groups:
        w_gate[:, groups:] = normal((d_ffn, d - groups), _GAP_NOISE * (d - groups) ** -0.5, generator, dtype)

    tensors = FfnTensors(w_gate=w_gate, w_up=base.w_up, w_down=base.w_down, x=x, dy=base.dy)
    _require_decided(tensors, rule)
    return tensors


def chunk_rows(tokens: int, d_ffn: int) -> list[slice]:
    """Slices of rows small enough that full-width float64 tensors of them fit beside everything else."""
    step = max(1, _CHUNK // d_ffn)
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def _require_decided(tensors: FfnTensors, rule: Selection) -> None:
    """Raise RuntimeError unless rounding the exact gates changes no choice; a first chunk stands for all."""
    rows = chunk_rows(tensors.x.shape[0], tensors.w_gate.shape[0])[0]
    exact = tensors.x[rows].double() @ tensors.w_gate.double().T
    rounded = exact.to(tensors.x.dtype)
    if not torch.equal(select_mask(exact, rule), select_mask(rounded, rule)):
        raise RuntimeError(f"the gate's inputs leave the choice of {rule} to rounding in {rounded.dtype}")
