"""What autograd really keeps between forward and backward, against the formulas of the registry."""

import pytest
import torch
from pure import PURE
from torch import Tensor, nn

from moc import METHODS, FfnShape, parse_selection

T, SHAPE = 37, FfnShape(24, 75)
RULES = ["topk:0.1875", "nm:2:8", "threshold:0.0:0.25"]


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes of the storages autograd keeps for backward, each once, without the parameters' storages."""
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, Tensor] = {}  # the tensors are held so that no storage pointer is reused meanwhile

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in parameters:
            kept[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert y.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_dense_keeps_x_and_four_wide_tensors() -> None:
    """Eager dense keeps exactly x + 4 * T * d_ffn elements: g, u, silu(g) and z."""
    layer = METHODS["dense"].make(SHAPE, None)
    elements = saved_bytes(layer, torch.randn(T, 24, requires_grad=True)) // 4
    assert elements == T * 24 + 4 * T * 75


@pytest.mark.parametrize("rule", RULES, ids=lambda text: text.replace(":", "_"))
@pytest.mark.parametrize("name", ["moc_reference", "act_prune"])
def test_moc_keeps_x_the_compact_pair_and_a_bitmask(name: str, rule: str) -> None:
    """MoC keeps exactly x + 2 * T * K elements and T * ceil(d_ffn / 32) words of bitmask."""
    selection = parse_selection(rule)
    layer = METHODS[name].make(SHAPE, selection)
    kept = saved_bytes(layer, torch.randn(T, 24, requires_grad=True))
    assert kept == 4 * (T * 24 + 2 * T * selection.k(75)) + 4 * T * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(T,), (2, 3, 5)], ids=["T37", "B2x3x5"])
@pytest.mark.parametrize("name", [name for name in PURE if METHODS[name].saved_bytes_per_token])
def test_formulas_of_the_registry(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Every method with a formula keeps exactly what it says, in either dtype and with leading dimensions."""
    method, selection = METHODS[name], parse_selection("topk:0.1875")
    layer = method.make(SHAPE, selection).to(dtype)
    x = torch.randn(*shape, 24, dtype=dtype, requires_grad=True)
    per_token = method.saved_bytes_per_token(SHAPE, selection.k(75), dtype.itemsize)  # type: ignore[misc]
    assert saved_bytes(layer, x) == per_token * x.numel() // 24


@pytest.mark.parametrize("name", ["dense", "dense_gu", "moc_reference", "act_prune"])
def test_autocast_keeps_one_low_precision_copy_of_x(name: str) -> None:
    """Under autocast a layer keeps its activations, x included, in bf16 only, once, beside bf16 weights."""
    method, selection = METHODS[name], parse_selection("topk:0.1875")
    layer = method.make(SHAPE, selection)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = saved_bytes(layer, torch.randn(T, 24, requires_grad=True))
    per_token = method.saved_bytes_per_token(SHAPE, selection.k(75), 2)  # type: ignore[misc]
    assert kept == per_token * T + 2 * SHAPE.n_params()


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_layers_keep_no_more_than_eager() -> None:
    """Through torch.compile MoC still keeps the compact tensors and nothing wide."""
    selection = parse_selection("topk:0.1875")
    layer = METHODS["moc_reference"].make(SHAPE, selection)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    kept = saved_bytes(compiled, torch.randn(T, 24, requires_grad=True))
    assert kept == METHODS["moc_reference"].saved_bytes_per_token(SHAPE, selection.k(75), 4) * T  # type: ignore[misc]
