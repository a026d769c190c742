"""Corpora: counting, vocabularies, folder layouts, cache, errors."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from deqzoo.data import text
from deqzoo.errors import UserError

ROWS = {
    "train": ["", " = Title = ", "", " b a b c ", "the b"],
    "validation": ["c d"],
    "test": ["E the", ""],
}


def write_parquet(folder: Path, column: str = "text", rows: dict[str, list[str]] = ROWS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, values in rows.items():
        pq.write_table(pa.table({column: values}), folder / f"{split}-00000-of-00001.parquet")
    return folder


def test_rows_and_vocabulary(tmp_path: Path) -> None:
    write_parquet(tmp_path / "wikitext-2-v1")
    corpus = text.load_corpus("wikitext-2", tmp_path, cache=tmp_path / "cache")
    # b 3, then = c the 2 each in order of appearance, then the rest
    assert corpus.vocabulary == ("<eos>", "b", "=", "c", "the", "Title", "a", "d", "E")
    assert corpus.stream("train").tolist() == [0, 2, 5, 2, 0, 0, 1, 6, 1, 3, 0, 4, 1, 0]
    assert corpus.stream("test").tolist() == [8, 4, 0, 0]
    assert corpus.stream("test").dtype == torch.int64
    described = corpus.describe("test")
    assert described["tokens"] == 4 and described["complete"] is False


def test_lowercase_and_train_only_vocabulary(tmp_path: Path) -> None:
    write_parquet(tmp_path, "sentence")
    corpus = text.load_corpus("ptb", tmp_path, cache=tmp_path / "cache")
    assert "e" in corpus.vocabulary and "E" not in corpus.vocabulary
    write_parquet(tmp_path / "wikitext-103-v1")
    with pytest.raises(UserError, match="'d' is not in the vocabulary"):
        text.load_corpus("wikitext-103", tmp_path, cache=tmp_path / "cache")


def test_plain_files_equal_parquet(tmp_path: Path) -> None:
    stored = write_parquet(tmp_path / "parquet")
    plain = tmp_path / "plain"
    plain.mkdir()
    for split, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        lines = "".join(f"{row}\n" for row in ROWS[split])
        (plain / f"wiki.{name}.tokens").write_text(lines, encoding="utf-8")
    one, other = (
        text.load_corpus("wikitext-2", folder, cache=tmp_path / "cache")
        for folder in (stored, plain)
    )
    assert one.vocabulary == other.vocabulary
    assert all(torch.equal(one.stream(s), other.stream(s)) for s in text.SPLITS)


def test_only_files_of_the_split_count(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a")
    write_parquet(tmp_path / "b", rows={"train": ["x y z"]})
    for name in ("train-old.parquet", "train-00000-of-00001 (1).parquet"):
        shutil.copy(tmp_path / "b/train-00000-of-00001.parquet", tmp_path / "a" / name)
    expected = text.load_corpus("wikitext-2", write_parquet(tmp_path / "c"), cache=tmp_path / "x")
    found = text.load_corpus("wikitext-2", tmp_path / "a", cache=tmp_path / "x")
    assert torch.equal(found.stream("train"), expected.stream("train"))
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens", "constrained.txt"):
        (plain / name).write_text("\ufeffa b\n", encoding="utf-8")
    corpus = text.load_corpus("wikitext-2", plain, cache=tmp_path / "x")
    assert corpus.vocabulary == ("<eos>", "a", "b")  # neither another file nor a byte order mark
    assert corpus.stream("train").tolist() == [1, 2, 0]
    (plain / "ptb.train.txt").write_text("a b\n")
    with pytest.raises(UserError, match="train split more than once"):
        text.load_corpus("wikitext-2", plain, cache=tmp_path / "x")


def test_corpus_is_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path)
    cache = tmp_path / "cache"
    first = text.load_corpus("wikitext-2", tmp_path, cache=cache)
    monkeypatch.setattr(text, "count_vocabulary", None)
    again = text.load_corpus("wikitext-2", tmp_path, cache=cache)
    assert again.vocabulary == first.vocabulary
    assert torch.equal(again.stream("train"), first.stream("train"))
    monkeypatch.undo()
    (file,) = cache.iterdir()
    file.write_bytes(b"cut short")
    healed = text.load_corpus("wikitext-2", tmp_path, cache=cache)
    assert torch.equal(healed.stream("train"), first.stream("train"))
    write_parquet(tmp_path, rows=ROWS | {"test": ["b"]})
    changed = text.load_corpus("wikitext-2", tmp_path, cache=cache)
    assert changed.stream("test").tolist() == [1, 0]


def test_unwritable_cache_is_no_error(tmp_path: Path) -> None:
    write_parquet(tmp_path)
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert text.load_corpus("wikitext-2", tmp_path, cache=blocked).vocabulary


def test_batch_streams() -> None:
    streams = text.batch_streams(torch.arange(11), 3)
    assert streams.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    with pytest.raises(UserError, match="too few"):
        text.batch_streams(torch.arange(5), 3)


def test_unknown_words() -> None:
    assert list(text.encode_rows(["a x"], {"a": 1, "<eos>": 0}, unknown=7)) == [[1, 7, 0]]
    with pytest.raises(UserError, match="'x'"):
        list(text.encode_rows(["a x"], {"a": 1, "<eos>": 0}))


def test_errors_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the corpora are"):
        text.load_corpus("wikitext-4", tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        text.load_corpus("ptb", tmp_path / "missing")
    with pytest.raises(UserError, match="no train split"):
        text.load_corpus("ptb", tmp_path)
    write_parquet(tmp_path, column="other")
    with pytest.raises(UserError, match="no column of text 'sentence'"):
        text.load_corpus("ptb", tmp_path, cache=tmp_path / "cache")
    (tmp_path / "test-00000-of-00001.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="cannot read"):
        list(text.load_rows(text.PTB, "test", tmp_path))
    with pytest.raises(UserError, match="its splits are"):
        text.load_rows(text.PTB, "dev", tmp_path)


@pytest.mark.parametrize("source", [text.WIKITEXT2, text.PTB], ids=lambda s: s.name)
def test_published_sizes(source: text.TextSource) -> None:
    """Runs where the corpus is in the Hub's cache."""
    try:
        corpus = text.load_corpus(source)
    except UserError:
        pytest.skip(f"{source.title} is not in the cache")
    assert len(corpus.vocabulary) == source.vocabulary_size
    assert {s: len(corpus.streams[s]) for s in text.SPLITS} == dict(source.tokens)


def test_sources_are_consistent() -> None:
    for name, source in text.SOURCES.items():
        assert source.name == name
        assert set(source.tokens) == set(text.SPLITS)
