"""The reference against brute force and against autograd."""

import pytest
import torch
from torch import Tensor

from moc import parse_selection
from moc.reference import (
    FfnGrads,
    act_prune_forward_backward,
    dense_forward,
    dense_forward_backward,
    moc_forward,
    moc_forward_backward,
    overflow_count,
    select_mask,
)

RULES = ["topk:0.1875", "topk:1", "topk:75", "topk_abs:9", "nm:2:8", "nm:5:12", "threshold:0.2:20"]


def by_id(text: str) -> str:
    return text.replace(":", "_")


def brute_force(row: list[float], text: str) -> tuple[set[int], int]:
    """Kept channels and overflow of one row, by sorting (value, channel) pairs in Python."""
    rule, *numbers = text.split(":")
    ranked = sorted(range(len(row)), key=lambda c: (-row[c], c))
    if rule == "nm":
        n, m = map(int, numbers)
        kept = set()
        for start in range(0, len(row), m):
            kept |= set([c for c in ranked if start <= c < start + m][:n])
        return kept, 0
    if rule == "threshold":
        above = [c for c in ranked if row[c] > float(numbers[0])]
        cap = int(numbers[1])
        return set(above[:cap]), max(0, len(above) - cap)
    return set(ranked[: int(numbers[0])]), 0


@pytest.mark.parametrize(
    "text", ["topk:7", "topk:1", "topk:27", "nm:2:8", "nm:3:4", "threshold:0.25:5"], ids=by_id
)
def test_mask_is_what_sorting_gives(text: str) -> None:
    """Rules keep what a sort by value, then channel, keeps, on rows full of ties and with a tail bank."""
    g = torch.randint(-3, 4, (40, 27)).double() / 4
    mask = select_mask(g, parse_selection(text))
    expected = [brute_force(row, text) for row in g.tolist()]
    assert [set(torch.nonzero(row).flatten().tolist()) for row in mask] == [kept for kept, _ in expected]
    assert overflow_count(g, parse_selection(text)).item() == sum(over for _, over in expected)


def test_topk_abs_ranks_by_magnitude_of_silu() -> None:
    """`topk_abs` prefers a gate at silu's negative minimum to a small positive one, and `topk` does not."""
    g = torch.tensor([[0.1, -1.2785, 0.2, -8.0]])
    assert select_mask(g, parse_selection("topk_abs:1")).tolist() == [[False, True, False, False]]
    assert select_mask(g, parse_selection("topk:1")).tolist() == [[False, False, True, False]]


def test_equal_gates_keep_the_lowest_channel() -> None:
    """When every gate is equal, each rule keeps the first channels."""
    g = torch.full((1, 10), 0.5)
    for text in ("topk:3", "topk_abs:3", "threshold:0.1:3"):
        assert select_mask(g, parse_selection(text)).tolist() == [[True] * 3 + [False] * 7]
    assert select_mask(g, parse_selection("nm:1:4")).nonzero()[:, 1].tolist() == [0, 4, 8]


def test_threshold_keeps_only_what_is_above() -> None:
    """A gate equal to the threshold is not kept, and rows may keep nothing."""
    g = torch.tensor([[0.5, 0.75, -1.0], [0.5, 0.5, 0.5]])
    assert select_mask(g, parse_selection("threshold:0.5:3")).tolist() == [[False, True, False], [False] * 3]
    assert overflow_count(g, parse_selection("threshold:0.5:3")).item() == 0


def test_nan_gates_are_an_error() -> None:
    """NaN gates raise, saying how many there are."""
    g = torch.tensor([[0.5, float("nan"), 1.0]])
    with pytest.raises(ValueError, match="1 of 3 gates are NaN"):
        select_mask(g, parse_selection("topk:1"))


def test_gates_must_be_two_dimensional() -> None:
    """Gates of another rank raise, naming their shape."""
    with pytest.raises(ValueError, match=r"gates must be \[T, d_ffn\], got shape \(2, 3, 4\)"):
        select_mask(torch.zeros(2, 3, 4), parse_selection("topk:1"))


def test_choice_is_made_from_gates_in_the_dtype_of_x() -> None:
    """Gates that differ in float64 but not in bfloat16 tie for bfloat16 inputs: the lower channel wins."""
    x = torch.tensor([[1.0, 2.0**-12]], dtype=torch.bfloat16)
    w_gate = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.bfloat16)
    w_up = torch.ones_like(w_gate)
    w_down = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.bfloat16)
    dy, selection = torch.ones(1, 2), parse_selection("topk:1")
    for inputs, kept in (
        ((x, w_gate, w_up, w_down), 0),
        ([t.double() for t in (x, w_gate, w_up, w_down)], 1),
    ):
        assert moc_forward(*inputs, selection).nonzero()[:, 1].tolist() == [kept]
        for reference in (moc_forward_backward, act_prune_forward_backward):
            assert reference(*inputs, dy, selection).dw_down.nonzero()[:, 0].unique().tolist() == [kept]


def ffn_inputs() -> tuple[Tensor, ...]:
    """x [11, 6], w_gate, w_up, w_down [75, 6] and dy [11, 6] in float64."""
    shapes = [(11, 6), (75, 6), (75, 6), (75, 6), (11, 6)]
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


def autograd(forward: object, x: Tensor, *weights: Tensor, dy: Tensor) -> FfnGrads:
    leaves = [t.clone().requires_grad_() for t in (x, *weights)]
    y = forward(*leaves)  # type: ignore[operator]
    return FfnGrads(y.detach(), *torch.autograd.grad(y, leaves, dy))


def assert_same(actual: FfnGrads, expected: FfnGrads) -> None:
    for name in ("y", "dx", "dw_gate", "dw_up", "dw_down"):
        torch.testing.assert_close(
            getattr(actual, name),
            getattr(expected, name),
            rtol=1e-12,
            atol=1e-12,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def silu(g: Tensor) -> Tensor:
    return g / (1 + torch.exp(-g))


@pytest.mark.parametrize("text", RULES, ids=by_id)
def test_moc_equals_autograd_of_the_masked_function(text: str) -> None:
    """Output and every gradient of the MoC reference equal float64 autograd of mask * silu(g) * u."""
    x, w_gate, w_up, w_down, dy = ffn_inputs()
    selection = parse_selection(text)
    mask = select_mask(x @ w_gate.T, selection)

    def masked(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        return (mask * silu(x @ w_gate.T) * (x @ w_up.T)) @ w_down

    expected = autograd(masked, x, w_gate, w_up, w_down, dy=dy)
    assert_same(moc_forward_backward(x, w_gate, w_up, w_down, dy, selection), expected)
    torch.testing.assert_close(moc_forward(x, w_gate, w_up, w_down, selection), expected.y)
    assert expected.y.abs().max() > 0


def test_dense_equals_autograd() -> None:
    """Output and every gradient of the dense reference equal float64 autograd of silu(g) * u."""
    x, w_gate, w_up, w_down, dy = ffn_inputs()

    def dense(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        return (silu(x @ w_gate.T) * (x @ w_up.T)) @ w_down

    expected = autograd(dense, x, w_gate, w_up, w_down, dy=dy)
    assert_same(dense_forward_backward(x, w_gate, w_up, w_down, dy), expected)
    torch.testing.assert_close(dense_forward(x, w_gate, w_up, w_down), expected.y)


def test_act_prune_is_dense_forward_and_masked_backward() -> None:
    """The act_prune reference has the dense output and the gradients of Mixture-of-Channels."""
    x, w_gate, w_up, w_down, dy = ffn_inputs()
    selection = parse_selection("topk:14")
    pruned = act_prune_forward_backward(x, w_gate, w_up, w_down, dy, selection)
    moc = moc_forward_backward(x, w_gate, w_up, w_down, dy, selection)
    assert_same(
        pruned, FfnGrads(dense_forward(x, w_gate, w_up, w_down), moc.dx, moc.dw_gate, moc.dw_up, moc.dw_down)
    )


def test_keeping_every_channel_is_dense() -> None:
    """With K = d_ffn the MoC reference is the dense reference."""
    x, w_gate, w_up, w_down, dy = ffn_inputs()
    for text in ("topk:1.0", "topk_abs:75", "threshold:-1e9:75"):
        moc = moc_forward_backward(x, w_gate, w_up, w_down, dy, parse_selection(text))
        assert_same(moc, dense_forward_backward(x, w_gate, w_up, w_down, dy))
