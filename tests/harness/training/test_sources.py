"""Sources: which documents a source string gives, and what it says when it cannot."""

from __future__ import annotations

import json
import lzma
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from harness.training.data.sources import Document, HubSource, SourceError, parse_source


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """A JSON Lines file of documents."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def texts_of(source: str) -> list[str]:
    """Texts of all documents of a source."""
    return [document.text for document in parse_source(source).documents()]


def test_stdlib_is_python_itself_and_nothing_installed() -> None:
    """`stdlib` holds help topics and library modules, in a fixed order, and no tests or packages."""
    source = parse_source("stdlib")
    documents = list(source.documents())
    texts = [document.text for document in documents]
    assert texts == [document.text for document in source.documents()]
    assert any("class ArgumentParser" in text for text in texts)
    assert any(text.lstrip().startswith('The "assert" statement') for text in texts)
    assert not any(document.held_out for document in documents)
    assert not any("packages" in part for path in source.paths() for part in path.parts)  # type: ignore[union-attr]
    assert 5_000_000 < sum(map(len, texts)) < 20_000_000


def test_all_file_types_hold_the_same_documents(tmp_path: Path) -> None:
    """A text read from .jsonl, .jsonl.xz and .parquet is the same text, and .txt is one document."""
    texts = ["one\n\nwith ünïcödé", "two"]
    plain = write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(plain.read_bytes()))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "other": [1, 2]}), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text(texts[0], encoding="utf-8")
    for name in ("a.jsonl", "b.jsonl.xz", "c.parquet"):
        assert texts_of(f"files:{tmp_path}/{name}") == texts
    assert texts_of(f"files:{tmp_path}/d.txt") == texts[:1]


def test_glob_reaches_into_folders_and_skips_other_files(tmp_path: Path) -> None:
    """`**` matches files at any depth, sorted by path; files of other types are not read."""
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "b" / "c" / "2.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "README.md").write_text("not data")
    assert texts_of(f"files:{tmp_path}/**/*") == ["first", "second"]


@pytest.mark.parametrize(
    ("name", "held_out"),
    [
        ("validation.jsonl", True),
        ("valid-0.jsonl", True),
        ("val_00000.jsonl", True),
        ("TEST.jsonl", True),
        ("dev1.jsonl", True),
        ("value_added.jsonl", False),
        ("testimony.jsonl", False),
        ("train.jsonl", False),
    ],
)
def test_validation_files_are_known_by_name(tmp_path: Path, name: str, held_out: bool) -> None:
    """A file is validation if its name starts with one of the words, not with a longer word."""
    write_jsonl(tmp_path / name, ["text"])
    assert list(parse_source(f"files:{tmp_path}/*").documents()) == [Document("text", held_out)]


def test_validation_files_come_first(tmp_path: Path) -> None:
    """Held-out documents precede all others, so that a later copy can be recognised."""
    write_jsonl(tmp_path / "a.jsonl", ["training"])
    write_jsonl(tmp_path / "validation.jsonl", ["held out"])
    assert texts_of(f"files:{tmp_path}/*") == ["held out", "training"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("stdlb", r"'stdlb' is not one of stdlib, files:GLOB.*did you mean stdlib\?"),
        ("file:x", r"did you mean files\?"),
        ("files:", r"'files:' is not one of"),
        ("hf:a:b:c:d", r"too many parts; write hf:NAME\[:CONFIG\]\[:SPLIT\]"),
        ("hf:c4?max_byte=3", "max_byte is not one of max_documents, max_bytes"),
        ("hf:c4?max_bytes=few", "max_bytes must be a number of at least 1, not 'few'"),
        ("hf:c4?max_bytes=0", "max_bytes must be a number of at least 1, not '0'"),
    ],
)
def test_bad_source_strings_are_explained(source: str, message: str) -> None:
    """A source string that means nothing names itself and what would be accepted."""
    with pytest.raises(SourceError, match=message):
        parse_source(source)


def _no_match(folder: Path) -> str:
    return "matches no file; files end in .txt"


def _only_other_types(folder: Path) -> str:
    (folder / "notes.md").write_text("x")
    return "matches only notes.md; files end in .txt"


def _bad_json(folder: Path) -> str:
    (folder / "a.jsonl").write_text('{"text": "fine"}\n\n{"text": \n')
    return r"a\.jsonl:3: not a line of JSON"


def _no_text_key(folder: Path) -> str:
    (folder / "a.jsonl").write_text('{"text": "fine"}\n{"body": "x", "id": 1}\n')
    return r"a\.jsonl:2: no key 'text'; the record has body, id"


def _text_is_null(folder: Path) -> str:
    (folder / "a.jsonl").write_text('{"text": null}\n')
    return r"a\.jsonl:1: 'text' must be a string, found NoneType"


def _not_an_object(folder: Path) -> str:
    (folder / "a.jsonl").write_text('["text"]\n')
    return r"a\.jsonl:1: expected an object with the key 'text', found list"


def _not_utf8(folder: Path) -> str:
    (folder / "a.txt").write_bytes(b"caf\xe9")
    return r"a\.txt: not UTF-8 text"


def _truncated_xz(folder: Path) -> str:
    (folder / "a.jsonl.xz").write_bytes(lzma.compress(b'{"text": "x"}\n' * 1000)[:-20])
    return r"a\.jsonl\.xz: broken xz file"


def _no_text_column(folder: Path) -> str:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), folder / "a.parquet")
    return r"a\.parquet: no column 'text'; it has body, id"


def _null_in_parquet(folder: Path) -> str:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None]}), folder / "a.parquet")
    return r"a\.parquet row 2: 'text' must be a string, found NoneType"


def _not_parquet(folder: Path) -> str:
    (folder / "a.parquet").write_bytes(b"not at all")
    return r"a\.parquet: not a Parquet file"


@pytest.mark.parametrize(
    "make",
    [
        _no_match,
        _only_other_types,
        _bad_json,
        _no_text_key,
        _text_is_null,
        _not_an_object,
        _not_utf8,
        _truncated_xz,
        _no_text_column,
        _null_in_parquet,
        _not_parquet,
    ],
    ids=lambda make: make.__name__.strip("_"),
)
def test_unreadable_files_name_file_and_line(tmp_path: Path, make: Callable[[Path], str]) -> None:
    """Whatever is wrong with a file, the message says which file, where, and what was expected."""
    message = make(tmp_path)
    with pytest.raises(SourceError, match=message):
        texts_of(f"files:{tmp_path}/*")


class FakeHub(types.ModuleType):
    """Stands in for the `datasets` package: endless streams, and a record of what was asked for."""

    def __init__(self) -> None:
        super().__init__("datasets")
        self.asked: list[tuple[str, str | None, str, bool]] = []

    def load_dataset(
        self, name: str, config: str | None, *, split: str, streaming: bool
    ) -> Iterator[dict[str, Any]]:
        """A stream of numbered ten-byte documents."""
        self.asked.append((name, config, split, streaming))
        return ({"text": f"{split[:3]}{number:07d}", "url": "x"} for number in range(10**7))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The fake package, importable as `datasets`."""
    monkeypatch.setattr("harness.training.data.sources.VALIDATION_STREAM_BYTES", 1000)
    fake = FakeHub()
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


def test_hub_stream_is_bounded_by_documents_or_bytes(hub: FakeHub) -> None:
    """The training split ends at the first bound reached, and is streamed, not downloaded."""
    assert texts_of("hf:someone/texts?max_documents=3") == ["tra0000000", "tra0000001", "tra0000002"]
    assert len(texts_of("hf:someone/texts:en:part?max_bytes=95")) == 10
    assert hub.asked == [("someone/texts", None, "train", True), ("someone/texts", "en", "part", True)]


def test_hub_short_names_and_their_own_validation_split(hub: FakeHub) -> None:
    """`c4` and `wikitext` hold out their own validation split; `fineweb-edu` has none."""
    documents = list(parse_source("hf:wikitext?max_documents=2").documents())
    assert [document.held_out for document in documents[-3:]] == [True, False, False]
    assert [document.text for document in documents[-2:]] == ["tra0000000", "tra0000001"]
    assert hub.asked == [
        ("Salesforce/wikitext", "wikitext-103-raw-v1", "validation", True),
        ("Salesforce/wikitext", "wikitext-103-raw-v1", "train", True),
    ]
    c4 = parse_source("hf:c4")
    assert isinstance(c4, HubSource)
    assert (c4.name, c4.config, c4.split, c4.validation_split) == ("allenai/c4", "en", "train", "validation")
    edu = parse_source("hf:fineweb-edu:sample-100BT")
    assert isinstance(edu, HubSource)
    assert (edu.name, edu.config, edu.validation_split) == ("HuggingFaceFW/fineweb-edu", "sample-100BT", None)


def test_hub_record_without_text_is_named(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set whose records have another key says which keys they have."""
    monkeypatch.setattr(hub, "load_dataset", lambda *_, **__: iter([{"content": "x"}]), raising=False)
    with pytest.raises(SourceError, match=r"hf:a/b train record 1: no key 'text'; the record has content"):
        texts_of("hf:a/b")


def test_hub_without_the_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `datasets` the message is one line with the command that installs it."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SourceError, match=r"^hf:allenai/c4: needs the package datasets; .*mocbench\[hf\]'$"):
        texts_of("hf:c4")
