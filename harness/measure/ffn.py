"""The FFN under test: its weights, its inputs, and what of a training or decoding step is timed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness.measure.launch import rotated_copies
from moc.config import FfnShape

DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
WEIGHTS = ("w_gate", "w_up", "w_down")


@dataclass(frozen=True)
class FfnTensors:
    """Weights [d_ffn, d], input x [T, d] and the gradient of the output dy [T, d], all of one dtype."""

    w_gate: Tensor
    w_up: Tensor
    w_down: Tensor
    x: Tensor
    dy: Tensor


def natural_tensors(
    shape: FfnShape, tokens: int, dtype: torch.dtype, device: torch.device, seed: int
) -> FfnTensors:
    """Normal data scaled so that gates, up projections and outputs are of order one, as in a trained layer.

    Never zeros: a tensor core runs faster on zeros than on data.
    """
    generator = torch.Generator(device).manual_seed(seed)
    wide, tall = (shape.d_ffn, shape.d_model), (tokens, shape.d_model)
    return FfnTensors(
        w_gate=normal(wide, shape.d_model**-0.5, generator, dtype),
        w_up=normal(wide, shape.d_model**-0.5, generator, dtype),
        w_down=normal(wide, shape.d_ffn**-0.5, generator, dtype),
        x=normal(tall, 1.0, generator, dtype),
        dy=normal(tall, 1.0, generator, dtype),
    )


def normal(size: tuple[int, ...], std: float, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Normal values with this standard deviation on the generator's device."""
    drawn = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.randn(size, generator=generator, device=generator.device, dtype=drawn)
    return values.mul_(std).to(dtype)


def ffn_weights(module: nn.Module, shape: FfnShape) -> dict[str, nn.Parameter]:
    """The parameters w_gate, w_up and w_down of a module.

    Raises ValueError if one is missing or not [d_ffn, d_model], or if there are others: a method with weights
    of its own computes another function.
    """
    named = dict(module.named_parameters())
    for name in WEIGHTS:
        if name not in named:
            raise ValueError(f"its module has no parameter {name}; it has {', '.join(named) or 'none'}")
        if tuple(named[name].shape) != (shape.d_ffn, shape.d_model):
            raise ValueError(
                f"its {name} is {list(named[name].shape)}; [d_ffn, d_model] is {[shape.d_ffn, shape.d_model]}"
            )
    extra = sorted(set(named) - set(WEIGHTS))
    if extra:
        raise ValueError(f"its module has parameters beside {', '.join(WEIGHTS)}: {', '.join(extra)}")
    return {name: named[name] for name in WEIGHTS}


class TrainingCalls:
    """What a training step of one FFN is, exactly, and its parts; every method does the same.

    - forward: `module(x)` with everything kept that backward needs. Input and weights require gradients.
    - backward: the gradients of x and of the weights for a given dy, into fresh tensors. Nothing is
      accumulated and nothing zeroed, so no method pays for bookkeeping that an optimiser could place
      elsewhere. Saved tensors are released as backward goes, as in training, so each backward needs a forward
      of its own before it.
    - step: forward, then backward. It is not the sum of the two as timed alone, since each of them starts
      with cold caches while in a step backward starts with what forward left there.

    No optimiser, no loss, no cast: weights are already in the compute dtype.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], weights: list[nn.Parameter], x: Tensor, dy: Tensor):
        self._run = run
        self._x = x
        self._inputs = [x, *weights]
        self._dy = dy
        self._y: Tensor | None = None

    def forward(self) -> Tensor:
        """y [T, d] with its graph."""
        return self._run(self._x)

    def prepare_backward(self) -> None:
        """A forward whose graph `backward` uses up."""
        self._y = self._run(self._x)

    def backward(self) -> tuple[Tensor, ...]:
        """Gradients of x, w_gate, w_up, w_down. Raises RuntimeError if no `prepare_backward` came before."""
        y, self._y = self._y, None
        if y is None:
            raise RuntimeError("backward needs a prepare_backward before each call")
        return torch.autograd.grad(y, self._inputs, self._dy)

    def step(self) -> tuple[Tensor, ...]:
        """Forward, then the gradients of x, w_gate, w_up, w_down."""
        return torch.autograd.grad(self._run(self._x), self._inputs, self._dy)


def with_weights(layer: nn.Module, tensors: FfnTensors) -> nn.Module:
    """A copy of the layer on other weights."""
    other = copy.deepcopy(layer)
    shape = FfnShape(d_model=tensors.w_gate.shape[1], d_ffn=tensors.w_gate.shape[0])
    for name, weight in ffn_weights(other, shape).items():
        weight.data = getattr(tensors, name)
    return other


def weight_copies(
    least_read: float, shape: FfnShape, batch: int, dtype: torch.dtype, device: torch.device, seed: int
) -> list[FfnTensors]:
    """As many copies of the weights as `rotated_copies` asks for, each of its own values."""
    count = rotated_copies(least_read, device)
    return [natural_tensors(shape, batch, dtype, device, seed + 1000 * number) for number in range(count)]


def decoding_call(layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Callable[[], None]:
    """One decoding step with each layer in turn, all on the same input, without gradients."""

    def call() -> None:
        with torch.no_grad():
            for layer in layers:
                layer(x)

    return call
