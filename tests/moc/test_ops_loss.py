"""Chunked cross-entropy against the plain one."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import moc.ops.loss
from moc import chunked_cross_entropy, token_cross_entropy


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Chunks of 16 tokens, so that small inputs span several and the last one is short."""
    monkeypatch.setattr(moc.ops.loss, "CHUNK_TOKENS", 16)
    return 16


def inputs(dtype: torch.dtype = torch.float64, tokens: int = 71) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, 12, dtype=dtype, requires_grad=True)
    weight = torch.randn(50, 12, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(0, 50, (tokens,))


@pytest.mark.parametrize("ignored", [0, 13], ids=["all-counted", "13-ignored"])
def test_equals_plain_cross_entropy(small_chunks: int, ignored: int) -> None:
    """Loss and both gradients are F.cross_entropy's, an upstream factor and ignored targets included."""
    hidden, weight, targets = inputs()
    targets[:ignored] = -100
    expected = 3 * F.cross_entropy(hidden @ weight.T, targets)
    actual = 3 * chunked_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(
        torch.autograd.grad(actual, [hidden, weight]),
        torch.autograd.grad(expected, [hidden, weight]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_gradcheck(small_chunks: int) -> None:
    """Numerical differentiation gives the gradients."""
    hidden, weight, targets = inputs(tokens=19)
    assert torch.autograd.gradcheck(lambda h, w: chunked_cross_entropy(h, w, targets), (hidden, weight))


def test_token_losses(small_chunks: int) -> None:
    """Per-token losses are F.cross_entropy's, in the targets' shape, 0 where ignored, without a graph."""
    hidden, weight, targets = inputs(tokens=72)
    targets[5] = -100
    actual = token_cross_entropy(hidden.view(8, 9, 12), weight, targets.view(8, 9))
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    torch.testing.assert_close(actual.flatten(), expected.detach())
    assert not actual.requires_grad
    assert actual.shape == (8, 9)


@pytest.mark.parametrize("mode", ["train", "frozen-weight", "no_grad"])
def test_any_need_for_gradients(small_chunks: int, mode: str) -> None:
    """The loss is the same, and differentiable where it should be, whatever requires a gradient."""
    hidden, weight, targets = inputs()
    expected = F.cross_entropy(hidden @ weight.T, targets)
    weight.requires_grad_(mode == "train")
    with torch.set_grad_enabled(mode != "no_grad"):
        loss = chunked_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss, expected, check_layout=False)
    assert loss.requires_grad == (mode != "no_grad")
    if mode != "no_grad":
        loss.backward()
        assert hidden.grad is not None
        assert (weight.grad is not None) == (mode == "train")


def test_autocast_takes_softmax_in_float32(small_chunks: int) -> None:
    """Under bf16 autocast the loss is float32 and the plain autocast loss; leaves get float32 gradients."""
    hidden, weight, targets = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = chunked_cross_entropy(hidden, weight, targets)
        expected = F.cross_entropy(F.linear(hidden, weight), targets)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected)
    for a, b in zip(
        torch.autograd.grad(actual, [hidden, weight]),
        torch.autograd.grad(expected, [hidden, weight]),
        strict=True,
    ):
        assert a.dtype == torch.float32
        assert float((a - b).norm() / b.norm()) < 1e-2


def largest_allocation(function: object) -> int:
    """The most bytes any one operation allocates while `function` runs, as the profiler sees it."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        function()  # type: ignore[operator]
    return max(event.self_cpu_memory_usage for event in profile.events())


def test_logits_never_stand_whole() -> None:
    """In forward and backward no allocation is larger than one chunk's logits; the plain loss's are."""
    tokens, vocabulary = 4 * moc.ops.loss.CHUNK_TOKENS, 96
    hidden = torch.randn(tokens, 4, requires_grad=True)
    weight = torch.randn(vocabulary, 4, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,))
    whole = tokens * vocabulary * 4
    chunked = largest_allocation(lambda: chunked_cross_entropy(hidden, weight, targets).backward())
    plain = largest_allocation(lambda: F.cross_entropy(hidden @ weight.T, targets).backward())
    assert plain >= whole
    assert chunked <= whole // 4
    assert largest_allocation(lambda: token_cross_entropy(hidden, weight, targets)) <= whole // 4


def test_opcheck(small_chunks: int) -> None:
    """PyTorch's own checks of a custom operator pass for both operators."""
    hidden, weight, targets = inputs(torch.float32)
    torch.library.opcheck(torch.ops.moc.mean_cross_entropy.default, (hidden, weight, targets, True))
    hidden, weight = hidden.detach(), weight.detach()
    torch.library.opcheck(torch.ops.moc.mean_cross_entropy.default, (hidden, weight, targets, False))
    torch.library.opcheck(torch.ops.moc.token_cross_entropy.default, (hidden, weight, targets))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_without_a_graph_break(small_chunks: int) -> None:
    """Through torch.compile loss and gradients stay the same."""
    hidden, weight, targets = inputs()
    compiled = torch.compile(chunked_cross_entropy, backend="aot_eager", fullgraph=True)
    expected, actual = chunked_cross_entropy(hidden, weight, targets), compiled(hidden, weight, targets)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(
        torch.autograd.grad(actual, [hidden, weight]),
        torch.autograd.grad(expected, [hidden, weight]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("hidden", "weight", "targets", "message"),
    [
        (
            torch.zeros(3, 4),
            torch.zeros(9, 5),
            torch.zeros(3).long(),
            r"must be \[\.\.\., d\], \[vocabulary, d\]",
        ),
        (
            torch.zeros(3, 4),
            torch.zeros(9, 4),
            torch.zeros(2).long(),
            r"targets have shape \(2,\), .* \(3,\) tokens",
        ),
        (torch.zeros(3, 4), torch.zeros(9, 4), torch.zeros(3).int(), r"targets have dtype torch\.int32"),
        (
            torch.zeros(3, 4),
            torch.zeros(9, 4).half(),
            torch.zeros(3).long(),
            r"weight torch\.float16: .* the same",
        ),
    ],
    ids=["d", "tokens", "targets-dtype", "mixed-dtype"],
)
def test_inputs_that_do_not_fit(hidden: Tensor, weight: Tensor, targets: Tensor, message: str) -> None:
    """Shapes and dtypes that do not fit are named."""
    for function in (chunked_cross_entropy, token_cross_entropy):
        with pytest.raises(ValueError, match=message):
            function(hidden, weight, targets)
