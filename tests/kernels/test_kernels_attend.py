"""The decoding step of attention against rotation, cache and scaled_dot_product_attention apart."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moc import METHODS, Llama, LlamaConfig
from moc.decoding import GreedyDecoder
from moc.ops.attention import attend_step

# Keys, queries and the output are rounded, each by at most half of eps (a whole one in the interpreter).
TOLERANCE = {dtype: 2 * torch.finfo(dtype).eps for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def case(batch: int, heads: int, dim: int, max_len: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """qkv, cos, sin, and a cache whose unwritten part is NaN."""
    qkv = torch.randn(batch, 1, 3 * heads * dim).to(device, dtype)
    angle = torch.rand(1, dim // 2).repeat(1, 2) * 6
    cache = [torch.randn(batch, heads, max_len, dim).to(device, dtype) for _ in range(2)]
    return [qkv, angle.cos().to(device), angle.sin().to(device), *cache]


def expected(qkv: Tensor, cos: Tensor, sin: Tensor, at: int, keys: Tensor, values: Tensor) -> list[Tensor]:
    """Output, new key and new value, in float64 from the operands as they are rounded."""
    dtype, dim = qkv.dtype, keys.shape[-1]
    q, k, v = (part.unflatten(-1, (-1, dim)).transpose(1, 2) for part in qkv.double().chunk(3, dim=-1))

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        turned = x * cos.double() + torch.cat((-second, first), dim=-1) * sin.double()
        return turned.to(dtype).double()

    q, k = rotated(q), rotated(k)
    all_keys = torch.cat((keys[:, :, :at].double(), k), dim=2)
    all_values = torch.cat((values[:, :, :at].double(), v), dim=2)
    y = F.scaled_dot_product_attention(q, all_keys, all_values).transpose(1, 2).flatten(2)
    return [y, k[:, :, 0], v[:, :, 0]]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "dim", "at"),
    [(1, 2, 16, 0), (2, 3, 32, 1), (1, 1, 64, 64), (3, 2, 16, 65), (1, 2, 128, 131)],
)
def test_step_equals_its_parts(
    batch: int, heads: int, dim: int, at: int, dtype: torch.dtype, device: str
) -> None:
    """Right at lengths around the block; no other place of the cache is touched, and NaN beyond is unread."""
    qkv, cos, sin, keys, values = case(batch, heads, dim, 140, dtype, device)
    keys[:, :, at:], values[:, :, at:] = float("nan"), float("nan")
    before = keys.clone(), values.clone()
    y = attend_step(qkv, cos, sin, torch.tensor([at], device=device), keys, values)
    truth, new_key, new_value = expected(qkv, cos, sin, at, *before)
    assert y.shape == (batch, 1, heads * dim)
    assert float((y.double() - truth).norm() / truth.norm()) < TOLERANCE[dtype]
    for cache, old, new in zip((keys, values), before, (new_key, new_value), strict=True):
        # Within the last bit: Triton's interpreter cuts bfloat16 off where a GPU rounds.
        torch.testing.assert_close(cache[:, :, at].double(), new, rtol=torch.finfo(dtype).eps, atol=1e-6)
        old[:, :, at] = cache[:, :, at]
        assert torch.equal(cache.nan_to_num(nan=9.0), old.nan_to_num(nan=9.0))


def test_large_scores_do_not_overflow(device: str) -> None:
    """Scores of hundreds are subtracted before they are exponentiated: the likeliest token wins alone."""
    qkv, cos, sin, keys, values = case(1, 1, 16, 8, torch.float32, device)
    qkv[..., :32] *= 100
    keys[:, :, :5] *= 100
    truth, *_ = expected(qkv, cos, sin, 5, keys, values)
    y = attend_step(qkv, cos, sin, torch.tensor([5], device=device), keys, values)
    torch.testing.assert_close(y.double(), truth, rtol=1e-4, atol=1e-5)


def test_operator_is_what_torch_expects(device: str) -> None:
    """PyTorch's own checks of schema, mutation and shapes pass."""
    qkv, cos, sin, keys, values = case(2, 2, 16, 9, torch.float32, device)
    arguments = (qkv, cos, sin, torch.tensor([4], device=device), keys, values)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.moc.attend_step.default, arguments, test_utils=tests)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_decoder_on_it_decodes_the_same(
    compiled: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole model decodes the same tokens with the kernel as by PyTorch alone, compiled or not."""
    torch._dynamo.reset()
    config = LlamaConfig("tiny", d_model=32, d_ffn=80, n_layers=2, n_heads=2, vocab_size=97, max_seq_len=64)
    model = Llama(config, lambda: METHODS["dense"].make(config.ffn, None), seed=1).to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    model.requires_grad_(False)
    prompt = torch.randint(97, (2, 7), device=device)
    wanted = model.generate(prompt, 6, use_cache=False)[:, 7:]
    monkeypatch.setattr("moc.llama.takes_step", lambda qkv, keys: True)
    region = functools.partial(torch.compile, dynamic=False, fullgraph=True, backend="aot_eager")
    decoder = GreedyDecoder(model, 2, 20, region if compiled else lambda work: work)
    decoder.prefill(prompt)
    found = [decoder.token.clone()]
    for _ in range(5):
        decoder.step()
        found.append(decoder.token.clone())
    assert torch.equal(torch.cat(found, dim=1), wanted)
