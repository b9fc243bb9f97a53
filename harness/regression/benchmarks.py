"""What is timed to notice that the code became slower: the benchmarks of `make bench` and of
`mocbench compare`.

A benchmark is a name and a way to get one piece of work ready on a device. `compare` opens those of either
revision side by side, so a name keeps its meaning: work that changes gets another name. Each is long enough
for 3 % of it to be seen above the grain of the clock. Whether a method is right is not asked here; the gate
of the workloads and the tests do that.

Opened again, a benchmark stands elsewhere in memory: where operands lie is worth a few percent by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from harness.measure.ffn import DTYPES, TrainingCalls, decoding_call, ffn_weights, natural_tensors
from harness.measure.launch import TimedMethod, rotated_copies
from harness.measure.roofline import decode_least_bytes
from moc.config import FfnShape, get_preset
from moc.llama import Llama
from moc.methods import METHODS, Method
from moc.ops.compact import gather_compact, keep_mask, kept_channels, pack_bitmask
from moc.selection import Selection, parse_selection

if TYPE_CHECKING:
    from moc.kernels.passes import Kept


@dataclass(frozen=True)
class Benchmark:
    """One piece of work. Each call of it handles `tokens`, so tokens per second follow from its time."""

    name: str
    tokens: int
    open: Callable[[torch.device], TimedMethod]
    mode: str = "graph_cold"  # of `harness.measure.timing.MODES`, where there is a GPU


@dataclass(frozen=True)
class _Size:
    """How much work, by kind of device."""

    preset: str
    dtype_name: str
    step_tokens: int
    model: str
    batch: int
    seq_len: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]


_SIZES = {
    "cuda": _Size("1b", "bf16", 8192, "60m", 8, 512),
    "cpu": _Size("4m", "fp32", 256, "1m", 2, 128),
}
_TOPK, _NM = "topk:0.1875", "nm:2:8"
# (kind of work, method, rule); those that a device or the registry does not have are left out.
_FFN = (
    ("ffn-step", "dense", None),
    ("ffn-step", "moc", _TOPK),
    ("ffn-step", "moc", _NM),
    ("ffn-step", "moc_fp8", _TOPK),
    ("ffn-step", "moc_reference", _TOPK),
    ("ffn-decode", "moc", _TOPK),
    ("ffn-decode", "moc", _NM),
    ("ffn-decode", "moc_reference", _NM),
)
_VOCABULARY = 8192


def benchmarks(device_type: str) -> dict[str, Benchmark]:
    """All that `device_type` ("cpu" or "cuda") can run, by name, in the order they are measured."""
    size = _SIZES[device_type]
    found = [
        _ffn(kind, METHODS[method], rule, size)
        for kind, method, rule in _FFN
        if method in METHODS and _runs(METHODS[method], rule, size, device_type)
    ]
    if device_type == "cuda":
        found += [_select(_TOPK, size), _select(_NM, size), _expand(size)]
        found += [_model_step("moc", _TOPK, size)]
    else:
        found += [_select_in_pytorch(_TOPK, size), _select_in_pytorch(_NM, size)]
        found += [_model_step("dense", None, size), _model_step("moc_reference", _TOPK, size)]
    return {benchmark.name: benchmark for benchmark in found}


def _runs(method: Method, rule: str | None, size: _Size, device_type: str) -> bool:
    if device_type == "cuda" and method.name == "moc_reference":
        return False  # there `moc` is what counts
    selection = parse_selection(rule) if rule else None
    shape = get_preset(size.preset).ffn
    return method.unsupported_reason(shape, selection, size.dtype_name, device_type) is None


def _name(kind: str, method: str | None, rule: str | None) -> str:
    words = (kind, method, None if rule is None else parse_selection(rule).rule)
    return "-".join(word for word in words if word)


def _layer(
    method: Method, selection: Selection | None, shape: FfnShape, device: torch.device, size: _Size, seed: int
) -> nn.Module:
    """The method's layer on natural weights, which lie in memory where the layer wants them."""
    layer = method.make(shape, selection).to(device, size.dtype)
    tensors = natural_tensors(shape, 1, size.dtype, device, seed)
    with torch.no_grad():
        for name, weight in ffn_weights(layer, shape).items():
            weight.copy_(getattr(tensors, name))
    return layer


def _ffn(kind: str, method: Method, rule: str | None, size: _Size) -> Benchmark:
    """A training step of one feed-forward layer, or one token through more copies of it than the L2 holds."""
    shape = get_preset(size.preset).ffn
    selection = parse_selection(rule) if rule else None
    name = _name(kind, method.name, rule)

    def open_step(device: torch.device) -> TimedMethod:
        layer = _layer(method, selection, shape, device, size, seed=0)
        tensors = natural_tensors(shape, size.step_tokens, size.dtype, device, seed=1)
        weights = list(ffn_weights(layer, shape).values())
        return TimedMethod(name, TrainingCalls(layer, weights, tensors.x.requires_grad_(), tensors.dy).step)

    def open_decode(device: torch.device) -> TimedMethod:
        least_read = decode_least_bytes(method, selection, shape, size.dtype.itemsize)
        copies = rotated_copies(least_read, device)
        layers = [_layer(method, selection, shape, device, size, seed) for seed in range(copies)]
        x = natural_tensors(shape, 1, size.dtype, device, seed=copies).x
        return TimedMethod(name, decoding_call(layers, x), calls=copies)

    if kind == "ffn-step":
        return Benchmark(name, size.step_tokens, open_step)
    return Benchmark(name, 1, open_decode, mode="graph_rotated")


def _select(rule: str, size: _Size) -> Benchmark:
    """The pass that selects channels in a forward pass, alone."""
    name = _name("select", None, rule)

    def open_pass(device: torch.device) -> TimedMethod:
        from moc.kernels.passes import select_pass

        g, u, kept, _dz = _between(rule, size, device)
        overflow = torch.zeros((), dtype=torch.int64, device=device)
        z = torch.empty_like(g)
        return TimedMethod(name, lambda: select_pass(g, u, z, parse_selection(rule), kept, overflow))

    return Benchmark(name, size.step_tokens, open_pass)


def _expand(size: _Size) -> Benchmark:
    """The pass that expands what was kept in a backward pass, alone."""

    def open_pass(device: torch.device) -> TimedMethod:
        from moc.kernels.passes import expand_pass, select_pass

        g, u, kept, dz = _between(_TOPK, size, device)
        overflow = torch.zeros((), dtype=torch.int64, device=device)
        select_pass(g, u, torch.empty_like(g), parse_selection(_TOPK), kept, overflow)
        dg, du, z = (torch.empty_like(g) for _ in range(3))
        return TimedMethod("expand", lambda: expand_pass(dz, kept, dg, du, z))

    return Benchmark("expand", size.step_tokens, open_pass)


def _between(rule: str, size: _Size, device: torch.device) -> tuple[Tensor, Tensor, Kept, Tensor]:
    """g, u, room for what is kept, and dz, of a step of natural data."""
    from moc.kernels.passes import Kept

    d_ffn = get_preset(size.preset).d_ffn
    k = parse_selection(rule).k(d_ffn)
    generator = torch.Generator(device).manual_seed(0)
    wide = (size.step_tokens, d_ffn)
    g, u, dz = (torch.randn(wide, generator=generator, device=device).to(size.dtype) for _ in range(3))
    pairs = torch.empty(size.step_tokens, k, 2, dtype=size.dtype, device=device)
    bitmask = torch.empty(size.step_tokens, -(-d_ffn // 32), dtype=torch.int32, device=device)
    return g, u, Kept(pairs, bitmask), dz


def _select_in_pytorch(rule: str, size: _Size) -> Benchmark:
    """As `_select`, of the methods that are plain PyTorch."""
    selection = parse_selection(rule)
    d_ffn = get_preset(size.preset).d_ffn
    name = _name("select", None, rule)

    def open_selection(device: torch.device) -> TimedMethod:
        generator = torch.Generator(device).manual_seed(0)
        g = torch.randn(size.step_tokens, d_ffn, generator=generator, device=device)

        def call() -> Tensor:
            mask, _overflow = keep_mask(g, selection)
            gather_compact(g, kept_channels(mask, selection.k(d_ffn)))
            return pack_bitmask(mask)

        return TimedMethod(name, call)

    return Benchmark(name, size.step_tokens, open_selection)


def _model_step(method_name: str, rule: str | None, size: _Size) -> Benchmark:
    """Forward and backward pass of a small model with its loss."""
    method, selection = METHODS[method_name], parse_selection(rule) if rule else None
    config = get_preset(size.model).with_(vocab_size=_VOCABULARY, max_seq_len=size.seq_len)
    name = _name("model-step", method_name, rule)

    def open_step(device: torch.device) -> TimedMethod:
        model = Llama(config, lambda: method.make(config.ffn, selection)).to(device, size.dtype)
        generator = torch.Generator(device).manual_seed(0)
        shape = (size.batch, size.seq_len + 1)
        text = torch.randint(config.vocab_size, shape, generator=generator, device=device)
        tokens, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        weights = list(model.parameters())
        return TimedMethod(name, lambda: torch.autograd.grad(model.loss(tokens, targets), weights))

    return Benchmark(name, size.batch * size.seq_len, open_step)
