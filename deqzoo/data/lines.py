"""Lines of texts that people have: plain, compressed, UTF-16, JSON lines, parquet, a pipe.

Everything is read piece by piece, so that memory does not grow with the text.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import json
import lzma
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from pyarrow.lib import ArrowException

from deqzoo.errors import UserError, as_user_error
from deqzoo.files import visible_files, warn_once

BLOCK_BYTES = 1 << 20
LONGEST_LINE = 1 << 16  # characters; longer lines are read in fragments
COLUMNS = ("text", "sentence", "content", "document", "article", "body")
"""Names that people give to a column of texts, the usual ones first."""
RECORDS = (".jsonl", ".ndjson")
SUFFIXES = (".txt", ".text", ".md", ".tokens", *RECORDS, ".parquet")
"""Files of a folder that are read as texts, with or without a compression's suffix."""
_OLD_END = re.compile(r"\r(?=[^\n])")
"""A carriage return that alone ends a line, as on old Macs: no line feed follows it."""
_OTHERS = (".json", ".csv", ".tsv")
_COMPRESSED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class Fragment(str):
    """Part of a line: no end of line follows it."""


def text_files(source: str | Path) -> list[Path]:
    """The file itself, or all texts of a folder in the order of their names, without hidden ones.

    Raises:
        UserError: there is no such file or folder, or no text in it.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"no file {path}")
        return [path]  # a pipe of the shell's, too
    inside = list(visible_files(path))
    files = [file for file in inside if _suffix(file) in SUFFIXES]
    if not files:
        raise UserError(f"folder {path} holds no text ({', '.join(SUFFIXES)})")
    if others := [file for file in inside if _suffix(file) not in SUFFIXES]:
        warn_once(
            f"{len(others)} file(s) of {path} are passed over, as {others[0].name}: give .txt or "
            ".md, or .parquet or .jsonl with a column of texts"
        )
    return files


def require_table(files: Sequence[str | Path], column: str | Sequence[str] | None) -> None:
    """Refuse the name of a column where no file is a table.

    Raises:
        UserError: a column is named, and none of the files has columns.
    """
    if isinstance(column, str) and not any(holds_records(Path(file)) for file in files):
        raise UserError(
            f"the column {column!r} is to be read, but {files[0]} is no table (.jsonl, .parquet): "
            "leave --column out"
        )


def read_lines(
    source: str | Path,
    column: str | Sequence[str] | None = None,
    rows: Iterable[bool] | None = None,
) -> Iterator[str]:
    """Lines of a text file, of standard input ("-"), or of the texts in a table, one by one.

    Overlong lines come as fragments that end between words, so that memory stays bounded.

    Args:
        source: plain text (UTF-8, or UTF-16 and UTF-32 with a byte order mark), `.jsonl` or
            `.parquet`; text and JSON lines may be compressed (.gz, .bz2, .xz).
        column: of the texts in JSON lines and parquet; see `text_column`.
        rows: of a table, whether each is read; all by default.

    Raises:
        UserError: the file is missing, a folder, or no text.
    """
    if str(source) == "-":
        yield from _decoded_lines(sys.stdin.buffer, "standard input")
        return
    path = Path(source).expanduser()
    if path.is_dir() or not path.exists():
        raise UserError(f"{path} is a folder, not a file" if path.is_dir() else f"no file {path}")
    if _suffix(path) in _OTHERS:
        raise UserError(
            f"{path} is no plain text: its marks would be scored as words; give .txt, or .parquet "
            "or .jsonl (an object per line) with a column of texts"
        )
    if holds_records(path):
        texts = _table_texts(path, column)
        for text in texts if rows is None else compress(texts, rows):
            yield from _row_lines(text)
        return
    with _open_stream(path) as stream:
        yield from _decoded_lines(stream, str(path))


def _table_texts(path: Path, column: str | Sequence[str] | None) -> Iterator[str]:
    """The text of every row of a table."""
    usual = (*COLUMNS, *([column] if isinstance(column, str) else column or ()))

    def announced(name: str) -> str:
        if name not in usual:
            warn_once(f"{path}: reading the column {name!r}; choose another with --column")
        return name

    if _suffix(path) == ".parquet":
        yield from parquet_rows(path, announced(text_column(path, column)))
        return
    for record in _records(path):  # once: it may be a pipe
        if not isinstance(column, str):
            column = announced(_column_of(record, column, path))
        value = record.get(column)
        if value is not None and not isinstance(value, str):
            raise UserError(f"{path}: {column!r} is no text in a record: {str(value)[:40]!r}")
        if value is None and column not in record:
            raise UserError(f"{path} has a record without {column!r}")
        yield _encodable(value or "", path)


def table_values(path: Path, column: str) -> Iterator[Any]:
    """What every row of a table has in a column; None where it has nothing there.

    Raises:
        UserError: the file cannot be read, or is a parquet file without the column.
    """
    if _suffix(path) != ".parquet":
        yield from (record.get(column) for record in _records(path))
        return
    with as_user_error(f"cannot read {path}", ArrowException, OSError, most=160):
        parquet = pq.ParquetFile(path)
        if column not in parquet.schema_arrow.names:
            raise UserError(f"{path} has no column {column!r}")
        for batch in parquet.iter_batches(columns=[column]):
            yield from batch.column(0).to_pylist()


@contextlib.contextmanager
def _open_stream(path: Path) -> Iterator[Any]:
    """A file's bytes, decompressed; a damaged file is an error in one line."""
    with as_user_error(f"cannot read {path}", OSError, EOFError, lzma.LZMAError):
        with _COMPRESSED.get(path.suffix.lower(), open)(path, "rb") as stream:
            yield stream


def parquet_rows(path: Path, column: str) -> Iterator[str]:
    """The strings of a parquet file's column, empty ones for nulls.

    Raises:
        UserError: the file is no parquet file or has no such column.
    """
    with as_user_error(f"cannot read {path}", ArrowException, OSError, most=160):
        parquet = pq.ParquetFile(path)
        if column not in _string_columns(parquet):
            raise UserError(f"{path} has no column of text {column!r}")
        for batch in parquet.iter_batches(columns=[column]):
            yield from (row or "" for row in batch.column(0).to_pylist())


def text_column(path: Path, column: str | Sequence[str] | None = None) -> str:
    """The column of a table that holds its texts.

    Args:
        path: a parquet file or JSON lines.
        column: where it is known; of several the first that it has. Else the one with a usual name
            (`COLUMNS`), or the only one that holds strings.

    Raises:
        UserError: the file cannot be read, or it is not clear which column is meant.
    """
    if _suffix(path) == ".parquet":
        with as_user_error(f"cannot read {path}", ArrowException, OSError, most=160):
            parquet = pq.ParquetFile(path)
            names, columns = _string_columns(parquet), list(parquet.schema_arrow.names)
        return _choose(names, column, path, [name for name in columns if name not in names])
    return _column_of(next(_records(path), {}), column, path)


def _column_of(record: dict[str, Any], column: str | Sequence[str] | None, path: Path) -> str:
    """The column of texts of JSON lines, by the first of them."""
    names = _text_names(record, column)
    return _choose(names, column, path, [name for name in record if name not in names])


def table_columns(path: Path) -> list[str]:
    """Names of a table's columns; of JSON lines those of the first record.

    Raises:
        UserError: the file cannot be read.
    """
    if _suffix(path) == ".parquet":
        with as_user_error(f"cannot read {path}", ArrowException, OSError, most=160):
            return list(pq.ParquetFile(path).schema_arrow.names)
    return list(next(_records(path), {}))


def _choose(
    names: Sequence[str],
    column: str | Sequence[str] | None,
    path: Path,
    others: Iterable[str] = (),
) -> str:
    """The column of a table's texts.

    Args:
        names: of its columns of text.
        column: as in `text_column`.
        path: of the table.
        others: names of its columns that hold no text.

    Raises:
        UserError: see `text_column`.
    """
    if isinstance(column, str):
        if column in names:
            return column
        raise UserError(f"{path} has no column of text {column!r}; it has {_name_list(names)}")
    usual = [name for name in (*(column or ()), *COLUMNS) if name in names]
    if usual:
        return usual[0]
    if wrong := [name for name in COLUMNS if name in others]:
        raise UserError(
            f"{path} has no text in the column {wrong[0]!r}: mend it, or choose another with "
            f"--column: {_name_list(names)}"
        )
    if len(names) == 1:
        return names[0]
    if not names:
        raise UserError(f"{path} has no column of text")
    raise UserError(
        f"{path} has several columns of text; choose with --column: {_name_list(names)}"
    )


def _name_list(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) or "none"


def _string_columns(parquet: pq.ParquetFile) -> list[str]:
    kinds = ("string", "large_string", "string_view")
    return [field.name for field in parquet.schema_arrow if str(field.type) in kinds]


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of JSON lines, one by one."""
    whole = ""
    with _open_stream(path) as stream:
        for line in _decoded_lines(stream, str(path)):
            whole += line
            if isinstance(line, Fragment):
                continue
            if whole.strip():
                yield _record(whole, path)
            whole = ""
    if whole.strip():
        yield _record(whole, path)


def _text_names(record: dict[str, Any], column: str | Sequence[str] | None) -> list[str]:
    """Keys of texts; a null counts as a text where the key is a usual name or in `column`."""
    text_keys = (*COLUMNS, *([column] if isinstance(column, str) else column or ()))
    return [k for k, v in record.items() if isinstance(v, str) or v is None and k in text_keys]


def _encodable(text: str, path: Path) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path} holds half a character: {text[:40]!a}") from error
    return text


def _record(line: str, path: Path) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} holds a line that is no JSON: {line.strip()[:40]!r}") from error
    if isinstance(record, str):
        return {"text": record}
    if not isinstance(record, dict):
        raise UserError(f"{path} holds a line that is no JSON object: {line.strip()[:40]!r}")
    return record


def _row_lines(row: str) -> Iterator[str]:
    for line in _OLD_END.sub("\n", row).split("\n"):
        yield from _pieces(line)


def holds_records(path: Path) -> bool:
    """Whether a file is a table, with a column of texts."""
    return _suffix(path) in (".parquet", *RECORDS)


def bare_stem(path: Path) -> str:
    """A file's name without its suffix and that of its compression."""
    return _inner(path).stem


def _suffix(path: Path) -> str:
    """The suffix that says what a file holds, below that of its compression, in small letters."""
    return _inner(path).suffix.lower()


def _inner(path: Path) -> Path:
    """The name of a file when it is unpacked."""
    return Path(path.stem if path.suffix.lower() in _COMPRESSED else path.name)


def _decoded_lines(stream: Any, name: str) -> Iterator[str]:
    block = stream.read(BLOCK_BYTES)
    while 0 < len(block) < 4 and (more := stream.read(BLOCK_BYTES)):
        block += more
    encoding = next((code for mark, code in _MARKS if block.startswith(mark)), "utf-8-sig")
    decoder = codecs.getincrementaldecoder(encoding)()
    rest = ""
    while True:
        if encoding == "utf-8-sig" and b"\0" in block:
            raise UserError(
                f"{name} is a binary file, or UTF-16 without a byte order mark; give UTF-8 text"
            )
        try:
            rest += decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            kind = encoding.removesuffix("-sig").upper()
            raise UserError(f"{name} is not {kind} text: {error.reason}") from error
        if not block:
            break
        *lines, rest = _OLD_END.sub("\n", rest).split("\n")
        for line in lines:
            *fragments, line = _pieces(line)
            yield from fragments
            yield f"{line}\n"
        *fragments, rest = _pieces(rest)
        yield from fragments
        block = stream.read(BLOCK_BYTES)
    if rest:
        yield rest


def _pieces(line: str) -> Iterator[str]:
    """Fragments of an overlong line, and what is left of it; cut at white space of any kind."""
    start = 0
    while len(line) - start > LONGEST_LINE:
        end = start + LONGEST_LINE
        spaces = (i + 1 for i in range(end - 1, start, -1) if line[i].isspace())
        end = next(spaces, end)
        yield Fragment(line[start:end])
        start = end
    yield line[start:]
