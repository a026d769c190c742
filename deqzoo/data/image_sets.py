"""CIFAR-10, Imagenette and Tiny ImageNet: what is known of them, and how they are loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from importlib import resources
from pathlib import Path

from PIL import Image, ImageOps

from deqzoo.data.images import SPLIT_SEED, ImageSource, Pictures, load_pictures
from deqzoo.errors import UserError

CIFAR10 = ImageSource(
    name="cifar10",
    title="CIFAR-10",
    repository="uoft-cs/cifar10",
    config="plain_text",
    classes=(
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    ),
    test="test",
    rows={"train": 50_000, "test": 10_000},
    side=32,
    validation_per_class=500,
    fingerprints={
        "train": "d59acf989e068e709ce686cda292672c7b212c08d29d3d3e6d8c3aa99eba6a85",
        "test": "899683d46c3a8c66fd56e1af12202e69fe5a4517be10b0f68e04c78fe585c57c",
    },
)  # fmt: skip
"""Krizhevsky 2009."""

IMAGENETTE = ImageSource(
    name="imagenette",
    title="Imagenette",
    repository="frgfm/imagenette",
    config="160px",
    classes=(
        "tench", "English springer", "cassette player", "chain saw", "church", "French horn",
        "garbage truck", "gas pump", "golf ball", "parachute",
    ),
    test="validation",
    rows={"train": 9_469, "validation": 3_925},
    validation_per_class=95,
)  # fmt: skip
"""Ten classes of ImageNet, photographs (Howard, fast.ai; version 2 split)."""

_TABLE = resources.files("deqzoo.data").joinpath("tiny_imagenet_classes.tsv")
_WORDS = dict(line.split("\t") for line in _TABLE.read_text(encoding="utf-8").splitlines())
"""WordNet number of each class of Tiny ImageNet to its first word in WordNet."""
_GROUP = 1000
"""Files that are read before they are decoded."""


def _archive_groups(folder: Path, split: str) -> Iterator[tuple[list[bytes], list[str]]] | None:
    """Pictures and labels of the authors' unpacked archive; None if the folder is none."""
    inside = folder / "tiny-imagenet-200"
    folder = inside if inside.is_dir() else folder
    annotations = folder / "val" / "val_annotations.txt"
    if not annotations.is_file():
        return None
    if split == "train":
        files = sorted((folder / "train").glob("*/images/*.JPEG"))
        labels = [file.parent.parent.name for file in files]
    else:
        rows = [line.split("\t")[:2] for line in annotations.read_text().splitlines() if line]
        if any(len(row) != 2 for row in rows):
            raise UserError(f"{annotations} is damaged: unpack the archive anew")
        files = [folder / "val" / "images" / name for name, _ in rows]
        labels = [label for _, label in rows]
    unknown_classes = set(labels) - _WORDS.keys()
    if unknown_classes:
        raise UserError(f"{folder} does not hold Tiny ImageNet: class {min(unknown_classes)}")

    def groups() -> Iterator[tuple[list[bytes], list[str]]]:
        for i in range(0, len(files), _GROUP):
            contents = [file.read_bytes() for file in files[i : i + _GROUP]]
            yield contents, [_WORDS[label] for label in labels[i : i + _GROUP]]

    return groups()


TINY_IMAGENET = ImageSource(
    name="tiny-imagenet",
    title="Tiny ImageNet",
    repository="zh-plus/tiny-imagenet",
    config="data",
    classes=tuple(_WORDS.values()),
    test="valid",  # the labels of the published test split are not public
    rows={"train": 100_000, "valid": 10_000},
    validation_per_class=25,
    stored_names=_WORDS,
    unpacked=_archive_groups,
)
"""200 classes of ImageNet, photographs of 64 pixels (Stanford CS231n)."""


def load_cifar10(
    split: str, data: str | os.PathLike[str] | None = None, *, seed: int = SPLIT_SEED
) -> Pictures:
    """CIFAR-10 as uint8 (N, 3, 32, 32).

    Args:
        split: "train" (45,000), "validation" (5,000, as many of each class), "train+validation"
            (50,000) or "test" (10,000).
        data: a local folder in the layout of the Hub's data set; fetched from there if None.
        seed: of the division into training and validation part.

    Raises:
        UserError: unknown split, or data that cannot be had or are not CIFAR-10.
    """
    return load_pictures(CIFAR10, split, data, seed=seed)


def load_photographs(
    source: ImageSource,
    split: str,
    data: str | os.PathLike[str] | None = None,
    *,
    size: int = 64,
    seed: int = SPLIT_SEED,
) -> Pictures:
    """Photographs as uint8 (N, 3, size, size).

    Args:
        source: Imagenette or Tiny ImageNet.
        split: "train", "validation" (some pictures of each class, from the published training
            split), "train+validation" (that whole split), or "test" (the published validation
            split).
        data: a local folder in the layout of the Hub's data set, or the authors' archive of Tiny
            ImageNet, unpacked; fetched from the Hub if None.
        size: side after scaling the shorter side and cropping the centre.
        seed: of the division into training and validation part.

    Raises:
        UserError: unknown split, or data that cannot be had or are not this data set.
    """

    def fit(picture: Image.Image) -> Image.Image:
        if picture.size == (size, size):
            return picture
        return ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)

    return load_pictures(source, split, data, transform=fit, seed=seed)


load_imagenette = partial(load_photographs, IMAGENETTE)
load_tiny_imagenet = partial(load_photographs, TINY_IMAGENET)
