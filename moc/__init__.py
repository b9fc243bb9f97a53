"""Mixture-of-Channels and dense SwiGLU feed-forward networks, a LLaMA decoder that uses them, and the
registry of methods that compares them. Does not depend on `harness`, which measures them.

A public name is imported from its module when it is first used (PEP 562), so that `moc.config` and
`moc.selection` can be imported without loading PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moc.config import PRESETS, FfnShape, LlamaConfig, get_preset
    from moc.decoding import GreedyDecoder
    from moc.layers.base import init_weights
    from moc.layers.dense import DenseFFN, DenseGuFFN, RecomputeFFN
    from moc.layers.moc import ActPruneFFN, MoCFFN
    from moc.llama import KVCache, Llama
    from moc.methods import METHODS, Method, get_method
    from moc.ops.loss import chunked_cross_entropy, token_cross_entropy
    from moc.ops.torch_ffn import act_prune_ffn, dense_gu_ffn, moc_ffn
    from moc.reference import FfnGrads
    from moc.selection import Selection, parse_selection

__all__ = [
    "METHODS",
    "PRESETS",
    "ActPruneFFN",
    "DenseFFN",
    "DenseGuFFN",
    "FfnGrads",
    "FfnShape",
    "GreedyDecoder",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "Method",
    "MoCFFN",
    "RecomputeFFN",
    "Selection",
    "act_prune_ffn",
    "chunked_cross_entropy",
    "dense_gu_ffn",
    "get_method",
    "get_preset",
    "init_weights",
    "moc_ffn",
    "parse_selection",
    "token_cross_entropy",
]

_NAMES_OF_MODULES = {
    "config": ("PRESETS", "FfnShape", "LlamaConfig", "get_preset"),
    "decoding": ("GreedyDecoder",),
    "layers.base": ("init_weights",),
    "layers.dense": ("DenseFFN", "DenseGuFFN", "RecomputeFFN"),
    "layers.moc": ("ActPruneFFN", "MoCFFN"),
    "llama": ("KVCache", "Llama"),
    "methods": ("METHODS", "Method", "get_method"),
    "ops.loss": ("chunked_cross_entropy", "token_cross_entropy"),
    "ops.torch_ffn": ("act_prune_ffn", "dense_gu_ffn", "moc_ffn"),
    "reference": ("FfnGrads",),
    "selection": ("Selection", "parse_selection"),
}
_MODULE_OF = {name: f"moc.{module}" for module, names in _NAMES_OF_MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # so the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
