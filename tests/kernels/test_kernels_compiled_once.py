"""How often the kernels are compiled, found without a GPU. What they compile to: `make bench-check`."""

import pytest
from kernel_cases import printed_without_launching

COUNT_VARIANTS = """
import torch
from moc.kernels import passes, primitives, sparse24
from moc.ops import cusparselt, triton_ffn
triton_ffn._is_sparse = lambda *_: True
cusparselt.sparse_mm = lambda *_: None

kernels = (passes.select_fwd_kernel, passes.expand_bwd_kernel, sparse24.metadata_kernel)
for rule, numbers in (
    ("topk:0.1875", (1, 2, 7, 16, 127, 128, 300, 4096)),
    ("nm:2:8", (64, 128, 320, 4096)),
):
    for kernel in kernels:
        kernel.device_caches.clear()
    for n_tokens in numbers:
        x = torch.zeros(n_tokens, 16, dtype=torch.bfloat16)
        weights = [torch.zeros(320, 16, dtype=torch.bfloat16) for _ in range(3)]
        with primitives.pretended_gpu((9, 0)):
            outputs = torch.ops.moc.triton_ffn_forward(x, *weights, rule, False, True)
            torch.ops.moc.triton_ffn_backward(x, x, *outputs[1:4], *weights, rule == "nm:2:8")
    print(rule, *[len(kernel.device_caches[0][0]) for kernel in kernels])
"""


@pytest.fixture(scope="module")
def compiled() -> dict[str, str]:
    """How often each kernel was compiled, by rule: select, expand and metadata."""
    lines = printed_without_launching(COUNT_VARIANTS).splitlines()
    return dict(line.split(" ", 1) for line in lines)


@pytest.mark.parametrize(
    ("rule", "variants"),
    [("topk:0.1875", "1 1 0"), ("nm:2:8", "1 1 2")],
    ids=["dense_products", "sparse_products"],
)
def test_one_compilation_for_every_number_of_tokens(
    compiled: dict[str, str], rule: str, variants: str
) -> None:
    """A sweep over the number of tokens compiles each kernel once, and metadata for z and for [dg du]."""
    assert compiled[rule] == variants
