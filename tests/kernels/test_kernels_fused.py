"""Selection in the epilogue of the gate-up GEMM: the same channels, pairs and z as GEMM and select pass."""

import math

import pytest
import torch
import torch.nn.functional as F

from moc.compact import unpack_bitmask
from moc.kernels.between import Kept
from moc.kernels.fused import GemmTiling, gate_up_nm
from moc.kernels.primitives import INTERPRETED
from moc.reference import select_mask
from moc.selection import parse_selection

TILING = GemmTiling(block_m=32, block_n=64, block_k=32, num_warps=4, num_stages=2, group=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("rule", ["nm:2:8", "nm:1:8", "nm:4:16"])
def test_agrees_with_the_reference(rule: str, dtype: torch.dtype, device: str) -> None:
    """On small integers, whose products are exact, everything is the reference's, ties included."""
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bf16 matrices by their bit patterns")
    selection, n_tokens, d, d_ffn = parse_selection(rule), 70, 64, 128
    x, w_gate, w_up = (torch.randint(-2, 3, (n, d)).to(device, dtype) for n in (n_tokens, d_ffn, d_ffn))
    k = selection.k(d_ffn)
    kept = Kept(
        torch.full((n_tokens, k, 2), math.nan, device=device, dtype=dtype),
        torch.full((n_tokens, d_ffn // 32), -1, device=device, dtype=torch.int32),
    )
    z = torch.full((n_tokens, d_ffn), math.nan, device=device, dtype=dtype)
    gate_up_nm(x, w_gate, w_up, selection, kept, z, TILING)
    g, u = (x.double() @ w.double().T for w in (w_gate, w_up))
    mask = select_mask(g, selection)
    assert torch.equal(unpack_bitmask(kept.bitmask, d_ffn), mask)
    assert torch.equal(kept.pairs[..., 0].double().flatten(), g[mask])
    assert torch.equal(kept.pairs[..., 1].double().flatten(), u[mask])
    expected = mask * F.silu(g) * u
    assert float((z.double() - expected).norm() / expected.norm()) < 3e-3


@pytest.mark.parametrize(
    ("rule", "d_ffn", "dtype"),
    [
        ("topk:9", 128, torch.float16),
        ("nm:12:64", 128, torch.float16),
        ("nm:2:8", 96, torch.float16),
        ("nm:2:8", 128, torch.float32),
    ],
)
def test_what_does_not_fit_is_refused(rule: str, d_ffn: int, dtype: torch.dtype) -> None:
    """Other rules, a d_ffn that is no multiple of the tile, and float32 are named in an error."""
    x, w, z = torch.zeros(4, 8, dtype=dtype), torch.zeros(d_ffn, 8, dtype=dtype), torch.zeros(4, d_ffn)
    kept = Kept(torch.zeros(4, 9, 2), torch.zeros(4, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=rf"{rule} of {d_ffn} channels in {dtype} does not fit"):
        gate_up_nm(x, w, w, parse_selection(rule), kept, z, TILING)
