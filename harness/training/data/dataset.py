"""Token cache: from a source string to memory-mapped tokens, built once per content and vocabulary.

A cache folder is named by what it is built from (content of the text, vocabulary size, versions of this code
and of the tokenizer library), is written under another name and renamed when whole, and is built by one
process while others wait. A small index remembers the content of a source by the paths, sizes and times of
its files, so that a second trial reads no text at all.

`data_id` names the tokens themselves: a hash of the text, its order and split, and the trained tokenizer.
It is what rows carry, so the same corpus at another path is the same data.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from filelock import FileLock
from numpy.typing import NDArray
from tokenizers import Tokenizer

from harness.measure.cache import cache_folder
from harness.training.data.corpus import Corpus, Progress, spool
from harness.training.data.sources import Source, parse_source
from harness.training.data.tokenizer import (
    END_OF_TEXT_ID,
    MIN_VOCAB_SIZE,
    VocabularyError,
    as_text_only,
    bytes_of_tokens,
    encode_documents,
    sample_bytes,
    train_tokenizer,
)

# Raise when the same source and vocabulary would give other tokens: cached ones are then left alone.
DATA_VERSION = 1

Tokens = NDArray[np.uint16] | NDArray[np.uint32]


@dataclass(frozen=True)
class TokenDataset:
    """Tokens of one source, split for good. `train` and `validation` are read-only maps of files.

    Both start with end-of-text, and every document is followed by one.
    """

    folder: Path
    meta: dict[str, Any]
    train: Tokens
    validation: Tokens

    @property
    def data_id(self) -> str:
        """Fingerprint of text, split and tokenizer: 16 hexadecimal digits."""
        return str(self.meta["data_id"])

    @property
    def vocab_size(self) -> int:
        """Entries of the tokenizer."""
        return int(self.meta["vocab_size"])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer the tokens were made with."""
        return as_text_only(Tokenizer.from_file(str(self.folder / "tokenizer.json")))

    @cached_property
    def token_bytes(self) -> NDArray[np.int64]:
        """Bytes of text each token stands for, [vocab_size]."""
        return bytes_of_tokens(self.tokenizer)


def prepare(
    source: str, vocab_size: int, *, cache_root: Path | str | None = None, progress: Progress | None = None
) -> TokenDataset:
    """Tokens of `source` under a tokenizer of `vocab_size` entries, from the cache or built now.

    `source` is `stdlib`, `files:GLOB` or `hf:NAME...` (see `harness.training.data.sources`). `progress` is
    called with a short text while something is built, and not at all on a cache hit. Any number of processes
    may call this at once. Raises SourceError or VocabularyError (both ValueError) for input that cannot work.
    """
    root, parsed, request = _request(source, vocab_size, cache_root)
    pointer = _pointer(root, request)
    found = _follow(root, pointer)
    if found is not None:
        return found
    for name in ("index", "locks", "work"):
        (root / name).mkdir(parents=True, exist_ok=True)
    with FileLock(root / "locks" / f"{request}.lock"):
        found = _follow(root, pointer)  # another process may have built it while this one waited
        if found is not None:
            return found
        work = root / "work" / request
        shutil.rmtree(work, ignore_errors=True)  # left by a process that was killed while it held the lock
        work.mkdir()
        try:
            corpus = spool(parsed, work / "text", progress)
            build = _hash(corpus.content_id, vocab_size, DATA_VERSION, tokenizers.__version__)
            with FileLock(root / "locks" / f"{build}.lock"):
                if not (root / build).exists():
                    _build(corpus, vocab_size, parsed.kind, work / "tokens", progress)
                    (work / "tokens").replace(root / build)
            _write_json(work / "pointer", {"folder": build})
            (work / "pointer").replace(pointer)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return _load(root / build)


def find(source: str, vocab_size: int, *, cache_root: Path | str | None = None) -> TokenDataset | None:
    """Tokens of `source` if the cache has them, else None; no text is read and nothing is written.

    Raises what `prepare` raises for a source or a vocabulary that cannot be used.
    """
    root, _, request = _request(source, vocab_size, cache_root)
    return _follow(root, _pointer(root, request))


def _request(source: str, vocab_size: int, cache_root: Path | str | None) -> tuple[Path, Source, str]:
    """The cache folder, the source, and the name of what is asked for."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise VocabularyError(f"vocab_size must be at least {MIN_VOCAB_SIZE}, not {vocab_size}")
    root = Path(cache_root) if cache_root is not None else cache_folder()
    parsed = parse_source(source)
    return root, parsed, _hash(parsed.identity(), vocab_size, DATA_VERSION, tokenizers.__version__)


def _pointer(root: Path, request: str) -> Path:
    """The index entry that says which folder answers a request."""
    return root / "index" / f"{request}.json"


def stats(
    source: str, vocab_size: int, *, cache_root: Path | str | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """What a person asks of a corpus before training on it: a flat dict of counts, in reading order.

    Prepares the tokens if they are not there. Raises what `prepare` raises.
    """
    dataset = prepare(source, vocab_size, cache_root=cache_root, progress=progress)
    values: dict[str, Any] = {
        "source": dataset.meta["source"],
        "data_id": dataset.data_id,
        "vocab_size": dataset.vocab_size,
        "folder": str(dataset.folder),
    }
    for split in ("train", "validation"):
        for name, value in dataset.meta[split].items():
            values[f"{split}_{name}"] = value
    values["duplicate_documents_dropped"] = dataset.meta["duplicates"]
    return values


def _follow(root: Path, pointer: Path) -> TokenDataset | None:
    """The data set an index entry points to, or None if the entry or the folder is not there."""
    try:
        folder = root / str(json.loads(pointer.read_text(encoding="utf-8"))["folder"])
    except FileNotFoundError:
        return None
    return _load(folder) if folder.exists() else None


def _load(folder: Path) -> TokenDataset:
    """Map a finished cache folder."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    dtype = np.dtype(meta["dtype"])
    train, validation = (
        np.memmap(folder / f"{split}.bin", dtype=dtype, mode="r") for split in ("train", "validation")
    )
    return TokenDataset(folder, meta, train, validation)


def _build(corpus: Corpus, vocab_size: int, kind: str, folder: Path, progress: Progress | None) -> None:
    """Train the tokenizer, encode both splits and write one whole cache folder."""
    folder.mkdir()
    if progress is not None:
        progress(f"training a tokenizer of {vocab_size} entries")
    sample = _tokenizer_sample(corpus, vocab_size)
    tokenizer = train_tokenizer(corpus.texts(sample), vocab_size)
    tokenizer_text = tokenizer.to_str(pretty=False)
    (folder / "tokenizer.json").write_text(tokenizer_text, encoding="utf-8")

    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    splits: dict[str, dict[str, Any]] = {}
    for split, members in (("train", corpus.in_training), ("validation", corpus.in_validation)):
        tokens = _encode_split(tokenizer, corpus, split, folder / f"{split}.bin", dtype, progress)
        size = corpus.bytes_of(members)
        splits[split] = {
            "documents": int(members.sum()),
            "bytes": size,
            "tokens": tokens,
            "bytes_per_token": size / tokens,
        }
    _write_json(
        folder / "meta.json",
        {
            "data_id": _hash(corpus.content_id, tokenizer_text, DATA_VERSION),
            "source": kind,
            "content_id": corpus.content_id,
            "vocab_size": vocab_size,
            "dtype": dtype.name,
            "data_version": DATA_VERSION,
            "tokenizers_version": tokenizers.__version__,
            "tokenizer_sample_bytes": corpus.bytes_of(sample),
            "duplicates": corpus.duplicates,
            **splits,
        },
    )


def _tokenizer_sample(corpus: Corpus, vocab_size: int) -> NDArray[np.bool_]:
    """Training documents the tokenizer is trained on: all, or a fair draw of about the wanted size.

    Drawn by a hash of the text and not from the front, where a corpus may hold only one kind of text.
    """
    share = sample_bytes(vocab_size) / max(1, corpus.bytes_of(corpus.in_training))
    if share >= 1.0:
        return corpus.in_training
    drawn = corpus.in_training & (corpus.order_keys < np.uint64(share * 2**64))
    return drawn if drawn.any() else corpus.in_training


def _encode_split(
    tokenizer: Tokenizer,
    corpus: Corpus,
    split: str,
    path: Path,
    dtype: np.dtype[Any],
    progress: Progress | None,
) -> int:
    """Write one split's tokens to `path`; returns how many."""
    members = corpus.in_training if split == "train" else corpus.in_validation
    total = int(members.sum())
    done, tokens = 0, 1
    with path.open("wb") as file:
        np.array([END_OF_TEXT_ID], dtype=dtype).tofile(file)  # so the first document has a start as well
        for documents, ids in encode_documents(tokenizer, corpus.texts(members)):
            ids.astype(dtype).tofile(file)
            tokens += len(ids)
            done += documents
            if progress is not None:
                progress(f"encoding {split} text: {100 * done // total} %")
    return tokens


def _hash(*parts: object) -> str:
    """16 hexadecimal digits over the parts."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:16]


def _write_json(path: Path, values: dict[str, Any]) -> None:
    """JSON for people as well as for `_load`."""
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
