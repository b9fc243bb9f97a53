"""FFNs from outside the project for the FFN workloads: right ones, wrong ones, and ones that give up."""

import torch
from torch import Tensor, nn

from moc.config import FfnShape
from moc.layers.dense import DenseFFN
from moc.layers.moc import MoCFFN
from moc.selection import Selection


def exact(shape: FfnShape, selection: Selection | None) -> nn.Module:
    """A dense FFN of one's own, which may be the baseline."""
    return DenseFFN(shape)


exact.is_dense = True


class _Scaled(DenseFFN):
    def forward(self, x: Tensor) -> Tensor:
        """Five percent too much."""
        return 1.05 * super().forward(x)


def scaled(shape: FfnShape, selection: Selection | None) -> nn.Module:
    """Fast and wrong, and calls itself exact."""
    return _Scaled(shape)


scaled.is_dense = True


def sparse(shape: FfnShape, selection: Selection | None) -> nn.Module:
    """A MoC of one's own."""
    assert selection is not None
    return MoCFFN(shape, selection)


sparse.takes_selection = True


class _OneMatrix(nn.Module):
    def __init__(self, shape: FfnShape) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(shape.d_ffn, shape.d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Not a SwiGLU."""
        return x


def one_matrix(shape: FfnShape, selection: Selection | None) -> nn.Module:
    """A module with other parameters."""
    return _OneMatrix(shape)


class _GivesUp(DenseFFN):
    def __init__(self, shape: FfnShape, after: int, error: Exception) -> None:
        super().__init__(shape)
        self.after, self.error = after, error

    def forward(self, x: Tensor) -> Tensor:
        """Right for some calls, then an error."""
        self.after -= 1
        if self.after < 0:
            raise self.error
        return super().forward(x)


def big_at_once(shape: FfnShape, selection: Selection | None) -> nn.Module:
    """Out of memory at the first call."""
    return _GivesUp(shape, 0, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore"))


def big_later(shape: FfnShape, selection: Selection | None) -> nn.Module:
    """Out of memory in the middle of timing."""
    return _GivesUp(shape, 12, torch.OutOfMemoryError("CUDA out of memory."))


def breaks_later(shape: FfnShape, selection: Selection | None) -> nn.Module:
    """An ordinary error in the middle of timing."""
    return _GivesUp(shape, 12, ZeroDivisionError("lost it"))
