"""Byte-level BPE: trained on the training documents, lossless, with one special token between documents.

Byte level (as in GPT-2) so that every text has an encoding and decodes to itself, and so that the bytes each
token stands for are known, which is what makes bits per byte exact.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0

MIN_VOCAB_SIZE = 257  # 256 bytes and end-of-text

# Text a vocabulary entry is learned from: 64 MB for 32k entries, 8 MB for 4k. More text changes few merges.
SAMPLE_BYTES_PER_ENTRY = 2_000


class VocabularyError(ValueError):
    """The vocabulary size cannot be reached with this text."""


def sample_bytes(vocab_size: int) -> int:
    """How much training text the tokenizer of this size is trained on, in bytes."""
    return SAMPLE_BYTES_PER_ENTRY * vocab_size


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Tokenizer with exactly `vocab_size` entries, end-of-text (id 0) among them.

    The same texts in the same order give the same tokenizer. Raises VocabularyError if `vocab_size` is under
    257 or the texts hold too few different words for it.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise VocabularyError(f"vocab_size must be at least {MIN_VOCAB_SIZE}, not {vocab_size}")
    _allow_threads()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise VocabularyError(
            f"vocab_size {vocab_size} is more than this text can fill; "
            f"choose at most {tokenizer.get_vocab_size()}, or more text"
        )
    return as_text_only(tokenizer)


def as_text_only(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, told to read a literal `<|endoftext|>` in a document as the text it is.

    The setting is not part of the tokenizer's file, so it is made again after loading. Without it a document
    that quotes the marker would be cut in two.
    """
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode_documents(
    tokenizer: Tokenizer, texts: Iterable[str], batch_bytes: int = 4_000_000
) -> Iterator[tuple[int, NDArray[np.uint32]]]:
    """Token ids of the documents, each followed by end-of-text, several documents at a time.

    Yields (documents encoded, ids). One batch is about `batch_bytes` characters: it bounds the memory, and
    its documents are encoded on all cores.
    """
    _allow_threads()
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= batch_bytes:
            yield len(batch), _encode_batch(tokenizer, batch)
            batch, size = [], 0
    if batch:
        yield len(batch), _encode_batch(tokenizer, batch)


def bytes_of_tokens(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Bytes of text each token stands for, [vocab_size]; end-of-text stands for none.

    A byte-level token is spelled with one printable character per byte, so its length counts its bytes.
    """
    lengths = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = len(token)
    lengths[END_OF_TEXT_ID] = 0
    return lengths


def _encode_batch(tokenizer: Tokenizer, batch: list[str]) -> NDArray[np.uint32]:
    """Ids of all documents of the batch in one array."""
    parts: list[NDArray[np.uint32]] = []
    end = np.array([END_OF_TEXT_ID], dtype=np.uint32)
    for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
        parts.extend((np.array(encoding.ids, dtype=np.uint32), end))
    return np.concatenate(parts)


def _allow_threads() -> None:
    """Say yes to the library's threads, which it otherwise turns off, with a warning, after a fork."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
