"""Texts of one's own: their lines, the parts that they are divided into, and a corpus of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deqzoo.data.lines import Fragment, read_lines, text_files
from deqzoo.data.own import FEWEST, HELD_OUT, require_split
from deqzoo.data.text import END, UNKNOWN, Corpus, TextSource, count_vocabulary, encode_rows
from deqzoo.errors import UserError
from deqzoo.models.deq_transformer.tokenization_deq_transformer import prepare_text


@dataclass(frozen=True)
class OwnText:
    """Lines of texts, and a name for them."""

    lines: list[str]
    name: str

    def divided(self, share: float = HELD_OUT / 2) -> tuple[list[str], list[str]]:
        """Lines to train on, and the last tenth.

        Args:
            share: that is held out.

        Raises:
            UserError: fewer than two lines.
        """
        if len(self.lines) < 2:
            raise UserError(
                f"{self.name} has {len(self.lines)} line(s); at least two are needed, since the "
                "last tenth of the lines is held out"
            )
        cut = len(self.lines) - max(1, round(len(self.lines) * share))
        return self.lines[:cut], self.lines[cut:]

    def divided_in_three(
        self, share: float = HELD_OUT / 2
    ) -> tuple[list[str], list[str], list[str]]:
        """Lines to train on, the tenth that chooses weights, and the last tenth, to be measured.

        The second part is empty where it would have fewer than `FEWEST` lines or no word.

        Raises:
            UserError: fewer than two lines.
        """
        rest, held_out = self.divided(share)
        cut = len(rest) - len(held_out)
        few = len(held_out) < FEWEST or cut < FEWEST or not "".join(rest[cut:]).strip()
        return (rest, [], held_out) if few else (rest[:cut], rest[cut:], held_out)


def load_own_text(path: str | Path, column: str | None = None) -> OwnText:
    """All lines of a text file, a table of texts, or a folder of them.

    Raises:
        UserError: nothing there that is text.
    """
    files = text_files(path)
    lines = [line for file in files for line in _whole_lines(read_lines(file, column))]
    while lines and not lines[-1].strip():
        lines.pop()
    path = Path(path).expanduser()
    return OwnText(lines, path.stem if path.is_file() else path.resolve().name)


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

    The last tenth of the lines is the validation split, and the test split. Words that the lines to
    train on hold less than `min_count` times are `<unk>`.

    Args:
        path: see `load_own_text`.
        column: of a table.
        min_count: how often a word must occur.

    Raises:
        UserError: no text, or no word in one of its parts.
    """
    text = load_own_text(path, column)
    training, held_out = text.divided()
    rows = {
        split: prepare_text("\n".join(lines), (), "wikitext").text.split("\n")
        for split, lines in (("train", training), ("validation", held_out))
    }
    counts = Counter(word for row in rows["train"] for word in row.split())
    kept = [word for word in count_vocabulary(rows["train"]) if counts[word] >= min_count]
    vocabulary = [END, UNKNOWN, *(word for word in kept if word not in (END, UNKNOWN))]
    index = {word: number for number, word in enumerate(vocabulary)}
    streams = {}
    for split, part in rows.items():
        if not any(row.split() for row in part):
            raise UserError(f"{text.name} holds no word in its {split} part")
        encoded = [i for row in encode_rows(part, index, index[UNKNOWN]) for i in row]
        streams[split] = torch.tensor(encoded, dtype=torch.int32)
    streams["test"] = streams["validation"]
    source = TextSource(
        name=text.name, title=text.name, repository="", folder="", column="text", lowercase=False,
        counted=("train",), tokens={split: len(stream) for split, stream in streams.items()},
        vocabulary_size=len(vocabulary),
    )  # fmt: skip
    record = {
        "kind": "text", "name": text.name, "lines": len(training), "train": text_digest(training),
    }  # fmt: skip
    return Corpus(source, tuple(vocabulary), streams), record


def lines_of_split(text: OwnText, split: str, record: dict[str, Any] | None) -> list[str]:
    """Lines of a text to measure a model on: "train", "validation", "test" or "all".

    Raises:
        UserError: another split, or one that the model does not know.
    """
    require_split(split)
    record = record or {}
    cut = int(record.get("lines", 0))
    known = cut > 0 and text_digest(text.lines[:cut]) == record.get("train")
    chosen = cut + (0 if record.get("one_hold_out") else int(record.get("validation", 0)))
    if split == "train" and not known:
        raise UserError(f"the model was not trained on {text.name} as it is now")
    if split == "validation" and (not known or chosen == cut):
        raise UserError(f"no lines of {text.name} chose the model's weights alone")
    if split == "all" or not known:
        return text.lines
    return {
        "train": text.lines[:cut],
        "validation": text.lines[cut:chosen],
        "test": text.lines[chosen:],
    }[split]


def text_digest(lines: Sequence[str]) -> str:
    """SHA-256 over lines."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
