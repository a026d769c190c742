"""Labelled pictures of one's own, in the layouts that people have.

`datasets` reads them: a folder per class, a folder with metadata, a zip of either, parquet, or a
CSV file of paths.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import os
import re
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from deqzoo.data.images import Pictures
from deqzoo.data.own import FEWEST, HELD_OUT, SPLITS, rows_of_split, stratified, three_parts, unseen
from deqzoo.data.pictures import HEIC, decode_picture, register_heic
from deqzoo.data.shards import open_dataset, parquet_shards
from deqzoo.data.splits import (
    SPELLINGS,
    SPLIT_COLUMN,
    SPLIT_OF,
    named_split,
    other_splits,
    split_of,
)
from deqzoo.errors import UserError, as_user_error
from deqzoo.files import is_hidden, visible_files, warn_once
from deqzoo.models.mdeq.image_processing_mdeq import to_rgb

_SHARD = re.compile(r"[\w.]+-\d+-of-\d+(-[0-9a-f]{8,})?\.parquet")
"""A part of a split as the Hub names it."""
_PICTURES = (
    "image", "img", "picture", "photo", "file_name", "file", "path", "filename", "image_path",
    "file_path", "filepath",
)  # fmt: skip
_LABELS = ("label", "labels", "class", "category", "target")
_Table = tuple[list[bytes | Path], list[str], list[str] | None]
"""Encoded pictures, the names of their labels, and the order of the classes where there is one."""
_NO_PICTURES = ("MPEG", "HDF5", "GRIB", "BUFR")
"""Formats that Pillow names but cannot decode."""
_LARGEST_FILE = 200_000_000
_TABLES = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class OwnPictures:
    """Labelled pictures, decoded when they are asked for.

    Attributes:
        encoded: a file's content, or the path of a file, per picture.
        labels: int64 (N,), indices into `classes`.
        classes: names in label order.
        name: of the data.
        split: its name.
    """

    encoded: Sequence[bytes | Path]
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    split: str

    def __len__(self) -> int:
        return len(self.labels)

    def content(self, row: int) -> bytes:
        """The file of one picture."""
        cell = self.encoded[row]
        if isinstance(cell, bytes):
            return cell
        with as_user_error(f"cannot read {cell}", OSError):
            return cell.read_bytes()

    def picture(self, row: int) -> Image.Image:
        """One picture, RGB and upright.

        Raises:
            UserError: it cannot be decoded.
        """
        cell = self.encoded[row]
        where = str(cell) if isinstance(cell, Path) else f"picture {row} of {self.name}"
        return to_rgb(decode_picture(self.content(row), where))

    def digests(self) -> list[str]:
        """A short SHA-256 of every picture's file."""
        return [hashlib.sha256(self.content(row)).hexdigest()[:16] for row in range(len(self))]

    def part(self, rows: Sequence[int], split: str) -> OwnPictures:
        """Some of the pictures, as a split of their own."""
        indices = list(rows)
        return replace(
            self,
            encoded=[self.encoded[i] for i in indices],
            labels=self.labels[indices],
            split=split,
        )

    def describe(self) -> dict[str, Any]:
        """What evaluation files and training records hold about the data."""
        labels = [self.classes[label] for label in self.labels.tolist()]
        lines = "".join(sorted(map("{} {}\n".format, self.digests(), labels))).encode()
        return {
            "name": self.name,
            "split": self.split,
            "pictures": len(self),
            "fingerprint": hashlib.sha256(lines).hexdigest(),
            "local": True,
        }

    def in_memory(self, side: int) -> Pictures:
        """All pictures scaled and cropped to side × side, as uint8 (N, 3, side, side)."""

        def crop(row: int) -> np.ndarray:
            picture = ImageOps.fit(self.picture(row), (side, side), Image.Resampling.BICUBIC)
            return np.asarray(picture)

        arrays = np.stack([crop(row) for row in range(len(self))])
        about = self.describe()
        return Pictures(
            torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous(),
            self.labels, self.classes, self.split, about["fingerprint"], False, self.name,
        )  # fmt: skip


def load_own_pictures(
    path: str | Path,
    classes: Sequence[str] | None = None,
    label_column: str | Sequence[str] | None = None,
) -> dict[str, OwnPictures]:
    """Labelled pictures of one's own by split; "train" where they have none.

    Args:
        path: a folder with a folder of pictures per class (below train, test, ... if they are
            split), one with metadata.csv, parquet files, a .zip of any of these, or a .csv, .tsv
            file with a column of paths and one of labels. A column "split" of a table names the
            split of each row.
        classes: of the model that is to read them; the data may hold only these. Else the names of
            the data, sorted, or in the order that a parquet file gives.
        label_column: of a table, where its name is unusual; of several, the first that it has.

    Raises:
        UserError: nothing there, no labels, labels that are none of `classes`, a label column but
            no table, or `datasets` is missing.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"there is no file or folder {path}")
    name = path.stem if path.is_file() else path.resolve().name
    inside = list(visible_files(path)) if path.is_dir() else []
    _know_heic(inside)
    tables: dict[str, _Table]
    if path.suffix.lower() in _TABLES and path.is_file():
        tables = _paths_of_table(path, label_column)
    elif path.suffix.lower() == ".zip" and path.is_file():
        tables = _pictures_of_zip(path, name, label_column)
    elif path.is_dir() and not _hold_tables(inside):
        _require_no_column(path, label_column)
        files = (file.relative_to(path) for file in inside)
        tables = _by_class(files, path, name, path.joinpath)
    else:
        tables = _cells_by_split(path, label_column)
    class_names = list(classes) if classes is not None else None
    if class_names is None:
        order = next((names for _, _, names in tables.values() if names), None)
        distinct_labels = {label for _, labels, _ in tables.values() for label in labels}
        class_names = list(order) if order else sorted(distinct_labels, key=_natural)
    index = {_normal_form(label): number for number, label in enumerate(class_names)}
    parts = {}
    for split, (cells, labels, _) in tables.items():
        unknown_labels = sorted({*labels} - {*index})
        if unknown_labels:
            raise UserError(
                f"{path} holds the class {unknown_labels[0]!r}, which is none of the model's: "
                f"{', '.join(class_names[:12])}"
            )
        numbers = torch.tensor([index[label] for label in labels], dtype=torch.int64)
        parts[split] = OwnPictures(cells, numbers, tuple(class_names), name, split)
    if not sum(len(part) for part in parts.values()):
        raise UserError(f"{path} holds no labelled pictures")
    return parts


def _hold_tables(files: Iterable[PurePath]) -> bool:
    """Whether files of a folder or zip are, or come with, tables that `datasets` reads."""
    tables = ("*.parquet", "metadata.csv", "metadata.jsonl")
    return any(file.match(name) for file in files for name in tables)


def _require_no_column(path: Path, label_column: str | Sequence[str] | None) -> None:
    if isinstance(label_column, str):
        raise UserError(
            f"the labels are to be in the column {label_column!r}, but {path} holds no table: "
            "leave --label-column out"
        )


def _natural(name: str) -> tuple[int, str]:
    return (int(name), name) if name.isdecimal() else (-1, name)


def _know_heic(files: Iterable[PurePath]) -> None:
    """Register HEIC, the format of iPhones, if files have it; else `datasets` leaves them out.

    Raises:
        UserError: files have it, and no installed package reads them.
    """
    picture = next((file for file in files if file.suffix.lower() in HEIC), None)
    if picture is None:
        return
    register_heic(picture)
    with contextlib.suppress(ImportError):
        from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

        ImageFolder.EXTENSIONS = [*{*ImageFolder.EXTENSIONS, *HEIC}]


def _open(path: Path, cache: Path | None = None) -> dict[str, Any]:
    """Splits as `datasets` opens them; it keeps its copy in `cache`, None for its own folder."""
    with contextlib.suppress(ImportError):
        from datasets import disable_progress_bars

        disable_progress_bars()
    inside = sorted(path.rglob("*.parquet")) if path.is_dir() else []
    parquet = [path] if path.suffix.lower() == ".parquet" else inside
    if path.is_file() and not parquet:
        raise UserError(
            f"{path} is no table of pictures: give a folder, a .zip, .parquet, .csv or .tsv"
        )
    cache_options = {"cache_dir": str(cache)} if cache else {}
    options: dict[str, Any] = {"path": "imagefolder", "data_dir": str(path), **cache_options}
    if parquet:
        shards = _parquet_by_split(path) if inside else {}
        shards = shards or {"train": parquet}
        paths = {split: [str(file) for file in files] for split, files in shards.items()}
        options = {"path": "parquet", "data_files": paths, **cache_options}
    else:  # `datasets` would take test-1.png for the test split, and leave out all others
        options["data_files"] = {"train": ["**"]}
        folders = [child.name for child in sorted(path.iterdir()) if child.is_dir()]
        if split_folders := [name for name in folders if name.casefold() in SPLIT_OF]:
            for file in (path / f"metadata{suffix}" for suffix in (".csv", ".jsonl", ".parquet")):
                if not file.is_file():
                    continue
                raise UserError(
                    f"{file} lies beside folders of splits, where it is not read: put one into "
                    "each of them, or name a .csv itself that has a column split"
                )
            options["data_files"] = {}
            for name in split_folders:
                split = SPLIT_OF[name.casefold()]
                options["data_files"].setdefault(split, []).append(f"{name}/**")
    return dict(open_dataset("pictures of one's own need", _unreadable(path), **options))


def _unreadable(path: Path) -> str:
    return (
        f"cannot read {path} as labelled pictures (a folder of pictures per class, a zip of it, "
        "parquet, or a .csv of paths and labels)"
    )


def _parquet_by_split(path: Path) -> dict[str, list[Path]]:
    """Parquet files of a folder by split: shards, else files named by their split alone."""
    shards = {
        split: [file for word in words for file in parquet_shards(path, word)]
        for split, words in SPELLINGS.items()
    }
    files = {file for file in path.rglob("*.parquet") if not is_hidden(file.relative_to(path))}
    rest = files.difference(*shards.values())
    for file in sorted(rest):
        if file.stem.casefold() in SPLIT_OF:
            shards[SPLIT_OF[file.stem.casefold()]].append(file)
            rest.remove(file)
    found = {split: files for split, files in shards.items() if files}
    if others := [file for file in rest if _SHARD.fullmatch(file.name)]:
        warn_once(f"{len(others)} file(s) of other splits are passed over, as {min(others)}")
        rest -= {*others}
    if found and rest:
        raise UserError(
            f"{min(rest)} is named by no split, as others are ({', '.join(found)}): name it "
            "train, validation or test, or take it away"
        )
    return found


def _visible_entries(archive: zipfile.ZipFile) -> dict[PurePath, zipfile.ZipInfo]:
    """Files of a zip in the order of their names, without hidden ones and what macOS adds."""
    files: dict[PurePath, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        entry.filename = entry.filename.replace("\\", "/")  # as old programs of Windows part them
        if not entry.is_dir():
            files[PurePosixPath(entry.filename)] = entry
    return {file: files[file] for file in sorted(files) if not is_hidden(file)}


def _by_class(
    files: Iterable[PurePath], path: Path, name: str, read: Callable[[PurePath], bytes | Path]
) -> dict[str, _Table]:
    """Pictures of a folder or zip by split; the folder that a picture lies in is its class.

    Not by `datasets`, which parts pictures by words in their files' names too.

    Args:
        files: below the folder or in the zip, relative to it.
        path: of the folder or zip.
        name: the class of pictures that lie in no folder, where all do.
        read: gives a picture's cell.

    Raises:
        UserError: there are none, or some lie in the folder of a class, or of a split, and others
            do not.
    """
    suffixes = _picture_suffixes()
    all_files = [*files]
    pictures = [file for file in all_files if file.suffix.lower() in suffixes]
    if not pictures:
        raise UserError(f"{_unreadable(path)}: it holds no pictures")
    if others := [file for file in all_files if file.suffix.lower() not in suffixes]:
        warn_once(
            f"{len(others)} file(s) of {path} are passed over, as {others[0]}: save pictures as "
            "PNG or JPEG"
        )
    inner = [tuple(map(_normal_form, file.parts[:-1])) for file in pictures]
    around = min(_around(inner), max(min(map(len, inner)) - 1, 0))
    inner = [parts[around:] for parts in inner]
    splits = [split_of(parts) for parts in inner]
    # Splits may lie in the folders of classes, too.
    places = [tuple(part for part in parts if split_of([part]) is None) for parts in inner]
    loose = [file for file, place in zip(pictures, places, strict=True) if not place]
    if loose and (len(loose) < len(pictures) or any(inner)):
        raise UserError(
            f"{path / loose[0]} lies in no folder of a class, as others do or as a split has them "
            "(train/CLASS/PICTURE)"
        )
    if None in splits and any(splits):
        raise UserError(
            f"{path / pictures[splits.index(None)]} lies in no folder of a split, as others do "
            f"({', '.join(sorted({split for split in splits if split}))})"
        )
    _require_one_place(path, places)
    labels = [place[-1] if place else name for place in places]
    classes = sorted({*labels})
    rows = zip(map(read, pictures), labels, [split or "train" for split in splits], strict=True)
    return _by_split(rows, classes)


def _around(inner: Sequence[tuple[str, ...]]) -> int:
    """Number of folders around all files, as zips often have one; a split's folder ends them."""
    prefix = os.path.commonprefix(list(inner))
    return next((i for i, name in enumerate(prefix) if split_of([name])), len(prefix))


def _require_one_place(path: Path, places: Iterable[tuple[str, ...]]) -> None:
    """Refuse folders of classes that do not say which class a picture has.

    Args:
        path: of the pictures.
        places: the folders around each picture, without those of splits.

    Raises:
        UserError: two folders have the name of a class, or one lies in another.
    """
    place_of_class: dict[str, tuple[str, ...]] = {}
    for place in sorted({*places} - {()}):
        other = place_of_class.setdefault(place[-1], place)
        above = (place[:end] for end in range(1, len(place)))
        if other == place:
            other = next((folder for folder in above if folder in place_of_class.values()), place)
        if other != place:
            raise UserError(
                f"{path} has pictures in {'/'.join(other)} and in {'/'.join(place)}, which leaves "
                "their class open: give every class one folder, in folders train, validation and "
                "test where there are splits, or name a .csv of paths and labels"
            )


def _normal_form(name: str) -> str:
    """A name in Unicode's form NFC; macOS writes the accents in names of files apart."""
    return unicodedata.normalize("NFC", name).strip()


def _by_split(
    rows: Iterable[tuple[bytes | Path, str, str]], classes: list[str] | None = None
) -> dict[str, _Table]:
    """Rows of picture, label and split as a table per split."""
    tables: dict[str, _Table] = {}
    order = classes and [*map(_normal_form, classes)]
    for cell, label, split in rows:
        cells, labels, _ = tables.setdefault(split, ([], [], order))
        cells.append(cell)
        labels.append(_normal_form(label))
    return tables


def _columns(
    names: Sequence[str], path: Path, label_column: str | Sequence[str] | None
) -> tuple[str, str]:
    """The columns of a table that hold its pictures, or their paths, and its labels."""
    image = _column(names, _PICTURES)
    label_names = [label_column] if isinstance(label_column, str) else label_column or _LABELS
    label = _column(names, label_names)
    if image is None or label is None:
        what = "pictures" if image is None else "labels"
        raise UserError(
            f"{path} has no {what}: it needs a folder of pictures per class, or columns such as "
            f"image (or path) and label (it has {', '.join(names) or 'none'}; --label-column names "
            "another)"
        )
    return image, label


def _column(names: Sequence[str], candidates: Sequence[str]) -> str | None:
    """The first of the wanted columns that a table has, in capitals or not."""
    plain = {name.casefold(): name for name in reversed(names)}
    matches = (name if name in names else plain.get(name.casefold()) for name in candidates)
    return next((name for name in matches if name), None)


def _split_column(names: Sequence[str], label: str) -> str | None:
    """The column that names the split of each row, unless it is the column of the labels."""
    column = _column(names, [SPLIT_COLUMN])
    return None if column == label else column


def _cells_by_split(
    path: Path, label_column: str | Sequence[str] | None, cache: Path | None = None
) -> dict[str, _Table]:
    """Pictures and labels of parquet files, or of a folder with tables; see `_open`."""
    if path.is_dir():
        inner = [file.relative_to(path).parts[:-1] for file in visible_files(path)]
        path = path.joinpath(*inner[0][: _around(inner)])
    datasets = _open(path, cache)
    tables: dict[str, _Table] = {}
    for split, dataset in datasets.items():
        split_tables = _cells(dataset, split, path, label_column)
        if len(datasets) > 1 and {*split_tables} - {split}:
            raise other_splits(path, split)
        tables |= split_tables
    if path.is_dir() and not any(path.rglob("*.parquet")):
        suffixes = _picture_suffixes()
        n_pictures = sum(file.suffix.lower() in suffixes for file in visible_files(path))
        n_rows = sum(len(cells) for cells, _, _ in tables.values())
        if n_rows < n_pictures:
            warn_once(
                f"{n_pictures - n_rows} picture(s) of {path} stand in no metadata file and are "
                "passed over"
            )
    return tables


def _picture_suffixes() -> set[str]:
    """Suffixes of files that are read as pictures, in small letters."""
    formats = Image.registered_extensions().items()
    suffixes = {
        suffix for suffix, kind in formats if kind in Image.OPEN and kind not in _NO_PICTURES
    }
    return suffixes | {*HEIC}


def _cells(
    dataset: Any, split: str, path: Path, label_column: str | Sequence[str] | None
) -> dict[str, _Table]:
    """Pictures and labels of a table by split: as its split column says, else all in `split`."""
    from datasets import Image as ImageFeature

    image, label = _columns(dataset.column_names, path, label_column)
    dataset = dataset.cast_column(image, ImageFeature(decode=False))
    classes = getattr(dataset.features[label], "names", None)
    cells: list[bytes | Path] = []
    for number, cell in enumerate(dataset[image]):
        if not cell or not (cell.get("bytes") or cell.get("path")):
            raise UserError(f"row {number} of {path} has no picture")
        content = cell.get("bytes")
        folder = path if path.is_dir() else path.parent
        cells.append(content if content else folder / cell["path"])
    labels = []
    for number, value in enumerate(dataset[label]):
        if isinstance(value, (list, dict)):
            raise UserError(f"row {number} of {path} has no single label, but {value!r}")
        is_missing = value is None or value != value  # NaN, as pandas writes what is missing
        if is_missing or not str(value).strip() or (classes and not 0 <= value < len(classes)):
            raise UserError(f"row {number} of {path} has no label")
        labels.append(classes[value] if classes else str(value))
    splits = [split] * len(labels)
    if column := _split_column(dataset.column_names, label):
        names = getattr(dataset.features[column], "names", None)
        words = [names[v] if names and v is not None else v for v in dataset[column]]
        splits = [named_split(word, f"row {n} of {path}") for n, word in enumerate(words)]
    return _by_split(zip(cells, labels, splits, strict=True), classes)


def _pictures_of_zip(
    path: Path, name: str, label_column: str | Sequence[str] | None
) -> dict[str, _Table]:
    """Pictures of a zip by split, as those of a folder."""
    faults = (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError, zlib.error)
    with as_user_error(f"cannot read {path}", *faults), zipfile.ZipFile(path) as archive:
        entries = _visible_entries(archive)
        _know_heic(entries)
        if _hold_tables(entries):
            return _tables_of_archive(archive, entries.values(), path, label_column)

        _require_no_column(path, label_column)

        def content(file: PurePath) -> bytes:
            if entries[file].file_size > _LARGEST_FILE:
                raise UserError(f"{file} in {path} is too large")
            return archive.read(entries[file])

        return _by_class(entries, path, name, content)


def _tables_of_archive(
    archive: zipfile.ZipFile,
    entries: Iterable[zipfile.ZipInfo],
    path: Path,
    label_column: str | Sequence[str] | None,
) -> dict[str, _Table]:
    """Pictures of a zip with tables, which `datasets` reads from folders alone."""
    with TemporaryDirectory() as place:
        folder = Path(place, "content")
        for entry in entries:
            if entry.file_size > _LARGEST_FILE and not entry.filename.lower().endswith(".parquet"):
                raise UserError(f"{entry.filename} in {path} is too large")
            archive.extract(entry, folder)
        try:
            tables = _cells_by_split(folder, label_column, Path(place, "cache"))
        except UserError as error:  # about the zip, which the user knows
            raise UserError(str(error).replace(str(folder), str(path))) from error
        for cells, _, _ in tables.values():
            cells[:] = [cell if isinstance(cell, bytes) else cell.read_bytes() for cell in cells]
        return tables


def _paths_of_table(path: Path, label_column: str | Sequence[str] | None) -> dict[str, _Table]:
    """Pictures and labels of a CSV file by split; paths are relative to it."""
    delimiter = _TABLES[path.suffix.lower()]
    with (
        as_user_error(f"{path} is not UTF-8; save it as UTF-8", UnicodeDecodeError),
        as_user_error(f"cannot read {path}", OSError, csv.Error),
        path.open(encoding="utf-8-sig", newline="") as stream,
    ):
        text = stream.read()
        head = text.partition("\n")[0]
        if delimiter not in head and ";" in head:  # as Excel writes it where commas are decimal
            delimiter = ";"
        reader = csv.reader(io.StringIO(text, ""), delimiter=delimiter, skipinitialspace=True)
        lines = [[field.strip() for field in line] for line in reader]
    names = lines[0] if lines else []
    image, label = _columns(names, path, label_column)
    column = _split_column(names, label)
    rows: list[tuple[Path, str, str]] = []
    for number, line in enumerate(lines[1:], 2):
        if not any(line):
            continue
        if any(line[len(names) :]):
            raise UserError(
                f"line {number} of {path} has {len(line)} fields, its first line names "
                f"{len(names)}; put a field that holds {delimiter!r} in quotes"
            )
        row = dict.fromkeys(names, "") | dict(zip(names, line, strict=False))
        if not row[image] or not row[label]:
            raise UserError(f"line {number} of {path} lacks a path or a label")
        file = path.parent / row[image]
        if not file.is_file():
            raise UserError(f"line {number} of {path}: there is no file {file}")
        split = named_split(row[column], f"line {number} of {path}") if column else "train"
        rows.append((file, row[label], split))
    _know_heic(file for file, _, _ in rows)
    return _by_split(rows)


def contradictions(parts: dict[str, OwnPictures]) -> list[str]:
    """Warnings about pictures with copies under another label; empty where there are none."""
    labels: dict[str, set[int]] = {}
    for part in parts.values():
        for digest, label in zip(part.digests(), part.labels.tolist(), strict=True):
            labels.setdefault(digest, set()).add(label)
    conflicts = [sorted(group) for group in labels.values() if len(group) > 1]
    if not conflicts:
        return []
    classes = next(iter(parts.values())).classes
    names = " and ".join(classes[label] for label in conflicts[0])
    what = "picture has" if len(conflicts) == 1 else "pictures have"
    return [f"{len(conflicts)} {what} copies under another label ({names}, say): mend the data"]


def unlearnt(parts: dict[str, OwnPictures]) -> list[str]:
    """Warnings about classes that the training split lacks and other splits have."""
    learnt_labels = {*parts["train"].labels.tolist()}
    missing_labels = sorted(
        {label for part in parts.values() for label in part.labels.tolist()} - learnt_labels
    )
    if not missing_labels:
        return []
    names = ", ".join(parts["train"].classes[label] for label in missing_labels[:5])
    return [
        f"{len(missing_labels)} of the classes have no picture to learn ({names}): mend the data"
    ]


def _to_train_on(parts: dict[str, OwnPictures]) -> OwnPictures:
    """The training split.

    Raises:
        UserError: there is none, or it has fewer than two classes.
    """
    if "train" not in parts:
        raise UserError(f"the data have no split to train on, but {', '.join(parts)}")
    training = parts["train"]
    if len(training.labels.unique()) < 2:
        raise UserError(
            f"{training.name} holds pictures of {len(training.labels.unique())} class; at least "
            "two are needed, a folder for each"
        )
    return training


def divide_own(parts: dict[str, OwnPictures], seed: int = 0) -> tuple[OwnPictures, OwnPictures]:
    """Training pictures and a hold-out: stored splits where there are two, else stratified.

    Raises:
        UserError: fewer than two classes, or no class with two pictures.
    """
    training = _to_train_on(parts)
    other = next((parts[split] for split in ("validation", "test") if split in parts), None)
    if other is not None and len(other):
        return training, other
    rows, held_out = stratified(training.labels, HELD_OUT, seed, training.digests())
    if not held_out:
        raise UserError(f"{training.name} has one picture of each class; give at least two")
    return training.part(rows, "train"), training.part(held_out, "test")


def divide_in_three(
    parts: dict[str, OwnPictures], share: float = HELD_OUT, seed: int = 0
) -> tuple[OwnPictures, OwnPictures | None, OwnPictures]:
    """Training, validation and test pictures.

    Stored splits are used where there are any; missing ones are drawn class by class from the
    training pictures. The validation part is None where it would be too small, see `FEWEST`.

    Args:
        parts: pictures by split.
        share: of the test part; the validation part has half of it.
        seed: of the draw.

    Raises:
        UserError: fewer than two classes, or no class with two pictures.
    """
    training = _to_train_on(parts)
    stored_parts = {
        split: parts[split] for split in ("validation", "test") if len(parts.get(split, ()))
    }
    validation = 0.0 if "validation" in stored_parts else share / 2
    digests = training.digests()
    if "test" in stored_parts:
        rows, validation_rows = list(range(len(training))), list[int]()
        if validation:
            rows, validation_rows = stratified(training.labels, validation, seed, digests)
            if len(validation_rows) < FEWEST:
                rows, validation_rows = list(range(len(training))), list[int]()
        held_out: list[int] = []
    else:
        rows, validation_rows, held_out = three_parts(
            training.labels, share, validation, seed, digests
        )
        if not held_out:
            raise UserError(f"{training.name} has one picture of each class; give at least two")
    validation_part = training.part(validation_rows, "validation") if validation_rows else None
    return (
        training.part(rows, "train"),
        stored_parts.get("validation", validation_part),
        stored_parts.get("test", training.part(held_out, "test")),
    )


def pictures_of_split(
    path: str | Path, split: str, classes: Sequence[str], record: dict[str, Any] | None
) -> OwnPictures:
    """Pictures of one's own to measure a model on.

    Args:
        path: see `load_own_pictures`.
        split: "train" (what the model was trained on), "validation" (what chose its weights),
            "test" (the rest) or "all". A stored split is used as it is. Where there is no test
            split, and no pictures are left for one, the validation split stands in for it.
        classes: of the model.
        record: of the model.
    """
    column = (record or {}).get("label_column")
    parts = load_own_pictures(path, classes, (column, *_LABELS) if column else None)
    if len(parts) == 1 and (split == "train" or split not in parts):
        (whole,) = parts.values()
        return whole.part(unseen(whole.digests(), record or {}, split), split)
    if split == "all":
        first = next(iter(parts.values()))
        return replace(
            first,
            encoded=[cell for part in parts.values() for cell in part.encoded],
            labels=torch.cat([part.labels for part in parts.values()]),
            split=split,
        )
    if split in parts and (split != "train" or record is None):
        learnt_digests = {*(record or {}).get("train", ())}
        if count := sum(digest in learnt_digests for digest in parts[split].digests()):
            warn_once(f"{count} picture(s) of the {split} split were learnt: its figure flatters")
        return parts[split]
    if record is not None and "train" in parts and split in SPLITS:
        whole = parts["train"]
        rows = rows_of_split(whole.digests(), record, split)
        if rows:
            return whole.part(rows, split)
    if split == "test" and "validation" in parts:
        return replace(parts["validation"], split=split)
    raise UserError(f"{path} has no split {split!r}; its splits are {', '.join(parts)}")
