"""Dense layers: the same function as plain dense SwiGLU."""

import copy

import torch
from layer_data import SHAPE, data, relative

from moc.layers.dense import DenseFFN, FusedFFN
from moc.reference import dense_forward_backward


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
