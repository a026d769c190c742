"""Word-level corpora as streams of word indices: WikiText-2, WikiText-103 and Penn Treebank.

A row of the published files becomes its words, split at white space, and `<eos>`; blank rows count.
Word 0 is `<eos>`, the others follow by falling frequency, equals in order of appearance. That is
how Transformer-XL and its descendants count, so perplexities can be compared with theirs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from huggingface_hub import constants
from torch import Tensor

from deqzoo.data.lines import parquet_rows
from deqzoo.data.shards import data_folder, parquet_shards
from deqzoo.errors import UserError, as_user_error
from deqzoo.files import file_digest

END = "<eos>"
UNKNOWN = "<unk>"
SPLITS = ("train", "validation", "test")
_FORMAT = 2  # of the cached files


@dataclass(frozen=True)
class TextSource:
    """What is known about a corpus.

    `tokens` and `vocabulary_size` are those of the published files, `<eos>` included; the
    vocabulary is that of the splits in `counted`.
    """

    name: str
    title: str
    repository: str
    folder: str
    column: str
    lowercase: bool
    counted: tuple[str, ...]
    tokens: Mapping[str, int]
    vocabulary_size: int


WIKITEXT2 = TextSource(
    name="wikitext-2",
    title="WikiText-2",
    repository="Salesforce/wikitext",
    folder="wikitext-2-v1",
    column="text",
    lowercase=False,
    counted=SPLITS,
    tokens={"train": 2_088_628, "validation": 217_646, "test": 245_569},
    vocabulary_size=33_278,
)
WIKITEXT103 = TextSource(
    name="wikitext-103",
    title="WikiText-103",
    repository="Salesforce/wikitext",
    folder="wikitext-103-v1",
    column="text",
    lowercase=False,
    counted=("train",),
    tokens={"train": 103_227_021, "validation": 217_646, "test": 245_569},
    vocabulary_size=267_735,
)
PTB = TextSource(
    name="ptb",
    title="Penn Treebank",
    repository="ptb-text-only/ptb_text_only",
    folder="penn_treebank",
    column="sentence",
    lowercase=True,
    counted=SPLITS,
    tokens={"train": 929_589, "validation": 73_760, "test": 82_430},
    vocabulary_size=10_000,
)
SOURCES = {source.name: source for source in (WIKITEXT2, WIKITEXT103, PTB)}


@dataclass(frozen=True)
class Corpus:
    """A whole corpus in memory.

    Attributes:
        source: where it comes from.
        vocabulary: the words in index order.
        streams: split to word indices, int32 (n,), one stream without document boundaries.
    """

    source: TextSource
    vocabulary: tuple[str, ...]
    streams: Mapping[str, Tensor]

    def stream(self, split: str) -> Tensor:
        """Word indices of a split, int64 (n,).

        Raises:
            UserError: unknown split.
        """
        _require_split(self.source, split)
        return self.streams[split].long()

    def describe(self, split: str) -> dict[str, Any]:
        """What evaluation files and training logs record about the data."""
        stream = self.streams[split]
        return describe_stream(self.source, split, stream)


def describe_stream(source: TextSource, split: str, stream: Tensor) -> dict[str, Any]:
    """Name, size and fingerprint of a split's word indices."""
    return {
        "name": source.name,
        "split": split,
        "tokens": len(stream),
        "fingerprint": hashlib.sha256(stream.to(torch.int32).numpy().tobytes()).hexdigest(),
        "complete": len(stream) == source.tokens[split],
    }


def source_of(name: str) -> TextSource:
    """A corpus by its name.

    Raises:
        UserError: there is none of that name.
    """
    if name not in SOURCES:
        raise UserError(f"unknown corpus {name!r}; the corpora are {', '.join(SOURCES)}")
    return SOURCES[name]


def load_corpus(
    source: TextSource | str,
    data: str | os.PathLike[str] | None = None,
    *,
    cache: str | os.PathLike[str] | None = None,
) -> Corpus:
    """All splits of a corpus, encoded once and then read from a cache.

    Args:
        source: the corpus, or its name.
        data: local folder in the Hub's layout or with plain files (`wiki.train.tokens`,
            `ptb.valid.txt`), or another repository; None for the corpus's own repository.
        cache: folder of encoded corpora; by default `deqzoo/text` in the Hugging Face home.

    Raises:
        UserError: unknown name, or data that cannot be had or are not this corpus.
    """
    source = source_of(source) if isinstance(source, str) else source
    files = corpus_files(source, data)
    home = Path(cache) if cache is not None else Path(constants.HF_HOME) / "deqzoo" / "text"
    path = home / f"{source.name}-{_digest(source, files)[:16]}.npz"
    corpus = _read_cache(source, path)
    if corpus is None:
        corpus = _encode_corpus(source, files)
        _write_cache(corpus, path)
    return corpus


def load_rows(
    source: TextSource, split: str, data: str | os.PathLike[str] | None = None
) -> Iterator[str]:
    """The rows of one split as published, lower-cased where the corpus is.

    Raises:
        UserError: unknown split, or data that cannot be had or are not this corpus.
    """
    _require_split(source, split)
    return _rows(source, corpus_files(source, data)[split])


def _require_split(source: TextSource, split: str) -> None:
    if split not in SPLITS:
        raise UserError(
            f"{source.title} has no split {split!r}; its splits are {', '.join(SPLITS)}"
        )


def row_words(row: str) -> list[str]:
    """The words of a row and the end of row."""
    return [*row.split(), END]


def encode_rows(
    rows: Iterable[str], vocabulary: Mapping[str, int], unknown: int | None = None
) -> Iterator[list[int]]:
    """Word indices, row by row.

    Args:
        unknown: index of words outside the vocabulary; None refuses them.

    Raises:
        UserError: a word is outside the vocabulary and `unknown` is None.
    """
    for row in rows:
        if unknown is not None:
            yield [vocabulary.get(word, unknown) for word in row_words(row)]
            continue
        try:
            yield [vocabulary[word] for word in row_words(row)]
        except KeyError as error:
            raise UserError(f"word {error.args[0]!r} is not in the vocabulary") from error


def count_vocabulary(rows: Iterable[str]) -> list[str]:
    """`<eos>`, then all words by falling frequency, equals in order of appearance."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(row.split())
    counts.pop(END, None)
    # Python sorts stably and a Counter keeps the order of appearance.
    return [END, *sorted(counts, key=counts.__getitem__, reverse=True)]


def batch_streams(stream: Tensor, n_streams: int) -> Tensor:
    """Cut a stream (n,) into `n_streams` contiguous rows (n_streams, n // n_streams).

    Raises:
        UserError: the stream is shorter than two tokens per row.
    """
    length = len(stream) // n_streams
    if length < 2:
        raise UserError(
            f"{len(stream)} tokens are too few for {n_streams} streams; use a smaller batch"
        )
    return stream[: length * n_streams].view(n_streams, length)


def corpus_files(
    source: TextSource, data: str | os.PathLike[str] | None = None
) -> dict[str, list[Path]]:
    """Files of every split.

    Raises:
        UserError: no such folder, no connection, or a folder without the splits.
    """
    folder = data_folder(source.title, source.repository, data, source.folder)
    inner = folder / source.folder
    folder = inner if inner.is_dir() else folder
    files_by_split = {}
    for split in SPLITS:
        files = parquet_shards(folder, split) or _plain_files(folder, split)
        if not files:
            raise UserError(
                f"folder {folder} does not hold {source.title}: it has no {split} split"
            )
        files_by_split[split] = files
    return files_by_split


def _plain_files(folder: Path, split: str) -> list[Path]:
    """Files as `wiki.train.tokens` and `ptb.valid.txt`.

    Raises:
        UserError: there are several of a split.
    """
    names = "validation|valid|val" if split == "validation" else split
    name = re.compile(rf"(?:\w+\.)?(?:{names})\.(?:txt|tokens)")
    files = sorted(path for path in folder.iterdir() if name.fullmatch(path.name))
    if len(files) > 1:
        raise UserError(
            f"{folder} holds the {split} split more than once: "
            f"{', '.join(path.name for path in files[:4])}; leave one of them"
        )
    return files


def _rows(source: TextSource, files: Sequence[Path]) -> Iterator[str]:
    for path in files:
        rows = parquet_rows(path, source.column) if path.suffix == ".parquet" else _lines(path)
        yield from (row.lower() for row in rows) if source.lowercase else rows


def _lines(path: Path) -> Iterator[str]:
    with as_user_error(f"cannot read {path}", OSError, UnicodeDecodeError):
        with path.open(encoding="utf-8-sig", newline="\n") as stream:
            yield from stream


def _encode_corpus(source: TextSource, files: Mapping[str, Sequence[Path]]) -> Corpus:
    counted_rows = (row for split in source.counted for row in _rows(source, files[split]))
    vocabulary = count_vocabulary(counted_rows)
    indices = {word: index for index, word in enumerate(vocabulary)}
    streams = {}
    for split in SPLITS:
        encoded_rows = encode_rows(_rows(source, files[split]), indices)
        flat = np.fromiter((i for row in encoded_rows for i in row), dtype=np.int32)
        streams[split] = torch.from_numpy(flat)
    return Corpus(source, tuple(vocabulary), streams)


def _digest(source: TextSource, files: Mapping[str, Sequence[Path]]) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {source.lowercase} {source.counted}".encode())
    for split in SPLITS:
        for path in files[split]:
            with as_user_error(f"cannot read {path}", OSError):
                content = file_digest(path)
            digest.update(f"\0{split}\0{path.suffix}\0{content}".encode())
    return digest.hexdigest()


def _read_cache(source: TextSource, path: Path) -> Corpus | None:
    """The cached corpus; None if it is not there or was not written to the end."""
    try:
        with np.load(path) as arrays:
            vocabulary = json.loads(arrays["vocabulary"].tobytes().decode())
            streams = {split: torch.from_numpy(arrays[split]) for split in SPLITS}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    return Corpus(source, tuple(vocabulary), streams)


def _write_cache(corpus: Corpus, path: Path) -> None:
    """Store a corpus; without a writable cache it is encoded anew next time."""
    words = np.frombuffer(json.dumps(corpus.vocabulary).encode(), dtype=np.uint8)
    arrays: dict[str, Any] = {split: stream.numpy() for split, stream in corpus.streams.items()}
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            np.savez(stream, vocabulary=words, **arrays)
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
