"""Feed-forward layers: one class per way to compute SwiGLU or to store its activations. All have the same
parameters (`FfnWeights`), so their state dicts are interchangeable."""

from moc.layers.base import INIT_STD, FfnWeights, init_weights
from moc.layers.dense import DenseFFN, DenseGuFFN, FusedFFN, LigerFFN, RecomputeFFN
from moc.layers.fp8 import Fp8FFN
from moc.layers.int8 import Int8FFN
from moc.layers.moc import ActPruneFFN, MoCFFN, TritonMoCFFN

__all__ = [
    "INIT_STD",
    "ActPruneFFN",
    "DenseFFN",
    "DenseGuFFN",
    "FfnWeights",
    "Fp8FFN",
    "FusedFFN",
    "Int8FFN",
    "LigerFFN",
    "MoCFFN",
    "RecomputeFFN",
    "TritonMoCFFN",
    "init_weights",
]
