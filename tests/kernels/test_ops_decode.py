"""Decoding as layers and operators: which path is taken, int8 weights, and PyTorch's machinery around it."""

import copy

import pytest
import torch
from kernel_cases import printed_without_launching
from torch import Tensor

from harness.measure import gate
from moc import METHODS, FfnShape, parse_selection
from moc.layers.int8 import Int8FFN, dequantize_rows, quantize_rows
from moc.layers.moc import TritonMoCFFN
from moc.ops.decode import decode_path, decodes, int8_decode, moc_decode, most_tokens
from moc.ops.triton_ffn import triton_moc_ffn
from moc.reference import dense_forward, moc_forward

SHAPE = FfnShape(40, 150)
RULES = ["nm:2:8", "topk:0.25"]
METHOD_RULES = [("dense_int8", None), *(("moc_int8", rule) for rule in RULES)]

COUNT_VARIANTS = """
import contextlib, torch
torch.cuda.get_device_capability = lambda device: (9, 0)

from moc.kernels import decode, decode_launch
from moc.selection import parse_selection
decode_launch._check_tensors = lambda x, rows: None
decode_launch.launching_on = lambda x: contextlib.nullcontext()
kernels = [kernel for name, kernel in vars(decode).items() if name.endswith("_kernel")]
for rule in ("nm:2:8", "topk:0.1875"):
    for kernel in kernels:
        kernel.device_caches.clear()
    for n_tokens in (1, 2, 3, 4, 5, 8, 15, 16):
        x = torch.zeros(n_tokens, 64, dtype=torch.bfloat16)
        rows = decode_launch.Rows(*(torch.zeros(320, 64, dtype=torch.bfloat16) for _ in range(3)))
        overflow = torch.zeros((), dtype=torch.int64)
        decode_launch.decode_pass(x, rows, parse_selection(rule), torch.zeros_like(x), overflow)
    print(rule, [len(kernel.device_caches[0][0]) for kernel in kernels])
"""


def fill(layer: torch.nn.Module) -> None:
    """Weights of ordinary size, so that gates are of order one."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape) / SHAPE.d_model**0.5)


def weights(layer: torch.nn.Module) -> list[Tensor]:
    return [layer.w_gate.detach(), layer.w_up.detach(), layer.w_down.detach()]


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("rule", RULES, ids=lambda text: text.replace(":", "_"))
def test_a_layer_decodes_few_tokens_and_no_others(rule: str, device: str) -> None:
    """Without gradients few tokens take the decoding kernels; all others, and training, the GEMMs."""
    selection = parse_selection(rule)
    layer = TritonMoCFFN(SHAPE, selection).to(device, torch.bfloat16)
    fill(layer)
    crossover = most_tokens(selection, 150)
    for shape in [(40,), (1, crossover, 40), (crossover + 1, 40), (0, 40)]:
        x = torch.randn(shape).to(device, torch.bfloat16)
        few = 1 <= x.numel() // 40 <= crossover
        assert decode_path(selection, 150, x.numel() // 40, torch.bfloat16) == ("rows" if few else "gemm")
        assert not decodes(x, *weights(layer), selection) or few
        with torch.no_grad():
            y = layer(x)
        assert y.shape == x.shape
        if x.numel():
            expected = moc_forward(x.reshape(-1, 40), *weights(layer), selection)
            assert error(y.reshape(-1, 40), expected) < 1e-2
    x = torch.randn(1, 40).to(device, torch.bfloat16)
    torch.autograd.grad(layer(x).sum(), layer.w_down)  # with gradients the same layer trains


def test_float32_and_wide_layers_take_the_gemms() -> None:
    """What the decoding kernels cannot do is left to the other path."""
    rule = parse_selection("nm:2:8")
    assert decode_path(rule, 1000, 1, torch.float32) == "gemm"
    assert decode_path(rule, 70000, 1, torch.bfloat16) == "gemm"


def test_overflow_is_counted_on_both_paths(device: str) -> None:
    """A `threshold` layer counts what its cap left out, however the tokens are computed."""
    selection = parse_selection("threshold:0.0:0.1")
    layer = TritonMoCFFN(SHAPE, selection).to(device, torch.float16)
    fill(layer)
    x = torch.randn(most_tokens(selection, 150), 40).to(device, torch.float16)
    with torch.no_grad():
        layer(x)
        decoded = int(layer.overflow_count)
        layer.overflow_count.zero_()
        layer._count(triton_moc_ffn(x, *weights(layer), selection)[1])
    assert decoded == int(layer.overflow_count) > 0


def test_autocast_decides_the_dtype(device: str) -> None:
    """Under torch.autocast float32 weights and tokens are cast first, as elsewhere."""
    layer = TritonMoCFFN(SHAPE, parse_selection("nm:2:8")).to(device)
    fill(layer)
    x = torch.randn(1, 40, device=device)
    narrow = [tensor.bfloat16() for tensor in weights(layer)]
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
        assert decodes(x, *weights(layer), layer.selection)
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert error(y, moc_forward(x.bfloat16(), *narrow, layer.selection)) < 1e-2


def test_operators_are_well_formed(device: str) -> None:
    """PyTorch's own check of custom operators passes: schema, fake kernels, tracing."""
    x = torch.randn(2, 24).to(device, torch.bfloat16)
    tensors = [torch.randn(50, 24).to(device, torch.bfloat16) for _ in range(3)]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.use_deterministic_algorithms(True)  # results are compared bit for bit
    try:
        torch.library.opcheck(torch.ops.moc.decode, (x, *tensors, "topk:20"), test_utils=tests)
        rows = torch.randint(-127, 128, (3, 50, 24), dtype=torch.int8, device=device)
        scales = torch.rand(3, 50, device=device)
        torch.library.opcheck(torch.ops.moc.decode_int8, (x, rows, scales, "nm:2:8"), test_utils=tests)
    finally:
        torch.use_deterministic_algorithms(False)


def test_torch_compile_sees_no_break(device: str) -> None:
    """Both layers trace whole, and compiled they do what they do eagerly."""
    x = torch.randn(1, 1, 40).to(device, torch.bfloat16)
    moc = TritonMoCFFN(SHAPE, parse_selection("topk:0.25"))
    for layer in (moc, Int8FFN(SHAPE, parse_selection("nm:2:8"))):
        fill(layer.to(device, torch.bfloat16))
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            expected = layer(x)
            assert error(compiled(x), expected.double()) < 1e-3


def test_arguments_that_do_not_fit(device: str) -> None:
    """Wrong shapes and a K that is too large are errors before any kernel runs."""
    x = torch.randn(1, 40).to(device, torch.bfloat16)
    tensors = [torch.randn(150, 40).to(device, torch.bfloat16) for _ in range(3)]
    with pytest.raises(ValueError, match="K=151 exceeds d_ffn=150"):
        moc_decode(x, *tensors, parse_selection("topk:151"))
    with pytest.raises(ValueError, match="its last dimension must be d = 40"):
        moc_decode(x[:, :39], *tensors, parse_selection("topk:20"))
    rows, scales = torch.zeros(3, 150, 40, dtype=torch.int8), torch.ones(3, 150)
    with pytest.raises(ValueError, match="K=151 exceeds d_ffn=150"):
        int8_decode(x, rows.to(device), scales.to(device), parse_selection("topk:151"))


def test_rounding_to_int8() -> None:
    """Numbers are off by half a scale at most, the largest of a row by nothing, and zeros stay zeros."""
    weight = torch.randn(20, 33).bfloat16()
    weight[3] = 0
    weight[4, 0] = 1000.0  # an outlier costs its own row only
    rows, scales = quantize_rows(weight)
    wide = dequantize_rows(rows, scales)
    assert rows.dtype == torch.int8
    assert scales.dtype == torch.float32
    assert ((wide - weight.double()).abs() <= 0.5001 * scales.double()[:, None]).all()
    assert (rows.abs().amax(dim=1) == torch.tensor([0 if row == 3 else 127 for row in range(20)])).all()
    assert (wide[3] == 0).all()


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(("name", "rule"), METHOD_RULES)
def test_int8_methods_pass_the_gate(name: str, rule: str | None, tokens: int, device: str) -> None:
    """The registry's int8 methods agree with their own reference within the ordinary bounds."""
    method, selection = METHODS[name], parse_selection(rule) if rule else None
    layer = method.make(SHAPE, selection).to(device, torch.bfloat16)
    parameters = dict(layer.named_parameters())
    result = gate.check(layer, parameters, method.reference, selection, tokens, 0, backward=False)
    assert result.ok, result.detail


def test_int8_weights_follow_the_others(device: str) -> None:
    """Loading, an assignment of data, a write in place and a copy on other weights are all noticed."""
    layer = Int8FFN(SHAPE).to(device, torch.bfloat16)
    x = torch.randn(2, 40).to(device, torch.bfloat16)

    def check(module: Int8FFN) -> None:
        exact = [dequantize_rows(*quantize_rows(weight)) for weight in weights(module)]
        with torch.no_grad():
            assert error(module(x), dense_forward(x, *exact)) < 1e-2

    fill(layer)
    check(layer)
    other = copy.deepcopy(layer)
    other.w_up.data = torch.randn_like(other.w_up)
    check(other)
    check(layer)
    other.load_state_dict(layer.state_dict())
    check(other)
    check(other.to(torch.float16).to(torch.bfloat16))
    with torch.no_grad():
        other.w_gate.mul_(-2)
    check(other)


@pytest.mark.parametrize(("name", "rule"), [("dense_int8", None), ("moc_int8", "nm:2:8")])
def test_int8_layers_take_a_prompt(name: str, rule: str | None, device: str) -> None:
    """More tokens than the decoding kernels take give what these give for each of them."""
    layer = METHODS[name].make(SHAPE, parse_selection(rule) if rule else None).to(device, torch.float16)
    fill(layer)
    x = torch.randn(2, 9, 40).to(device, torch.float16)
    with torch.no_grad():
        assert error(layer(x)[0], layer(x[0]).double()) < 2e-2


def test_compilations_for_every_number_of_tokens() -> None:
    """One token, up to four and more are compiled apart, whatever their number otherwise.

    In the order clear, gate, cut, channels, down. Of several tokens only the channels kernel knows whether a
    down kernel follows, and that is what four tokens and five differ in.
    """
    wanted = ["nm:2:8 [2, 0, 0, 3, 1]", "topk:0.1875 [0, 2, 1, 3, 1]"]
    assert printed_without_launching(COUNT_VARIANTS).splitlines() == wanted
