"""Synchronisation-free selection and storage against the reference and against brute force."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moc import Selection, parse_selection
from moc.ops.compact import Expander, gather_compact, keep_mask, kept_channels, pack_bitmask, unpack_bitmask
from moc.reference import overflow_count, select_mask
from moc.selection import n_words

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
RULES = ["topk:0.1875", "topk:1", "topk_abs:0.3", "nm:2:8", "nm:12:64", "nm:1:2", "threshold:0.25:0.2"]


def test_a_mask_that_is_a_view_is_packed() -> None:
    """A row of 32 out of a longer one, as a bank that reaches past d_ffn leaves it, whatever it starts at."""
    longer = torch.rand(1, 70, generator=torch.Generator().manual_seed(0)) < 0.5
    for start in (0, 1, 5):
        mask = longer[:, start : start + 32]
        assert torch.equal(unpack_bitmask(pack_bitmask(mask), 32), mask)


@st.composite
def gates_and_rule(draw: st.DrawFn) -> tuple[Tensor, Selection]:
    """Gates [T, d_ffn] with many ties (and signed zeros) or with none, and any rule that fits them."""
    n_tokens, d_ffn = draw(st.integers(0, 5)), draw(st.integers(1, 150))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    g = torch.randn(n_tokens, d_ffn, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        g = (g * 3).round() / 2
    count = draw(st.integers(1, d_ffn))
    m = draw(st.integers(2, 64))
    selection = draw(
        st.sampled_from(
            [
                Selection("topk", count=count),
                Selection("topk_abs", count=count),
                Selection("nm", n=draw(st.integers(1, m - 1)), m=m),
                Selection(
                    "threshold", threshold=draw(st.sampled_from([-10.0, 0.0, 0.3, 1.0, 10.0])), count=count
                ),
            ]
        )
    )
    return g.to(draw(st.sampled_from(DTYPES))), selection


@given(gates_and_rule())
def test_mask_and_overflow_equal_the_reference(case: tuple[Tensor, Selection]) -> None:
    """For every rule, dtype and shape the mask, ties included, and the overflow are the reference's."""
    g, selection = case
    mask, overflow = keep_mask(g, selection)
    assert torch.equal(mask, select_mask(g, selection))
    assert overflow.item() == overflow_count(g, selection).item()


@given(gates_and_rule())
def test_compact_storage_loses_nothing_that_was_kept(case: tuple[Tensor, Selection]) -> None:
    """Kept channels ascend, gathered values are the originals, K bits are set, expanding restores all."""
    g, selection = case
    n_tokens, d_ffn = g.shape
    k = selection.k(d_ffn)
    mask, _ = keep_mask(g, selection)
    bitmask = pack_bitmask(mask)
    assert bitmask.dtype == torch.int32
    assert bitmask.shape == (n_tokens, n_words(d_ffn))
    channels = kept_channels(unpack_bitmask(bitmask, d_ffn), k)
    compact = gather_compact(g, channels)
    assert compact.shape == (n_tokens, k)
    for row in range(n_tokens):
        kept = mask[row].nonzero().flatten()
        # brute force: channel c is bit c % 32 of word c // 32
        words = [word & 0xFFFFFFFF for word in bitmask[row].tolist()]
        assert [c for c in range(len(words) * 32) if words[c // 32] >> (c % 32) & 1] == kept.tolist()
        if selection.rule != "threshold":
            assert len(kept) == k
        assert channels[row].tolist() == kept.tolist() + [d_ffn] * (k - len(kept))
        assert torch.equal(compact[row, : len(kept)], g[row, kept])
        assert not compact[row, len(kept) :].any()
    expanded = Expander(channels, d_ffn, g.dtype).expand(compact)
    assert torch.equal(expanded, torch.where(mask, g, torch.zeros_like(g)))


def test_expander_gives_each_tensor_in_turn() -> None:
    """A second tensor put through the same buffer leaves nothing of the first behind."""
    mask, _ = keep_mask(torch.randn(5, 70), parse_selection("threshold:0.0:30"))
    channels = kept_channels(mask, 30)
    expander = Expander(channels, 70, torch.float32)
    first, second = torch.randn(5, 70), torch.randn(5, 70)
    for full in (first, second):
        assert torch.equal(expander.expand(gather_compact(full, channels)), full * mask)


@pytest.mark.parametrize("text", RULES, ids=lambda text: text.replace(":", "_"))
def test_nan_gates_stay_within_bounds_and_visible(text: str) -> None:
    """NaN gates are kept like the largest ones: indices stay in range and NaN reaches the compact values."""
    g = torch.randn(4, 130)
    g[1] = float("nan")
    g[2, 77] = float("nan")
    selection = parse_selection(text)
    mask, _ = keep_mask(g, selection)
    k = selection.k(130)
    channels = kept_channels(mask, k)
    assert int(channels.min()) >= 0
    assert int(channels.max()) <= 130
    assert (mask.sum(1) <= k).all()
    assert mask[2, 77]
    compact = gather_compact(g, channels)
    assert compact.isnan().any(dim=1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("text", RULES, ids=lambda text: text.replace(":", "_"))
def test_infinite_gates_rank_as_numbers(text: str) -> None:
    """Infinite gates are ranked as the reference ranks them, a tail bank full of minus infinity included."""
    g = torch.randn(4, 130)
    g[0, 100:] = float("-inf")
    g[1, ::3] = float("inf")
    if text.startswith("topk_abs"):
        g[0] = 0  # silu(-inf) is NaN, which has no rank
    mask, overflow = keep_mask(g, parse_selection(text))
    assert torch.equal(mask, select_mask(g, parse_selection(text)))
    assert overflow.item() == overflow_count(g, parse_selection(text)).item()


def test_rows_wider_than_int16_are_counted_right() -> None:
    """Rows of more channels than int16 can count are selected and stored like any other."""
    g = torch.randn(2, 40000)
    mask, _ = keep_mask(g, parse_selection("topk:39000"))
    assert torch.equal(mask, select_mask(g, parse_selection("topk:39000")))
    assert torch.equal(kept_channels(mask, 39000)[1], mask[1].nonzero().flatten())
