"""What every FFN layer has: three weight matrices and their initialisation."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import torch
from torch import nn

from moc.config import FfnShape

INIT_STD = 0.02  # of every matrix, as `initializer_range` of Hugging Face's LlamaConfig


def init_weights(module: nn.Module, seed: int) -> None:
    """Fill every parameter of `module` in place from `seed`: matrices normal(0, 0.02), vectors (norms) one.

    A parameter's values depend on the seed, its name and its shape only: not on the method, on the other
    parameters, on the device or on PyTorch's global generator. So the same model starts from the same weights
    whatever its feed-forward method, including one from outside. Parameters on the meta device, which have no
    values, are skipped.
    """
    # In threads because drawing is serial and takes 10 s per 1e9 weights, in every process of a sweep.
    with ThreadPoolExecutor() as pool:
        named = {name: p for name, p in module.named_parameters() if not p.is_meta}
        list(pool.map(_fill, named.keys(), named.values(), repeat(seed)))


@torch.no_grad()
def _fill(name: str, parameter: nn.Parameter, seed: int) -> None:
    if parameter.dim() < 2:
        parameter.fill_(1.0)
        return
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
    parameter.copy_(values.normal_(0.0, INIT_STD, generator=generator))


class FfnWeights(nn.Module):
    """The parameters all feed-forward layers share; weights start as `init_weights(layer, seed=0)`."""

    def __init__(self, shape: FfnShape) -> None:
        super().__init__()
        self.shape = shape
        self.w_gate = nn.Parameter(torch.empty(shape.d_ffn, shape.d_model))
        self.w_up = nn.Parameter(torch.empty(shape.d_ffn, shape.d_model))
        self.w_down = nn.Parameter(torch.empty(shape.d_ffn, shape.d_model))
        init_weights(self, seed=0)

    def freeze(self) -> None:
        """Prepare what makes calls without gradients faster, such as a layout of weights; by default nothing.

        Call it again after a weight has been replaced.
        """

    def extra_repr(self) -> str:
        return f"d_model={self.shape.d_model}, d_ffn={self.shape.d_ffn}"
