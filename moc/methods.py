"""The registry of methods: the ways to compute a feed-forward network that are compared.

A method is a name of `METHODS` or `package.module:factory`, so that a feed-forward network from outside can
be compared by the same rules without a change of this package. The part after the colon names either

- a `Method` (a module attribute), taken as it stands, or
- a callable `factory(shape: FfnShape, selection: Selection | None) -> nn.Module`. The module maps
  x [..., d_model] to [..., d_model] and has the parameters `w_gate`, `w_up` and `w_down`, each [d_ffn,
  d_model] (channel-major), which are filled with the same values as those of every other method. Attributes
  of the factory may say more: `takes_selection` (default False: the selection is ignored, and the method is
  measured once and checked against the dense reference; True: the method must follow the selection rule and
  is checked against the Mixture-of-Channels reference), `is_dense` (default False; True: an exact dense
  network, which may be the baseline of a speed-up) and `compile` (default False).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moc.config import FfnShape, near_miss
from moc.dtypes import BYTES, DECODE_DTYPES, FP8_ROUNDOFF, KERNEL_DTYPES
from moc.selection import Selection, n_words, required

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moc.reference import FfnGrads

Reference = Callable[
    ["Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Selection | None"], "FfnGrads"
]  # x, w_gate, w_up, w_down, dy, selection


def _wide_row_bytes(d_model: int, itemsize: int) -> int:
    return d_model * itemsize


def _int8_row_bytes(d_model: int, _itemsize: int) -> int:
    return d_model + 4  # and a float32 scale


@dataclass(frozen=True)
class Method:
    """One way to compute a feed-forward network, with what it is able to do."""

    name: str
    make: Callable[[FfnShape, Selection | None], nn.Module]  # the layer; parameters w_gate, w_up, w_down
    is_dense: bool  # exact dense SwiGLU, so it may be the best dense method of a comparison
    takes_selection: bool  # False: the selection of a point is ignored and the method measured once
    compile: bool  # goes through torch.compile on CUDA: the whole model, or the bare layer
    reference: Reference  # (x, w_gate, w_up, w_down, dy, selection) -> the truth it is checked against
    dtypes: frozenset[str] = frozenset(BYTES)
    device_types: frozenset[str] = frozenset({"cpu", "cuda"})
    backward: bool = True  # can be trained
    decode: bool = True  # can generate token by token
    compile_mode: str | None = None  # of torch.compile; None: its default
    requires: str | None = None  # an importable package of an optional extra
    # unit roundoff of the format activations are kept in, where that is coarser than the dtype: gradients may
    # be off by it
    kept_roundoff: float = 0.0
    # (shape, k, itemsize) -> bytes kept per token between forward and backward, x included and weights not;
    # None: not known by formula
    saved_bytes_per_token: Callable[[FfnShape, int, int], float] | None = None
    # (shape, selection, tokens, itemsize) -> bytes a backward pass allocates beside dx and one weight
    # gradient; None: as autograd or inductor does it
    scratch_bytes: Callable[[FfnShape, Selection | None, int, int], int] | None = None
    keeps_casts: bool = True  # under autocast, a cast of every weight until backward has used it
    # (d_model, itemsize) -> bytes of one row of w_gate, w_up or w_down as decoding reads it
    row_bytes: Callable[[int, int], int] = _wide_row_bytes
    generate_refusal: str | None = None  # why it cannot be compared in `generate`; None: it can

    def compiles_on(self, device_type: str) -> bool:
        """Whether torch.compile is applied on this device.

        Never on the CPU: there inductor would need a C++ compiler, which a bare machine has not.
        """
        return self.compile and device_type == "cuda"

    def unsupported_reason(
        self, shape: FfnShape, selection: Selection | None, dtype: str, device_type: str
    ) -> str | None:
        """Why this method cannot run such a point, in one line; None if it can.

        `dtype` is one of fp64, fp32, fp16, bf16; `device_type` is cpu or cuda.
        """
        if dtype not in self.dtypes:
            return f"method {self.name} does not support dtype {dtype}; {near_miss(dtype, self.dtypes)}"
        if device_type not in self.device_types:
            valid = near_miss(device_type, self.device_types)
            return f"method {self.name} does not run on {device_type}; {valid}"
        if self.requires is not None and importlib.util.find_spec(self.requires) is None:
            return f"method {self.name} needs the package {self.requires}, which is not installed"
        if not self.takes_selection:
            return None
        if selection is None:
            return f"method {self.name} needs a selection, such as topk:0.1875"
        try:
            selection.k(shape.d_ffn)
        except ValueError as error:
            return f"method {self.name}: {error}"
        return None


def get_method(name: str) -> Method:
    """The method `name`: one of METHODS, or `package.module:factory` (see the module's docstring).

    Raises ValueError, in one line: an unknown name (with the nearest one), a module that cannot be imported,
    a missing attribute, or an attribute that is neither a Method nor callable.
    """
    if name in METHODS:
        return METHODS[name]
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(
            f"unknown method {name!r}; {near_miss(name, METHODS)}; or package.module:factory for one's own"
        )
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise ValueError(f"method {name!r}: expected package.module:factory")
    factory = _attribute(name, module_name, attribute)
    if isinstance(factory, Method):
        return factory
    if not callable(factory):
        raise ValueError(
            f"method {name!r}: {attribute} is a {type(factory).__name__}, expected a Method or a callable "
            "(shape, selection) -> nn.Module"
        )
    takes_selection = bool(getattr(factory, "takes_selection", False))
    return Method(
        name=name,
        make=factory,
        is_dense=bool(getattr(factory, "is_dense", False)),
        takes_selection=takes_selection,
        compile=getattr(factory, "compile", False) is True,  # a module class has a method of that name
        reference=_moc_reference if takes_selection else _dense_reference,
    )


def _attribute(name: str, module_name: str, attribute: str) -> object:
    """The attribute of a module that the method `name` names. Raises ValueError as `get_method`."""
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"method {name!r}: cannot import {module_name}: {error}") from error
    found: object = getattr(module, attribute, None)
    if found is None:
        public = [
            key
            for key, value in vars(module).items()
            if isinstance(value, Method) or (callable(value) and value.__module__ == module_name)
        ]
        raise ValueError(
            f"method {name!r}: {module_name} has no {attribute!r}; {near_miss(attribute, public)}"
        )
    return found


def _later(name: str, **fixed: Any) -> Callable[..., Any]:
    """What `package.module:attribute` names, imported when it is called: the registry loads no PyTorch."""
    module, _, attribute = name.partition(":")

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(module), attribute)(*args, **fixed)

    return call


def _reference(name: str, *, selects: bool = True) -> Reference:
    """A function of `moc.reference` as the truth of a method; one that `selects` takes a selection."""
    function = _later(f"moc.reference:{name}")
    return lambda *tensors: function(*tensors[:5], *([required(tensors[5])] if selects else []))


_dense_reference = _reference("dense_forward_backward", selects=False)
_moc_reference = _reference("moc_forward_backward")


def _dense_bytes(tensors: int) -> Callable[[FfnShape, int, int], float]:
    """Saved bytes per token of x and so many tensors [T, d_ffn]."""
    return lambda shape, _k, itemsize: (shape.d_model + tensors * shape.d_ffn) * itemsize


def _compact_fp8_bytes(shape: FfnShape, k: int, itemsize: int) -> float:
    # a pair of bytes for each kept channel, and two scales
    return shape.d_model * itemsize + 2 * k + 4 * n_words(shape.d_ffn) + 8


def _compact_bytes(shape: FfnShape, k: int, itemsize: int) -> float:
    return (shape.d_model + 2 * k) * itemsize + 4 * n_words(shape.d_ffn)


# The reason that `generate` refuses a method.
_NOT_COMPILED = "its layers are not compiled, so its whole model would run eagerly beside compiled ones"


def _dense(name: str, layer: str, **fields: Any) -> Method:
    """A method without selection: exact dense SwiGLU and compiled, unless `fields` say otherwise."""
    defaults: dict[str, Any] = {"is_dense": True, "compile": True, "reference": _dense_reference}
    make = _later(f"moc.layers:{layer}")
    return Method(name, lambda shape, _: make(shape), takes_selection=False, **(defaults | fields))


def _moc(name: str, layer: str, fp8: bool = False, **fields: Any) -> Method:
    """A method with a selection: Mixture-of-Channels and compiled, unless `fields` say otherwise."""
    defaults: dict[str, Any] = {"is_dense": False, "compile": True, "reference": _moc_reference}
    make = _later(f"moc.layers:{layer}", **({"fp8": True} if fp8 else {}))
    return Method(
        name, lambda shape, rule: make(shape, required(rule)), takes_selection=True, **(defaults | fields)
    )


_CUDA = frozenset({"cuda"})
_ON_TRITON: dict[str, Any] = {
    "dtypes": frozenset(KERNEL_DTYPES),
    "device_types": _CUDA,
    "scratch_bytes": _later("moc.ops.triton_ffn:backward_scratch_bytes"),
    "keeps_casts": False,
}
_INT8: dict[str, Any] = {
    "is_dense": False,  # its weights are rounded, so it is no exact dense baseline
    "reference": _later("moc.layers.int8:int8_reference"),
    "compile": False,  # a compiled layer would not see that its int8 weights are out of date
    "dtypes": frozenset(DECODE_DTYPES),
    "device_types": _CUDA,
    "backward": False,
    "row_bytes": _int8_row_bytes,
    "generate_refusal": _NOT_COMPILED,
}

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        _dense("dense", "DenseFFN", compile=False, saved_bytes_per_token=_dense_bytes(4)),
        # Only on CUDA: elsewhere nothing is compiled, so it would be `dense` again.
        _dense("dense_compiled", "DenseFFN", device_types=_CUDA),
        _dense("dense_autotuned", "DenseFFN", device_types=_CUDA, compile_mode="max-autotune-no-cudagraphs"),
        _dense("dense_fused", "FusedFFN", device_types=_CUDA),
        _dense(
            "dense_liger",
            "LigerFFN",
            compile=False,
            dtypes=frozenset(KERNEL_DTYPES),
            device_types=_CUDA,
            requires="liger_kernel",
            saved_bytes_per_token=_dense_bytes(3),
        ),
        _dense(
            "dense_fp8",
            "Fp8FFN",
            is_dense=False,  # its gradients are rounded, so it is no exact dense baseline
            kept_roundoff=FP8_ROUNDOFF,
            saved_bytes_per_token=lambda shape, _k, size: shape.d_model * size + 2 * (shape.d_ffn + 4),
        ),
        _dense("dense_recompute", "RecomputeFFN", saved_bytes_per_token=_dense_bytes(0)),
        _dense("dense_gu", "DenseGuFFN", saved_bytes_per_token=_dense_bytes(2)),
        _moc("moc", "TritonMoCFFN", saved_bytes_per_token=_compact_bytes, **_ON_TRITON),
        _moc(
            "moc_fp8",
            "TritonMoCFFN",
            fp8=True,
            kept_roundoff=FP8_ROUNDOFF,
            saved_bytes_per_token=_compact_fp8_bytes,
            **_ON_TRITON,
        ),
        _moc("moc_reference", "MoCFFN", saved_bytes_per_token=_compact_bytes),
        _moc(
            "act_prune",
            "ActPruneFFN",
            reference=_reference("act_prune_forward_backward"),
            saved_bytes_per_token=_compact_bytes,
        ),
        _dense("dense_int8", "Int8FFN", **_INT8),
        _moc("moc_int8", "Int8FFN", **_INT8),
    )
}
