"""Labelled pictures from parquet files in the Hub's layout, as uint8 tensors.

The files come from a local folder or are fetched from the Hub; pyarrow and Pillow read them, so no
further data set library is needed. Splits and fingerprints depend on the pixels alone, not on the
order of the rows nor on how the pictures are compressed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from pyarrow.lib import ArrowException
from torch import Tensor

from deqzoo.data.pictures import decode_picture
from deqzoo.data.shards import data_folder, parquet_shards
from deqzoo.errors import UserError, as_user_error
from deqzoo.models.mdeq.image_processing_mdeq import to_rgb

logger = logging.getLogger(__name__)

SPLIT_SEED = 0

Groups = Iterator[tuple[list[bytes], list[Any]]]
"""Encoded pictures with their labels, each an index into the classes or a class name."""


@dataclass(frozen=True)
class ImageSource:
    """What is known about a data set.

    `config` is the folder of the repository that holds the wanted variant; `test` is the stored
    split to test on, "train" is divided into training and validation part. `fingerprints` are
    those of the stored splits when complete; photographs have none, since decoders and scalers
    differ in the last bit. `stored_names` maps the class names of the Hub's files to those of
    `classes` where they differ; `unpacked` reads a stored split from a folder in
    the authors' own layout and returns None for any other folder.
    """

    name: str
    title: str
    repository: str
    config: str
    classes: tuple[str, ...]
    test: str
    rows: Mapping[str, int]
    side: int | None = None
    validation_per_class: int = 0
    fingerprints: Mapping[str, str] | None = None
    stored_names: Mapping[str, str] | None = None
    unpacked: Callable[[Path, str], Groups | None] | None = None

    def part(self, split: str) -> tuple[str, str | None]:
        """The stored split of a split, and which part of it where it is divided.

        Raises:
            UserError: there is no such split.
        """
        parts = {
            "train": ("train", "train"),
            "validation": ("train", "validation"),
            "train+validation": ("train", None),
            "test": (self.test, None),
        }
        if split not in parts:
            raise UserError(
                f"{self.title} has no split {split!r}; its splits are {', '.join(parts)}"
            )
        return parts[split]


@dataclass(frozen=True)
class Pictures:
    """One split in memory.

    Attributes:
        pixels: uint8 (N, 3, H, W).
        labels: int64 (N,), indices into `classes`.
        classes: names in label order.
        split: its name.
        fingerprint: SHA-256 over the sorted digests of all (label, pixels) pairs.
        complete: whether the stored split it came from is the published one: picture for picture
            where its fingerprint is known, else by the number of pictures.
        source: the data set's name.
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    split: str
    fingerprint: str
    complete: bool
    source: str

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, row: int) -> Image.Image:
        """One picture, RGB."""
        return Image.fromarray(self.pixels[row].permute(1, 2, 0).numpy())

    def describe(self) -> dict[str, Any]:
        """What evaluation files and training logs record about the data."""
        return {
            "name": self.source,
            "split": self.split,
            "pictures": len(self),
            "fingerprint": self.fingerprint,
            "complete": self.complete,
        }


def load_pictures(
    source: ImageSource,
    split: str,
    data: str | os.PathLike[str] | None = None,
    *,
    transform: Callable[[Image.Image], Image.Image] | None = None,
    seed: int = SPLIT_SEED,
) -> Pictures:
    """A split as tensors.

    Args:
        source: the data set.
        split: "train", "validation", "train+validation" or "test".
        data: local folder in the Hub's layout, or another repository; None for `source.repository`.
        transform: applied to each decoded RGB picture; all results must have one size.
        seed: of the division into training and validation part.

    Raises:
        UserError: unknown split, or data that cannot be had or are not this data set.
    """
    stored_split, part = source.part(split)
    folder = data_folder(source.title, source.repository, data, source.config)
    groups = source.unpacked(folder, stored_split) if source.unpacked else None
    if groups is None:
        groups = _row_groups(source, split_files(source, folder, stored_split))
    pixels, labels = _decode(source, folder, groups, transform)
    digests = picture_digests(pixels, labels)
    fingerprint = _fingerprint(digests)
    reference = (source.fingerprints or {}).get(stored_split)
    complete = fingerprint == reference if reference else len(labels) == source.rows[stored_split]
    if len(labels) != source.rows[stored_split]:
        logger.warning(
            "%s holds %d pictures of %s %s, the published split has %d",
            folder, len(labels), source.title, stored_split, source.rows[stored_split],
        )  # fmt: skip
    whole = Pictures(pixels, labels, source.classes, split, fingerprint, complete, source.name)
    if part is None:
        return whole
    held_out = validation_rows(digests, labels, source.validation_per_class, seed)
    return _part(whole, digests, part, held_out if part == "validation" else ~held_out)


def divide(
    whole: Pictures, source: ImageSource, seed: int = SPLIT_SEED
) -> tuple[Pictures, Pictures]:
    """Training and validation part of a published training split.

    What `load_pictures` gives for "train" and "validation", from pictures decoded once.
    """
    digests = picture_digests(whole.pixels, whole.labels)
    held_out = validation_rows(digests, whole.labels, source.validation_per_class, seed)
    training = _part(whole, digests, "train", ~held_out)
    return training, _part(whole, digests, "validation", held_out)


def _part(whole: Pictures, digests: list[bytes], split: str, mask: Tensor) -> Pictures:
    """The pictures of a mask (N,), as a split of their own."""
    part_digests = [digest for digest, here in zip(digests, mask.tolist(), strict=True) if here]
    return replace(
        whole,
        pixels=whole.pixels[mask],
        labels=whole.labels[mask],
        split=split,
        fingerprint=_fingerprint(part_digests),
    )


def split_files(source: ImageSource, folder: Path, stored_split: str) -> list[Path]:
    """Parquet files of a stored split, of the wanted variant where the folder holds several.

    Raises:
        UserError: there are none, not all of them, or those of several copies.
    """
    inside = folder / source.config if (folder / source.config).is_dir() else folder
    files = parquet_shards(inside, stored_split)
    if not files:
        raise UserError(
            f"folder {folder} does not hold {source.title}: it has no {stored_split}-*.parquet"
        )
    return files


def _decode(
    source: ImageSource,
    folder: Path,
    groups: Groups,
    transform: Callable[[Image.Image], Image.Image] | None,
) -> tuple[Tensor, Tensor]:
    """All pictures (N, 3, H, W) uint8 and labels (N,) int64 of a stored split."""
    index = {name: number for number, name in enumerate(source.classes)}

    def to_array(content: bytes) -> np.ndarray:
        picture = to_rgb(decode_picture(content, f"a picture of {source.title} in {folder}"))
        return np.asarray(picture if transform is None else transform(picture))

    arrays: list[np.ndarray] = []
    labels: list[int] = []
    fault = f"cannot read {source.title} from {folder}"
    with as_user_error(fault, ArrowException, OSError, most=160):
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            for contents, marks in groups:
                arrays.extend(pool.map(to_array, contents, chunksize=64))
                labels.extend(index.get(mark, mark) for mark in marks)  # type: ignore[misc]
    if not arrays:
        raise UserError(f"folder {folder} holds no picture of {source.title}")
    sizes = {array.shape[:2] for array in arrays}
    expected_sizes = {(source.side, source.side)} if transform is None and source.side else sizes
    if sizes != expected_sizes or len(sizes) != 1:
        raise UserError(
            f"folder {folder} does not hold {source.title}: pictures of "
            f"{len(sizes)} sizes, e.g. {sorted(sizes)[:2]}"
        )
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.tensor(labels, dtype=torch.int64)


def _row_groups(source: ImageSource, files: list[Path]) -> Iterator[tuple[list[bytes], list[int]]]:
    """Encoded pictures and labels in the order of `source.classes`, one row group at a time."""
    for path in files:
        parquet = pq.ParquetFile(path)
        schema = parquet.schema_arrow
        image = next((name for name in ("img", "image") if name in schema.names), None)
        if image is None or "label" not in schema.names:
            raise UserError(
                f"{path} does not hold {source.title}: its columns are {', '.join(schema.names)}"
            )
        numbers = _label_numbers(source, path, _class_names(path, schema.metadata))
        for group in range(parquet.num_row_groups):
            table = parquet.read_row_group(group, columns=[image, "label"])
            contents = [_file_content(path, cell) for cell in table.column(image).to_pylist()]
            labels = table.column("label").to_pylist()
            for label in labels:
                if not isinstance(label, (int, str)) or label not in numbers:
                    raise UserError(
                        f"{path} does not hold {source.title}: labels outside "
                        f"0..{len(source.classes) - 1}, e.g. {label!r}"
                    )
            yield contents, [numbers[label] for label in labels]


def _file_content(path: Path, cell: Any) -> bytes:
    """Bytes of a picture's file, which a cell holds itself or in a mapping."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(content, bytes):
        raise UserError(f"{path} has a row whose picture is empty or not stored in the file")
    return content


def _label_numbers(source: ImageSource, path: Path, names: list[str] | None) -> dict[Any, int]:
    """Stored label, a number or a class name, to its index in `source.classes`.

    Raises:
        UserError: the file names other classes.
    """
    index = {_plain(name): number for number, name in enumerate(source.classes)}
    if names is not None and source.stored_names is not None:
        names = [source.stored_names.get(name, name) for name in names]
    if names is None:
        number_of_name = {name: number for number, name in enumerate(source.classes)}
        return {number: number for number in range(len(source.classes))} | number_of_name
    if sorted(map(_plain, names)) != sorted(index):
        raise UserError(
            f"{path} does not hold {source.title}: its classes are {', '.join(names[:5])}, ..."
        )
    return {number: index[_plain(name)] for number, name in enumerate(names)}


def _plain(name: str) -> str:
    return name.casefold().replace("_", " ").strip()


def _class_names(path: Path, metadata: Mapping[bytes, bytes] | None) -> list[str] | None:
    """Class names as the Hub stores them in a parquet file, if they are there.

    Raises:
        UserError: the description is damaged, so that the order of the classes is not known.
    """
    description = (metadata or {}).get(b"huggingface")
    if not description:
        return None
    try:
        label = json.loads(description).get("info", {}).get("features", {}).get("label", {})
        names = label.get("names")
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"the description of the columns in {path} is damaged: write the file anew"
        ) from error
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"the class names in {path} are no list of names: write the file anew")
    return names


def picture_digests(pixels: Tensor, labels: Tensor) -> list[bytes]:
    """SHA-256 of each picture's label and pixels (H, W, 3)."""
    rows = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    return [
        hashlib.sha256(bytes([label]) + row.tobytes()).digest()
        for row, label in zip(rows, labels.tolist(), strict=True)
    ]


def _fingerprint(digests: list[bytes]) -> str:
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def validation_rows(digests: list[bytes], labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Which rows belong to the validation part: bool (N,).

    Of each class those `per_class` pictures whose digest, hashed with the seed, is smallest; at
    most half of a class, so that small stand-ins keep both parts.
    """
    salt = str(seed).encode()
    order = np.array([hashlib.sha256(salt + digest).hexdigest() for digest in digests])
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = np.flatnonzero(labels.numpy() == label)
        ranking = members[np.argsort(order[members], kind="stable")]
        mask[torch.from_numpy(ranking[: min(per_class, len(members) // 2)])] = True
    return mask
