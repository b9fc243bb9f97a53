"""The decoder against transformers, its cache against none, and its independence of the method."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from pure import PURE
from torch import Tensor, nn
from transformers import LlamaConfig as HfConfig
from transformers import LlamaForCausalLM

from moc import METHODS, DenseFFN, KVCache, Llama, LlamaConfig, parse_selection

TINY = LlamaConfig("tiny", d_model=32, d_ffn=80, n_layers=3, n_heads=4, vocab_size=97, max_seq_len=48)


def tiny(method: str = "dense", rule: str = "topk:0.25", seed: int = 1) -> Llama:
    """A decoder of three layers; its matrices are scaled up so that every layer matters to the logits."""
    model = Llama(TINY, lambda: METHODS[method].make(TINY.ffn, parse_selection(rule)), seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else torch.rand_like(parameter) + 0.5)
    return model


def as_transformers(model: Llama) -> LlamaForCausalLM:
    """transformers' LlamaForCausalLM with the weights of `model`."""
    config = HfConfig(
        vocab_size=TINY.vocab_size,
        hidden_size=TINY.d_model,
        intermediate_size=TINY.d_ffn,
        num_hidden_layers=TINY.n_layers,
        num_attention_heads=TINY.n_heads,
        num_key_value_heads=TINY.n_heads,
        max_position_embeddings=TINY.max_seq_len,
        rms_norm_eps=TINY.norm_eps,
        rope_theta=TINY.rope_theta,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    theirs = LlamaForCausalLM(config).to(model.head.dtype)
    state = {
        "model.embed_tokens.weight": model.embedding,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.head,
    }
    for i, layer in enumerate(model.layers):
        attention, ffn = layer.attention, layer.ffn
        state |= {
            f"model.layers.{i}.{name}.weight": tensor
            for name, tensor in {
                "input_layernorm": layer.attention_norm.weight,
                "post_attention_layernorm": layer.ffn_norm.weight,
                "self_attn.q_proj": attention.wq,
                "self_attn.k_proj": attention.wk,
                "self_attn.v_proj": attention.wv,
                "self_attn.o_proj": attention.wo,
                "mlp.gate_proj": ffn.w_gate,
                "mlp.up_proj": ffn.w_up,
                "mlp.down_proj": ffn.w_down.T,
            }.items()
        }
    theirs.load_state_dict({name: tensor.detach().clone() for name, tensor in state.items()}, strict=True)
    return theirs.eval()


def tokens_of(batch: int, length: int) -> Tensor:
    return torch.randint(0, TINY.vocab_size, (batch, length))


def test_logits_and_loss_equal_transformers() -> None:
    """With the same weights, logits, loss and the gradients of both ends equal transformers' LLaMA."""
    model = tiny()
    theirs = as_transformers(model)
    tokens = tokens_of(3, 41)
    output = theirs(input_ids=tokens, labels=tokens)
    torch.testing.assert_close(F.linear(model(tokens), model.head), output.logits, rtol=1e-4, atol=1e-4)
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(loss, output.loss, rtol=1e-5, atol=1e-6)
    loss.backward()
    output.loss.backward()
    for ours, their in (
        (model.embedding, theirs.model.embed_tokens.weight),
        (model.head, theirs.lm_head.weight),
        (model.layers[1].attention.wk, theirs.model.layers[1].self_attn.k_proj.weight),
    ):
        assert float((ours.grad - their.grad).norm() / their.grad.norm()) < 1e-4


@pytest.mark.parametrize("method", PURE)
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_cached_generation_equals_uncached(method: str, temperature: float) -> None:
    """Every method generates the same tokens with the key-value cache as by recomputing the whole prefix."""
    model = tiny(method).double()
    prompt = tokens_of(2, 5)
    cached, uncached = (
        model.generate(
            prompt, 20, temperature, use_cache=use_cache, generator=torch.Generator().manual_seed(7)
        )
        for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)
    assert torch.equal(cached[:, :5], prompt)
    assert cached.shape == (2, 25)
    assert len(cached[:, 5:].unique()) > 3  # not one token repeated, which would hide a wrong cache


def test_greedy_generation_takes_the_likeliest_token() -> None:
    """Each greedy token is the argmax of the logits of everything before it."""
    model = tiny().double()
    out = model.generate(tokens_of(2, 4), 6)
    logits = F.linear(model(out), model.head)
    assert torch.equal(out[:, 4:], logits[:, 3:-1].argmax(dim=-1))


def test_cache_takes_a_prompt_in_pieces() -> None:
    """Hidden states are the same whether tokens enter the cache at once, in pieces, or without a cache."""
    model = tiny().double()
    tokens = tokens_of(2, 13)
    cache = KVCache(TINY, 2, 30, torch.float64, torch.device("cpu"))
    pieces = [model(piece, cache) for piece in tokens.split([6, 1, 6], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens))
    assert cache.length.item() == 13


def test_later_tokens_do_not_change_earlier_ones() -> None:
    """Attention is causal: changing the last token leaves every earlier hidden state alone."""
    model = tiny().double()
    tokens = tokens_of(1, 12)
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % TINY.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :-1], after[:, :-1], rtol=0, atol=0)
    assert not torch.allclose(before[:, -1], after[:, -1])


def test_token_losses_average_to_the_loss() -> None:
    """Per-token losses are float32 [B, S], have no graph, and their mean is the loss."""
    model = tiny()
    tokens, targets = tokens_of(2, 9), tokens_of(2, 9)
    losses = model.token_losses(tokens, targets)
    assert losses.shape == (2, 9)
    assert losses.dtype == torch.float32
    assert not losses.requires_grad
    torch.testing.assert_close(losses.mean(), model.loss(tokens, targets).detach())


def test_weights_follow_from_the_seed_alone() -> None:
    """The same seed gives every method the same weights under the same names, and another seed others."""
    states = {name: Llama(TINY, maker(name), seed=3).state_dict() for name in METHODS}
    reference = states["dense"]
    for name, state in states.items():
        assert list(state) == list(reference), name
        assert all(torch.equal(state[key], reference[key]) for key in reference), name
    torch.manual_seed(999)  # the global generator has no part in it
    assert torch.equal(Llama(TINY, maker("dense"), seed=3).head, reference["head"])
    other = Llama(TINY, maker("dense"), seed=4).state_dict()
    assert not any(torch.equal(other[key], reference[key]) for key in reference if "norm" not in key)
    matrices = [value for key, value in reference.items() if value.dim() == 2]
    assert all(abs(float(m.std()) / 0.02 - 1) < 0.1 for m in matrices)
    assert not any(torch.equal(a, b) for a, b in pairwise(matrices))


def maker(method: str) -> object:
    return lambda: METHODS[method].make(TINY.ffn, parse_selection("topk:0.25"))


def test_a_network_from_outside_gets_the_same_weights() -> None:
    """A feed-forward module from outside gets the same values, whatever the order of its weights."""

    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("w_down", "w_up", "w_gate"):
                setattr(self, name, nn.Parameter(torch.zeros(TINY.d_ffn, TINY.d_model)))

        def forward(self, x: Tensor) -> Tensor:
            return (F.silu(x @ self.w_gate.T) * (x @ self.w_up.T)) @ self.w_down

    tokens = tokens_of(2, 7)
    outside, ours = Llama(TINY, Outside, seed=5), Llama(TINY, lambda: DenseFFN(TINY.ffn), seed=5)
    torch.testing.assert_close(outside(tokens), ours(tokens))


def test_parameter_count() -> None:
    """n_params of the configuration is the number of weights the model has."""
    assert sum(p.numel() for p in Llama(TINY, maker("dense")).parameters()) == TINY.n_params()


@pytest.mark.parametrize("method", PURE)
@pytest.mark.usefixtures("fresh_compiler")
def test_whole_model_compiles_without_a_graph_break(method: str) -> None:
    """torch.compile takes loss and backward of the whole model as one graph, under autocast, same numbers."""
    model = tiny(method)
    tokens, targets = tokens_of(2, 11), tokens_of(2, 11)

    def step(loss_function: object) -> tuple[Tensor, list[Tensor]]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_function(tokens, targets)  # type: ignore[operator]
        return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))

    loss, grads = step(torch.compile(model.loss, backend="aot_eager", fullgraph=True))
    expected_loss, expected_grads = step(model.loss)
    torch.testing.assert_close(loss, expected_loss, rtol=2e-3, atol=0)
    for (name, _), actual, expected in zip(model.named_parameters(), grads, expected_grads, strict=True):
        assert float((actual - expected).norm() / expected.norm()) < 0.1, name


@pytest.mark.usefixtures("fresh_compiler")
def test_decoding_step_compiles_without_a_graph_break() -> None:
    """A decoding step with a cache is one graph, updates the cache, and gives the same hidden states."""
    model = tiny("moc_reference").double()
    tokens = tokens_of(2, 8)
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    cache = KVCache(TINY, 2, 16, torch.float64, torch.device("cpu"))
    with torch.no_grad():
        hidden = torch.cat([step(tokens[:, i : i + 1], cache) for i in range(8)], dim=1)
        torch.testing.assert_close(hidden, model(tokens))
    assert cache.length.item() == 8


def test_training_lowers_the_loss() -> None:
    """A few steps of AdamW on one batch lower the loss of the dense and of the MoC model alike."""
    tokens, targets = tokens_of(4, 16), tokens_of(4, 16)
    for method in ("dense", "moc_reference"):
        model = Llama(TINY, maker(method), seed=0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(8):
            loss = model.loss(tokens, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 1.0, method


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"tokens": torch.zeros(1, 40).long(), "max_new_tokens": 9},
            "49 tokens exceed max_seq_len=48 of model tiny",
        ),
        ({"tokens": torch.zeros(1, 0).long(), "max_new_tokens": 1}, "at least one prompt token"),
        ({"tokens": torch.zeros(1, 2).long(), "max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"tokens": torch.zeros(1, 2).long(), "max_new_tokens": 1, "temperature": -1.0}, "temperature=-1.0"),
    ],
    ids=["too-long", "empty", "negative", "cold"],
)
def test_impossible_generation_is_refused(arguments: dict, message: str) -> None:
    """generate refuses what it cannot do before computing anything."""
    with pytest.raises(ValueError, match=message):
        tiny().generate(**arguments)


def test_too_long_a_sequence_is_refused() -> None:
    """forward refuses more tokens than there are positions."""
    with pytest.raises(ValueError, match="49 tokens exceed max_seq_len=48"):
        tiny()(torch.zeros(1, 49).long())
