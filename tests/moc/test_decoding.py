"""Greedy decoding with static shapes: the same tokens as `Llama.generate`, on tensors that stay in place."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from moc import METHODS, Llama, LlamaConfig, parse_selection
from moc.decoding import GreedyDecoder

TINY = LlamaConfig("tiny", d_model=32, d_ffn=80, n_layers=3, n_heads=4, vocab_size=97, max_seq_len=64)
NEW = 12


def tiny(method: str = "dense", dtype: torch.dtype = torch.float64) -> Llama:
    """A decoder whose matrices are scaled up, so that every layer matters to the logits."""
    model = Llama(TINY, lambda: METHODS[method].make(TINY.ffn, parse_selection("topk:0.25")), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else torch.rand_like(parameter) + 0.5)
    return model.to(dtype).requires_grad_(False)


def prompts(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(0, TINY.vocab_size, (batch, length))


def decode(decoder: GreedyDecoder, prompt: Tensor, count: int) -> Tensor:
    """`count` tokens after the prompt."""
    decoder.prefill(prompt)
    tokens = [decoder.token.clone()]
    for _ in range(count - 1):
        decoder.step()
        tokens.append(decoder.token.clone())
    return torch.cat(tokens, dim=1)


@pytest.mark.parametrize("method", ["dense", "dense_gu", "moc_reference", "act_prune"])
def test_it_decodes_what_generate_does(method: str) -> None:
    """Every token is the one that the uncached generation chooses, for several prompts at once."""
    model, prompt = tiny(method), prompts()
    expected = model.generate(prompt, NEW, use_cache=False)[:, 7:]
    assert torch.equal(decode(GreedyDecoder(model, 2, 7 + NEW), prompt, NEW), expected)
    assert len(expected.unique()) > 3


@pytest.mark.parametrize("method", ["dense", "moc_reference"])
def test_its_logits_are_those_of_the_full_forward(method: str) -> None:
    """Each step's logits equal the last place of one forward over everything so far."""
    model, prompt = tiny(method), prompts()
    decoder = GreedyDecoder(model, 2, 20)
    logits = [decoder.prefill(prompt)]
    seen = prompt
    for _ in range(6):
        seen = torch.cat((seen, decoder.token), dim=1)
        logits.append(decoder.step())
    expected = F.linear(model(seen), model.head)[:, 6:]
    torch.testing.assert_close(torch.stack(logits, dim=1), expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_all_layers_are_one_compiled_function() -> None:
    """Compiled, it is six graphs for prompt and step (start, layer, end of each), however many layers."""
    model, prompt = tiny("moc_reference"), prompts()
    expected = model.generate(prompt, NEW)[:, 7:]
    counters.clear()
    compile_region = functools.partial(torch.compile, dynamic=False, fullgraph=True, backend="aot_eager")
    assert torch.equal(decode(GreedyDecoder(model, 2, 7 + NEW, compile_region), prompt, NEW), expected)
    assert counters["stats"]["unique_graphs"] == 6


def test_a_step_leaves_every_tensor_in_its_place() -> None:
    """Token, length and cache keep their addresses and shapes, which a captured graph relies on."""
    decoder = GreedyDecoder(tiny(), 2, 20)
    tensors = [decoder.token, decoder.cache.length, *decoder.cache.keys, *decoder.cache.values]
    before = [(tensor.data_ptr(), tensor.shape) for tensor in tensors]
    decode(decoder, prompts(), 5)
    after = [decoder.token, decoder.cache.length, *decoder.cache.keys, *decoder.cache.values]
    assert [(tensor.data_ptr(), tensor.shape) for tensor in after] == before
    assert decoder.cache.length.item() == 7 + 4


def test_rewinding_decodes_the_same_again() -> None:
    """After `rewind` the same tokens follow, whatever was decoded in between."""
    decoder = GreedyDecoder(tiny(), 2, 7 + NEW)
    first = decode(decoder, prompts(), NEW)
    decoder.rewind(7, first[:, :1])
    again = [decoder.token.clone()]
    for _ in range(NEW - 1):
        decoder.step()
        again.append(decoder.token.clone())
    assert torch.equal(torch.cat(again, dim=1), first)


def test_the_projections_are_joined_without_a_second_copy() -> None:
    """wq, wk and wv become views of one matrix with the same values, and a second decoder reuses it."""
    model = tiny()
    attention = model.layers[0].attention
    before = torch.cat((attention.wq, attention.wk, attention.wv)).clone()
    GreedyDecoder(model, 1, 8)
    storage = attention.wq.untyped_storage().data_ptr()
    assert {w.untyped_storage().data_ptr() for w in (attention.wk, attention.wv)} == {storage}
    assert torch.equal(torch.cat((attention.wq, attention.wk, attention.wv)), before)
    GreedyDecoder(model, 1, 8)
    assert attention.wq.untyped_storage().data_ptr() == storage


def test_more_tokens_than_positions_are_refused() -> None:
    """A cache longer than the model's positions is refused before anything is computed."""
    with pytest.raises(ValueError, match="65 tokens exceed max_seq_len=64"):
        GreedyDecoder(tiny(), 1, 65)


def test_a_model_without_weights_takes_those_of_another() -> None:
    """Built on the meta device a model draws nothing, and shares the tensors it is given."""
    model = tiny()
    with torch.device("meta"):
        shell = Llama(TINY, lambda: METHODS["dense"].make(TINY.ffn, None))
    assert all(parameter.is_meta for parameter in shell.parameters())
    shell.load_state_dict(model.state_dict(), assign=True)
    assert all(
        a.data_ptr() == b.data_ptr() for a, b in zip(shell.parameters(), model.parameters(), strict=True)
    )
    tokens = prompts()
    torch.testing.assert_close(shell(tokens), model(tokens))
