"""Float dtypes by name, and which of them operators and kernels take. Does not import PyTorch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BYTES = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}  # of a number; what operators in plain PyTorch take
KERNEL_DTYPES = ("bf16", "fp16", "fp32")  # what the Triton kernels for training, and of the loss, take
DECODE_DTYPES = ("bf16", "fp16")  # what the Triton kernels for decoding take
FP8_ROUNDOFF = 2.0**-4  # of float8_e4m3fn, in which activations may be kept: three mantissa bits

_IN_TORCH = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def torch_dtype(name: str) -> torch.dtype:
    """PyTorch's dtype of this name, a key of BYTES."""
    import torch

    dtype: torch.dtype = getattr(torch, _IN_TORCH[name])
    return dtype


def torch_dtypes(names: Iterable[str]) -> tuple[torch.dtype, ...]:
    """PyTorch's dtypes of these names, in their order."""
    return tuple(torch_dtype(name) for name in names)
