"""Where text comes from: `stdlib`, `files:GLOB` or `hf:NAME`, each a stream of documents.

A source says three things: `identity()`, a cheap string that changes whenever its content may have changed
(so that an unchanged source is never read twice); `documents()`, always in the same order; and `kind`, the
one word of it that may appear in tables, since a path may not.
"""

from __future__ import annotations

import difflib
import glob
import importlib
import json
import lzma
import os
import platform
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import parse_qsl

FILE_SUFFIXES = (".txt", ".jsonl", ".jsonl.xz", ".parquet")

# `valid`, `validation-00`, `test_1`: yes. `value_added`, `testimony`: a longer word, so no.
_HELD_OUT_NAME = re.compile(r"(validation|valid|val|test|dev)(?![a-z])", re.IGNORECASE)

# Not prose or code a person wrote to be read: tests and their fixtures, character tables, generated topics
# (they are read as documents of their own) and whatever else was installed into the library folder.
_STDLIB_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo"}
    | {"encodings", "pydoc_data", "lib-dynload", "__phello__", "__pycache__"}
)


class SourceError(ValueError):
    """The source string, or what it points to, cannot be used; the message names the file and the line."""


@dataclass(frozen=True)
class Document:
    """One document. `held_out` is True if the source itself says that it is for validation."""

    text: str
    held_out: bool = False


@dataclass(frozen=True)
class StdlibSource:
    """The interpreter's own documentation topics and standard library sources: always there, no network.

    The same for everybody with the same Python version, apart from what a distribution leaves out; the
    fingerprint of the content tells such copies apart.
    """

    root: Path
    kind: str = "stdlib"

    def paths(self) -> list[Path]:
        """The `.py` files that are read, sorted by their path inside the library."""
        kept = []
        for folder, subfolders, names in os.walk(self.root):
            subfolders[:] = [name for name in subfolders if name not in _STDLIB_SKIPPED]
            kept += [
                Path(folder, name)
                for name in names
                if name.endswith(".py") and not name.startswith("_sysconfigdata")  # generated: build paths
            ]
        return sorted(kept, key=lambda path: path.relative_to(self.root).as_posix())

    def identity(self) -> str:
        """Python version and the size and time of every file."""
        return f"stdlib {platform.python_version()} {_stamps(self.paths())}"

    def documents(self) -> Iterator[Document]:
        """Topics in the order of their names, then one document per file."""
        for _, topic in sorted(_documentation_topics().items()):
            yield Document(topic)
        paths = self.paths()
        if not paths:
            raise SourceError(
                f"stdlib: {self.root} holds no .py files; this Python has no sources, use files:GLOB"
            )
        for path in paths:
            try:
                with tokenize.open(path) as file:  # honours the file's own coding line
                    text = file.read()
            except (SyntaxError, UnicodeDecodeError):  # a coding line that does not fit: not text
                continue
            yield Document(text)


@dataclass(frozen=True)
class FilesSource:
    """Files matched by a glob pattern; `**` matches any number of folders.

    A `.txt` file is one document; `.jsonl` and `.jsonl.xz` hold one JSON object a line with the key `text`;
    `.parquet` has a column `text`. If the name of any file starts with the word validation, valid, val,
    test or dev, those files are the validation split, and no other document is held out.
    """

    pattern: str
    kind: str = "files"

    def paths(self) -> list[Path]:
        """Matching files of a known type: validation files first, then by name.

        Raises SourceError if there are none.
        """
        matches = [Path(name) for name in glob.glob(str(Path(self.pattern).expanduser()), recursive=True)]
        files = sorted(path.resolve() for path in matches if path.is_file())
        known = [path for path in files if path.name.endswith(FILE_SUFFIXES)]
        if not known:
            found = f"only {files[0].name}" if len(files) == 1 else f"{len(files)} files, none readable"
            raise SourceError(
                f"files:{self.pattern}: "
                + (f"matches {found}" if files else "matches no file")
                + f"; files end in {', '.join(FILE_SUFFIXES)}"
            )
        return sorted(known, key=lambda path: (not _is_held_out(path), path))

    def identity(self) -> str:
        """Path, size and modification time of every file."""
        return f"files {_stamps(self.paths())}"

    def documents(self) -> Iterator[Document]:
        """Every record, validation files first, so that their copies in training can be dropped.

        Raises SourceError, naming file and line, for a record that cannot be read or has no text.
        """
        for path in self.paths():
            held_out = _is_held_out(path)
            for text in _read_file(path):
                yield Document(text, held_out)


@dataclass(frozen=True)
class HubSource:
    """A data set of the Hugging Face hub, streamed; needs the `hf` extra.

    `max_documents` and `max_bytes` bound what is taken from the training split, which can be terabytes.
    """

    name: str
    config: str | None
    split: str
    validation_split: str | None
    max_documents: int | None
    max_bytes: int
    kind: str = "hf"

    def identity(self) -> str:
        """All that was asked for; a change on the hub itself is not noticed once the tokens are cached."""
        return f"hf {self!r}"

    def documents(self) -> Iterator[Document]:
        """The validation split, if the data set is known to have one, then the training split.

        Raises SourceError if `datasets` is not installed or a record has no text.
        """
        try:
            datasets = importlib.import_module("datasets")
        except ImportError as error:
            raise SourceError(
                f"hf:{self.name}: needs the package datasets; install it with pip install 'mocbench[hf]'"
            ) from error
        if self.validation_split is not None:
            # The bound is on training text; how much validation text is kept is decided by the split.
            for text in _take(self._texts(datasets, self.validation_split), None, VALIDATION_STREAM_BYTES):
                yield Document(text, held_out=True)
        for text in _take(self._texts(datasets, self.split), self.max_documents, self.max_bytes):
            yield Document(text)

    def _texts(self, datasets: Any, split: str) -> Iterator[str]:
        """Texts of one split, in the order of the stream."""
        rows = datasets.load_dataset(self.name, self.config, split=split, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield _record_text(row, f"hf:{self.name} {split} record {number}")


Source = StdlibSource | FilesSource | HubSource

VALIDATION_STREAM_BYTES = 8_000_000  # twice the most validation text that is kept: room for duplicates
DEFAULT_HUB_BYTES = 500_000_000  # about 120M tokens of a 32k vocabulary

# Short names: repository, default configuration, split that the data set itself holds out.
KNOWN_HUB_NAMES: dict[str, tuple[str, str, str | None]] = {
    "c4": ("allenai/c4", "en", "validation"),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", None),
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1", "validation"),
}


def parse_source(text: str) -> Source:
    """Source named by a string.

    Forms: `stdlib`; `files:GLOB`; `hf:NAME[:CONFIG][:SPLIT][?max_documents=N&max_bytes=N]`, where NAME is
    c4, fineweb-edu, wikitext or a repository of the hub. Raises SourceError for anything else.
    """
    kind, colon, rest = text.partition(":")
    if kind == "stdlib" and not colon:
        return StdlibSource(Path(sysconfig.get_path("stdlib")))
    if kind == "files" and rest:
        return FilesSource(rest)
    if kind == "hf" and rest:
        return _parse_hub(text, rest)
    near = difflib.get_close_matches(kind, ("stdlib", "files", "hf"), n=1)
    hint = f"; did you mean {near[0]}?" if near and near[0] != kind else ""
    raise SourceError(
        f"data source {text!r} is not one of stdlib, files:GLOB, hf:NAME[:CONFIG][:SPLIT]{hint}"
    )


def _parse_hub(text: str, rest: str) -> HubSource:
    """The `hf:` form: short names resolved, limits read."""
    address, _, query = rest.partition("?")
    name, *more = address.split(":")
    if len(more) > 2:
        raise SourceError(f"data source {text!r} has too many parts; write hf:NAME[:CONFIG][:SPLIT]")
    limits: dict[str, int] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in ("max_documents", "max_bytes"):
            raise SourceError(f"data source {text!r}: {key} is not one of max_documents, max_bytes")
        try:
            limits[key] = int(float(value))
        except (ValueError, OverflowError):
            limits[key] = 0
        if limits[key] < 1:
            raise SourceError(f"data source {text!r}: {key} must be a number of at least 1, not {value!r}")
    repository, default_config, validation = KNOWN_HUB_NAMES.get(name, (name, "", None))
    config = (more[0] if more else "") or default_config
    split = (more[1] if len(more) > 1 else "") or "train"
    return HubSource(
        repository,
        config or None,
        split,
        validation if validation != split else None,
        limits.get("max_documents"),
        limits.get("max_bytes", DEFAULT_HUB_BYTES),
    )


def _documentation_topics() -> dict[str, str]:
    """Topics of `help()`; some distributions leave them out, then there are none."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return {}
    return {str(name): str(text) for name, text in topics.items()}


def _stamps(paths: Iterable[Path]) -> str:
    """Path, size and modification time of each file: what a changed file would change."""
    stats = [(path, path.stat()) for path in paths]
    return json.dumps([(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats])


def _is_held_out(path: Path) -> bool:
    """Whether the file's name says that it is a validation file."""
    return _HELD_OUT_NAME.match(path.name) is not None


def _read_file(path: Path) -> Iterator[str]:
    """Texts of one file, by its suffix. Raises SourceError naming the file."""
    try:
        if path.name.endswith(".txt"):
            yield path.read_text(encoding="utf-8")
        elif path.name.endswith(".jsonl"):
            with path.open(encoding="utf-8") as file:
                yield from _read_lines(path, file)
        elif path.name.endswith(".jsonl.xz"):
            with lzma.open(path, "rt", encoding="utf-8") as file:
                yield from _read_lines(path, file)
        else:
            yield from _read_parquet(path)
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 text ({error.reason})") from error
    except (lzma.LZMAError, EOFError) as error:
        raise SourceError(f"{path}: broken xz file ({error})") from error


def _read_lines(path: Path, file: TextIO) -> Iterator[str]:
    """Texts of a JSON Lines file; blank lines are skipped."""
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise SourceError(f"{path}:{number}: not a line of JSON ({error.msg})") from error
        yield _record_text(record, f"{path}:{number}")


def _read_parquet(path: Path) -> Iterator[str]:
    """Column `text` of a Parquet file, a batch of rows at a time."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise SourceError(f"{path}: not a Parquet file ({error})") from error
    with file:
        columns = file.schema_arrow.names
        if "text" not in columns:
            raise SourceError(f"{path}: no column 'text'; it has {', '.join(columns)}")
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=["text"]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield _record_text({"text": value}, f"{path} row {number}")


def _record_text(record: Any, place: str) -> str:
    """The record's text. Raises SourceError naming the place if it is missing or not a string."""
    if not isinstance(record, dict):
        raise SourceError(f"{place}: expected an object with the key 'text', found {type(record).__name__}")
    if "text" not in record:
        raise SourceError(
            f"{place}: no key 'text'; the record has {', '.join(map(str, record)) or 'no keys'}"
        )
    text = record["text"]
    if not isinstance(text, str):
        raise SourceError(f"{place}: 'text' must be a string, found {type(text).__name__}")
    return text


def _take(texts: Iterable[str], max_documents: int | None, max_bytes: int) -> Iterator[str]:
    """Texts until either bound is reached; the document that passes the bound is the last one."""
    taken = 0
    for number, text in enumerate(texts, start=1):
        yield text
        taken += len(text.encode("utf-8", "replace"))
        if taken >= max_bytes or number == max_documents:
            return
