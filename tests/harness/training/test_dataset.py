"""From text to tokens: the split, the tokenizer, the cache and its fingerprint."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.measure.cache import cache_folder
from harness.training.data import corpus as corpus_module
from harness.training.data.corpus import spool
from harness.training.data.dataset import prepare, stats
from harness.training.data.sources import SourceError, parse_source
from harness.training.data.tokenizer import (
    END_OF_TEXT,
    END_OF_TEXT_ID,
    VocabularyError,
    bytes_of_tokens,
    encode_documents,
    train_tokenizer,
)

WORDS = ["the", "channel", "gate", "keeps", "some", "of", "its", "largest", "values", "while", "training"]


def make_texts(count: int, seed: int = 0, length: int = 40) -> list[str]:
    """Different documents of ordinary words, in a fixed order."""
    generator = np.random.default_rng(seed)
    return [
        f"Document {number}. " + " ".join(generator.choice(WORDS, size=length).tolist()) + ".\n"
        for number in range(count)
    ]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """A JSON Lines file of documents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def split_texts(source: str, folder: Path) -> tuple[list[str], list[str]]:
    """Training and validation texts of a source."""
    folder.mkdir(exist_ok=True)
    corpus = spool(parse_source(source), folder / "text")
    return list(corpus.texts(corpus.in_training)), list(corpus.texts(corpus.in_validation))


def documents_of(tokens: np.ndarray) -> list[tuple[int, ...]]:
    """Token sequences between end-of-text marks."""
    ends = np.flatnonzero(tokens == END_OF_TEXT_ID)
    return [tuple(tokens[a + 1 : b].tolist()) for a, b in itertools.pairwise(ends)]


# --- split -----------------------------------------------------------------------------------------------


def test_split_is_disjoint_and_complete(tmp_path: Path) -> None:
    """Every document is on exactly one side, about one in twenty is for validation, copies are dropped."""
    texts = make_texts(1000)
    write_jsonl(tmp_path / "a.jsonl", texts + texts[:100])
    train, validation = split_texts(f"files:{tmp_path}/a.jsonl", tmp_path / "work")
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(texts)
    assert 25 <= len(validation) <= 80


def test_a_document_keeps_its_side_when_others_come(tmp_path: Path) -> None:
    """Adding documents moves none of the earlier ones between training and validation."""
    texts = make_texts(400)
    write_jsonl(tmp_path / "a.jsonl", texts[:200])
    write_jsonl(tmp_path / "b.jsonl", texts[200:] + texts[:200])
    few, many = (split_texts(f"files:{tmp_path}/{n}.jsonl", tmp_path / "work") for n in "ab")
    assert set(few[0]) <= set(many[0])
    assert set(few[1]) <= set(many[1])


def test_training_copies_of_validation_files_are_dropped(tmp_path: Path) -> None:
    """A file named validation is the validation split wholesale, and its documents are not trained on."""
    texts = make_texts(200)
    write_jsonl(tmp_path / "train.jsonl", texts)
    write_jsonl(tmp_path / "validation.jsonl", texts[50:60])
    train, validation = split_texts(f"files:{tmp_path}/*", tmp_path / "work")
    assert validation == texts[50:60]
    assert train == texts[:50] + texts[60:]


def test_validation_text_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound, held-out documents are in neither split and hash-chosen ones stay in training."""
    monkeypatch.setattr(corpus_module, "VALIDATION_MAX_BYTES", 1000)
    texts = make_texts(500)
    write_jsonl(tmp_path / "own" / "train.jsonl", texts[:400] + texts[450:460])
    write_jsonl(tmp_path / "own" / "validation.jsonl", texts[400:])
    train, validation = split_texts(f"files:{tmp_path}/own/*", tmp_path / "work")
    assert train == texts[:400]
    assert 1 < len(validation) < 10
    assert validation == texts[400 : 400 + len(validation)]

    write_jsonl(tmp_path / "hash.jsonl", texts)
    train, validation = split_texts(f"files:{tmp_path}/hash.jsonl", tmp_path / "work")
    assert 1 < len(validation) < 10
    assert sorted(train + validation) == sorted(texts)


def test_two_documents_are_enough_and_one_is_not(tmp_path: Path) -> None:
    """The smallest corpus that can be split is split; a single document is an error that says what to do."""
    write_jsonl(tmp_path / "a.jsonl", ["one text", "another text"])
    train, validation = split_texts(f"files:{tmp_path}/a.jsonl", tmp_path / "work")
    assert len(train) == len(validation) == 1
    write_jsonl(tmp_path / "b.jsonl", ["one text", "one text", "   "])
    with pytest.raises(SourceError, match=r"only one document.*whose name starts with validation"):
        split_texts(f"files:{tmp_path}/b.jsonl", tmp_path / "work")
    write_jsonl(tmp_path / "c.jsonl", [])
    with pytest.raises(SourceError, match="no documents with any text"):
        split_texts(f"files:{tmp_path}/c.jsonl", tmp_path / "work")
    write_jsonl(tmp_path / "test.jsonl", ["one text"])
    with pytest.raises(SourceError, match="none is left for training"):
        split_texts(f"files:{tmp_path}/test.jsonl", tmp_path / "work")


# --- tokenizer -------------------------------------------------------------------------------------------

TOKENIZER = train_tokenizer(make_texts(200), 400)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_survives_the_round_trip(text: str) -> None:
    """Decoding the tokens of any Unicode text gives the text back, and their bytes add up to its bytes."""
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert bytes_of_tokens(TOKENIZER)[ids].sum() == len(text.encode("utf-8"))


def test_end_of_text_in_a_document_is_text() -> None:
    """A document that quotes the marker is not cut in two, and still decodes to itself."""
    text = f"before {END_OF_TEXT} after"
    (count, ids), *rest = encode_documents(TOKENIZER, [text])
    assert (count, rest) == (1, [])
    assert np.flatnonzero(ids == END_OF_TEXT_ID).tolist() == [len(ids) - 1]
    assert TOKENIZER.decode(ids[:-1].tolist(), skip_special_tokens=False) == text


def test_vocabulary_size_is_exact_and_training_deterministic() -> None:
    """The vocabulary has the size asked for, end-of-text included, and the same text gives the same one."""
    texts = make_texts(300, seed=1)
    first, second = (train_tokenizer(texts, 350) for _ in range(2))
    assert first.get_vocab_size() == 350
    assert first.token_to_id(END_OF_TEXT) == END_OF_TEXT_ID
    assert first.to_str() == second.to_str()


def test_impossible_vocabularies_are_refused() -> None:
    """Too small for all bytes, or too large for the text: the message says what would work."""
    with pytest.raises(VocabularyError, match="at least 257, not 100"):
        train_tokenizer(["x"], 100)
    with pytest.raises(VocabularyError, match=r"vocab_size 5000 is more than .* choose at most \d+"):
        train_tokenizer(make_texts(3), 5000)


def test_batching_does_not_change_the_tokens() -> None:
    """Documents encoded one by one and all together give the same stream."""
    texts = make_texts(50)
    together = np.concatenate([ids for _, ids in encode_documents(TOKENIZER, texts)])
    singly = np.concatenate([ids for _, ids in encode_documents(TOKENIZER, texts, batch_bytes=1)])
    np.testing.assert_array_equal(together, singly)


# --- cache -----------------------------------------------------------------------------------------------


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    """A corpus of a few hundred documents."""
    return write_jsonl(tmp_path / "corpus" / "texts.jsonl", make_texts(300))


def test_tokens_on_disk_are_the_documents(corpus_file: Path, tmp_path: Path) -> None:
    """Decoded, the two token files hold the two splits, and the counts in the metadata are theirs."""
    dataset = prepare(f"files:{corpus_file}", 400, cache_root=tmp_path / "cache")
    train, validation = split_texts(f"files:{corpus_file}", tmp_path / "work")
    assert dataset.vocab_size == 400
    assert dataset.train.dtype == np.uint16
    for tokens, texts, split in (
        (dataset.train, train, "train"),
        (dataset.validation, validation, "validation"),
    ):
        assert tokens[0] == tokens[-1] == END_OF_TEXT_ID
        assert [dataset.tokenizer.decode(ids) for ids in documents_of(tokens)] == texts
        size = sum(len(text.encode()) for text in texts)
        assert dataset.meta[split]["documents"] == len(texts)
        assert dataset.meta[split]["bytes"] == size == dataset.token_bytes[tokens].sum()
        assert dataset.meta[split]["tokens"] == len(tokens)
        assert dataset.meta[split]["bytes_per_token"] == size / len(tokens)


def test_splits_share_no_document_as_tokens(corpus_file: Path, tmp_path: Path) -> None:
    """No document of the validation tokens occurs among the training tokens."""
    dataset = prepare(f"files:{corpus_file}", 400, cache_root=tmp_path / "cache")
    assert not set(documents_of(dataset.train)) & set(documents_of(dataset.validation))


def test_a_second_call_builds_nothing(corpus_file: Path, tmp_path: Path) -> None:
    """On a hit nothing is reported, nothing is written, and the text is not even opened."""
    messages: list[str] = []
    root = tmp_path / "cache"
    first = prepare(f"files:{corpus_file}", 400, cache_root=root, progress=messages.append)
    assert messages
    messages.clear()
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    stamp = corpus_file.stat()
    corpus_file.write_bytes(b"\x00" * stamp.st_size)  # unreadable, but of the same size and time
    os.utime(corpus_file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    second = prepare(f"files:{corpus_file}", 400, cache_root=root, progress=messages.append)
    assert (messages, second.data_id) == ([], first.data_id)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_fingerprint_follows_content_not_path(corpus_file: Path, tmp_path: Path) -> None:
    """The same text elsewhere is the same data and is not encoded again; other text or vocabulary is not."""
    root = tmp_path / "cache"
    first = prepare(f"files:{corpus_file}", 400, cache_root=root)
    moved = tmp_path / "elsewhere" / "other.jsonl"
    moved.parent.mkdir()
    moved.write_bytes(corpus_file.read_bytes())
    messages: list[str] = []
    same = prepare(f"files:{moved}", 400, cache_root=root, progress=messages.append)
    assert (same.data_id, same.folder) == (first.data_id, first.folder)
    assert not any("encoding" in message for message in messages)
    apart = prepare(f"files:{moved}", 400, cache_root=tmp_path / "another cache")
    assert apart.data_id == first.data_id
    smaller = prepare(f"files:{corpus_file}", 399, cache_root=root)
    write_jsonl(moved, [*make_texts(300)[:-1], "One other document.\n"])
    changed = prepare(f"files:{moved}", 400, cache_root=root)
    assert len({first.data_id, smaller.data_id, changed.data_id}) == 3
    assert str(tmp_path) not in json.dumps(first.meta)


def test_leftovers_of_a_killed_build_are_harmless(corpus_file: Path, tmp_path: Path) -> None:
    """A cache folder that was removed, and half-written work of a killed process, lead to a whole rebuild."""
    root = tmp_path / "cache"
    first = prepare(f"files:{corpus_file}", 400, cache_root=root)
    tokens = np.array(first.train)
    for path in first.folder.iterdir():
        path.unlink()
    first.folder.rmdir()
    request = next((root / "index").iterdir()).stem
    (root / "work" / request / "tokens").mkdir(parents=True)
    (root / "work" / request / "tokens" / "train.bin").write_bytes(b"half")
    again = prepare(f"files:{corpus_file}", 400, cache_root=root)
    assert again.data_id == first.data_id
    np.testing.assert_array_equal(again.train, tokens)
    assert not list((root / "work").iterdir())


def _prepare_in_child(source: str, root: str, queue: multiprocessing.Queue) -> None:
    messages: list[str] = []
    dataset = prepare(source, 400, cache_root=root, progress=messages.append)
    queue.put((dataset.data_id, len(messages)))


def test_processes_at_once_build_once(corpus_file: Path, tmp_path: Path) -> None:
    """Of several processes that want the same tokens, one builds them and the others wait for it."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    arguments = (f"files:{corpus_file}", str(tmp_path / "cache"), queue)
    children = [context.Process(target=_prepare_in_child, args=arguments) for _ in range(3)]
    for child in children:
        child.start()
    results = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert len({data_id for data_id, _ in results}) == 1
    assert sorted(messages > 0 for _, messages in results) == [False, False, True]


def test_stats_are_flat_and_name_the_data(corpus_file: Path, tmp_path: Path) -> None:
    """`stats` gives plain values with the fingerprint and the counts of both splits."""
    values = stats(f"files:{corpus_file}", 400, cache_root=tmp_path / "cache")
    dataset = prepare(f"files:{corpus_file}", 400, cache_root=tmp_path / "cache")
    assert values["data_id"] == dataset.data_id
    assert values["train_documents"] + values["validation_documents"] == 300
    assert values["train_tokens"] == len(dataset.train)
    assert json.loads(json.dumps(values)) == values


def test_cache_root_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`MOCBENCH_CACHE` names the cache; without it, it is in the home folder's cache."""
    monkeypatch.setenv("MOCBENCH_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("MOCBENCH_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "mocbench"


def test_wide_vocabularies_use_wide_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary that does not fit 16 bits is stored in 32, and its tokens decode to the documents."""
    generator = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    texts = [" ".join("".join(w) for w in generator.choice(letters, (3000, 9))) for _ in range(12)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    dataset = prepare(f"files:{source}", 2**16 + 1, cache_root=tmp_path / "cache")
    assert dataset.train.dtype == np.uint32
    assert dataset.train.max() >= 2**16
    train, _ = split_texts(f"files:{source}", tmp_path / "work")
    assert [dataset.tokenizer.decode(ids) for ids in documents_of(dataset.train)] == train
