"""The strong dense rivals: same function as plain dense, and what they keep."""

import copy

import pytest
import torch

from moc import FfnShape, get_method
from moc.layers.dense import DenseFFN, FusedFFN
from moc.layers.fp8 import FP8_MAX, Fp8FFN, to_fp8
from moc.reference import dense_forward_backward

SHAPE = FfnShape(16, 48)


def data(dtype: torch.dtype, tokens: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """x and dy of a small batch."""
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(tokens, SHAPE.d_model, generator=generator).to(dtype) for _ in range(2))
    return x, dy


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative Frobenius error."""
    return float((found.double() - truth).norm() / truth.norm())


def test_fused_dense_is_dense() -> None:
    """One product for gate and up gives output and gradients of the float64 reference."""
    layer = FusedFFN(SHAPE).double()
    x, dy = data(torch.float64)
    x.requires_grad_()
    layer(x).backward(dy)
    truth = dense_forward_backward(x.detach(), *(weight.detach() for weight in layer.parameters()), dy)
    found = (x.grad, layer.w_gate.grad, layer.w_up.grad, layer.w_down.grad)
    for gradient, expected in zip(found, (truth.dx, truth.dw_gate, truth.dw_up, truth.dw_down), strict=True):
        assert gradient is not None
        assert relative(gradient, expected) < 1e-14


def test_fused_dense_frozen_follows_its_weights() -> None:
    """Frozen, it is still dense after a weight is written in place, moved to a dtype, copied or replaced."""
    layer, plain = FusedFFN(SHAPE).double(), DenseFFN(SHAPE).double()
    x, _dy = data(torch.float64)

    def check(layer: FusedFFN) -> None:
        plain.load_state_dict(layer.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-12)

    layer.freeze()
    check(layer)
    layer.load_state_dict({name: 2 * weight for name, weight in layer.state_dict().items()})
    check(layer)
    layer.float().double()
    check(layer)
    layer.freeze()
    frozen = layer.w_gate.data_ptr()
    layer.freeze()
    assert layer.w_gate.data_ptr() == frozen  # what already lies side by side is not copied
    other = copy.deepcopy(layer)
    other.w_up.data = -layer.w_up.data
    check(other)


def test_fp8_dense_has_the_exact_output_and_gradients_rounded_to_three_bits() -> None:
    """y equals dense to the last bit; gradients differ by the rounding of e4m3, and by no more."""
    layer, plain = Fp8FFN(SHAPE), DenseFFN(SHAPE)
    torch.nn.init.normal_(layer.w_gate)
    torch.nn.init.normal_(layer.w_up)
    plain.load_state_dict(layer.state_dict())
    x, dy = data(torch.float32)
    x.requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, plain(x), rtol=1e-6, atol=1e-6)
    y.backward(dy)
    truth = dense_forward_backward(x.detach(), *(weight.detach() for weight in layer.parameters()), dy)
    assert x.grad is not None
    assert layer.w_down.grad is not None
    for gradient, expected in ((x.grad, truth.dx), (layer.w_down.grad, truth.dw_down)):
        assert 0.005 < relative(gradient, expected) < 1.5 * 2.0**-4


def test_fp8_dense_keeps_one_byte_for_each_of_g_and_u() -> None:
    """Saved bytes equal the registered formula: x, two bytes a channel, two scales a token."""
    layer = Fp8FFN(SHAPE)
    x, _ = data(torch.float32)
    x.requires_grad_()
    weights = {weight.untyped_storage().data_ptr() for weight in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    formula = get_method("dense_fp8").saved_bytes_per_token
    assert formula is not None
    assert sum(kept.values()) == formula(SHAPE, SHAPE.d_ffn, 4) * x.shape[0]


@pytest.mark.parametrize("magnitude", [0.0, 1e-20, 1.0, 1e20])
def test_fp8_scales_cover_any_row(magnitude: float) -> None:
    """The largest element of a row is exact whatever its size, and a zero row stays zero."""
    row = torch.tensor([[1.0, -0.5, 0.25, 0.0]]) * magnitude
    packed, scale = to_fp8(row)
    assert packed.float().abs().max() <= FP8_MAX
    torch.testing.assert_close(packed.float() * scale, row, rtol=1e-6, atol=0.0)


def test_fp8_dense_passes_opcheck() -> None:
    """The op's fake, autograd and schema agree with what it does."""
    x, _ = data(torch.float32, tokens=5)
    layer = Fp8FFN(SHAPE)
    torch.library.opcheck(
        torch.ops.moc.dense_fp8_forward.default,
        (x.requires_grad_(), layer.w_gate, layer.w_up, layer.w_down),
    )


def test_a_method_whose_package_is_missing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the optional extra, Liger is unsupported and names what is not installed."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reason = get_method("dense_liger").unsupported_reason(SHAPE, None, "bf16", "cuda")
    assert reason == "method dense_liger needs the package liger_kernel, which is not installed"
