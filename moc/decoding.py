"""Greedy decoding with static shapes: a step that a CUDA graph can capture once and replay for every token.

The token, the position and the key-value cache stay on the device and keep their addresses, and nothing
waits for the device. The bytes a step must move are those of the weights it uses and of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from moc.llama import Block, KVCache, LayerCache, Llama
from moc.ops.inputs import place_side_by_side

# Cache length is a multiple of it: a mask whose rows start at unaligned addresses is copied by every layer.
_LENGTH_MULTIPLE = 64

Rotation = tuple[Tensor, Tensor]
Region = Callable[..., Any]


class GreedyDecoder:
    """Continues `batch` prompts by their likeliest tokens, each a step of fixed shapes on fixed tensors.

    `token` [batch, 1] int64 is the newest token of each row. `compile_region` wraps the three functions that
    a step consists of, such as `functools.partial(torch.compile, dynamic=False)`: start, one layer, and end.
    All layers are one compiled function, which compiles once instead of once per layer.

    It places wq, wk and wv of each layer side by side in memory (the model's parameters become views), so
    that one matrix product uses all three; do not move or replace them while the decoder is in use. Weights,
    cache and activations have the dtype of `model.head`. There are no gradients. Raises ValueError if
    `max_len` exceeds the model's max_seq_len.
    """

    def __init__(
        self,
        model: Llama,
        batch: int,
        max_len: int,
        compile_region: Callable[[Region], Region] = lambda region: region,
    ) -> None:
        self.model = model
        head = model.head
        length = max(max_len, min(cache_length(max_len), model.config.max_seq_len))
        self.cache = KVCache(model.config, batch, length, head.dtype, head.device)
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=head.device)
        attentions = [cast(Block, block).attention for block in model.layers]
        self._wqkv = [place_side_by_side(part.wq, part.wk, part.wv) for part in attentions]
        self._start = compile_region(_start)
        self._layer = compile_region(_layer)
        self._end = compile_region(_end)

    @torch.no_grad()
    def prefill(self, prompt: Tensor) -> Tensor:
        """Read `prompt` [batch, S] int64 into an emptied cache and choose the next token.

        Logits [batch, vocabulary] of that choice. Nothing checks that S fits into the cache.
        """
        self.cache.length.zero_()
        return self._run(prompt, first=True)

    @torch.no_grad()
    def step(self) -> Tensor:
        """Append `token` to the cache and choose the next one; the logits [batch, vocabulary] of the choice.

        Nothing checks that the cache has room: that would wait for the device.
        """
        return self._run(self.token, first=False)

    @torch.no_grad()
    def rewind(self, length: int, token: Tensor) -> None:
        """Go back to `length` tokens in the cache, with `token` [batch, 1] as the newest one after them."""
        self.cache.length.fill_(length)
        self.token.copy_(token)

    def _run(self, tokens: Tensor, first: bool) -> Tensor:
        cache = self.cache
        x, rotation, positions, mask = self._start(self.model, tokens, cache.length, cache.keys[0])
        delta = torch.zeros_like(x)  # not None: the first layer is the same compiled function as the others
        for block, keys, values, wqkv in zip(
            self.model.layers, cache.keys, cache.values, self._wqkv, strict=True
        ):
            place = LayerCache(keys, values, positions, None if first else mask, wqkv)
            x, delta = self._layer(block, x, delta, rotation, place)
        logits: Tensor = self._end(self.model, x, delta, self.token, cache.length, tokens.shape[1])
        return logits


def cache_length(tokens: int) -> int:
    """Length of a cache for so many tokens: a multiple of 64."""
    return -(-tokens // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE


def _start(
    model: Llama, tokens: Tensor, length: Tensor, keys: Tensor
) -> tuple[Tensor, Rotation, Tensor, Tensor]:
    return model.place(tokens, length, keys)


def _layer(
    block: torch.nn.Module, x: Tensor, delta: Tensor, rotation: Rotation, place: LayerCache
) -> tuple[Tensor, Tensor]:
    both: tuple[Tensor, Tensor] = block(x, delta, rotation, place)
    return both


def _end(model: Llama, x: Tensor, delta: Tensor, token: Tensor, length: Tensor, added: int) -> Tensor:
    hidden = model.norm(x[:, -1:] + delta[:, -1:])
    logits = F.linear(hidden, model.head).squeeze(1)
    token.copy_(logits.argmax(dim=-1, keepdim=True))
    length.add_(added)
    return logits
