"""Texts of one's own: their lines, the parts that they are divided into, and a corpus of them."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deqzoo.data.lines import (
    Fragment,
    bare_stem,
    holds_records,
    read_lines,
    require_table,
    table_columns,
    table_values,
    text_files,
)
from deqzoo.data.own import FEWEST, HELD_OUT, RECORD, require_split
from deqzoo.data.shards import parquet_shards
from deqzoo.data.splits import SPLIT_COLUMN, SPLIT_OF, named_split, other_splits, split_of
from deqzoo.data.text import END, UNKNOWN, Corpus, TextSource, count_vocabulary, encode_rows
from deqzoo.errors import UserError
from deqzoo.files import warn_once
from deqzoo.models.deq_transformer.tokenization_deq_transformer import prepare_text

_SHARD = re.compile(r"([A-Za-z]+)-\d+(?:-of-\d+)?(?:-[0-9a-f]{8,})?")
"""The stem of a split's file as the Hub names it."""
_SKETCH_SIZE, _NOTABLE_SHARE = 4096, 0.05
"""Digests of learnt lines that a record keeps, and the share of lines from which on it is said that
a text holds them."""
_ABOUT = ("readme", "license", "licence", "copying", "notice", "citation", "changelog")
"""Stems of files that tell of the others in a folder, in any case of letters."""


@dataclass(frozen=True)
class OwnText:
    """Lines of texts, and a name for them.

    Attributes:
        lines: to train on, or all where no splits are stored.
        name: of the text.
        stored: lines of the splits "validation" and "test", where files, folders or rows name them.
        column: of a table that the lines are from, where somebody said which.
    """

    lines: list[str]
    name: str
    stored: dict[str, list[str]] = field(default_factory=dict)
    column: str | None = None

    def divided(self, share: float = HELD_OUT / 2) -> tuple[list[str], list[str]]:
        """Training lines and held-out lines: a stored split, else the last tenth.

        Args:
            share: that is held out.

        Raises:
            UserError: no lines to train on, or fewer than two where none are stored to hold out.
        """
        self._require_lines()
        held_out = self.stored.get("validation") or self.stored.get("test")
        return (self.lines, held_out) if held_out else self._cut(share)

    def divided_in_three(
        self, share: float = HELD_OUT / 2
    ) -> tuple[list[str], list[str], list[str]]:
        """Training, validation and test lines.

        Stored splits are used where there are any. A missing test part is the last tenth of the
        training lines, a missing validation part the tenth before it. The validation part is empty
        where it would have fewer than `FEWEST` lines or no word.

        Raises:
            UserError: no training lines, or fewer than two where no test split is stored.
        """
        self._require_lines()
        if "test" in self.stored:
            rest, held_out = self.lines, self.stored["test"]
            count = max(1, round(len(rest) * share))
        else:
            rest, held_out = self._cut(share)
            count = len(held_out)
        if "validation" in self.stored:
            return rest, self.stored["validation"], held_out
        cut = len(rest) - count
        too_few = count < FEWEST or cut < FEWEST or not "".join(rest[cut:]).strip()
        return (rest, [], held_out) if too_few else (rest[:cut], rest[cut:], held_out)

    def record(self, training: list[str], validation: list[str]) -> dict[str, Any]:
        """What a model keeps of the text that it was trained on.

        Args:
            training: lines that it learnt, the first of `lines`.
            validation: lines behind those, which only selected its weights.
        """
        n_validation = 0 if "validation" in self.stored else len(validation)
        digests = {split: text_digest(lines) for split, lines in self.stored.items()}
        return {
            "kind": "text",
            "name": self.name,
            "lines": len(training),
            "validation": n_validation,  # lines behind the training lines
            "train": text_digest(training),
            "sketch": _sketch(training),
            **({"stored": digests} if digests else {}),
            **({"column": self.column} if self.column else {}),
        }

    def _require_lines(self) -> None:
        if not self.lines and self.stored:
            raise UserError(
                f"{self.name} has no split to train on, but {', '.join(self.stored)}: name a file "
                "or folder of it train"
            )

    def _cut(self, share: float) -> tuple[list[str], list[str]]:
        if len(self.lines) < 2:
            raise UserError(
                f"{self.name} has {len(self.lines)} line(s); at least two are needed, since the "
                "last tenth of the lines is held out"
            )
        cut = len(self.lines) - max(1, round(len(self.lines) * share))
        return self.lines[:cut], self.lines[cut:]


def load_own_text(path: str | Path, column: str | Sequence[str] | None = None) -> OwnText:
    """The lines of a text file, a table of texts, or a folder of them.

    Files of a folder that are named by splits (`train.txt`, `Valid/a.txt`, `wiki.test.tokens`,
    `train-00000-of-00001.parquet`) are those splits, and so are those that all have a word of one
    in their names (`my_train.txt`, `my_test.txt`). Rows of a table with a column `split` are of the
    split that it names. Copies of a file are passed over.

    Args:
        path: of the file or folder.
        column: of tables, see `text_column`.

    Raises:
        UserError: nothing there that is text, only some files are named by splits, the column
            `split` names none or another than the file, or there is no table to have `column`.
    """
    # Cards of models are no text of one's own, also where a run writes among its data.
    files = [file for file in text_files(path) if not _is_card(file)]
    texts = [file for file in files if bare_stem(file).casefold() not in _ABOUT]
    if texts and texts != files:  # they tell of the data, as in a copy from the Hub
        about = next(file for file in files if file not in texts)
        warn_once(f"{about} and the like tell of the texts of {path}, and are passed over")
    files = texts or files
    require_table(files, column)
    path = Path(path).expanduser()
    parts = _by_split(path, files) if path.is_dir() else {"train": files}
    pieces_by_split = _pieces_by_split(parts, column)
    lines_by_split = {split: _all_lines(some, column) for split, some in pieces_by_split.items()}
    lines = lines_by_split.pop("train", [])
    stored_splits = {split: part for split, part in lines_by_split.items() if part}
    name = path.stem if path.is_file() else path.resolve().name
    return OwnText(lines, name, stored_splits, column if isinstance(column, str) else None)


def _is_card(file: Path) -> bool:
    return file.name == "README.md" and (file.parent / RECORD).is_file()


def _by_split(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Files of a folder by split; "train" where none is named by one.

    Raises:
        UserError: only some are, or a part of a split is missing.
    """
    split_by_file = {file: _split_of_file(file.relative_to(folder)) for file in files}
    if not any(split_by_file.values()):
        split_by_file = {file: split_of(re.split(r"[\W_]+", bare_stem(file))) for file in files}
        splits = {*split_by_file.values()}
        if None in splits or "train" not in splits or len(splits) == 1:
            return {"train": list(files)}
    files_by_split: dict[str | None, list[Path]] = {}
    for file, split in split_by_file.items():
        files_by_split.setdefault(split, []).append(file)
    if others := files_by_split.pop(None, []):
        raise UserError(
            f"{others[0]} is named by no split, as others are "
            f"({', '.join(map(str, files_by_split))}): name it, or a folder around it, train, "
            "validation or test, or take it away"
        )
    for word in SPLIT_OF:
        parquet_shards(folder, word)  # refuses those that are incomplete
    return {split: inside for split, inside in files_by_split.items() if split is not None}


def _split_of_file(file: Path) -> str | None:
    """The split that the names of a file's folders give, else its own name."""
    stem = bare_stem(file)
    shard = _SHARD.fullmatch(stem)
    return split_of([*file.parts[:-1], shard[1] if shard else stem.rpartition(".")[2]])


def _pieces_by_split(
    parts: Mapping[str, Sequence[Path]], text_column: str | Sequence[str] | None
) -> dict[str, list[tuple[Path, list[bool] | None]]]:
    """Files by split, and which rows of each: None for all of them.

    Args:
        parts: files by the split that their names give; "train" alone where they give none.
        text_column: of the texts, which names no splits.

    Raises:
        UserError: a column `split` names no split, or another one than the name of the file.
    """
    pieces: dict[str, list[tuple[Path, list[bool] | None]]] = {}
    for split, inside in parts.items():
        for file in inside:
            is_table = holds_records(file) and file.is_file()  # a pipe can be read once only
            columns = table_columns(file) if is_table else []
            column = next((c for c in columns if c.casefold() == SPLIT_COLUMN), None)
            if column is None or column == text_column:
                pieces.setdefault(split, []).append((file, None))
                continue
            values = enumerate(table_values(file, column))
            words = [named_split(value, f"row {n} of {file}") for n, value in values]
            if len(parts) > 1 and {*words} - {split}:
                raise other_splits(file, split)
            for named in sorted({*words}):
                rows = [word == named for word in words]
                pieces.setdefault(named, []).append((file, rows))
    return pieces


def _all_lines(
    pieces: Sequence[tuple[Path, list[bool] | None]], column: str | Sequence[str] | None
) -> list[str]:
    lines: list[str] = []
    digests: set[str] = set()
    copies = []
    for file, rows in pieces:
        inside = list(_whole_lines(read_lines(file, column, rows)))
        digest = text_digest(inside)
        if digest in digests and len(inside) > FEWEST:  # its lines would be learnt and measured
            copies.append(file)
            continue
        digests.add(digest)
        lines += inside
    if copies:
        warn_once(f"{len(copies)} file(s) are copies of others and passed over, as {copies[0]}")
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def _whole_lines(pieces: Iterator[str]) -> Iterator[str]:
    line = ""
    for piece in pieces:
        line += piece
        if not isinstance(piece, Fragment):
            yield line.rstrip("\r\n")
            line = ""
    if line:
        yield line


def own_corpus(
    path: str | Path, *, column: str | None = None, min_count: int = 1
) -> tuple[Corpus, dict[str, Any]]:
    """A text of one's own as a corpus with its own vocabulary, and its record.

    Without stored splits the last tenth of the lines is the validation split; where one of the two
    is missing, validation and test split are the same. Words that the lines to train on hold less
    than `min_count` times are `<unk>`.

    Args:
        path: see `load_own_text`.
        column: of a table.
        min_count: how often a word must occur.

    Raises:
        UserError: no text, or no word in one of its parts.
    """
    text = load_own_text(path, column)
    training, held_out = text.divided()
    parts = {"train": training, "validation": held_out}
    if len(text.stored) == 2:
        parts["test"] = text.stored["test"]
    rows = {
        split: prepare_text("\n".join(lines), (), "wikitext").text.split("\n")
        for split, lines in parts.items()
    }
    counts = Counter(word for row in rows["train"] for word in row.split())
    words = [word for word in count_vocabulary(rows["train"]) if counts[word] >= min_count]
    vocabulary = [END, UNKNOWN, *(word for word in words if word not in (END, UNKNOWN))]
    index = {word: number for number, word in enumerate(vocabulary)}
    streams = {}
    for split, part in rows.items():
        if not any(row.split() for row in part):
            raise UserError(f"{text.name} holds no word in its {split} part")
        indices = [i for row in encode_rows(part, index, index[UNKNOWN]) for i in row]
        streams[split] = torch.tensor(indices, dtype=torch.int32)
    streams.setdefault("test", streams["validation"])
    source = TextSource(
        name=text.name, title=text.name, repository="", folder="", column="text", lowercase=False,
        counted=("train",), tokens={split: len(stream) for split, stream in streams.items()},
        vocabulary_size=len(vocabulary),
    )  # fmt: skip
    return Corpus(source, tuple(vocabulary), streams), text.record(training, [])


def lines_of_split(text: OwnText, split: str, record: dict[str, Any] | None) -> list[str]:
    """Lines of a text to measure a model on: "train", "validation", "test" or "all".

    A stored split is used as it is. Where there is no test split, and no lines are left for one,
    the validation split stands in for it.

    Raises:
        UserError: another split, or one that the model does not know.
    """
    require_split(split)
    if split in text.stored:
        return text.stored[split]
    cut = int((record or {}).get("lines", 0))
    matches_record = (
        record is not None and cut > 0 and text_digest(text.lines[:cut]) == record.get("train")
    )
    n_validation = (
        0 if record is None or record.get("one_hold_out") else int(record.get("validation", 0))
    )
    if split == "all":
        return [line for part in (text.lines, *text.stored.values()) for line in part]
    if split == "train":
        if not matches_record and (record is not None or not text.stored):
            raise UserError(f"the model was not trained on {text.name} as it is now")
        return text.lines[:cut] if matches_record else text.lines
    if split == "validation":
        if not matches_record or not n_validation:
            raise UserError(f"no lines of {text.name} chose the model's weights alone")
        return text.lines[cut : cut + n_validation]
    if matches_record:
        rest = text.lines[cut + n_validation :]
    else:
        if record is not None and record.get("name") == text.name:
            warn_once(
                f"{text.name} has changed since the model was trained on it, or is another text of "
                "that name: lines that it learnt may be among those that are measured"
            )
        elif (share := _learnt_share(text.lines, record)) > _NOTABLE_SHARE:
            warn_once(
                f"about {share:.0%} of the lines of {text.name} were learnt, from a text of "
                "another name: its figure flatters"
            )
        # A model without a record may have learnt what is stored to train on.
        rest = [] if record is None and text.stored else text.lines
    return rest or text.stored.get("validation", [])


def _sketch(lines: Iterable[str]) -> list[str]:
    """The smallest digests of distinct lines, a sample that another text can be held against."""
    return sorted({_line_digest(line) for line in lines if line.strip()})[:_SKETCH_SIZE]


def _learnt_share(lines: Iterable[str], record: dict[str, Any] | None) -> float:
    """About how many of some lines a model has learnt, by the sketch in its record; else 0."""
    learnt = (record or {}).get("sketch") or []
    if not learnt:
        return 0.0
    is_sample = len(learnt) == _SKETCH_SIZE
    digests = [_line_digest(line) for line in lines if line.strip()]
    sample = [digest for digest in digests if not is_sample or digest <= learnt[-1]]
    known = {*learnt}
    return sum(digest in known for digest in sample) / max(len(sample), 1)


def _line_digest(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()[:10]


def text_digest(lines: Sequence[str]) -> str:
    """SHA-256 over lines."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
