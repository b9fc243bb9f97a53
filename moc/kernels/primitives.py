"""What the kernels are built from: where they run, the decorator, and small device functions.

Where Triton's own operations would cost too much, a device function has two forms: PTX, taken where `ASM` is
true, and plain Triton with the same meaning, which Triton's interpreter runs. The reason stands at each.
"""

# mypy: disable-error-code="no-untyped-def, no-redef"

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction


def _interpreted() -> bool:
    setting = os.environ.get("TRITON_INTERPRET")
    return setting == "1" if setting is not None else not torch.cuda.is_available()


# Without a GPU the kernels run, slowly, in Triton's interpreter; TRITON_INTERPRET=0 or 1 decides otherwise.
# Decided once, here: `jit` needs it when a module of kernels is imported.
INTERPRETED = _interpreted()

_PRETENDED: ContextVar[tuple[int, int] | None] = ContextVar("_PRETENDED", default=None)

# The combine functions themselves, not tl.sum and tl.cumsum: those are compiled or interpreted as `triton`
# was first imported, maybe by somebody else, and could not be called from an interpreted kernel.
SUM = tl.standard._sum_combine
MAX = tl.standard._elementwise_max


def jit(fn: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`triton.jit`, but interpreted where `INTERPRETED`, whatever the environment said when triton loaded."""
    if fn is None:
        return lambda function: jit(function, **options)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = INTERPRETED
        made = triton.jit(fn, **options)
    return _Interpreted(fn, **made.kwargs) if INTERPRETED else made


class _Interpreted(InterpretedFunction):
    """An interpreted function that calls what it calls without preparing the language for it once more.

    The launch of a kernel has done that for all of them; Triton's own does it again in every call, which
    takes a third of the time.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A call from an interpreted kernel."""
        return self.rewrite()(*args, **kwargs)


@contextmanager
def pretended_gpu(capability: tuple[int, int]) -> Iterator[None]:
    """Within it tensors on any device pass for tensors on a GPU of this compute capability.

    For counting what launches would compile where there is no GPU. The caller keeps Triton from launching.
    """
    token = _PRETENDED.set(capability)
    try:
        yield
    finally:
        _PRETENDED.reset(token)


def capability_of(device: torch.device) -> tuple[int, int]:
    """The compute capability that kernels are compiled for on a GPU; (9, 0) where they are interpreted."""
    return (9, 0) if INTERPRETED else _PRETENDED.get() or torch.cuda.get_device_capability(device)


def check_device(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError, naming the tensor, unless kernels can be launched on its device."""
    if tensor.device.type != "cuda" and not INTERPRETED and _PRETENDED.get() is None:
        raise ValueError(f"{name} is on {tensor.device}; the kernels run on cuda here")


def launching_on(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Where to launch a kernel on `tensor`: its GPU; or, interpreted, where NaN raises no warning."""
    return np.errstate(all="ignore") if INTERPRETED else torch.cuda.device_of(tensor)


@jit
def total(values, axis: tl.constexpr):
    return tl.reduce(values, axis, SUM)


@jit
def largest(values, axis: tl.constexpr):
    return tl.reduce(values, axis, MAX)


@jit
def running_total(values, axis: tl.constexpr):
    return tl.associative_scan(values, axis, SUM)


@jit
def ranked(gate, ASM: tl.constexpr):
    """A gate as it is ranked: NaN as plus infinity, so that it is kept and reaches the output."""
    # min.f32 returns its other argument for a NaN: one instruction. The interpreter's returns the NaN.
    if ASM:
        return tl.minimum(gate, float("inf"))
    else:
        return tl.where(gate == gate, gate, float("inf"))


@jit
def sigmoid(x, ASM: tl.constexpr):
    """1 / (1 + exp(-x)) in float32, relative error about 2**-22."""
    b_denominator = 1.0 + tl.exp2(x * -1.4426950408889634)
    # Triton's division scales its operands against overflow: 8 instructions instead of one.
    if ASM:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [b_denominator], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / b_denominator


@jit
def pair_fp8(first, second, ASM: tl.constexpr):
    """Two float32 as float8_e4m3fn in the low and high byte of int16, rounded to nearest even."""
    # Triton's own conversion leads to wrong bytes here (3.6.0, sm_90).
    if ASM:
        return tl.inline_asm_elementwise(
            "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;", "=h,f,f", [first, second],
            dtype=tl.int16, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return _pair_bits(_round_to_fp8(first), _round_to_fp8(second))


@jit
def _round_to_fp8(x):
    # The interpreter drops the carry out of the significand, so nothing must be left to round.
    b_bits = x.to(tl.int32, bitcast=True)
    x = ((b_bits + 0x7FFFF + ((b_bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    return x.to(tl.float8e4nv)


@jit
def _pair_bits(first, second):
    """Two values of 16 or 8 bits in the low and high half of an integer."""
    BITS: tl.constexpr = first.dtype.primitive_bitwidth
    NARROW: tl.constexpr = tl.int16 if BITS == 16 else tl.int8
    WIDE: tl.constexpr = tl.int32 if BITS == 16 else tl.int16
    b_low = first.to(NARROW, bitcast=True).to(WIDE) & ((1 << BITS) - 1)
    return b_low | (second.to(NARROW, bitcast=True).to(WIDE) << BITS)


@jit
def popcount(word, ASM: tl.constexpr):
    """Number of set bits of int32."""
    if ASM:
        return tl.inline_asm_elementwise(
            "popc.b32 $0, $1;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        b_word = word.to(tl.uint32, bitcast=True)
        b_word = b_word - ((b_word >> 1) & 0x55555555)
        b_word = (b_word & 0x33333333) + ((b_word >> 2) & 0x33333333)
        b_word = (b_word + (b_word >> 4)) & 0x0F0F0F0F
        b_word = b_word + (b_word >> 8)
        b_word = b_word + (b_word >> 16)
        return (b_word & 0x3F).to(tl.int32)


@jit
def kept_bit(value, score, at, last, bit, ASM: tl.constexpr):
    """`bit` where the value is above `score`, or equal to it and `at` <= `last`; else 0."""
    # Left to the compiler this becomes three selections.
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.eq.f32 p, $1, $2; setp.le.and.s32 p, $3, $4, p;"
            " setp.gt.or.f32 p, $1, $2, p; selp.b32 $0, $5, 0, p; }",
            "=r,f,f,r,r,r", [value, score, at, last, bit], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.where((value > score) | ((value == score) & (at <= last)), bit, 0)


@jit
def bits_before(word, bit, ASM: tl.constexpr):
    """How many bits of `word` below `bit` are set: the place of a channel among those its word keeps."""
    return popcount(word & ((1 << bit) - 1), ASM)


@jit
def store_pairs(pairs_ptr, base, offset, first, second, mask, ASM: tl.constexpr):
    """pairs[base + offset] = (first, second) where `mask`; pairs is [..., 2] of the values' dtype, or of
    float8e4nv, to which float32 values are then rounded.

    A pair of 16-bit or 8-bit values is one store, from the lane that has it. tl.store would first move pairs
    through shared memory, neighbouring channels to neighbouring lanes: slower, and PTX alone avoids it.
    """
    BITS: tl.constexpr = pairs_ptr.dtype.element_ty.primitive_bitwidth
    if BITS == 32:
        b_ptr = pairs_ptr + 2 * (base + offset)
        tl.store(b_ptr, first, mask=mask)
        tl.store(b_ptr + 1, second, mask=mask)
    else:
        WIDE: tl.constexpr = tl.int32 if BITS == 16 else tl.int16
        b_pair = pair_fp8(first, second, ASM) if BITS == 8 else _pair_bits(first, second)
        if not ASM:
            tl.store(pairs_ptr.to(tl.pointer_type(WIDE), bitcast=True) + base + offset, b_pair, mask=mask)
        else:
            b_address = (pairs_ptr + 2 * base).to(tl.int64) + offset.to(tl.uint32).to(tl.int64) * (BITS // 4)
            # An elementwise instruction must have a result, so it returns a zero that is not used.
            if BITS == 16:
                tl.inline_asm_elementwise(
                    "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b32 [$1], $2; mov.b32 $0, 0; }",
                    "=r,l,r,r", [b_address, b_pair, mask.to(tl.int32)],
                    dtype=tl.int32, is_pure=False, pack=1,
                )  # fmt: skip
            else:
                tl.inline_asm_elementwise(
                    "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b16 [$1], $2; mov.b32 $0, 0; }",
                    "=r,l,h,r", [b_address, b_pair, mask.to(tl.int32)],
                    dtype=tl.int32, is_pure=False, pack=1,
                )  # fmt: skip


@jit
def load_pairs(pairs_ptr, base, offset, mask, ASM: tl.constexpr):
    """(first, second) of pairs[base + offset] where `mask`, else zeros; the counterpart of `store_pairs`."""
    DTYPE: tl.constexpr = pairs_ptr.dtype.element_ty
    BITS: tl.constexpr = DTYPE.primitive_bitwidth
    if BITS == 32:
        b_ptr = pairs_ptr + 2 * (base + offset)
        return tl.load(b_ptr, mask=mask, other=0.0), tl.load(b_ptr + 1, mask=mask, other=0.0)
    else:
        NARROW: tl.constexpr = tl.int16 if BITS == 16 else tl.int8
        WIDE: tl.constexpr = tl.int32 if BITS == 16 else tl.int16
        if not ASM:
            b_ptr = pairs_ptr.to(tl.pointer_type(WIDE), bitcast=True) + base + offset
            b_pair = tl.load(b_ptr, mask=mask, other=0)
        else:
            b_address = (pairs_ptr + 2 * base).to(tl.int64) + offset.to(tl.uint32).to(tl.int64) * (BITS // 4)
            if BITS == 16:
                b_pair = tl.inline_asm_elementwise(
                    "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.nc.b32 $0, [$1]; }",
                    "=r,l,r", [b_address, mask.to(tl.int32)], dtype=tl.int32, is_pure=True, pack=1,
                )  # fmt: skip
            else:
                b_pair = tl.inline_asm_elementwise(
                    "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b16 $0, 0; @p ld.global.nc.b16 $0, [$1]; }",
                    "=h,l,r", [b_address, mask.to(tl.int32)], dtype=tl.int16, is_pure=True, pack=1,
                )  # fmt: skip
        return (
            b_pair.to(NARROW).to(DTYPE, bitcast=True),
            (b_pair >> BITS).to(NARROW).to(DTYPE, bitcast=True),
        )
