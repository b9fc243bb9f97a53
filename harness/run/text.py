"""The text that a sweep trains on: tokenised, or found already tokenised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harness.errors import UserError
from harness.sweep.grid import vocab_sizes
from harness.sweep.model import Sweep


def prepare_data(sweep: Sweep, say: Callable[[str], None]) -> dict[int, str]:
    """Tokenise the sweep's text for every vocabulary it needs; returns fingerprints by vocabulary size.

    Raises UserError naming the source if it cannot be read or is too small for the vocabulary.
    """
    sizes = sorted({size for part in sweep.parts for size in vocab_sizes(part)})
    if not sizes:
        return {}
    from harness.training.data import SourceError, prepare
    from harness.training.data.tokenizer import VocabularyError

    ids = {}
    for size in sizes:
        say(f"text: {describe_source(sweep.data)}, vocabulary {size:,}")
        try:
            ids[size] = prepare(sweep.data, size, progress=say).data_id
        except (SourceError, VocabularyError) as error:
            raise UserError(str(error)) from error
    return ids


def find_data(sweep: Sweep) -> dict[int, str]:
    """As `prepare_data`, but only what is tokenised already: nothing is read, built or written.

    Raises UserError for a source or a vocabulary that cannot be used.
    """
    from harness.training.data import SourceError, find
    from harness.training.data.tokenizer import VocabularyError

    ids = {}
    for size in sorted({size for part in sweep.parts for size in vocab_sizes(part)}):
        try:
            dataset = find(sweep.data, size)
        except (SourceError, VocabularyError) as error:
            raise UserError(str(error)) from error
        if dataset is not None:
            ids[size] = dataset.data_id
    return ids


def describe_source(source: str) -> str:
    """A text source without the path of this machine: only the last part of a `files:` pattern is kept."""
    kind, _, rest = source.partition(":")
    return f"files:{Path(rest).name}" if kind == "files" else source
