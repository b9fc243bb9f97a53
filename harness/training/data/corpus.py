"""Documents of a source, deduplicated, split and spooled to one file: the only pass over the source.

Why a spool: the split and the tokenizer need the whole corpus before the first token is written, a streamed
source can be read once, and text held in memory would be counted in whatever is measured next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from harness.training.data.sources import Source, SourceError

Progress = Callable[[str], None]

VALIDATION_FRACTION = 0.05  # of documents, where the source holds none out itself
VALIDATION_MAX_BYTES = 4_000_000  # about 1M tokens: a longer validation text is never evaluated

_MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Corpus:
    """Spooled documents in source order. Arrays have one entry a document."""

    path: Path  # UTF-8 text of all documents, one after the other
    sizes: NDArray[np.int64]  # bytes
    order_keys: NDArray[np.uint64]  # uniform over documents, from their content: a fair coin for sampling
    in_training: NDArray[np.bool_]
    in_validation: NDArray[np.bool_]
    content_id: str  # fingerprint of every kept text, its place and its split
    duplicates: int  # documents left out because the same text came before

    def bytes_of(self, members: NDArray[np.bool_]) -> int:
        """Bytes of text of the documents marked in `members`."""
        return int(self.sizes[members].sum())

    def texts(self, members: NDArray[np.bool_]) -> Iterator[str]:
        """Text of the documents marked in `members`, in order, read one at a time."""
        starts = np.cumsum(self.sizes) - self.sizes
        with self.path.open("rb") as file:
            for start, size, member in zip(starts, self.sizes, members, strict=True):
                if member:
                    file.seek(int(start))
                    yield file.read(int(size)).decode("utf-8")


def spool(source: Source, path: Path, progress: Progress | None = None) -> Corpus:
    """Read the source once into `path` and decide the split.

    Documents with the same text are one document, and the one the source holds out wins. If the source holds
    documents out, those are the validation split; otherwise about 5 % of the documents are, chosen by a hash
    of their text, so a document keeps its side when others come or go. Validation text beyond 4 MB is left
    out of both splits where the source held it out, and stays in training where the hash chose it.

    Raises SourceError if either split would be empty.
    """
    sizes: list[int] = []
    digests: list[bytes] = []
    held_out: list[bool] = []
    seen: set[bytes] = set()
    duplicates = written = 0
    reported = 0
    with path.open("wb") as file:
        for document in source.documents():
            data = document.text.encode("utf-8", "replace")  # a lone surrogate in JSON has no UTF-8 form
            if not data.strip():
                continue
            digest = hashlib.blake2b(data, digest_size=16).digest()
            if digest in seen:
                duplicates += 1
                continue
            seen.add(digest)
            file.write(data)
            sizes.append(len(data))
            digests.append(digest)
            held_out.append(document.held_out)
            written += len(data)
            if progress is not None and written - reported >= 10 * _MEGABYTE:
                reported = written
                progress(f"reading text: {written // _MEGABYTE} MB")
    if not sizes:
        raise SourceError(f"{source.kind}: no documents with any text")

    words = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)
    size_array = np.array(sizes, dtype=np.int64)
    in_training, in_validation = _split(
        source.kind, size_array, words[:, 0], np.array(held_out, dtype=np.bool_)
    )
    sides = in_training + 2 * in_validation.astype(np.uint8)
    content = hashlib.blake2b(digest_size=16)
    for digest, side in zip(digests, sides.tolist(), strict=True):
        content.update(digest + bytes([side]))
    return Corpus(
        path, size_array, words[:, 1].copy(), in_training, in_validation, content.hexdigest(), duplicates
    )


def _split(
    kind: str, sizes: NDArray[np.int64], keys: NDArray[np.uint64], held_out: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which documents are for training and which for validation; never both."""
    if held_out.any():
        if held_out.all():
            raise SourceError(f"{kind}: every document is in a validation file; none is left for training")
        in_training, candidates = ~held_out, held_out
    else:
        if len(sizes) < 2:
            raise SourceError(
                f"{kind}: only one document, so none can be held out; add a file whose name starts with"
                " validation, or cut the text into several documents"
            )
        candidates = keys < np.uint64(VALIDATION_FRACTION * 2**64)
        if not candidates.any() or candidates.all():  # a corpus of a few documents: hold out one
            candidates = np.arange(len(keys)) == int(np.argmin(keys))
        in_training = ~candidates
    # A document counts if the ones before it left room; so the first is in whatever its size.
    before = np.cumsum(np.where(candidates, sizes, 0)) - sizes
    in_validation = candidates & (before < VALIDATION_MAX_BYTES)
    if not held_out.any():
        in_training = ~in_validation
    return in_training, in_validation
