"""Inputs of the dense layers' tests, and how far a result is off."""

import torch

from moc import FfnShape

SHAPE = FfnShape(16, 48)


def data(dtype: torch.dtype, tokens: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """x and dy of a small batch."""
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(tokens, SHAPE.d_model, generator=generator).to(dtype) for _ in range(2))
    return x, dy


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative Frobenius error."""
    return float((found.double() - truth).norm() / truth.norm())
