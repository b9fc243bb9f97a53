"""Mixture-of-Channels and dense SwiGLU feed-forward networks, a LLaMA decoder to hold them, and the registry
of methods that compares them. Importable on its own; measuring lives in `harness`."""

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
