"""What only a CUDA device can show: no synchronisation, CUDA graphs, inductor, memory really freed."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moc import (
    METHODS,
    FfnShape,
    Llama,
    LlamaConfig,
    chunked_cross_entropy,
    parse_selection,
    token_cross_entropy,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RULES = ["topk:0.1875", "topk_abs:0.1875", "nm:2:8", "nm:12:64", "threshold:0.5:0.25"]
SHAPE = FfnShape(128, 1000)
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda text: text.replace(":", "_"))


def make(method: str, rule: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    layer = METHODS[method].make(SHAPE, parse_selection(rule)).to("cuda", dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(4)  # gates of order one
    return layer


def inputs(tokens: int = 257) -> tuple[Tensor, Tensor]:
    x, dy = (torch.randn(tokens, SHAPE.d_model, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return x.requires_grad_(), dy


def assert_matches_reference(
    layer: nn.Module, method: str, rule: str, x: Tensor, dy: Tensor, y: Tensor
) -> None:
    weights = [w.detach() for w in (layer.w_gate, layer.w_up, layer.w_down)]
    expected = METHODS[method].reference(x.detach(), *weights, dy, parse_selection(rule))
    actual = (y.detach(), x.grad, layer.w_gate.grad, layer.w_up.grad, layer.w_down.grad)
    wanted = (expected.y, expected.dx, expected.dw_gate, expected.dw_up, expected.dw_down)
    for name, a, b in zip(("y", "dx", "dw_gate", "dw_up", "dw_down"), actual, wanted, strict=True):
        error = float((a.double() - b).norm() / b.norm())
        assert error < 1e-2, f"{name}: relative error {error:.3g}"


@each_rule
@pytest.mark.parametrize("method", ["moc_reference", "act_prune"])
def test_bf16_values_on_the_gpu(method: str, rule: str) -> None:
    """bf16 output and gradients on the GPU agree with the float64 reference for every rule."""
    layer, (x, dy) = make(method, rule), inputs()
    y = layer(x)
    y.backward(dy)
    assert_matches_reference(layer, method, rule, x, dy, y)


@each_rule
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")  # it does its job
def test_nothing_synchronises(rule: str) -> None:
    """Forward and backward never make the CPU wait for the GPU."""
    layer, (x, dy) = make("moc_reference", rule), inputs()
    layer(x).backward(dy)  # one-time initialisation may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).backward(dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_rule
def test_runs_inside_a_cuda_graph(rule: str) -> None:
    """A captured step replayed on new inputs, ties and all, gives the reference's values for those inputs."""
    layer, (x, dy) = make("moc_reference", rule), inputs()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            layer(x).backward(dy)
    torch.cuda.current_stream().wait_stream(stream)
    for tensor in (x, *layer.parameters()):
        tensor.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        y.backward(dy)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        x[:, ::2] = 0
        dy.copy_(torch.randn_like(dy))
    graph.replay()
    torch.cuda.synchronize()
    assert_matches_reference(layer, "moc_reference", rule, x, dy, y)


@pytest.mark.parametrize(
    "method", ["dense", "dense_gu", "dense_recompute", "moc_reference", "act_prune", "moc", "moc_fp8"]
)
def test_memory_kept_is_the_formula(method: str) -> None:
    """The allocator's growth from before to after forward is y and what the registry's formula says."""
    tokens, selection = 4096, parse_selection("topk:0.1875")
    layer, (x, dy) = make(method, str(selection)), inputs(tokens)
    layer(x).backward(dy)  # cuBLAS workspaces and the like come now
    before = requested_bytes()
    y = layer(x)
    kept = requested_bytes() - before - y.untyped_storage().nbytes()
    k = selection.k(SHAPE.d_ffn)
    without_x = METHODS[method].saved_bytes_per_token(SHAPE, k, 2) - 2 * SHAPE.d_model  # type: ignore[misc]
    assert kept == without_x * tokens


def requested_bytes() -> int:
    """Bytes of live tensors; memory_allocated would add what the allocator rounds up."""
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # float32 stays float32 here
# A rival from another package runs eagerly, as its users run it.
@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.backward and not m.requires])
@pytest.mark.usefixtures("fresh_compiler")
def test_whole_model_through_inductor(method: str) -> None:
    """The compiled step of a whole model has no graph break and the eager step's loss and gradients."""
    config = LlamaConfig(
        "tiny", d_model=128, d_ffn=384, n_layers=2, n_heads=4, vocab_size=500, max_seq_len=64
    )
    make_ffn = METHODS[method].make
    model = Llama(config, lambda: make_ffn(config.ffn, parse_selection("topk:0.25"))).cuda()
    tokens, targets = torch.randint(0, 500, (2, 4, 64), device="cuda")

    def step(loss_function: object) -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = loss_function(tokens, targets)  # type: ignore[operator]
        return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))

    loss, grads = step(torch.compile(model.loss, fullgraph=True))
    expected_loss, expected_grads = step(model.loss)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-3, atol=0)
    for (name, _), actual, expected in zip(model.named_parameters(), grads, expected_grads, strict=True):
        assert float((actual - expected).norm() / expected.norm()) < 0.1, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_cross_entropy_on_the_gpu(dtype: torch.dtype) -> None:
    """The loss, per token and in the mean, and both gradients equal the plain ones of float64 logits."""
    tokens, vocabulary, d = 5000, 4099, 64
    hidden = torch.randn(tokens, d, device="cuda").to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, d, device="cuda").div(4).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), device="cuda")
    targets[::7] = -100
    wide_hidden, wide_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logits = wide_hidden @ wide_weight.T
    expected = F.cross_entropy(logits, targets)
    actual = chunked_cross_entropy(hidden, weight, targets)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
    assert abs(float(actual.detach()) / float(expected.detach()) - 1) < tolerance
    per_token = token_cross_entropy(hidden, weight, targets)
    error = per_token.double() - F.cross_entropy(logits, targets, reduction="none")
    assert float(error.detach().norm() / per_token.norm()) < tolerance
    grads = torch.autograd.grad(actual, [hidden, weight])
    expected_grads = torch.autograd.grad(expected, [wide_hidden, wide_weight])
    for a, b in zip(grads, expected_grads, strict=True):
        assert a.dtype == dtype
        assert float((a.double() - b).norm() / b.norm()) < tolerance
