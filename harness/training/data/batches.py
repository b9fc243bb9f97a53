"""Batches cut from packed tokens: training windows in a seeded order, and the fixed evaluation windows.

The order is a pure function of the seed and the step, so methods trained with the same seed see the same
batches, and a resumed run goes on exactly where it stopped without any state being saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from harness.training.data.dataset import Tokens


@lru_cache(maxsize=2)  # a batch may reach over the end of an epoch
def epoch_order(seed: int, epoch: int, n_windows: int) -> NDArray[np.int64]:
    """Order of the windows in one epoch, [n_windows]: a pure function of its arguments.

    The raw counter-based stream is sorted rather than `Generator.permutation` called: numpy promises to
    keep the first as it is, but not the second, and two machines may have different versions.
    """
    generator = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    order = np.argsort(generator.random_raw(n_windows), kind="stable").astype(np.int64)
    order.setflags(write=False)  # shared by every caller
    return order


@dataclass(frozen=True)
class TrainingBatches:
    """Training batches of one token stream.

    Window i is tokens [i * seq_len, (i + 1) * seq_len]: seq_len inputs and, one further, their targets, so
    every token but the first is a target once an epoch. Each epoch visits every window once, in an order of
    its own; a batch may reach over the end of an epoch.
    """

    tokens: Tokens
    seq_len: int
    batch: int
    seed: int

    def __post_init__(self) -> None:
        """Raises ValueError if a field is out of range or the stream is shorter than one window."""
        for name in ("seq_len", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, not {self.seed}")
        if self.n_windows < 1:
            raise ValueError(
                f"seq_len {self.seq_len} is longer than the training text of {len(self.tokens)} tokens"
            )

    @property
    def n_windows(self) -> int:
        """Windows in one epoch; up to seq_len tokens at the end of the stream are left over."""
        return (len(self.tokens) - 1) // self.seq_len

    def windows(self, step: int) -> NDArray[np.int64]:
        """Windows of the batch of one step, [batch]."""
        places = np.arange(step * self.batch, (step + 1) * self.batch)
        epochs, offsets = places // self.n_windows, places % self.n_windows
        windows = np.empty(self.batch, dtype=np.int64)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            windows[now] = epoch_order(self.seed, int(epoch), self.n_windows)[offsets[now]]
        return windows

    def at(self, step: int) -> NDArray[np.int64]:
        """Tokens of the batch of one step, [batch, seq_len + 1]: inputs are [:, :-1], targets [:, 1:]."""
        return cut(self.tokens, self.windows(step), self.seq_len)


@dataclass(frozen=True)
class EvaluationText:
    """The tokens every model is evaluated on."""

    windows: NDArray[np.int64]  # [n, seq_len + 1]
    target_bytes: int  # bytes of text the targets stand for

    @property
    def n_tokens(self) -> int:
        """Targets, end-of-text included."""
        return self.windows.shape[0] * (self.windows.shape[1] - 1)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per target, exactly over these targets."""
        return self.target_bytes / self.n_tokens


def evaluation_text(
    validation: Tokens, token_bytes: NDArray[np.int64], seq_len: int, eval_tokens: int
) -> EvaluationText:
    """The first `eval_tokens` targets of the validation stream, in windows of `seq_len`.

    Which targets are scored does not depend on `seq_len` as long as it divides `eval_tokens`; what differs
    is how much text each is predicted from, since no window sees the one before it. If `eval_tokens` is
    more than there is, all whole windows are taken. Raises ValueError if not even one window fits.
    """
    n_windows = min(eval_tokens, len(validation) - 1) // seq_len
    if n_windows < 1:
        raise ValueError(
            f"eval_tokens {eval_tokens} and a validation text of {len(validation)} tokens hold no window"
            f" of seq_len {seq_len}"
        )
    windows = cut(validation, np.arange(n_windows), seq_len)
    return EvaluationText(windows, int(token_bytes[windows[:, 1:]].sum()))


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Loss per byte of text in bits, which tokenizers of any size share: nats / ln 2 / bytes per token."""
    return nats_per_token / float(np.log(2.0)) / bytes_per_token


def cut(tokens: Tokens, windows: NDArray[np.int64], seq_len: int) -> NDArray[np.int64]:
    """Windows of `seq_len + 1` tokens, [len(windows), seq_len + 1], copied out of the mapped file."""
    places = windows[:, None] * seq_len + np.arange(seq_len + 1)
    return tokens[places].astype(np.int64)
