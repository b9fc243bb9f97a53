"""Inputs, layers and comparisons that several of the kernel tests use."""

import math
import os
import subprocess
import sys

import torch
from torch import Tensor, nn

from moc import FfnShape, parse_selection
from moc.kernels.passes import Kept
from moc.layers.moc import TritonMoCFFN
from moc.reference import FfnGrads
from moc.selection import n_words

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Relative Frobenius error against the float64 reference.
TOLERANCE = {"bf16": 1e-2, "fp16": 1.5e-3, "fp32": 2e-6}
NAMES = ("y", "dx", "dw_gate", "dw_up", "dw_down")


def rows(
    n_tokens: int, d_ffn: int, dtype: torch.dtype, device: str, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Gates and ups as the operator lays them out: halves of one buffer, padded with NaN."""
    width = -(-d_ffn // 64) * 64
    buffer = torch.full((n_tokens, 2 * width), math.nan, dtype=dtype, device=device)
    g, u = buffer[:, :d_ffn], buffer[:, width : width + d_ffn]
    g.copy_(torch.randn(n_tokens, d_ffn) * scale)
    u.copy_(torch.randn(n_tokens, d_ffn))
    return g, u


def poisoned(n_tokens: int, k: int, d_ffn: int, dtype: torch.dtype, device: str) -> Kept:
    """Storage filled with NaN and ones, so that what is not written shows."""
    return Kept(
        torch.full((n_tokens, k, 2), math.nan, dtype=dtype, device=device),
        torch.full((n_tokens, n_words(d_ffn)), -1, dtype=torch.int32, device=device),
    )


def make(d: int, d_ffn: int, rule: str, dtype: torch.dtype, device: str, fp8: bool = False) -> TritonMoCFFN:
    """A layer with weights of ordinary size, so that gates are of order one."""
    layer = TritonMoCFFN(FfnShape(d, d_ffn), parse_selection(rule), fp8).to(device, dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape) / d**0.5)
    return layer


def weights(layer: nn.Module) -> list[Tensor]:
    return [layer.w_gate.detach(), layer.w_up.detach(), layer.w_down.detach()]


def run(layer: nn.Module, x: Tensor, dy: Tensor) -> FfnGrads:
    """Output and gradients of a layer for `dy`."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    grads = torch.autograd.grad(y, [x, layer.w_gate, layer.w_up, layer.w_down], dy)
    return FfnGrads(y.detach(), *grads)


def assert_same(actual: FfnGrads, expected: FfnGrads, tolerance: float) -> None:
    for name in NAMES:
        wanted = getattr(expected, name).double()
        error = (getattr(actual, name).double().reshape(wanted.shape) - wanted).norm() / (
            1e-30 + wanted.norm()
        )
        assert float(error) <= tolerance, f"{name}: relative error {error:.3g} > {tolerance:.3g}"


def tokens(n_tokens: int, d: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """x and dy."""
    return torch.randn(n_tokens, d).to(device, dtype), torch.randn(n_tokens, d).to(device, dtype)


_LAUNCH_NOTHING = """
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

triton.runtime.driver.set_active(Driver())
run = JITFunction.run
JITFunction.run = lambda self, *a, grid, warmup, **k: run(self, *a, grid=grid, warmup=True, **k)
"""


def printed_without_launching(program: str) -> str:
    """What a Python program prints in which Triton compiles as launches would and launches nothing.

    It compiles for compute capability 9.0, and no GPU need be there.
    """
    done = subprocess.run(
        [sys.executable, "-c", _LAUNCH_NOTHING + program],
        env={**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
