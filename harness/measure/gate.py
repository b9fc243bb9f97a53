"""The correctness gate: outputs and every gradient against the float64 truth, before anything is timed.

Two bounds, for y, dx, dw_gate, dw_up and dw_down alike:

1. the relative Frobenius error, by the table `TOLERANCE`, finds numerics that are wrong everywhere;
2. the largest error of a single element finds what a norm hides: one channel too few of 2000, a swapped tie,
   a tail that was never written.

Nothing is allowed for channels that rounding could swap, since the inputs (`harness.measure.gate_data`) leave
none. Free device memory is filled with NaN first, so that an unwritten output cannot pass by luck.

How the table comes about. u is the unit roundoff (half the distance from 1 to the next number): 2^-8 for
bf16, 2^-11 for fp16, 2^-24 for fp32, 2^-53 for fp64. Rounding random values once to nearest gives a relative
Frobenius error of about 0.42 u.

- bf16, fp16: storing an intermediate rounds it. On the way to a gradient that happens up to eight times (g,
  u, silu(g), dz, two products, the GEMM's output, a sum of two such), independently: 0.42 u * sqrt(8) = 1.2
  u. Derivatives amplify it by up to 1.5 (g silu'(g) / silu(g) at the gates used), and a GEMM that adds
  partial sums in the narrow type costs as much again. Bound: 3 u.
- fp32: the longest sum runs over T tokens; its rounding error grows as u sqrt(T) / 2, 8e-6 at T = 65536 in
  the worst order. Bound: 3e-5, which tf32 operands (3e-4) miss by far.
- fp64: likewise 1.4e-14, and the truth itself is no better. Bound: 1e-12.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness.measure import gate_data
from harness.measure.ffn import WEIGHTS, FfnTensors, natural_tensors
from moc.config import FfnShape
from moc.methods import Reference
from moc.selection import Selection

TOLERANCE: dict[torch.dtype, float] = {
    torch.bfloat16: 3 * 2.0**-8,
    torch.float16: 3 * 2.0**-11,
    torch.float32: 3e-5,
    torch.float64: 1e-12,
}
# Of an element, relative to the element plus its row's root mean square: a bf16 element that is the sum of a
# few large values of both signs may be off by 30 u = 0.12. A kept channel that is missing where it stands
# alone is off by more than 0.25 if it is at least a third of that mean, as three channels in four are.
# dx is a sum over all channels that cancels where a column of w_gate is large, so there the column's root
# mean square counts if it is the larger one. By rows alone a right dx was off by 0.31 at d_ffn = 5504, and it
# grew with d_ffn; by columns it stays at 0.01.
ELEMENT_TOLERANCE = 0.25
NAMES = ("y", "dx", "dw_gate", "dw_up", "dw_down")


@dataclass(frozen=True)
class TensorError:
    """Errors of one tensor on one kind of data."""

    frobenius: float  # relative; infinite if a value is not finite
    element: float  # the largest, relative to the element plus the root mean square around it


@dataclass(frozen=True)
class GateResult:
    """Whether a method passed, its largest relative Frobenius error, and why it did not."""

    ok: bool
    max_rel_err: float  # infinite if something was missing or not finite
    errors: dict[str, TensorError]  # by "data.tensor", such as "ties.dw_down"
    detail: str  # empty if ok


def check(
    run: Callable[[Tensor], Tensor],
    weights: Mapping[str, nn.Parameter],
    reference: Reference,
    selection: Selection | None,
    tokens: int,
    seed: int,
    *,
    backward: bool = True,
    draws: int = 1,
    kept_roundoff: float = 0.0,
) -> GateResult:
    """Check y = run(x) and its gradients for `tokens` tokens against `reference`.

    `weights` are the parameters that `run` uses; they are overwritten in place and restored. `selection` is
    None for a method that chooses nothing. Inputs are fresh for each seed and have the shape that will be
    timed, since another shape could take another kernel, and would make torch.compile give up static shapes.
    The truth is computed from the same (narrow) inputs in float64, in chunks of tokens. Without `backward`,
    only y is checked, computed without a graph. `draws` repeats it all on other data, for few tokens.
    `kept_roundoff` is the unit roundoff of the format in which a method keeps activations, if that is
    coarser than the dtype (2^-4 for fp8 e4m3): it widens the bounds of the gradients, not of y. Two factors
    are rounded by 0.42 of it each and amplified by up to 1.5, which makes 0.9 of it; 1.5 of it is allowed,
    and 12 of it for a single element: one of 65,536 x 1,024 may hang on a channel that weighs five times the
    root mean square, and both of its factors may be off by all of it (0.72 was seen, of a right method).
    """
    w_gate = weights["w_gate"]
    shape = FfnShape(d_model=w_gate.shape[1], d_ffn=w_gate.shape[0])
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    errors: dict[str, TensorError] = {}
    problems: list[str] = []
    try:
        for draw in range(draws):
            arguments = (shape, tokens, w_gate.dtype, w_gate.device, seed + draw)
            for label, data in _inputs(arguments, selection):
                found = _outputs(run, weights, data, backward)
                whole = _well_formed(label, found, data, problems)
                for name, error in _compare(whole, data, reference, selection, label == "ties").items():
                    errors[f"{label}.{name}"] = _worse(errors.get(f"{label}.{name}"), error)
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(kept[name])
    worst = max((error.frobenius for error in errors.values()), default=0.0)
    if problems:
        worst = math.inf  # a tensor is missing or is another kind of tensor
    tolerance = TOLERANCE[w_gate.dtype]
    for name, error in errors.items():
        rounded = 0.0 if name.endswith(".y") else kept_roundoff
        allowed, element_allowed = tolerance + 1.5 * rounded, ELEMENT_TOLERANCE + 12 * rounded
        if not error.frobenius <= allowed:
            problems.append(
                f"{name} off by {error.frobenius:.2e} (relative Frobenius), allowed {allowed:.1e}"
            )
        elif not error.element <= element_allowed:
            problems.append(
                f"{name} has an element off by {error.element:.2f} of its size, allowed {element_allowed:.2f}"
            )
    return GateResult(not problems, worst, errors, "; ".join(dict.fromkeys(problems)))


def _inputs(
    arguments: tuple[FfnShape, int, torch.dtype, torch.device, int], selection: Selection | None
) -> Iterator[tuple[str, FfnTensors]]:
    if selection is None:
        yield "natural", natural_tensors(*arguments)
        return
    yield "ties", gate_data.ties(*arguments, selection)
    yield "gap", gate_data.gap(*arguments, selection)


def _outputs(
    run: Callable[[Tensor], Tensor], weights: Mapping[str, nn.Parameter], data: FfnTensors, backward: bool
) -> dict[str, Tensor | None]:
    """What the method makes of the data, by the names of NAMES; only y without `backward`."""
    with torch.no_grad():
        for name in WEIGHTS:
            weights[name].copy_(getattr(data, name))
    x = data.x.clone()
    poison_free_memory(x.device)
    if not backward:
        with torch.no_grad():
            return {"y": run(x)}
    x.requires_grad_()
    y = run(x)
    inputs = [x, *(weights[name] for name in WEIGHTS)]
    gradients = torch.autograd.grad(y, inputs, data.dy, allow_unused=True)
    return dict(zip(NAMES, (y.detach(), *gradients), strict=True))


def _well_formed(
    label: str, found: Mapping[str, Tensor | None], data: FfnTensors, problems: list[str]
) -> dict[str, Tensor]:
    """The outputs that are there and of the right kind; the others are added to the problems."""
    likes = {"y": data.x, "dx": data.x, **{f"d{name}": getattr(data, name) for name in WEIGHTS}}
    good = {}
    for name, tensor in found.items():
        like = likes[name]
        if tensor is None:
            problems.append(f"{label}.{name} is missing: no gradient reaches it")
        elif tensor.shape != like.shape or tensor.dtype != like.dtype:
            problems.append(
                f"{label}.{name} is {tensor.dtype} {list(tensor.shape)}, not {like.dtype} {list(like.shape)}"
            )
        else:
            good[name] = tensor
    return good


def _compare(
    found: Mapping[str, Tensor],
    data: FfnTensors,
    reference: Reference,
    selection: Selection | None,
    one_token_per_column: bool,
) -> dict[str, TensorError]:
    """Errors against the reference, which is evaluated for some tokens at a time and added up over tokens.

    `one_token_per_column`: each column of dw_down belongs to one token, whose magnitude is its own, so its
    elements are judged by column.
    """
    errors = {name: _Errors() for name in found}
    totals: dict[str, Tensor] = {}
    for rows in gate_data.chunk_rows(data.x.shape[0], data.w_gate.shape[0]):
        truth = reference(data.x[rows], data.w_gate, data.w_up, data.w_down, data.dy[rows], selection)
        for name in found:
            part = getattr(truth, name)
            if name in ("y", "dx"):
                errors[name].add(found[name][rows], part, by_column=name == "dx")
            else:
                totals[name] = totals[name].add_(part) if name in totals else part
    for name, total in totals.items():
        if name == "dw_down" and one_token_per_column:
            errors[name].add(found[name].T, total.T)
        else:
            errors[name].add(found[name], total)
    return {name: item.result() for name, item in errors.items()}


def _worse(known: TensorError | None, error: TensorError) -> TensorError:
    if known is None:
        return error
    return TensorError(max(known.frobenius, error.frobenius), max(known.element, error.element))


class _Errors:
    """Adds up the errors of one tensor over chunks of its rows."""

    def __init__(self) -> None:
        self._squares = 0.0
        self._norm = 0.0
        self._element = 0.0

    def add(self, found: Tensor, truth: Tensor, *, by_column: bool = False) -> None:
        difference = (found.double() - truth).abs()
        squares = truth.square()
        typical = squares.mean(dim=1, keepdim=True).sqrt()
        if by_column:
            typical = torch.maximum(typical, squares.mean(dim=0, keepdim=True).sqrt())
        scale = truth.abs() + typical
        # 0/0 is an exact zero where zero was due; anything over 0 is infinite
        element = torch.where(difference == 0, 0.0, difference / scale)
        self._squares += float(difference.square().sum())
        self._norm += float(truth.square().sum())
        largest = float(element.max())
        self._element = max(self._element, math.inf if math.isnan(largest) else largest)

    def result(self) -> TensorError:
        if self._squares == 0.0:
            return TensorError(0.0, self._element)
        relative = (self._squares / self._norm) ** 0.5 if self._norm > 0 else math.inf
        return TensorError(math.inf if math.isnan(relative) else relative, self._element)


def poison_free_memory(device: torch.device) -> None:
    """CUDA: fill free memory that the allocator will hand out next with NaN; nothing on the CPU.

    Half of what is free and no more than 4 GiB in one block for large tensors, and some small ones, are
    written and given back to the allocator's cache, from where it serves `torch.empty`. On the CPU the C
    library serves large tensors with fresh zero pages, so nothing can be planted there.
    """
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    free, _total = torch.cuda.mem_get_info(device)
    sizes = [min(free // 2, 4 * 1024**3) // 4, *[2**16] * 64]
    blocks = [torch.full((size,), math.nan, device=device, dtype=torch.float32) for size in sizes]
    del blocks
