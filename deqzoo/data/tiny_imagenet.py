"""Tiny ImageNet (Stanford CS231n): 200 classes of ImageNet, photographs of 64 pixels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from PIL import Image, ImageOps

from deqzoo.data.images import SPLIT_SEED, ImageSource, Pictures, load_pictures
from deqzoo.errors import UserError

_TABLE = resources.files("deqzoo.data").joinpath("tiny_imagenet_classes.tsv")
_WORDS = dict(line.split("\t") for line in _TABLE.read_text(encoding="utf-8").splitlines())
"""WordNet number of each class to its first word in WordNet."""
_GROUP = 1000
"""Files that are read before they are decoded."""


def _unpacked(folder: Path, stored: str) -> Iterator[tuple[list[bytes], list[str]]] | None:
    """Pictures and labels of the authors' unpacked archive; None if the folder is none."""
    inside = folder / "tiny-imagenet-200"
    folder = inside if inside.is_dir() else folder
    annotations = folder / "val" / "val_annotations.txt"
    if not annotations.is_file():
        return None
    if stored == "train":
        files = sorted((folder / "train").glob("*/images/*.JPEG"))
        labels = [file.parent.parent.name for file in files]
    else:
        rows = [line.split("\t")[:2] for line in annotations.read_text().splitlines() if line]
        if any(len(row) != 2 for row in rows):
            raise UserError(f"{annotations} is damaged: unpack the archive anew")
        files = [folder / "val" / "images" / name for name, _ in rows]
        labels = [label for _, label in rows]
    strange = set(labels) - _WORDS.keys()
    if strange:
        raise UserError(f"{folder} does not hold Tiny ImageNet: class {min(strange)}")

    def groups() -> Iterator[tuple[list[bytes], list[str]]]:
        for i in range(0, len(files), _GROUP):
            encoded = [file.read_bytes() for file in files[i : i + _GROUP]]
            yield encoded, [_WORDS[label] for label in labels[i : i + _GROUP]]

    return groups()


TINY_IMAGENET = ImageSource(
    name="tiny-imagenet",
    title="Tiny ImageNet",
    repository="zh-plus/tiny-imagenet",
    config="data",
    classes=tuple(_WORDS.values()),
    parts={
        "train": ("train", "train"),
        "validation": ("train", "validation"),
        "train+validation": ("train", None),
        "test": ("valid", None),
    },
    rows={"train": 100_000, "valid": 10_000},
    validation_per_class=25,
    stored_names=_WORDS,
    unpacked=_unpacked,
)


def load_tiny_imagenet(
    split: str,
    data: str | os.PathLike[str] | None = None,
    *,
    size: int = 64,
    seed: int = SPLIT_SEED,
) -> Pictures:
    """Tiny ImageNet as uint8 (N, 3, size, size).

    Args:
        split: "train", "validation" (25 pictures of each class, from the published training split),
            "train+validation" (that whole split), or "test" (the published validation split, since
            the labels of the test split are not public).
        data: the authors' archive, unpacked, or a local folder in the layout of the Hub's copy;
            fetched from there if None.
        size: side after scaling, where it is not the pictures' own 64.
        seed: of the division into training and validation part.

    Raises:
        UserError: unknown split, or data that cannot be had or are not Tiny ImageNet.
    """

    def fit(picture: Image.Image) -> Image.Image:
        if picture.size == (size, size):
            return picture
        return ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)

    return load_pictures(TINY_IMAGENET, split, data, transform=fit, seed=seed)
