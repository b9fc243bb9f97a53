"""Part `variants` of the budget: how often a sweep compiles.

A Triton kernel is compiled anew for every combination of its constants and of what Triton specialises its
arguments on; torch.compile breaks a graph at code that it cannot trace. Every method of the registry runs at
many numbers of tokens and of kept channels, as a sweep would, and what would be compiled is counted. Nothing
is compiled or launched: Triton calls a hook before it compiles, and the hook refuses. Outputs of kernels are
uninitialised memory, so no number that is computed here means anything.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from harness.measure.ffn import DTYPES, natural_tensors
from harness.regression.budget.check import Fact, Facts
from moc.config import FfnShape
from moc.kernels.primitives import pretended_gpu
from moc.methods import METHODS, Method
from moc.selection import parse_selection

CAPABILITY = (9, 0)
SHAPE = FfnShape(16, 320)
TOKENS = (1, 2, 7, 16, 127, 128, 300)
FRACTIONS = (0.125, 0.1875, 0.25, 0.5)
RULE = "topk:0.1875"


def collect() -> Facts:
    """Compiled variants of each kernel over a sweep, and graphs of each method that is compiled."""
    return {"variants": {**dict(_kernels()), **dict(_graphs())}}


def _kernels() -> Iterator[tuple[str, Fact]]:
    for method in METHODS.values():
        if method.requires is not None:
            continue
        with _launches_nothing() as asked:
            for dtype in sorted(method.dtypes & set(DTYPES)):
                asked.clear()
                for tokens in TOKENS:
                    _run(method, RULE, tokens, dtype)
                for kernel, count in _by_kernel(asked):
                    yield f"{method.name} {dtype}: {kernel} over {len(TOKENS)} numbers of tokens", count
            if method.takes_selection:
                asked.clear()
                for fraction in FRACTIONS:
                    _run(method, f"topk:{fraction:g}", 16, "bf16")
                for kernel, count in _by_kernel(asked):
                    yield f"{method.name} bf16: {kernel} over {len(FRACTIONS)} K", count


def _run(method: Method, rule: str, tokens: int, dtype: str) -> None:
    """A training step, as far as the method has one, and a decoding step."""
    selection = parse_selection(rule) if method.takes_selection else None
    layer = method.make(SHAPE, selection).to(DTYPES[dtype])
    tensors = natural_tensors(SHAPE, tokens, DTYPES[dtype], torch.device("cpu"), seed=0)
    if method.backward:
        layer(tensors.x.requires_grad_()).backward(tensors.dy)
    if method.decode:
        with torch.no_grad():
            layer(tensors.x.detach())


def _by_kernel(asked: Sequence[tuple[str, str]]) -> list[tuple[str, int]]:
    return sorted(Counter(kernel for kernel, _key in set(asked)).items())


def _graphs() -> Iterator[tuple[str, Fact]]:
    """Of one training forward: more than one graph means that torch.compile broke it."""
    for method in METHODS.values():
        if not method.compile or method.requires is not None or not method.backward:
            continue
        selection = parse_selection(RULE) if method.takes_selection else None
        layer = method.make(SHAPE, selection)
        x = torch.randn(16, SHAPE.d_model, requires_grad=True)
        torch._dynamo.reset()
        with _launches_nothing():
            found = torch._dynamo.explain(layer)(x)
        yield f"{method.name}: graphs of a forward pass", found.graph_count


@contextlib.contextmanager
def _launches_nothing() -> Iterator[list[tuple[str, str]]]:
    """Kernels are launched on CPU tensors as if they were on a GPU; gives each launch's (kernel, variant)."""
    asked: list[tuple[str, str]] = []

    def refuse(*, key: str, fn: Any, **_: Any) -> bool:
        asked.append((fn.name, key))
        return True  # as if another had compiled it

    triton.runtime.driver.set_active(_Driver())
    with triton.knobs.runtime.scope(), pretended_gpu(CAPABILITY):
        triton.knobs.runtime.jit_cache_hook = refuse
        yield asked


class _Driver:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0
