"""FFNs that are right for tokens in a row and wrong, or too large, in a decoding model."""

import torch
from torch import Tensor, nn

from moc.config import FfnShape
from moc.layers.dense import DenseFFN
from moc.selection import Selection


class _SeesNeighbours(DenseFFN):
    def forward(self, x: Tensor) -> Tensor:
        """Right for [tokens, d]; for [batch, tokens, d] every token gets a part of the first one's output."""
        y = super().forward(x)
        return y if x.dim() == 2 else y + 0.3 * y[:, :1]


def sees_neighbours(shape: FfnShape, selection: Selection | None) -> nn.Module:
    """Right in the layer's gate, wrong in a model."""
    return _SeesNeighbours(shape)


class _WrongForOne(DenseFFN):
    def forward(self, x: Tensor) -> Tensor:
        """Right but for one token a row in three dimensions, as a decoding step has."""
        y = super().forward(x)
        return 1.5 * y if x.dim() == 3 and x.shape[1] == 1 else y


def wrong_for_one(shape: FfnShape, selection: Selection | None) -> nn.Module:
    """Right for whole sequences, wrong in each decoding step."""
    return _WrongForOne(shape)


class _KeepsItsWeights(DenseFFN):
    def __init__(self, shape: FfnShape) -> None:
        super().__init__(shape)
        self.packed = torch.ones(3)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Uses a buffer beside the weights."""
        return super().forward(x) * self.scale


def with_buffer(shape: FfnShape, selection: Selection | None) -> nn.Module:
    """A module whose state is more than its weights."""
    return _KeepsItsWeights(shape)


with_buffer.is_dense = True
