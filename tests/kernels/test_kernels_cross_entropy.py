"""Cross-entropy in place: nats and gradient against PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F

from moc.kernels.cross_entropy import cross_entropy_in_place


@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [(5003, torch.float32), (50, torch.float32), (4097, torch.float16)],
    ids=["two_blocks", "one_block", "one_logit_more"],
)
def test_nats_and_gradient(vocabulary: int, dtype: torch.dtype, device: str) -> None:
    """Rows apart in memory, a target ignored and one outside the vocabulary: nats, then also the gradient."""
    logits = (4 * torch.randn(9, vocabulary + 3)).to(device, dtype)[:, :vocabulary]
    targets = torch.randint(0, vocabulary, (9,), device=device)
    targets[2], targets[5] = -100, vocabulary
    before = logits.double().requires_grad_()
    expected = F.cross_entropy(before, targets.where(targets < vocabulary, -100), reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), before)
    for keep in (False, True):
        nats = cross_entropy_in_place(logits, targets, -100, keep)
        assert nats[5].isnan()
        assert nats[2] == 0
        assert float((nats.double() - expected.detach()).nan_to_num().abs().max()) < 1e-4
        if not keep:
            assert torch.equal(logits.double(), before)
    counted = [0, 1, 3, 4, 6, 7, 8]
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3
    assert float((logits.double() - gradient)[counted].abs().max()) < tolerance
