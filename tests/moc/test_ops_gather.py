"""Decoding on a CPU by the kept rows alone: the same function, the same choice, and nothing else is read."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moc import FfnShape, MoCFFN, parse_selection
from moc.ops import gather as gather_module
from moc.ops import torch_ffn as ops
from moc.ops.compact import keep_mask
from moc.ops.gather import kept_rows_output
from moc.reference import moc_forward, select_mask

D, D_FFN = 48, 320
RULES = ("topk:0.1875", "topk:1", "topk_abs:0.25", "nm:2:8", "nm:12:64", "threshold:0.5:0.3")
# Of the sums of magnitudes, since a row of w_up may be almost orthogonal to x.
TOLERANCE = {torch.float64: 1e-15, torch.float32: 3e-7, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}


def case(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """x, w_gate, w_up, w_down with gates of order one."""
    sizes = ((tokens, D, 1.0), (D_FFN, D, D**-0.5), (D_FFN, D, D**-0.5), (D_FFN, D, D_FFN**-0.5))
    return [torch.randn(rows, columns).mul_(std).to(dtype) for rows, columns, std in sizes]


@pytest.mark.parametrize("chunk_bytes", [1, 4000, 1 << 20], ids=["row", "some", "all"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_output_is_the_references(
    chunk_bytes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rule, one token and three, however many rows are copied at a time."""
    monkeypatch.setattr(gather_module, "CHUNK_BYTES", chunk_bytes)
    for rule in RULES:
        for tokens in (1, 3):
            x, *weights = case(tokens, dtype)
            selection = parse_selection(rule)
            mask, _ = keep_mask(x @ weights[0].T, selection)
            y = kept_rows_output(x, x @ weights[0].T, mask, *weights[1:])
            truth = moc_forward(x, *weights, selection)
            assert y.dtype == dtype
            wide_x, w_gate, w_up, w_down = (tensor.double() for tensor in (x, *weights))
            z = F.silu(wide_x @ w_gate.T).abs() * mask * (wide_x.abs() @ w_up.abs().T)
            error = (y.double() - truth).norm() / (z @ w_down.abs()).norm()
            assert float(error) < TOLERANCE[dtype], (rule, tokens)


def test_rows_that_are_not_kept_are_not_read() -> None:
    """With every other row of w_up and w_down not a number, one token's output is what it was."""
    x, w_gate, w_up, w_down = case(1, torch.float32)
    gates = x @ w_gate.T
    mask = select_mask(gates, parse_selection("nm:2:8"))
    expected = kept_rows_output(x, gates, mask, w_up, w_down)
    w_up[~mask[0]], w_down[~mask[0]] = float("nan"), float("nan")
    assert torch.equal(kept_rows_output(x, gates, mask, w_up, w_down), expected)


def test_no_kept_channel_gives_zero() -> None:
    """A threshold above every gate keeps nothing."""
    x, w_gate, w_up, w_down = case(2, torch.float32)
    mask = torch.zeros(2, D_FFN, dtype=torch.bool)
    assert torch.equal(kept_rows_output(x, x @ w_gate.T, mask, w_up, w_down), torch.zeros(2, D))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of tokens that went by kept rows, with every layer wide enough for it."""
    seen: list[int] = []

    def noted(x: Tensor, *rest: Tensor) -> Tensor:
        seen.append(len(x))
        return kept_rows_output(x, *rest)

    monkeypatch.setattr(ops, "kept_rows_output", noted)
    monkeypatch.setattr(gather_module, "LEAST_BYTES", 0)
    return seen


@pytest.mark.parametrize("rule", RULES)
def test_a_layer_decodes_by_kept_rows_with_the_same_choice(rule: str, calls: list[int]) -> None:
    """One token without gradients takes this path; ties go to the lowest channel as everywhere."""
    selection = parse_selection(rule)
    layer = MoCFFN(FfnShape(D, D_FFN), selection)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(torch.randint(-2, 3, weight.shape))  # small whole numbers: full of equal gates
        x = torch.randint(-1, 2, (1, D)).float()
        y = layer(x)
    assert calls == [1]
    truth = moc_forward(x, layer.w_gate, layer.w_up, layer.w_down, selection).detach()
    assert float((y.double() - truth).norm() / truth.norm()) < 1e-6


def test_training_and_many_tokens_go_the_other_way(calls: list[int]) -> None:
    """With gradients, or with more tokens than it pays for, the layer computes all channels as before."""
    layer = MoCFFN(FfnShape(D, D_FFN), parse_selection("topk:0.1875"))
    layer(torch.randn(1, D)).sum().backward()
    with torch.no_grad():
        layer(torch.randn(gather_module.MOST_TOKENS + 1, D))
    assert calls == []
    assert layer.w_up.grad is not None
