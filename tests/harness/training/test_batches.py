"""Batches: every window once an epoch, in an order that is a function of seed and step alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from harness.training.data.batches import TrainingBatches, bits_per_byte, evaluation_text

TOKENS = np.arange(1003, dtype=np.uint16)


def test_an_epoch_covers_every_window_once() -> None:
    """Over two epochs each window of inputs comes exactly twice, in two different orders."""
    batches = TrainingBatches(TOKENS, seq_len=10, batch=4, seed=7)
    assert batches.n_windows == 100
    steps = [batches.at(step) for step in range(50)]
    starts = np.concatenate([step[:, 0] for step in steps])
    for epoch in (starts[:100], starts[100:]):
        assert sorted(epoch.tolist()) == list(range(0, 1000, 10))
    assert starts[:100].tolist() != starts[100:].tolist()
    assert starts[:100].tolist() != sorted(starts[:100].tolist())


def test_targets_are_the_next_tokens() -> None:
    """A window is a run of consecutive tokens, one longer than the inputs."""
    batch = TrainingBatches(TOKENS, seq_len=16, batch=3, seed=0).at(5)
    assert batch.shape == (3, 17)
    assert batch.dtype == np.int64
    np.testing.assert_array_equal(batch[:, 1:], batch[:, :-1] + 1)


def test_order_is_a_pure_function_of_seed_and_step() -> None:
    """Steps may be asked for in any order, by a fresh object, and give the same batches; seeds differ."""
    forward = TrainingBatches(TOKENS, 10, 7, seed=3)
    wanted = {step: forward.at(step) for step in range(40)}
    for step in (39, 14, 0, 28, 15):
        np.testing.assert_array_equal(TrainingBatches(TOKENS, 10, 7, seed=3).at(step), wanted[step])
    assert not np.array_equal(TrainingBatches(TOKENS, 10, 7, seed=4).at(0), wanted[0])


def test_batch_reaches_over_the_end_of_an_epoch() -> None:
    """A batch larger than an epoch still takes the windows of each epoch in that epoch's order."""
    tokens = np.arange(31, dtype=np.uint16)
    starts = TrainingBatches(tokens, seq_len=10, batch=7, seed=1).windows(0)
    for epoch in (starts[:3], starts[3:6]):
        assert sorted(epoch.tolist()) == [0, 1, 2]


def test_order_does_not_depend_on_the_library_version() -> None:
    """The first windows of a known seed are the ones it has always had."""
    assert TrainingBatches(TOKENS, 10, 8, seed=0).windows(0).tolist() == [66, 0, 54, 43, 69, 38, 21, 91]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seq_len": 0}, "seq_len must be at least 1, not 0"),
        ({"batch": 0}, "batch must be at least 1, not 0"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"seq_len": 1003}, "seq_len 1003 is longer than the training text of 1003 tokens"),
    ],
)
def test_impossible_batches_are_refused(values: dict[str, int], message: str) -> None:
    """A field out of range is named with its value."""
    with pytest.raises(ValueError, match=message):
        TrainingBatches(**{"tokens": TOKENS, "seq_len": 10, "batch": 4, "seed": 0} | values)  # type: ignore[arg-type]


def test_evaluation_scores_the_same_targets_at_every_length() -> None:
    """As long as seq_len divides the number asked for, the targets are the same tokens, each once."""
    lengths = np.ones(2000, dtype=np.int64)
    for seq_len in (16, 64, 128):
        text = evaluation_text(TOKENS, lengths, seq_len, 640)
        assert text.n_tokens == 640
        np.testing.assert_array_equal(text.windows[:, 1:].ravel(), np.arange(1, 641))
        np.testing.assert_array_equal(text.windows[:, :-1].ravel(), np.arange(640))


def test_evaluation_counts_the_bytes_of_its_own_targets() -> None:
    """Bytes per token is over exactly the targets scored, whatever the rest of the text is like."""
    lengths = np.full(2000, 5)
    lengths[1:65] = 2
    text = evaluation_text(TOKENS, lengths, seq_len=32, eval_tokens=64)
    assert text.target_bytes == 128
    assert text.bytes_per_token == 2.0


def test_evaluation_takes_what_there_is() -> None:
    """More tokens than the split has: all whole windows; not even one: an error with both numbers."""
    lengths = np.ones(2000, dtype=np.int64)
    assert evaluation_text(TOKENS, lengths, 100, 10**9).n_tokens == 1000
    with pytest.raises(
        ValueError, match="eval_tokens 50 and a validation text of 1003 tokens hold no window"
    ):
        evaluation_text(TOKENS, lengths, 64, 50)


def test_bits_per_byte_of_a_known_code() -> None:
    """A uniform guess over 256 tokens of one byte costs 8 bits a byte; over tokens of four bytes, 2."""
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8.0, rel=1e-12)
    assert bits_per_byte(math.log(256), 4.0) == pytest.approx(2.0, rel=1e-12)
