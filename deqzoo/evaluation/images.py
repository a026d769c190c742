"""Image classification on a data set: accuracy, calibration, and what the equilibrium costs."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from deqzoo.data.image_sets import (
    CIFAR10,
    IMAGENETTE,
    TINY_IMAGENET,
    load_cifar10,
    load_imagenette,
    load_tiny_imagenet,
)
from deqzoo.data.images import ImageSource, Pictures
from deqzoo.data.own import chose_weights, read_record
from deqzoo.data.own_pictures import OwnPictures, pictures_of_split
from deqzoo.errors import UserError
from deqzoo.evaluation.base import Batches, ClassifierEvaluator
from deqzoo.models.mdeq.native_norm import native_norm_available
from deqzoo.models.readers import load_processor, to_batch

_KNOWN = (
    (CIFAR10, load_cifar10),
    # As large as they are stored: the processor scales and crops.
    (IMAGENETTE, functools.partial(load_imagenette, size=160)),
    (TINY_IMAGENET, load_tiny_imagenet),
)
WORTH_COMPILING = 2000
"""Pictures from which compiling the norm (half a minute, once) pays."""


class ImageEvaluator(ClassifierEvaluator):
    """An image classifier on CIFAR-10, Imagenette, Tiny ImageNet, or pictures of one's own.

    Raises:
        UserError: the model is no image classifier, or the data are missing or have other classes.
    """

    task = "image-classification"
    metric = "accuracy"
    unit = "pictures"
    budget_samples = 1000

    def load(self, split: str, data: str | os.PathLike[str] | None, limit: int | None) -> None:
        self.pictures = pictures_of(self.model, split, data)
        self.classes = self.pictures.classes
        self.processor = load_processor(self.model)
        self.description = self.pictures.describe()
        if isinstance(self.pictures, OwnPictures):
            record, digests = read_record(self.model.config._name_or_path), self.pictures.digests()
            self.description |= chose_weights(record, digests)
            # Folders are in the order of their classes: the first pictures would be of one class.
            order = sorted(range(len(digests)), key=digests.__getitem__)
            self.pictures = self.pictures.part(order, self.pictures.split)
        self.count = len(self.pictures)
        self.limit_to(limit)
        _speed_up(self.model, self.count)

    def environment(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "inference": _path(self.model)}

    def batches(self, samples: int | None) -> Batches:
        n = self.count if samples is None else min(samples, self.count)
        starts = range(0, n, self.batch_size)

        def inputs() -> Iterator[tuple[dict[str, Any], Any]]:
            for start in starts:
                rows = range(start, min(start + self.batch_size, n))
                pictures = [self.pictures.picture(row) for row in rows]
                pixels = to_batch(self.processor, pictures, self.model)
                yield {"pixel_values": pixels}, slice(None)

        return Batches(inputs(), len(starts), self.pictures.labels[:n])


def _path(model: Any) -> str:
    """The way in which a model computes; "plain" where it has only one."""
    return str(model.eval().inference_path()) if hasattr(model, "inference_path") else "plain"


def _speed_up(model: Any, n_pictures: int) -> None:
    """Take the memory format of a fast path, if there is one; compile its norm for many pictures.

    Another process that compiles it is not waited for.
    """
    if _path(model) == "plain":
        return
    model.to(memory_format=torch.channels_last)
    if n_pictures >= WORTH_COMPILING:
        native_norm_available(wait=False)


def pictures_of(
    model: Any, split: str, data: str | os.PathLike[str] | None
) -> Pictures | OwnPictures:
    """Pictures of one's own, or the split of the data set whose class names the labels are."""
    labels = tuple(model.config.id2label[i] for i in range(model.config.num_labels))
    source, load = next((pair for pair in _KNOWN if labels == pair[0].classes), (None, None))
    record = read_record(model.config._name_or_path)
    if data is not None and (record or source is None or not _may_hold(source, data)):
        return pictures_of_split(Path(data), split, labels, record)
    if load is not None:
        return load(split, data)
    raise UserError(
        f"the model's labels ({', '.join(labels[:4])}, ...) are those of no known data set "
        f"({', '.join(item.title for item, _ in _KNOWN)}): name pictures of your own with --data"
    )


def _may_hold(source: ImageSource, data: str | os.PathLike[str]) -> bool:
    """Whether local data may be a published set: no file, and no folder without parquet."""
    path = Path(data).expanduser()
    return (
        not path.exists()
        or (path.is_dir() and (path / source.config).is_dir())
        or (path.is_dir() and not any(entry.is_dir() for entry in path.iterdir()))
    )
