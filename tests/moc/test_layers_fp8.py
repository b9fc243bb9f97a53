"""The dense layer that keeps g and u in fp8: output, gradients and what is kept."""

import pytest
import torch
from layer_data import SHAPE, data, relative

from moc import get_method
from moc.layers.dense import DenseFFN
from moc.layers.fp8 import FP8_MAX, Fp8FFN, to_fp8
from moc.reference import dense_forward_backward


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
