"""The correctness gate passes right methods and catches wrong ones, each in its smallest form."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.measure import gate, gate_data
from harness.measure.ffn import DTYPES, ffn_weights
from moc.config import FfnShape
from moc.layers.base import FfnWeights
from moc.methods import get_method
from moc.reference import moc_forward_backward, select_mask
from moc.selection import Selection, parse_selection

SHAPE = FfnShape(d_model=64, d_ffn=256)
TOKENS = 96
CPU = torch.device("cpu")
RULES = ["topk:0.1875", "topk:1", "topk:0.5", "topk_abs:0.1875", "nm:2:8", "nm:12:64", "threshold:0.5:0.25"]


def moc_reference(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, dy: Tensor, selection: Selection | None
) -> object:
    assert selection is not None
    return moc_forward_backward(x, w_gate, w_up, w_down, dy, selection)


class Masked(FfnWeights):
    """MoC by autograd of the masked function, with the choice and the product open to mutation."""

    def __init__(
        self,
        choose: Callable[[Tensor, Selection], Tensor],
        rule: Selection,
        product: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(SHAPE)
        self.choose, self.rule = choose, rule
        self.product = product or (lambda g, u: F.silu(g) * u)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, d] -> y [T, d]."""
        g, u = x @ self.w_gate.T, x @ self.w_up.T
        return (self.product(g, u) * self.choose(g.detach(), self.rule)) @ self.w_down


def judge(
    layer: nn.Module, rule: str, dtype: str = "bf16", seed: int = 0, tokens: int = TOKENS
) -> gate.GateResult:
    layer = layer.to(DTYPES[dtype])
    weights = ffn_weights(layer, SHAPE)
    return gate.check(layer, weights, moc_reference, parse_selection(rule), tokens, seed)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp64"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", ["moc_reference", "act_prune"])
def test_right_methods_pass_in_every_dtype(method: str, rule: str, dtype: str) -> None:
    """The registry's selecting methods pass, with a margin to the tolerance."""
    entry, selection = get_method(method), parse_selection(rule)
    layer = entry.make(SHAPE, selection).to(DTYPES[dtype])
    result = gate.check(layer, ffn_weights(layer, SHAPE), entry.reference, selection, TOKENS, seed=3)
    assert result.ok, result.detail
    assert result.max_rel_err < 0.7 * gate.TOLERANCE[DTYPES[dtype]]
    assert set(result.errors) == {f"{data}.{name}" for data in ("ties", "gap") for name in gate.NAMES}


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp64"])
@pytest.mark.parametrize("method", ["dense", "dense_gu", "dense_recompute"])
def test_right_dense_methods_pass_on_natural_data(method: str, dtype: str) -> None:
    """Methods without a selection are judged on normal data alone."""
    entry = get_method(method)
    layer = entry.make(SHAPE, None).to(DTYPES[dtype])
    result = gate.check(layer, ffn_weights(layer, SHAPE), entry.reference, None, TOKENS, seed=3)
    assert result.ok, result.detail
    assert set(result.errors) == {f"natural.{name}" for name in gate.NAMES}


@pytest.mark.parametrize("rule", RULES)
def test_choosing_from_unrounded_gates_is_as_right_as_from_rounded_ones(rule: str) -> None:
    """A bf16 kernel may select in its float32 accumulator: no allowance is needed for it to pass."""

    class Late(Masked):
        def forward(self, x: Tensor) -> Tensor:
            exact = x.detach().float() @ self.w_gate.detach().float().T
            g, u = x @ self.w_gate.T, x @ self.w_up.T
            return (F.silu(g) * u * select_mask(exact, self.rule)) @ self.w_down

    result = judge(Late(select_mask, parse_selection(rule)), rule)
    assert result.ok, result.detail


def test_on_natural_gates_that_would_not_be_so() -> None:
    """On normal data rounding swaps channels in many tokens: why the gate makes its own data."""
    generator = torch.Generator().manual_seed(0)
    gates = torch.randn(200, 2048, generator=generator)
    rule = parse_selection("topk:0.1875")
    swapped = select_mask(gates, rule) != select_mask(gates.bfloat16(), rule)
    assert swapped.any(dim=1).float().mean() > 0.2


def one_fewer(g: Tensor, rule: Selection) -> Tensor:
    mask = select_mask(g, rule)
    kept = torch.where(mask, g, torch.inf)
    return mask.scatter(1, kept.argmin(dim=1, keepdim=True), False)


def one_more(g: Tensor, rule: Selection) -> Tensor:
    mask = select_mask(g, rule)
    left = torch.where(mask, -torch.inf, g)
    return mask.scatter(1, left.argmax(dim=1, keepdim=True), True)


def last_tie_wins(g: Tensor, rule: Selection) -> Tensor:
    return select_mask(g.flip(1), rule).flip(1)


def first_token_unmasked(g: Tensor, rule: Selection) -> Tensor:
    mask = select_mask(g, rule).clone()
    mask[0] = True
    return mask


def smallest(g: Tensor, rule: Selection) -> Tensor:
    return select_mask(-g, rule)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "choose", [one_fewer, one_more, last_tie_wins, first_token_unmasked, smallest], ids=lambda f: f.__name__
)
def test_a_wrong_choice_of_channels_is_caught(
    choose: Callable[[Tensor, Selection], Tensor], dtype: str
) -> None:
    """K off by one, ties in another order, one token without its mask, the wrong end of the order."""
    result = judge(Masked(choose, parse_selection("topk:0.1875")), "topk:0.1875", dtype)
    assert not result.ok
    assert "ties." in result.detail


def test_one_channel_too_few_in_one_token_is_caught_although_the_norm_hides_it() -> None:
    """The Frobenius error stays within the tolerance, and the element bound sees it."""

    def once(g: Tensor, rule: Selection) -> Tensor:
        mask = select_mask(g, rule).clone()
        mask[0] = one_fewer(g, rule)[0]
        return mask

    result = judge(Masked(once, parse_selection("topk:0.1875")), "topk:0.1875", tokens=192)
    assert not result.ok
    assert result.errors["ties.y"].frobenius < gate.TOLERANCE[torch.bfloat16]
    assert result.errors["ties.y"].element > gate.ELEMENT_TOLERANCE


def test_a_backward_that_uses_other_channels_than_the_forward_is_caught() -> None:
    """Right output, wrong saved channels: the gradients show it."""

    class Swapped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z, mask, other):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(other)
            return z * mask

        @staticmethod
        def backward(ctx, dz):  # type: ignore[no-untyped-def]
            return dz * ctx.saved_tensors[0], None, None

    class Layer(Masked):
        def forward(self, x: Tensor) -> Tensor:
            g, u = x @ self.w_gate.T, x @ self.w_up.T
            mask, other = select_mask(g.detach(), self.rule), last_tie_wins(g.detach(), self.rule)
            return Swapped.apply(F.silu(g) * u, mask, other) @ self.w_down

    result = judge(Layer(select_mask, parse_selection("topk:0.1875")), "topk:0.1875")
    assert not result.ok
    assert "ties.y" not in result.detail


@pytest.mark.parametrize(
    ("product", "where"),
    [
        (lambda g, u: torch.sigmoid(g) * u, "y"),
        (lambda g, u: F.silu(g).detach() * u, "dw_gate"),
        (lambda g, u: F.silu(g) * u.detach(), "dw_up"),
        (lambda g, u: 1.02 * F.silu(g) * u, "y"),
        (lambda g, u: F.silu(g) * u + (F.silu(g) * u)[:1] * 0.0 / 0.0, "y"),
    ],
    ids=["other_activation", "no_gate_gradient", "no_up_gradient", "two_percent", "nan"],
)
def test_wrong_numbers_are_caught(product: Callable[[Tensor, Tensor], Tensor], where: str) -> None:
    """Another activation, a gradient that is missing, 2 % too much, NaN: named by the tensor they show in."""
    result = judge(Masked(select_mask, parse_selection("topk:0.1875"), product), "topk:0.1875")
    assert not result.ok
    assert where in result.detail
    if where.startswith("dw_"):
        assert f"{where} is missing: no gradient reaches it" in result.detail
        assert result.max_rel_err == float("inf")


def test_an_element_that_nobody_wrote_is_caught() -> None:
    """One element of y with half its value is found by its own error, where the norm hides it."""

    class Stale(Masked):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            scale = torch.ones_like(y)
            scale[0] = torch.where(y[0].abs() == y[0].abs().max(), 0.5, 1.0)
            return y * scale

    layer = Stale(select_mask, parse_selection("topk:0.1875"))
    result = judge(layer, "topk:0.1875", tokens=1024)
    assert not result.ok
    assert result.max_rel_err < gate.TOLERANCE[torch.bfloat16]
    assert "gap.y has an element off" in result.detail


def test_an_output_of_another_dtype_or_shape_is_caught() -> None:
    """y must be what goes in: same dtype, same shape."""

    class Upcast(Masked):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).float()

    result = judge(Upcast(select_mask, parse_selection("nm:2:8")), "nm:2:8")
    assert not result.ok
    assert "y is torch.float32" in result.detail


def test_narrow_products_in_float32_are_caught() -> None:
    """Operands cut to tf32's 10 bits fail the float32 tolerance."""

    def cut(t: Tensor) -> Tensor:
        return (t.view(torch.int32) & ~0x1FFF).view(torch.float32)

    class Tf32(FfnWeights):
        def forward(self, x: Tensor) -> Tensor:
            z = F.silu(x @ self.w_gate.T) * (x @ self.w_up.T)
            exact = z @ self.w_down
            return exact + (cut(z.detach()) @ cut(self.w_down.detach()) - exact.detach())

    layer = Tf32(SHAPE)
    result = gate.check(layer, ffn_weights(layer, SHAPE), get_method("dense").reference, None, TOKENS, seed=0)
    assert not result.ok
    assert result.errors["natural.y"].frobenius < 1e-3


def test_weights_are_given_back_as_they_were() -> None:
    """The gate writes its own weights and restores those it found, also when the method raises."""
    rule = parse_selection("topk:0.25")
    layer = Masked(select_mask, rule)
    before = {name: weight.detach().clone() for name, weight in layer.named_parameters()}
    judge(layer, "topk:0.25", "fp32")

    def raises(g: Tensor, u: Tensor) -> Tensor:
        raise RuntimeError("broken")

    layer.product = raises
    with pytest.raises(RuntimeError, match="broken"):
        judge(layer, "topk:0.25", "fp32")
    for name, weight in layer.named_parameters():
        assert torch.equal(weight, before[name])


def test_inputs_differ_between_seeds_and_repeat_for_one() -> None:
    """Fresh data for every seed, the same data for the same seed."""
    rule = parse_selection("topk:0.25")
    for make in (gate_data.ties, gate_data.gap):
        first, again, other = (make(SHAPE, 32, torch.bfloat16, CPU, seed, rule) for seed in (1, 1, 2))
        assert torch.equal(first.x, again.x)
        assert torch.equal(first.w_gate, again.w_gate)
        assert not torch.equal(first.w_gate, other.w_gate)


@pytest.mark.parametrize("rule", ["topk:0.1875", "nm:2:8"])
def test_tie_data_have_ties_exactly_where_the_rule_cuts(rule: str) -> None:
    """In most tokens the smallest kept gate equals the largest gate left out, in every dtype."""
    selection = parse_selection(rule)
    data = gate_data.ties(SHAPE, 64, torch.bfloat16, CPU, 0, selection)
    gates = data.x.double() @ data.w_gate.double().T
    assert torch.equal(gates, (data.x.float() @ data.w_gate.float().T).double())
    mask = select_mask(gates, selection)
    if selection.rule == "nm":
        gates, mask = gates.reshape(-1, 8), mask.reshape(-1, 8)
    kept = torch.where(mask, gates, torch.inf).min(dim=1).values
    left = torch.where(mask, -torch.inf, gates).max(dim=1).values
    assert (kept == left).float().mean() > (0.7 if selection.rule == "topk" else 0.03)
    largest = float((gates.abs() / gates.abs()[gates != 0].min()).max())
    assert largest <= 4 / 0.5 * 256  # integers up to 256, in rows of magnitudes 1/2 to 4


def test_tie_data_are_exact_even_when_partial_sums_are_rounded() -> None:
    """A GEMM that adds bf16 partial sums, as cuBLAS may, gets the same gates."""
    data = gate_data.ties(SHAPE, 64, torch.bfloat16, CPU, 0, parse_selection("topk:0.1875"))
    exact = data.x.double() @ data.w_gate.double().T
    total = torch.zeros(64, SHAPE.d_ffn, dtype=torch.bfloat16)
    for start in range(0, SHAPE.d_model, 8):
        total = total + data.x[:, start : start + 8] @ data.w_gate[:, start : start + 8].T
    assert torch.equal(total.double(), exact)


def test_gap_data_have_a_gap_where_the_rule_cuts() -> None:
    """Kept and other gates of every token are at least one apart, and each group keeps its own channels."""
    selection = parse_selection("topk:0.1875")
    data = gate_data.gap(SHAPE, 64, torch.bfloat16, CPU, 0, selection)
    gates = data.x.double() @ data.w_gate.double().T
    mask = select_mask(gates, selection)
    kept = torch.where(mask, gates, torch.inf).min(dim=1).values
    left = torch.where(mask, -torch.inf, gates).max(dim=1).values
    assert (kept - left).min() > 1.0
    assert len(torch.unique(mask, dim=0)) == 8
    assert gates.unique().numel() > gates.numel() // 2  # real numbers, not a few levels


def test_decoding_is_judged_by_its_output_alone() -> None:
    """Without backward a method that has none passes, on several draws of few tokens."""

    class Forward(Masked):
        def forward(self, x: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            return super().forward(x)

    rule = parse_selection("topk:0.1875")
    layer = Forward(select_mask, rule).bfloat16()
    weights = ffn_weights(layer, SHAPE)
    good = gate.check(layer, weights, moc_reference, rule, 1, seed=0, backward=False, draws=4)
    assert good.ok, good.detail
    assert set(good.errors) == {"ties.y", "gap.y"}
    layer.choose = one_fewer
    bad = gate.check(layer, weights, moc_reference, rule, 1, seed=0, backward=False, draws=4)
    assert not bad.ok
