"""2:4 sparse matrices: what the passes write is the dense matrix, in the bytes that cuSPARSELt reads."""

import math

import pytest
import torch
from kernel_cases import DTYPES, TOLERANCE, assert_same, make, poisoned, rows, run, tokens, weights
from torch import Tensor

from moc.kernels.passes import Kept, expand_pass, select_pass
from moc.kernels.sparse24 import Sparse24, compressed_bytes, metadata_pass
from moc.ops import cusparselt
from moc.ops.compact import pack_bitmask
from moc.ops.triton_ffn import Chunking, Layout
from moc.reference import moc_forward_backward
from moc.selection import parse_selection

# Where a group's four bits lie among a tile's, by bits of its column and of its row; read off an H100.
COLUMN_BITS, ROW_BITS = (4, 8, 2), (16, 32, 64, 1, 128, 256)

needs_library = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)),
    reason="needs a GPU of compute capability 9.0",
)


def empty(n_rows: int, width: int, dtype: torch.dtype, device: str) -> Sparse24:
    """A sparse matrix filled with NaN and with metadata that no hardware would take."""
    return Sparse24(
        torch.full((compressed_bytes(n_rows, width),), 255, dtype=torch.uint8, device=device),
        n_rows,
        width,
        dtype,
    )


def decompressed(sparse: Sparse24) -> Tensor:
    """The dense matrix [n_rows, width] in float32, found four bits by four bits."""
    metadata = sparse.metadata.cpu().contiguous().view(torch.uint8).flatten(2)  # [tiles, tiles, 256]
    fours = torch.stack((metadata & 15, metadata >> 4), 3).flatten(2)  # [tiles, tiles, 512]
    values = sparse.values.cpu().float()
    dense = torch.zeros(sparse.n_rows, sparse.width)
    for row in range(sparse.n_rows):
        in_tile = sum(step for bit, step in enumerate(ROW_BITS) if row >> bit & 1)
        for group in range(sparse.width // 4):
            at = in_tile + sum(step for bit, step in enumerate(COLUMN_BITS) if group >> bit & 1)
            code = int(fours[row // 64, group // 8, at])
            first, second = code & 3, code >> 2
            assert first < second
            dense[row, 4 * group + first] = values[row, 2 * group]
            dense[row, 4 * group + second] = values[row, 2 * group + 1]
    return dense


def selected(rule: str, d_ffn: int, dtype: str, device: str) -> tuple[Tensor, Tensor, Kept, Sparse24]:
    """(gates, ups, what is kept, 2:4 sparse z) of 64 tokens."""
    g, u = rows(64, d_ffn, DTYPES[dtype], device)
    kept = poisoned(64, parse_selection(rule).k(d_ffn), d_ffn, g.dtype, device)
    sparse = empty(64, d_ffn, g.dtype, device)
    overflow = torch.zeros((), dtype=torch.int64, device=device)
    select_pass(g, u, sparse.values, parse_selection(rule), kept, overflow, sparse=True)
    metadata_pass(kept.bitmask, sparse)
    return g, u, kept, sparse


@pytest.mark.parametrize(
    ("rule", "d_ffn", "dtype"),
    [
        *(("nm:2:8", 288, "bf16"), ("nm:2:8", 96, "fp16")),
        *((rule, 96, "bf16") for rule in ("nm:2:4", "nm:2:12", "nm:1:64")),
    ],
)
def test_select_writes_a_sparse_z(rule: str, d_ffn: int, dtype: str, device: str) -> None:
    """Sparse z is the dense z of the same gates, bit for bit, and so is what is kept beside it."""
    g, u, kept, sparse = selected(rule, d_ffn, dtype, device)
    again = poisoned(64, kept.pairs.shape[1], d_ffn, g.dtype, device)
    z = torch.full_like(u, math.nan)
    select_pass(g, u, z, parse_selection(rule), again, torch.zeros((), dtype=torch.int64, device=device))
    assert torch.equal(decompressed(sparse), z.cpu().float())
    assert torch.equal(kept.bitmask, again.bitmask)
    assert torch.equal(kept.pairs, again.pairs)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_expand_writes_a_sparse_gradient_beside_the_dense(dtype: str, device: str) -> None:
    """Sparse [dg du] is the dense one that the same pass writes, bit for bit, for a width of many tiles."""
    d_ffn = 288
    g, _u, kept, _z = selected("nm:2:8", d_ffn, dtype, device)
    dz = torch.randn(64, d_ffn).to(g)
    dgu, z = torch.full((64, 2 * d_ffn), math.nan).to(g), torch.full((64, d_ffn), math.nan).to(g)
    sparse = empty(64, 2 * d_ffn, g.dtype, device)
    expand_pass(dz, kept, dgu[:, :d_ffn], dgu[:, d_ffn:], z, sparse=sparse.values)
    metadata_pass(kept.bitmask, sparse)
    assert dgu.any()
    assert torch.equal(decompressed(sparse), dgu.cpu().float())


def test_every_pattern_of_four(device: str) -> None:
    """All eleven ways to keep at most two of four, in every row and group of a tile."""
    patterns = torch.tensor([word for word in range(16) if word.bit_count() <= 2])
    groups = patterns[torch.randint(0, 11, (128, 16), generator=torch.Generator().manual_seed(5))]
    keep = (groups[..., None] >> torch.arange(4) & 1).bool().flatten(1)
    bitmask = pack_bitmask(keep).to(device)
    sparse = empty(128, 64, torch.bfloat16, device)
    sparse.values.fill_(1)
    metadata_pass(bitmask, sparse)
    named = decompressed(sparse) == 1
    assert (named.view(128, 16, 4).sum(2) == 2).all()
    assert not (keep & ~named).any()


def test_what_does_not_fit_is_named(device: str) -> None:
    """Rules, shapes and dtypes that have no 2:4 sparse form are refused in one line."""
    g, u = rows(64, 64, torch.bfloat16, device)
    overflow = torch.zeros((), dtype=torch.int64, device=device)
    values = g.new_empty(64, 32)
    with pytest.raises(ValueError, match=r"nm:12:64 may keep more than two of four"):
        select_pass(g, u, values, parse_selection("nm:12:64"), None, overflow, sparse=True)
    with pytest.raises(ValueError, match=r"of 64 columns have shape \(64, 64\).*expected \[T, 32\]"):
        select_pass(g, u, g, parse_selection("nm:2:8"), None, overflow, sparse=True)
    with pytest.raises(ValueError, match=r"16-bit values and a multiple of 32 columns, not .*float32 and 64"):
        select_pass(
            g.float(), u.float(), values.float(), parse_selection("nm:2:8"), None, overflow, sparse=True
        )
    bitmask = torch.zeros(60, 2, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"shape \(60, 2\) does not fit \[60, 64\] in tiles of \[64, 32\]"):
        metadata_pass(bitmask, empty(60, 64, torch.bfloat16, device))


@pytest.mark.parametrize(("dtype", "fp8"), [("bf16", False), ("fp16", False), ("bf16", True)])
def test_the_operator_with_sparse_products(
    dtype: str, fp8: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """y and every gradient are the reference's; whole tiles of tokens go one way and the rest the other."""
    products = []
    has_library = cusparselt.usable(torch.device(device))
    multiply = cusparselt.sparse_mm

    def product(sparse: Sparse24, right: Tensor, out: Tensor) -> None:
        products.append((sparse.n_rows, sparse.width))
        if has_library:
            multiply(sparse, right, out)
        else:  # what the library would do
            torch.mm(decompressed(sparse).to(right), right, out=out)

    monkeypatch.setattr("moc.ops.cusparselt.sparse_mm", product)
    monkeypatch.setattr("moc.ops.triton_ffn._is_sparse", lambda *_: True)
    monkeypatch.setattr("moc.ops.triton_ffn.LAYOUT", Layout(Chunking(long_batch=60, multiple=64)))
    layer = make(32, 128, "nm:2:8", DTYPES[dtype], device, fp8)
    x, dy = tokens(69, 32, DTYPES[dtype], device)
    actual = run(layer, x, dy)
    assert products == [(64, 128), (64, 256)]
    expected = moc_forward_backward(x, *weights(layer), dy, parse_selection("nm:2:8"))
    assert_same(actual, expected, 0.05 if fp8 else TOLERANCE[dtype])


def test_no_library_without_its_gpu() -> None:
    """The CPU is not asked to multiply sparse matrices."""
    assert not cusparselt.usable(torch.device("cpu"))


@pytest.mark.gpu
@needs_library
def test_the_library_compresses_to_the_same_bytes() -> None:
    """Where two of every four are kept there is one way to write it, and cuSPARSELt's is ours."""
    _g, _u, _kept, sparse = selected("nm:2:4", 5504, "bf16", "cuda")
    dense = decompressed(sparse).cuda().bfloat16()
    assert torch.equal(torch._cslt_compress(dense).view(torch.uint8).flatten(), sparse.buffer)


@pytest.mark.gpu
@needs_library
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_sparse_product_is_the_dense_product(dtype: str) -> None:
    """To the rounding of the result, into a tensor with rows of its own stride, also from a CUDA graph."""
    assert cusparselt.usable(torch.device("cuda"))
    _g, _u, _kept, sparse = selected("nm:2:8", 1408, dtype, "cuda")
    right = torch.randn(1408, 512, device="cuda").to(DTYPES[dtype])
    out = torch.full((64, 1024), math.nan, device="cuda").to(right)
    expected = decompressed(sparse).cuda().double() @ right.double()
    cusparselt.sparse_mm(sparse, right, out[:, :512])
    error = (out[:, :512].double() - expected).norm() / expected.norm()
    assert float(error) < {"bf16": 4e-3, "fp16": 5e-4}[dtype]
    assert out[:, 512:].isnan().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cusparselt.sparse_mm(sparse, right, out[:, 512:])
    graph.replay()
    assert torch.equal(out[:, :512], out[:, 512:])
