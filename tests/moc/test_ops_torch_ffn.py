"""Feed-forward operators and layers: values, every gradient, and behaviour inside PyTorch's machinery."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pure import PURE
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moc import (
    METHODS,
    ActPruneFFN,
    DenseFFN,
    DenseGuFFN,
    FfnShape,
    MoCFFN,
    RecomputeFFN,
    act_prune_ffn,
    dense_gu_ffn,
    moc_ffn,
    parse_selection,
)
from moc.reference import FfnGrads, select_mask

# relative Frobenius error against the float64 reference
TOLERANCE = {"fp64": 1e-14, "fp32": 2e-6, "bf16": 1e-2, "fp16": 1.5e-3}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RULES = ["topk:0.1875", "topk:1", "topk:1.0", "topk_abs:0.25", "nm:2:8", "nm:12:64", "threshold:0.1:0.25"]
NAMES = ("y", "dx", "dw_gate", "dw_up", "dw_down")
CASES = [
    pytest.param(method, t, d, f, rule, dtype, id=f"{method}-T{t}-d{d}-f{f}-{rule.replace(':', '_')}-{dtype}")
    for method in PURE
    for t, d, f, dtype in (
        (63, 64, 200, "fp64"),
        (1, 8, 33, "fp32"),
        (17, 24, 75, "bf16"),
        (17, 24, 75, "fp16"),
    )
    for rule in RULES
    if METHODS[method].takes_selection or rule == RULES[0]
]


def make(method: str, shape: FfnShape, rule: str, dtype: torch.dtype) -> nn.Module:
    """The method's layer with weights of ordinary size, so that gates are of order one."""
    layer = METHODS[method].make(shape, parse_selection(rule)).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape) / shape.d_model**0.5)
    return layer


def run(layer: nn.Module, x: Tensor, dy: Tensor) -> FfnGrads:
    """Output and gradients of a layer for `dy`."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    grads = torch.autograd.grad(y, [x, layer.w_gate, layer.w_up, layer.w_down], dy)
    return FfnGrads(y.detach(), *grads)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double().reshape(expected.shape) - expected).norm() / expected.norm())


def assert_same(actual: FfnGrads, expected: FfnGrads, tolerance: float) -> None:
    for name in NAMES:
        error = relative_error(getattr(actual, name), getattr(expected, name).double())
        assert error <= tolerance, f"{name}: relative error {error:.3g} > {tolerance:.3g}"


@pytest.mark.parametrize(("method", "t", "d", "f", "rule", "dtype"), CASES)
def test_output_and_every_gradient(method: str, t: int, d: int, f: int, rule: str, dtype: str) -> None:
    """Each method agrees with its own reference in y, dx and all three weight gradients."""
    layer = make(method, FfnShape(d, f), rule, DTYPES[dtype])
    x, dy = torch.randn(t, d).to(DTYPES[dtype]), torch.randn(t, d).to(DTYPES[dtype])
    weights = [w.detach() for w in (layer.w_gate, layer.w_up, layer.w_down)]
    expected = METHODS[method].reference(x, *weights, dy, parse_selection(rule))
    allowed = TOLERANCE[dtype] + 1.5 * METHODS[method].kept_roundoff
    assert_same(run(layer, x, dy), expected, allowed)


@given(
    rule=st.sampled_from([*RULES, "nm:1:3", "topk:3", "threshold:-5.0:2", "threshold:5.0:1"]),
    t=st.integers(1, 6),
    d=st.integers(1, 9),
    f=st.integers(3, 90),
    dtype=st.sampled_from(["fp64", "bf16"]),
    seed=st.integers(0, 2**31),
)
def test_any_small_shape(rule: str, t: int, d: int, f: int, dtype: str, seed: int) -> None:
    """MoC agrees with the reference for any small shape, rows that keep nothing included."""
    torch.manual_seed(seed)
    layer = make("moc_reference", FfnShape(d, f), rule, DTYPES[dtype])
    x, dy = torch.randn(t, d).to(DTYPES[dtype]), torch.randn(t, d).to(DTYPES[dtype])
    weights = [w.detach() for w in (layer.w_gate, layer.w_up, layer.w_down)]
    expected = METHODS["moc_reference"].reference(x, *weights, dy, parse_selection(rule))
    actual = run(layer, x, dy)
    for name in NAMES:
        wanted = getattr(expected, name)
        # A tensor of one or two numbers may cancel, so here the error is taken against the size of the terms.
        error = (getattr(actual, name).double() - wanted).norm() / (1 + wanted.norm())
        assert float(error) <= 5 * TOLERANCE[dtype], name


@pytest.mark.parametrize("rule", RULES, ids=lambda text: text.replace(":", "_"))
def test_gradcheck(rule: str) -> None:
    """Numerical differentiation of the MoC operator gives its gradients, the choice of channels held."""
    selection = parse_selection(rule)
    x, *weights = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(4, 5)] + [(19, 5)] * 3)
    assert torch.autograd.gradcheck(lambda *leaves: moc_ffn(*leaves, selection)[0], (x, *weights))


def test_gradient_only_on_kept_channels() -> None:
    """Channels that no token kept get no weight gradient at all, and kept ones do."""
    layer = make("moc_reference", FfnShape(16, 64), "topk:2", torch.float64)
    x = torch.randn(3, 16, dtype=torch.float64)
    used = select_mask(x @ layer.w_gate.T.detach(), parse_selection("topk:2")).any(dim=0)
    grads = run(layer, x, torch.randn(3, 16, dtype=torch.float64))
    assert 0 < int(used.sum()) < 64
    for dw in (grads.dw_gate, grads.dw_up, grads.dw_down):
        assert torch.equal(dw.abs().sum(dim=1) > 0, used)


@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
def test_keeping_every_channel_is_dense(dtype: str) -> None:
    """With K = d_ffn, MoC and act_prune give the output of the dense layer bit for bit and its gradients."""
    shape, x, dy = (
        FfnShape(16, 40),
        torch.randn(9, 16).to(DTYPES[dtype]),
        torch.randn(9, 16).to(DTYPES[dtype]),
    )
    dense = DenseFFN(shape).to(DTYPES[dtype])
    expected = run(dense, x, dy)
    for layer in (MoCFFN(shape, parse_selection("topk:40")), ActPruneFFN(shape, parse_selection("nm:7:8"))):
        layer.to(DTYPES[dtype]).load_state_dict(dense.state_dict())
        if layer.selection.rule == "topk":
            assert_same(run(layer, x, dy), expected, 2 * TOLERANCE[dtype])
        assert torch.equal(layer(x), expected.y)


def test_dense_gu_is_eager_dense_exactly() -> None:
    """dense_gu and dense_recompute repeat eager's operations: output and gradients are the same numbers."""
    shape, x, dy = FfnShape(16, 40), torch.randn(9, 16), torch.randn(9, 16)
    expected = run(DenseFFN(shape), x, dy)
    assert_same(run(RecomputeFFN(shape), x, dy), expected, 0.0)
    assert_same(run(DenseGuFFN(shape), x, dy), expected, 1e-7)


LAYERS = {method: make(method, FfnShape(12, 50), "topk:9", torch.float32) for method in PURE}
each_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=list(LAYERS))


@each_layer
def test_leading_dimensions(layer: nn.Module) -> None:
    """Any leading dimensions, none, or an empty batch: the result is row by row that of [T, d]."""
    x, dy = torch.randn(24, 12), torch.randn(24, 12)
    flat = run(layer, x, dy)
    shaped = run(layer, x.view(2, 3, 4, 12), dy.view(2, 3, 4, 12))
    assert shaped.y.shape == (2, 3, 4, 12)
    assert_same(shaped, flat, 1e-6)
    assert relative_error(layer(x[0]).detach(), flat.y[0].double()) < 1e-6
    empty = run(layer, x[:0], dy[:0])
    assert empty.y.shape == empty.dx.shape == (0, 12)
    assert not empty.dw_gate.any()
    assert not empty.dw_down.any()


@each_layer
def test_non_contiguous_inputs(layer: nn.Module) -> None:
    """A transposed x and an expanded output gradient give what their contiguous copies give."""
    x, dy = torch.randn(12, 6, 4).permute(2, 1, 0), torch.randn(12).expand(4, 6, 12)
    assert not x.is_contiguous()
    assert_same(run(layer, x, dy), run(layer, x.contiguous(), dy.contiguous()), 1e-6)


@each_layer
def test_no_grad_keeps_nothing(layer: nn.Module) -> None:
    """Under no_grad, and with frozen weights and input, the output has no graph and nothing is saved."""
    saved: list[Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        torch.no_grad(),
    ):
        y = layer(torch.randn(5, 12, requires_grad=True))
    assert not y.requires_grad
    assert not saved


def test_inference_does_not_build_what_only_backward_needs() -> None:
    """Under no_grad the compact tensors are not computed, and the output is the one of training."""
    layer, x = make("moc_reference", FfnShape(12, 50), "topk:9", torch.float32), torch.randn(5, 12)

    def operations() -> tuple[Tensor, set[str]]:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
        ) as profile:
            y = layer(x)
        return y, {event.key for event in profile.key_averages()}

    trained, in_training = operations()
    with torch.no_grad():
        inferred, in_inference = operations()
    assert in_training - in_inference >= {"aten::gather", "aten::searchsorted"}
    assert torch.equal(trained, inferred)


@each_layer
def test_checkpointing(layer: nn.Module) -> None:
    """Activation checkpointing around a layer does not change its gradients."""
    x, dy = torch.randn(7, 12), torch.randn(7, 12)
    expected = run(layer, x, dy)
    leaf = x.clone().requires_grad_()
    grads = torch.autograd.grad(checkpoint(layer, leaf, use_reentrant=False), [leaf, *layer.parameters()], dy)
    for actual, name in zip(grads, NAMES[1:], strict=True):
        assert relative_error(actual, getattr(expected, name).double()) < 1e-6


@each_layer
def test_autocast(layer: nn.Module) -> None:
    """Under bf16 autocast a layer computes and returns bf16, as F.linear, and leaves get float32 grads."""
    x, dy = torch.randn(7, 12), torch.randn(7, 12)
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(leaf)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y, [leaf, *layer.parameters()], dy.bfloat16())
    assert {g.dtype for g in grads} == {torch.float32}
    half = make_like(layer, torch.bfloat16)
    assert_same(FfnGrads(y.detach(), *grads), run(half, x.bfloat16(), dy.bfloat16()), 1e-6)


def make_like(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a layer in another dtype."""
    copy = type(layer)(layer.shape, *([layer.selection] if hasattr(layer, "selection") else [])).to(dtype)
    copy.load_state_dict(layer.state_dict())
    return copy


@each_layer
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_without_a_graph_break(layer: nn.Module) -> None:
    """torch.compile takes forward and backward as one graph each, and the numbers stay the same."""
    x, dy = torch.randn(2, 7, 12), torch.randn(2, 7, 12)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    leaf = x.clone().requires_grad_()
    y = compiled(leaf)
    grads = torch.autograd.grad(y, [leaf, *layer.parameters()], dy)
    assert_same(FfnGrads(y.detach(), *grads), run(layer, x, dy), 1e-6)


OPERATORS = {
    "moc_forward": lambda x, w: (torch.ops.moc.ffn_forward.default, (x, *w, "topk:5", True, True)),
    "moc_forward-threshold": lambda x, w: (
        torch.ops.moc.ffn_forward.default,
        (x, *w, "threshold:0.0:5", True, True),
    ),
    "act_prune_forward": lambda x, w: (torch.ops.moc.ffn_forward.default, (x, *w, "nm:2:8", False, True)),
    "moc_inference": lambda x, w: (
        torch.ops.moc.ffn_forward.default,
        (x.detach(), *(t.detach() for t in w), "topk:5", True, False),
    ),
    "dense_gu_forward": lambda x, w: (torch.ops.moc.dense_gu_forward.default, (x, *w)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    """PyTorch's own checks of a custom operator pass: schema, fake tensors, autograd, tracing."""
    x = torch.randn(6, 8, requires_grad=True)
    operator, arguments = OPERATORS[name](x, [torch.randn(37, 8, requires_grad=True) for _ in range(3)])
    torch.library.opcheck(operator, arguments)


def test_backward_operators_pass_opcheck() -> None:
    """The backward operators, which have no gradient themselves, pass the same checks."""
    x, dy = torch.randn(6, 8), torch.randn(6, 8)
    weights = [torch.randn(37, 8) for _ in range(3)]
    _y, g, u, bitmask, _overflow = torch.ops.moc.ffn_forward(x, *weights, "topk:5", True, True)
    torch.library.opcheck(torch.ops.moc.ffn_backward.default, (dy, x, g, u, bitmask, *weights))
    _y, g, u = torch.ops.moc.dense_gu_forward(x, *weights)
    torch.library.opcheck(torch.ops.moc.dense_gu_backward.default, (dy, x, g, u, *weights))


def test_threshold_overflow_is_counted() -> None:
    """The layer adds up what the cap left out, call after call, and keeps the count out of its state dict."""
    layer = make("moc_reference", FfnShape(12, 50), "threshold:0.0:5", torch.float32)
    x = torch.randn(9, 12)
    above = int(((x @ layer.w_gate.T) > 0).sum(dim=1).sub(5).clamp(min=0).sum())
    assert above > 0
    layer(x)
    layer(x)
    assert layer.overflow_count.item() == 2 * above
    assert "overflow_count" not in layer.state_dict()
    assert not hasattr(MoCFFN(FfnShape(12, 50), parse_selection("topk:5")), "overflow_count")


def test_nan_reaches_the_output() -> None:
    """A NaN in one token makes that token's output NaN and leaves the others alone."""
    layer = make("moc_reference", FfnShape(12, 50), "topk:5", torch.float32)
    x = torch.randn(3, 12)
    x[1, 4] = float("nan")
    assert layer(x).isnan().all(dim=1).tolist() == [False, True, False]


SHAPES = {"x": (4, 8), "w_gate": (20, 8), "w_up": (20, 8), "w_down": (20, 8)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (4, 9)}, r"x has shape \(4, 9\): its last dimension must be d = 8"),
        ({"w_up": (8, 20)}, r"w_up has shape \(8, 20\), w_gate \(20, 8\)"),
        ({"w_down": (8, 20)}, r"w_down has shape \(8, 20\), w_gate \(20, 8\)"),
        ({"w_gate": (20,)}, r"w_gate must be \[d_ffn, d\], got shape \(20,\)"),
    ],
    ids=["x", "w_up", "w_down", "w_gate"],
)
def test_shapes_that_do_not_fit(change: dict[str, tuple[int, ...]], message: str) -> None:
    """A tensor of the wrong shape is named, with its shape and what would fit."""
    tensors = [torch.zeros(shape) for shape in {**SHAPES, **change}.values()]
    with pytest.raises(ValueError, match=message):
        moc_ffn(*tensors, parse_selection("topk:3"))
    with pytest.raises(ValueError, match=message):
        dense_gu_ffn(*tensors)


def test_dtypes_that_do_not_fit() -> None:
    """Integer inputs and mixed dtypes are refused, naming the tensor and its dtype."""
    x, *weights = (torch.zeros(shape) for shape in SHAPES.values())
    with pytest.raises(ValueError, match=r"x has dtype torch\.int64; supported: torch\.float16"):
        act_prune_ffn(x.long(), *weights, parse_selection("topk:3"))
    with pytest.raises(ValueError, match=r"w_gate has dtype torch\.float32, x torch\.bfloat16: .* the same"):
        moc_ffn(x.bfloat16(), *weights, parse_selection("topk:3"))


def test_k_that_does_not_fit() -> None:
    """K beyond d_ffn is refused when the layer is made and when the operator is called."""
    tensors = [torch.zeros(shape) for shape in SHAPES.values()]
    with pytest.raises(ValueError, match="K=21 exceeds d_ffn=20"):
        moc_ffn(*tensors, parse_selection("topk:21"))
    with pytest.raises(ValueError, match="K=21 exceeds d_ffn=20"):
        MoCFFN(FfnShape(8, 20), parse_selection("topk:21"))


def test_operator_without_storage_refuses_a_gradient() -> None:
    """The bare operator called with keep=False on tensors that need a gradient refuses."""
    x, *weights = (torch.zeros(shape, requires_grad=True) for shape in SHAPES.values())
    with pytest.raises(ValueError, match="keep=False on inputs that require a gradient"):
        torch.ops.moc.ffn_forward(x, *weights, "topk:3", True, False)
