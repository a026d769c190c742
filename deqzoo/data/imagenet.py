"""ImageNet-1k (ILSVRC 2012): a million photographs, decoded one by one when they are needed.

`datasets` keeps the encoded pictures in memory-mapped files, so that memory holds labels only.
The data set on the Hub asks for its terms to be accepted; a local copy needs no connection.
"""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from PIL import Image

from deqzoo.data.images import SPLIT_SEED, ImageSource, split_files
from deqzoo.data.shards import local_folder, open_dataset
from deqzoo.errors import UserError
from deqzoo.models.mdeq.image_processing_mdeq import to_rgb

IMAGENET = ImageSource(
    name="imagenet",
    title="ImageNet-1k",
    repository="ILSVRC/imagenet-1k",
    config="data",
    classes=tuple(f"class {i}" for i in range(1000)),
    test="validation",
    rows={"train": 1_281_167, "validation": 50_000},
    validation_per_class=10,
)


class StoredPictures:
    """One split of a data set that `datasets` has opened."""

    def __init__(self, dataset: Any, column: str, rows: np.ndarray, split: str) -> None:
        """Take the rows (N,) of a stored split whose pictures are in `column`."""
        labels = np.asarray(dataset.with_format("numpy")["label"][:], dtype=np.int64)
        self.dataset = dataset
        self.column = column
        self.rows = rows
        self.split = split
        self.labels = torch.from_numpy(labels[rows])
        self.classes = _class_names(dataset, labels)

    def __len__(self) -> int:
        return len(self.rows)

    def picture(self, row: int) -> Image.Image:
        return to_rgb(self.dataset[int(self.rows[row])][self.column])

    def describe(self) -> dict[str, Any]:
        return {
            "name": IMAGENET.name,
            "split": self.split,
            "pictures": len(self),
            "fingerprint": self.fingerprint,
        }

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over labels and lengths of the encoded pictures, which is read in seconds."""
        contents = pc.struct_field(self.dataset.data.column(self.column), "bytes")
        lengths = np.asarray(pc.binary_length(contents).to_numpy(), dtype=np.int64)[self.rows]
        return hashlib.sha256(self.labels.numpy().tobytes() + lengths.tobytes()).hexdigest()


class BlankPictures:
    """Grey pictures in the numbers of a split, to try a recipe where the data are not at hand."""

    def __init__(self, n: int, classes: tuple[str, ...], side: int = 256) -> None:
        self.labels = torch.arange(n) % len(classes)
        self.classes = classes
        self._picture = Image.new("RGB", (side, side), "grey")

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, row: int) -> Image.Image:
        return self._picture

    def describe(self) -> dict[str, Any]:
        return {"name": f"stand-in-{IMAGENET.name}", "pictures": len(self)}


def load_imagenet(
    split: str,
    data: str | os.PathLike[str] | None = None,
    *,
    seed: int = SPLIT_SEED,
    cache_dir: str | None = None,
) -> StoredPictures:
    """ImageNet-1k, or photographs in its layout.

    Args:
        split: "train", "validation" (ten pictures of each class of the published training split),
            "train+validation" (that whole split), or "test" (the published validation split).
        data: local folder with parquet files in the Hub's layout (`train-*.parquet` with the
            columns image and label), or another repository; None for `ILSVRC/imagenet-1k`.
        seed: of the division into training and validation part.
        cache_dir: where `datasets` keeps its memory-mapped files; by default below HF_HOME. They
            take as much space as the parquet files.

    Raises:
        UserError: unknown split, `datasets` is missing, or data that cannot be had.
    """
    stored_split, part = IMAGENET.part(split)
    dataset = _open(stored_split, data, cache_dir)
    column = next((name for name in ("image", "img") if name in dataset.column_names), None)
    if column is None or "label" not in dataset.column_names:
        raise UserError(
            f"the data do not have the columns image and label but "
            f"{', '.join(dataset.column_names)}"
        )
    from datasets import Image as ImageFeature

    dataset = dataset.cast_column(column, ImageFeature())
    labels = np.asarray(dataset.with_format("numpy")["label"][:], dtype=np.int64)
    rows = np.arange(len(labels))
    if part is not None:
        held_out = _held_out(labels, IMAGENET.validation_per_class, seed)
        rows = rows[held_out if part == "validation" else ~held_out]
    return StoredPictures(dataset, column, rows, split)


def _open(stored_split: str, data: str | os.PathLike[str] | None, cache_dir: str | None) -> Any:
    folder = local_folder(data)
    if folder is None:
        options: dict[str, Any] = {"path": str(data or IMAGENET.repository), "split": stored_split}
    else:
        files = [str(path) for path in split_files(IMAGENET, folder, stored_split)]
        options = {"path": "parquet", "data_files": files, "split": "train"}
    fault = (
        f"{IMAGENET.title} cannot be opened; accept its terms on the Hub and log in, or pass the "
        "folder of a copy with --data"
    )
    return open_dataset("ImageNet needs", fault, cache_dir=cache_dir, **options)


def _class_names(dataset: Any, labels: np.ndarray) -> tuple[str, ...]:
    names = getattr(dataset.features["label"], "names", None)
    return tuple(names or (f"class {i}" for i in range(int(labels.max()) + 1)))


def _held_out(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Which rows belong to the validation part: bool (N,); at most half of a class."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    sizes = np.bincount(labels)
    starts = np.cumsum(sizes) - sizes
    rank = np.arange(len(labels)) - starts[labels[order]]
    mask = np.zeros(len(labels), dtype=bool)
    mask[order] = rank < np.minimum(per_class, sizes // 2)[labels[order]]
    return mask
