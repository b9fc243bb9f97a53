"""Which methods of the registry are plain PyTorch and so run anywhere. The others are somebody's GPU kernels:
Triton's are tested in tests/kernels, interpreted where there is no GPU."""

from moc import METHODS, FfnShape, parse_selection
from moc.layers.int8 import Int8FFN
from moc.layers.moc import TritonMoCFFN

_RULE = parse_selection("topk:0.25")

PURE = [
    name
    for name, method in METHODS.items()
    if method.requires is None
    and not isinstance(method.make(FfnShape(8, 32), _RULE), (TritonMoCFFN, Int8FFN))
]
