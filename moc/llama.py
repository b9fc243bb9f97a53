"""A LLaMA decoder that takes its feed-forward network as an argument, the only difference between methods.

Pre-norm blocks with RMSNorm, rotary positions (Hugging Face's convention: halves of a head are rotated
against each other), causal attention without biases, an untied head, and the chunked loss of `moc.ops.loss`.
With the same weights it gives the logits of `transformers.LlamaForCausalLM`. Weights stay in float32 under
torch.autocast; the residual stream is then float32 and products run in the autocast dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moc.config import LlamaConfig
from moc.layers.base import init_weights
from moc.ops.attention import attend_step, takes_step
from moc.ops.inputs import autocast_cast, compute_dtype
from moc.ops.loss import chunked_cross_entropy, token_cross_entropy


class KVCache:
    """Keys and values of the tokens seen so far, in tensors of fixed shape.

    `keys` and `values` hold a tensor [batch, n_heads, max_len, head_dim] per layer: apart, because a compiled
    layer that writes into its own tensor does so in place. `length` is an int64 scalar on the device, so a
    decoding step has static shapes and no value known only to the CPU, and can be captured in a CUDA graph.
    Nothing checks that `length` stays within `max_len`: that would synchronise; `Llama.generate` checks
    beforehand. Raises ValueError if `max_len` exceeds the model's max_seq_len.
    """

    def __init__(
        self, config: LlamaConfig, batch: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        _check_length(max_len, config)
        shape = (batch, config.n_heads, max_len, config.head_dim)
        self.keys, self.values = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)] for _ in range(2)
        )
        self.length = torch.zeros((), dtype=torch.int64, device=device)


class LayerCache(NamedTuple):
    """What one layer needs to know of a cache while S tokens enter it."""

    keys: Tensor  # [batch, n_heads, max_len, head_dim], written at `positions`
    values: Tensor  # likewise
    positions: Tensor  # [S] int64: where in the cache the tokens go
    mask: Tensor | None  # [S, max_len], 0 or -inf, added to scores; None: the cache held nothing before
    wqkv: Tensor | None = None  # [3 d_model, d_model]: wq, wk and wv as one matrix, where that is at hand


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions; weights wq, wk, wv, wo are [d_model, d_model]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads = (config.n_heads, config.head_dim)
        self.wq = nn.Parameter(torch.empty(config.d_model, config.d_model))
        self.wk = nn.Parameter(torch.empty(config.d_model, config.d_model))
        self.wv = nn.Parameter(torch.empty(config.d_model, config.d_model))
        self.wo = nn.Parameter(torch.empty(config.d_model, config.d_model))

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], cached: LayerCache | None) -> Tensor:
        """x [B, S, d] -> [B, S, d]; `rotation` holds cos and sin [S, head_dim]."""
        (x,) = autocast_cast(x)
        if cached is None or cached.wqkv is None:
            q, k, v = (self._split(F.linear(x, w)) for w in (self.wq, self.wk, self.wv))
        else:
            qkv = F.linear(x, cached.wqkv)
            if x.shape[1] == 1 and cached.mask is not None and takes_step(qkv, cached.keys):
                y = attend_step(qkv, *rotation, cached.positions, cached.keys, cached.values)
                return F.linear(y, self.wo)
            q, k, v = (self._split(part) for part in qkv.chunk(3, dim=-1))
        q, k = _rotate(q, *rotation), _rotate(k, *rotation)
        if cached is not None:
            cached.keys.index_copy_(2, cached.positions, k)
            cached.values.index_copy_(2, cached.positions, v)
        if cached is None or cached.mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = F.scaled_dot_product_attention(q, cached.keys, cached.values, attn_mask=cached.mask)
        return F.linear(y.transpose(1, 2).flatten(2), self.wo)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, self.heads).transpose(1, 2)  # [B, n_heads, S, head_dim]


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then + ffn(norm(.)).

    The last sum is left to the next layer, so that a layer compiled by itself begins with that sum and the
    norm in one pass. No layer knows its number, so all of them are one compiled function.
    """

    def __init__(self, config: LlamaConfig, ffn: nn.Module) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.ffn = ffn

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None,
        rotation: tuple[Tensor, Tensor],
        cached: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x and delta [B, S, d], whose sum enters the layer, to two such for the next one."""
        if delta is not None:
            x = x + delta
        x = x + self.attention(self.attention_norm(x), rotation, cached)
        return x, self.ffn(self.ffn_norm(x))


class Llama(nn.Module):
    """LLaMA decoder with any feed-forward network.

    `ffn_factory` is called once per layer and returns a module that maps [..., d_model] to the same shape and
    has the parameters w_gate, w_up, w_down [d_ffn, d_model]. All weights follow from `seed` alone, whatever
    the feed-forward network (`moc.layers.init_weights`). Built under `torch.device("meta")` it has no weights
    but takes those of `load_state_dict(..., assign=True)`, so several models can share one copy.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: LlamaConfig, ffn_factory: Callable[[], nn.Module], seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.layers = nn.ModuleList(Block(config, ffn_factory()) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.head = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        init_weights(self, seed)
        device = "cpu" if self.head.is_meta else self.head.device  # the tables hold values on any device
        cos, sin = _rotation_tables(config)
        self.register_buffer("cos", cos.to(device), persistent=False)
        self.register_buffer("sin", sin.to(device), persistent=False)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens [B, S] int64 -> hidden [B, S, d_model] after the final norm; logits are hidden @ head.T.

        With a `cache` the tokens follow those already in it and are appended to it. Raises ValueError if S
        exceeds the model's max_seq_len.
        """
        _check_length(tokens.shape[1], self.config)
        if cache is None:
            x, rotation = F.embedding(tokens, self.embedding), self.rotation(slice(tokens.shape[1]))
            places: list[LayerCache | None] = [None] * len(self.layers)
        else:
            x, rotation, positions, mask = self.place(tokens, cache.length, cache.keys[0])
            places = [LayerCache(*kv, positions, mask) for kv in zip(cache.keys, cache.values, strict=True)]
            cache.length.add_(tokens.shape[1])
        delta = None
        for layer, place in zip(self.layers, places, strict=True):
            x, delta = layer(x, delta, rotation, place)
        assert delta is not None  # there is at least one layer
        return self.norm(x + delta)

    def rotation(self, positions: Tensor | slice) -> tuple[Tensor, Tensor]:
        """cos and sin [S, head_dim] at these positions."""
        return self.cos[positions], self.sin[positions]

    def place(
        self, tokens: Tensor, length: Tensor, keys: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
        """What a step of S tokens that follow `length` cached ones needs before its first layer.

        Embeddings [B, S, d]; cos and sin; positions [S]; and the mask [S, max_len] for scores against a whole
        layer's `keys`, of their dtype.
        """
        positions = length + torch.arange(tokens.shape[1], device=tokens.device)
        unseen = torch.arange(keys.shape[2], device=keys.device) > positions.unsqueeze(1)
        mask = torch.zeros(unseen.shape, dtype=keys.dtype, device=keys.device)
        mask = mask.masked_fill(unseen, float("-inf"))
        return F.embedding(tokens, self.embedding), self.rotation(positions), positions, mask

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of `targets` [B, S] given `tokens` [B, S]; see `chunked_cross_entropy`.

        To compile the whole step compile this method, `torch.compile(model.loss)`: a compiled *module*
        compiles `forward` alone.
        """
        return chunked_cross_entropy(self(tokens), self.head, targets)

    @torch.no_grad()
    def token_losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats of each of `targets` [B, S]: float32 [B, S] (or float64), no gradient."""
        return token_cross_entropy(self(tokens), self.head, targets)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        use_cache: bool = True,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue each row of `tokens` [B, S] int64 by `max_new_tokens`: [B, S + max_new_tokens].

        Temperature 0 takes the likeliest token, else one is drawn (with `generator`, of the tokens' device).
        Without `use_cache` every token is computed anew from the whole prefix, which is the check on the
        cache. Raises ValueError for an empty prompt, a negative number, or a result beyond max_seq_len.
        """
        batch, prompt = tokens.shape
        if prompt < 1:
            raise ValueError("generate needs at least one prompt token per row")
        if max_new_tokens < 0 or temperature < 0:
            raise ValueError(f"max_new_tokens={max_new_tokens}, temperature={temperature}: negative")
        total = prompt + max_new_tokens
        _check_length(total, self.config)
        out = torch.cat((tokens, tokens.new_empty(batch, max_new_tokens)), dim=1)
        cache = None
        if use_cache:
            cache = KVCache(self.config, batch, total, compute_dtype(self.head), tokens.device)
        seen = 0  # tokens in the cache
        for end in range(prompt, total):
            hidden = self(out[:, seen:end], cache)
            out[:, end] = _next_token(F.linear(hidden[:, -1], self.head), temperature, generator)
            seen = end if use_cache else 0
        return out


def _next_token(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


def _rotation_tables(config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """cos and sin [max_seq_len, head_dim] float32 of rotary positions (arXiv 2104.09864, equation 34)."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device="cpu") / config.head_dim
    positions = torch.arange(config.max_seq_len, dtype=torch.float64, device="cpu")
    angles = torch.outer(positions, config.rope_theta**-half).repeat(1, 2)
    return angles.cos().float(), angles.sin().float()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def _check_length(length: int, config: LlamaConfig) -> None:
    if length > config.max_seq_len:
        raise ValueError(f"{length} tokens exceed max_seq_len={config.max_seq_len} of model {config.name}")
