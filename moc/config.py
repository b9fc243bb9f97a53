"""Shapes: the feed-forward network's, the decoder's, and the named presets of every sweep."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace

MAX_D_FFN = 65534  # of the Triton kernels: two counts of channels share a 32-bit word


@dataclass(frozen=True)
class FfnShape:
    """Shape of one SwiGLU feed-forward network: three matrices of [d_ffn, d_model].

    Raises ValueError if a dimension is not a positive integer.
    """

    d_model: int  # width of a token, d
    d_ffn: int  # number of channels

    def __post_init__(self) -> None:
        for field in ("d_model", "d_ffn"):
            _require_positive(field, getattr(self, field))

    def n_params(self) -> int:
        """Number of weights of w_gate, w_up and w_down together."""
        return 3 * self.d_model * self.d_ffn


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a LLaMA decoder (pre-norm, RoPE, SwiGLU, untied head, no biases).

    Raises ValueError if a dimension is not positive, if d_model is not a multiple of n_heads, or if a
    head's width is odd (RoPE rotates pairs).
    """

    name: str
    d_model: int
    d_ffn: int
    n_layers: int
    n_heads: int
    vocab_size: int = 32000
    max_seq_len: int = 4096  # positions for which RoPE tables are kept
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for field in ("d_model", "d_ffn", "n_layers", "n_heads", "vocab_size", "max_seq_len"):
            _require_positive(field, getattr(self, field))
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads={self.n_heads} does not divide d_model={self.d_model}")
        if self.head_dim % 2:
            raise ValueError(
                f"d_model / n_heads = {self.d_model} / {self.n_heads} = {self.head_dim} is odd; "
                "RoPE needs an even head width"
            )

    @property
    def ffn(self) -> FfnShape:
        """Shape of each layer's feed-forward network."""
        return FfnShape(self.d_model, self.d_ffn)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    def n_params(self) -> int:
        """Number of weights in all: embedding, layers, final norm and the untied head."""
        attention = 4 * self.d_model * self.d_model
        layer = attention + self.ffn.n_params() + 2 * self.d_model
        return 2 * self.vocab_size * self.d_model + self.n_layers * layer + self.d_model

    def with_(self, *, vocab_size: int | None = None, max_seq_len: int | None = None) -> LlamaConfig:
        """The same model with another vocabulary or another longest sequence (what a sweep sets)."""
        return replace(
            self,
            vocab_size=self.vocab_size if vocab_size is None else vocab_size,
            max_seq_len=self.max_seq_len if max_seq_len is None else max_seq_len,
        )


def near_miss(name: str, valid: Iterable[str]) -> str:
    """The end of an error message about a wrong name: the nearest valid one, then all of them."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}valid: {', '.join(names)}"


def _require_positive(field: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{field}={value!r} must be a positive integer")


# d_model / d_ffn / layers / heads. The plain names round d_ffn to a multiple of 64, because cuBLAS leaves its
# fast path elsewhere (5461 runs four times slower than 5464); `paper-*` are the shapes of arXiv 2511.09323,
# kept to reproduce its tables; `1m` and `4m` are for a machine without a GPU.
PRESETS: dict[str, LlamaConfig] = {
    config.name: config
    for config in (
        LlamaConfig("1m", 128, 384, 4, 4),
        LlamaConfig("4m", 256, 704, 4, 4),
        LlamaConfig("60m", 512, 1408, 8, 8),
        LlamaConfig("130m", 768, 2048, 12, 12),
        LlamaConfig("350m", 1024, 2752, 24, 16),
        LlamaConfig("1b", 2048, 5504, 24, 32),
        LlamaConfig("7b", 4096, 11008, 32, 32),
        LlamaConfig("paper-60m", 512, 1376, 8, 8),
        LlamaConfig("paper-130m", 768, 2048, 12, 12),
        LlamaConfig("paper-350m", 1024, 2736, 24, 16),
        LlamaConfig("paper-1b", 2048, 5461, 24, 32),
    )
}


def get_preset(name: str) -> LlamaConfig:
    """The preset called `name`. Raises ValueError naming the nearest preset."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; {near_miss(name, PRESETS)}")
    return PRESETS[name]
