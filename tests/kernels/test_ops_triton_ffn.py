"""The operator on Triton kernels: values, every gradient, and PyTorch's machinery around it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, NAMES, TOLERANCE, assert_same, make, run, tokens, weights
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from harness.measure import memory
from moc import METHODS, FfnShape, Llama, LlamaConfig, MoCFFN, parse_selection
from moc.layers.moc import TritonMoCFFN
from moc.ops.compact import unpack_bitmask
from moc.ops.triton_ffn import Chunking, Layout, triton_moc_ffn
from moc.reference import FfnGrads, moc_forward_backward, select_mask
from moc.selection import n_words

RULES = ["topk:0.1875", "topk_abs:0.25", "nm:2:8", "nm:12:64", "threshold:0.1:0.25"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES, ids=lambda text: text.replace(":", "_"))
@pytest.mark.parametrize(
    ("n_tokens", "d", "d_ffn"), [(5, 24, 75), (3, 16, 200)], ids=["T5-d24-f75", "T3-d16-f200"]
)
def test_output_and_every_gradient(
    n_tokens: int, d: int, d_ffn: int, rule: str, dtype: str, device: str
) -> None:
    """y, dx and all three weight gradients agree with the float64 reference."""
    layer = make(d, d_ffn, rule, DTYPES[dtype], device)
    x, dy = tokens(n_tokens, d, DTYPES[dtype], device)
    expected = moc_forward_backward(x, *weights(layer), dy, parse_selection(rule))
    assert_same(run(layer, x, dy), expected, TOLERANCE[dtype])


@settings(deadline=None, max_examples=30)
@given(
    rule=st.sampled_from(["topk:1", "topk:0.4", "topk:1.0", "nm:2:8", "nm:3:5", "threshold:0.0:0.2"]),
    n_tokens=st.integers(1, 3),
    d=st.integers(1, 9),
    d_ffn=st.integers(3, 70),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 2**31),
)
def test_any_small_shape(rule: str, n_tokens: int, d: int, d_ffn: int, dtype: str, seed: int) -> None:
    """Any small shape agrees with the reference, rows that keep nothing included."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = make(d, d_ffn, rule, DTYPES[dtype], device)
    x, dy = tokens(n_tokens, d, DTYPES[dtype], device)
    expected = moc_forward_backward(x, *weights(layer), dy, parse_selection(rule))
    actual = run(layer, x, dy)
    for name in NAMES:
        wanted = getattr(expected, name)
        # A tensor of one or two numbers may cancel, so here the error is taken against the size of the terms.
        error = (getattr(actual, name).double() - wanted).norm() / (1 + wanted.norm())
        assert float(error) <= 5 * TOLERANCE[dtype], name


def test_several_chunks_give_what_one_gives(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Splitting the tokens changes nothing but the order of summation in the weight gradients."""
    layer = make(8, 75, "topk:0.2", torch.float32, device)
    x, dy = tokens(11, 8, torch.float32, device)
    whole = run(layer, x, dy)
    small = Chunking(chunk_bytes=4 * 128 * 4, long_batch=10, multiple=1)
    assert len(small.chunks(11, 128 * 4)) == 3
    monkeypatch.setattr("moc.ops.triton_ffn.LAYOUT", Layout(small))
    assert_same(run(layer, x, dy), whole, 1e-6)


@pytest.mark.parametrize(
    ("n_tokens", "count"), [(0, 0), (1, 1), (4096, 1), (4097, 2), (16384, 2), (65536, 4), (1 << 20, 8)]
)
def test_chunks_of_a_batch(n_tokens: int, count: int) -> None:
    """A long batch has two to eight chunks, a short one is one; they follow each other, in whole tiles."""
    chunks = Chunking().chunks(n_tokens, token_bytes=11008)
    assert len(chunks) == count
    assert [token for chunk in chunks for token in range(n_tokens)[chunk]] == list(range(n_tokens))
    assert all((chunk.stop - chunk.start) % 128 == 0 for chunk in chunks[:-1])
    if count < 8:
        assert all((chunk.stop - chunk.start) * 11008 < 1.1 * Chunking().chunk_bytes for chunk in chunks)


def test_weights_lie_side_by_side(device: str) -> None:
    """w_gate and w_up share one block of memory, also after a conversion; apart, the numbers are the same."""
    layer = make(16, 64, "topk:9", torch.float32, device)
    for module in (layer, TritonMoCFFN(layer.shape, layer.selection).to(device, torch.bfloat16)):
        assert module.w_up.data_ptr() == module.w_gate.data_ptr() + module.w_gate.nbytes
        assert [name for name, _w in module.named_parameters()] == ["w_gate", "w_up", "w_down"]
    x, dy = tokens(4, 16, torch.float32, device)
    expected = run(layer, x, dy)
    layer.w_up.data = layer.w_up.data.clone()
    assert_same(run(layer, x, dy), expected, 1e-6)


@pytest.mark.parametrize("rule", ["topk:0.2", "nm:2:8"])
def test_fp8_keeps_gate_and_up_to_three_bits(rule: str, device: str) -> None:
    """With fp8 y is unchanged, kept values are right to 1/16, and gradients are those of what was kept."""
    layer = make(16, 200, rule, torch.float32, device, fp8=True)
    x, dy = tokens(3, 16, torch.float32, device)
    plain = TritonMoCFFN(layer.shape, layer.selection).to(device)
    plain.load_state_dict(layer.state_dict())
    actual = run(layer, x, dy)
    assert torch.equal(actual.y, run(plain, x, dy).y)

    w_gate, w_up, w_down = weights(layer)
    g, u = x @ w_gate.T, x @ w_up.T
    _y, pairs, scales, bitmask, _overflow = torch.ops.moc.triton_ffn_forward(
        x, w_gate, w_up, w_down, rule, True, True
    )
    assert pairs.dtype == torch.float8_e4m3fn
    mask = unpack_bitmask(bitmask, 200)
    assert torch.equal(mask, select_mask(g, layer.selection))
    kept = (pairs.float() * scales[:, None, :]).flatten(0, 1)  # [T K, 2]
    full = torch.stack((g[mask], u[mask]), dim=1)
    assert ((kept - full).abs() <= full.abs() / 16 + scales.max() * 2**-9).all()

    gate, up = torch.zeros_like(g), torch.zeros_like(u)
    gate[mask], up[mask] = kept.T
    gate.requires_grad_()
    up.requires_grad_()
    z = mask * nn.functional.silu(gate) * up
    dg, du = torch.autograd.grad(z, (gate, up), dy @ w_down.T)
    expected = FfnGrads(actual.y, dg @ w_gate + du @ w_up, dg.T @ x, du.T @ x, z.detach().T @ dy)
    assert_same(actual, expected, 2e-6)


@pytest.mark.parametrize(("name", "bytes_per_k"), [("moc", 4), ("moc_fp8", 2)])
def test_what_is_saved(name: str, bytes_per_k: int, device: str) -> None:
    """A token keeps x, K pairs, a bitmask, and with fp8 two scales for backward; no more."""
    shape, rule = FfnShape(32, 200), parse_selection("topk:0.2")
    layer = METHODS[name].make(shape, rule).to(device, torch.bfloat16)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(7, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    for parameter in layer.parameters():
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    scales = 8 if name == "moc_fp8" else 0
    assert sum(saved.values()) == 7 * (2 * 32 + bytes_per_k * 40 + 4 * n_words(200) + scales)


def test_gradient_only_on_kept_channels(device: str) -> None:
    """Channels that no token kept get no weight gradient at all, and kept ones do."""
    layer = make(16, 64, "topk:2", torch.float32, device)
    x, dy = tokens(3, 16, torch.float32, device)
    used = select_mask(x @ layer.w_gate.T.detach(), parse_selection("topk:2")).any(dim=0)
    grads = run(layer, x, dy)
    assert 0 < int(used.sum()) < 64
    for dw in (grads.dw_gate, grads.dw_up, grads.dw_down):
        assert torch.equal(dw.abs().sum(dim=1) > 0, used)


def test_same_parameters_as_every_layer(device: str) -> None:
    """The state dict is that of the PyTorch layer, and so is the result."""
    layer = make(12, 50, "topk:9", torch.float32, device)
    rival = MoCFFN(layer.shape, layer.selection).to(device)
    rival.load_state_dict(layer.state_dict())
    x, dy = tokens(6, 12, torch.float32, device)
    assert_same(run(layer, x, dy), run(rival, x, dy), 1e-6)


def test_leading_dimensions_and_empty_batches(device: str) -> None:
    """Any leading dimensions, none, or an empty batch: the result is row by row that of [T, d]."""
    layer = make(12, 50, "topk:9", torch.float32, device)
    x, dy = tokens(6, 12, torch.float32, device)
    flat = run(layer, x, dy)
    assert_same(run(layer, x.view(2, 3, 1, 12), dy.view(2, 3, 1, 12)), flat, 1e-6)
    assert torch.allclose(layer(x[0]), flat.y[0], atol=1e-6)
    empty = run(layer, x[:0], dy[:0])
    assert empty.y.shape == empty.dx.shape == (0, 12)
    for dw in (empty.dw_gate, empty.dw_up, empty.dw_down):
        assert dw.shape == (50, 12)
        assert not dw.any()


@pytest.mark.parametrize("d_ffn", [50, 64], ids="f{}".format)
def test_non_contiguous_inputs(d_ffn: int, device: str) -> None:
    """A transposed x, an expanded output gradient and transposed weights give what their copies give."""
    layer = make(12, d_ffn, "nm:2:8", torch.float32, device)
    x = torch.randn(12, 3, 2, device=device).permute(2, 1, 0)
    dy = torch.randn(12, device=device).expand(2, 3, 12)
    expected = run(layer, x.contiguous(), dy.contiguous())
    assert_same(run(layer, x, dy), expected, 1e-6)
    for name in ("w_gate", "w_up", "w_down"):
        setattr(layer, name, nn.Parameter(getattr(layer, name).detach().T.contiguous().T))
        assert not getattr(layer, name).is_contiguous()
    assert_same(run(layer, x, dy), expected, 1e-6)


def test_no_grad_keeps_nothing(device: str) -> None:
    """Without gradients nothing is saved, and the output is the same."""
    layer = make(12, 50, "topk:9", torch.float32, device)
    x = torch.randn(3, 12, device=device)
    saved: list[Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        torch.no_grad(),
    ):
        y = layer(x)
    assert not y.requires_grad
    assert not saved
    assert torch.equal(y, layer(x))


def test_checkpointing(device: str) -> None:
    """Activation checkpointing does not change the gradients."""
    layer = make(12, 50, "topk:9", torch.float32, device)
    x, dy = tokens(4, 12, torch.float32, device)
    expected = run(layer, x, dy)
    leaf = x.clone().requires_grad_()
    grads = torch.autograd.grad(checkpoint(layer, leaf, use_reentrant=False), [leaf, *layer.parameters()], dy)
    assert_same(FfnGrads(expected.y, *grads), expected, 1e-6)


def test_autocast(device: str) -> None:
    """Under bf16 autocast the layer computes in bf16, and float32 leaves get float32 gradients."""
    layer = make(12, 50, "topk:9", torch.float32, device)
    x, dy = tokens(4, 12, torch.float32, device)
    leaf = x.clone().requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        y = layer(leaf)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y, [leaf, *layer.parameters()], dy.bfloat16())
    assert {g.dtype for g in grads} == {torch.float32}
    half = TritonMoCFFN(layer.shape, layer.selection).to(device, torch.bfloat16)
    half.load_state_dict(layer.state_dict())
    assert_same(FfnGrads(y.detach(), *grads), run(half, x.bfloat16(), dy.bfloat16()), 1e-6)


@pytest.mark.parametrize("narrow", ["w_gate", "w_up", "w_down"])
def test_autocast_of_weights_of_several_dtypes(narrow: str, device: str) -> None:
    """A weight may have autocast's dtype already; each gets a gradient of its own dtype, of equal value."""
    layer = make(12, 50, "topk:9", torch.float32, device)
    x, dy = tokens(4, 12, torch.float32, device)
    half = TritonMoCFFN(layer.shape, layer.selection).to(device, torch.bfloat16)
    half.load_state_dict(layer.state_dict())
    leaves = [w.detach().clone().requires_grad_() for w in (layer.w_gate, layer.w_up, layer.w_down)]
    at = NAMES.index(f"d{narrow}") - 2
    leaves[at] = leaves[at].detach().bfloat16().requires_grad_()
    leaf = x.clone().requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        y, _overflow = triton_moc_ffn(leaf, *leaves, layer.selection)
    grads = torch.autograd.grad(y, [leaf, *leaves], dy.bfloat16())
    assert [grad.dtype for grad in grads[1:]] == [weight.dtype for weight in leaves]
    assert_same(FfnGrads(y.detach(), *grads), run(half, x.bfloat16(), dy.bfloat16()), 1e-6)


def test_autocast_keeps_no_copy_of_a_weight(device: str) -> None:
    """Of the weights the parameters themselves are saved; a cast of them does not wait for backward."""
    layer = make(12, 64, "topk:9", torch.float32, device)
    kept: list[Tensor] = []

    def pack(saved: Tensor) -> Tensor:
        kept.append(saved)
        return saved

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved),
        torch.autocast(device, dtype=torch.bfloat16),
    ):
        layer(torch.randn(4, 12, device=device))
    weights_kept = [saved for saved in kept if saved.shape == layer.w_gate.shape]
    own = {parameter.data_ptr() for parameter in layer.parameters()}
    assert {saved.data_ptr() for saved in weights_kept} == own


def test_functional_call(device: str) -> None:
    """torch.func.functional_call with other weights gives what a layer with those weights gives."""
    layer, other = (make(12, 50, "topk:9", torch.float32, device) for _ in range(2))
    x, dy = tokens(4, 12, torch.float32, device)
    leaf = x.clone().requires_grad_()
    state = {name: w.detach().clone().requires_grad_() for name, w in other.named_parameters()}
    y = torch.func.functional_call(layer, state, (leaf,))
    grads = torch.autograd.grad(y, [leaf, *state.values()], dy)
    assert_same(FfnGrads(y.detach(), *grads), run(other, x, dy), 1e-6)


def test_compiles_without_a_graph_break(device: str) -> None:
    """torch.compile takes forward and backward as one graph each, and the numbers stay the same."""
    layer = make(12, 50, "topk:9", torch.float32, device)
    x, dy = tokens(4, 12, torch.float32, device)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    leaf = x.clone().requires_grad_()
    y = compiled(leaf)
    grads = torch.autograd.grad(y, [leaf, *layer.parameters()], dy)
    assert_same(FfnGrads(y.detach(), *grads), run(layer, x, dy), 1e-6)


def test_whole_model_compiles_without_a_graph_break(device: str) -> None:
    """A decoder with this layer compiles as one graph, with the loss and gradients of the PyTorch layer."""
    config, rule = LlamaConfig("tiny", 16, 64, 1, 2, vocab_size=11, max_seq_len=8), parse_selection("topk:12")
    model = Llama(config, lambda: TritonMoCFFN(config.ffn, rule)).to(device)
    rival = Llama(config, lambda: MoCFFN(config.ffn, rule)).to(device)
    tokens = torch.randint(11, (1, 5), device=device)
    losses = [torch.compile(model.loss, backend="aot_eager", fullgraph=True), rival.loss]
    actual, expected = (loss(tokens[:, :-1], tokens[:, 1:]) for loss in losses)
    assert torch.allclose(actual, expected, rtol=1e-5)
    actual.backward()
    expected.backward()
    for (name, parameter), other in zip(model.named_parameters(), rival.parameters(), strict=True):
        assert torch.allclose(parameter.grad, other.grad, rtol=1e-4, atol=1e-6), name


def test_opcheck(device: str) -> None:
    """PyTorch's own checks of both operators pass: schema, fake tensors, autograd registration, tracing."""
    x = torch.randn(3, 8, device=device, requires_grad=True)
    leaves = [torch.randn(37, 8, device=device, requires_grad=True) for _ in range(3)]
    forward, backward = torch.ops.moc.triton_ffn_forward.default, torch.ops.moc.triton_ffn_backward.default
    torch.library.opcheck(forward, (x, *leaves, "threshold:0.0:5", False, True))
    x, *leaves = (t.detach() for t in (x, *leaves))
    torch.library.opcheck(forward, (x, *leaves, "topk:5", False, False))
    _y, pairs, scales, bitmask, _overflow = forward(x, *leaves, "topk:5", False, True)
    torch.library.opcheck(backward, (torch.randn_like(x), x, pairs, scales, bitmask, *leaves, False))


def test_threshold_overflow_is_counted(device: str) -> None:
    """The layer adds up what the cap left out, call after call."""
    layer = make(12, 50, "threshold:0.0:5", torch.float32, device)
    x = torch.randn(4, 12, device=device)
    above = int(((x @ layer.w_gate.T) > 0).sum(dim=1).sub(5).clamp(min=0).sum())
    assert above > 0
    layer(x)
    layer(x)
    assert layer.overflow_count.item() == 2 * above


def test_nan_reaches_the_output(device: str) -> None:
    """A NaN in one token makes that token's output NaN and leaves the others alone."""
    layer = make(12, 50, "topk:5", torch.bfloat16, device)
    x = torch.randn(3, 12, device=device, dtype=torch.bfloat16)
    x[1, 4] = float("nan")
    assert layer(x).isnan().all(dim=1).tolist() == [False, True, False]


def test_errors_name_what_is_wrong(device: str) -> None:
    """A dtype, a K or a shape that cannot work is named in one line."""
    x, w = torch.zeros(4, 8, device=device), torch.zeros(20, 8, device=device)
    with pytest.raises(ValueError, match=r"dtype torch\.float64; supported: torch\.bfloat16"):
        triton_moc_ffn(x.double(), w.double(), w.double(), w.double(), parse_selection("topk:3"))
    with pytest.raises(ValueError, match="K=21 exceeds d_ffn=20"):
        triton_moc_ffn(x, w, w, w, parse_selection("topk:21"))
    with pytest.raises(ValueError, match=r"w_up has shape \(8, 20\)"):
        triton_moc_ffn(x, w, w.T, w, parse_selection("topk:3"))
    with pytest.raises(ValueError, match="keep=False on inputs that require a gradient"):
        torch.ops.moc.triton_ffn_forward(x.requires_grad_(), w, w, w, "topk:3", False, False)
    for name in ("moc", "moc_fp8", "moc_int8"):
        with pytest.raises(ValueError, match="needs a selection, such as topk"):
            METHODS[name].make(FfnShape(8, 20), None)


def test_matrix_products_are_counted(device: str) -> None:
    """PyTorch's counter sees nine matrix products of 2 T d d_ffn in a training step."""
    layer = make(32, 96, "topk:0.25", torch.float32, device)
    x, dy = tokens(8, 32, torch.float32, device)
    with FlopCounterMode(display=False) as counter:
        layer(x.requires_grad_()).backward(dy)
    assert counter.get_total_flops() == 9 * 2 * 8 * 32 * 96


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["moc", "moc_fp8"])
def test_the_registry_declares_what_is_saved(name: str, dtype: str, device: str) -> None:
    """The methods' formulas say how many bytes per token the layer keeps, in every dtype."""
    method, selection = METHODS[name], parse_selection("topk:0.1875")
    shape = FfnShape(32, 200)
    layer = method.make(shape, selection).to(device, DTYPES[dtype])
    x, _ = tokens(7, 32, DTYPES[dtype], device)
    kept = memory.saved_bytes(lambda: layer(x), list(layer.parameters()), [x.requires_grad_()])
    assert method.saved_bytes_per_token is not None
    assert kept.activation_bytes == 7 * method.saved_bytes_per_token(shape, selection.k(200), x.itemsize)
