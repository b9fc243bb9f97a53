"""The channels a decoding batch needs together: counted on masks made by hand, and on a model."""

import numpy as np
import pytest
import torch

from harness.measure.union import MAX_SETS, spread_windows, union_counts, union_shares
from moc import METHODS, Llama, LlamaConfig, parse_selection
from moc.reference import select_mask

TINY = LlamaConfig("tiny", d_model=16, d_ffn=32, n_layers=2, n_heads=2, vocab_size=61, max_seq_len=16)


def test_counts_of_masks_made_by_hand() -> None:
    """Three tokens that keep {0, 1}, {1, 2}, {1, 2} need 2, 3 and 3 channels together."""
    masks = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]], dtype=torch.bool)
    assert union_counts(masks).tolist() == [2, 3, 3]
    assert union_counts(masks.flip(0)).tolist() == [2, 2, 3]


def test_counts_against_python_sets() -> None:
    """At every place the count is the size of the union of sets, whatever the other places do."""
    masks = torch.rand(5, 7, 40, generator=torch.Generator().manual_seed(1)) < 0.2
    found = union_counts(masks)
    for place in range(7):
        union: set[int] = set()
        for batch in range(5):
            union |= set(masks[batch, place].nonzero().flatten().tolist())
            assert found[batch, place] == len(union)


def test_the_texts_of_a_batch_lie_far_apart() -> None:
    """Sets share no window, and the windows of a set are as many apart as the text allows."""
    windows = np.arange(100)[:, None] + np.zeros(3, dtype=np.int64)
    sets = spread_windows(windows, 4)
    assert len(sets) == MAX_SETS
    used = [int(window[0]) for rows in sets for window in rows]
    assert len(set(used)) == len(used)
    assert all(np.all(np.diff(rows[:, 0]) == 25) for rows in sets)
    assert len(spread_windows(windows[:9], 4)) == 2
    with pytest.raises(ValueError, match="needs 4 windows of text, not 3"):
        spread_windows(windows[:3], 4)


@pytest.mark.parametrize("rule", ["topk:0.25", "nm:2:8"])
def test_shares_of_a_model_against_an_independent_count(rule: str) -> None:
    """The mean over layers and places equals sets of channels counted with the reference, token by token."""
    selection = parse_selection(rule)
    model = Llama(TINY, lambda: METHODS["moc_reference"].make(TINY.ffn, selection), seed=2).double()
    windows = np.random.default_rng(0).integers(0, 61, (6, 5))
    found = union_shares(model, windows, selection, batch=3)
    assert found.shape == (2, 3)
    gates: list[torch.Tensor] = []
    for block in model.layers:
        block.ffn.register_forward_pre_hook(
            lambda ffn, inputs: gates.append((inputs[0] @ ffn.w_gate.T).detach())
        )
    for at, rows in enumerate(([0, 2, 4], [1, 3, 5])):
        gates.clear()
        model(torch.from_numpy(windows[rows]))
        shares = []
        for batch in (1, 2, 3):
            sizes = []
            for layer in gates:
                for place in range(5):
                    mask = select_mask(layer[:batch, place], selection)
                    sizes.append(len(set(mask.nonzero()[:, 1].tolist())) / 32)
            shares.append(np.mean(sizes))
        np.testing.assert_allclose(found[at], shares)
    assert found[0, 0] == pytest.approx(0.25)


def test_no_hook_is_left_behind() -> None:
    """The model is as it was, also after a failure."""
    selection = parse_selection("topk:0.25")
    model = Llama(TINY, lambda: METHODS["moc_reference"].make(TINY.ffn, selection))
    union_shares(model, np.zeros((2, 4), dtype=np.int64), selection, batch=2)
    with pytest.raises(IndexError):
        union_shares(model, np.full((2, 4), 1000), selection, batch=2)
    assert all(not block.ffn._forward_pre_hooks for block in model.layers)
