"""Image classification on a data set: accuracy, calibration, and what the equilibrium costs."""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from deqzoo.data.cifar import CIFAR10, load_cifar10
from deqzoo.data.imagenette import IMAGENETTE, load_imagenette
from deqzoo.data.images import ImageSource, Pictures
from deqzoo.data.own import chose_weights, read_record
from deqzoo.data.own_pictures import OwnPictures, pictures_of_split
from deqzoo.data.tiny_imagenet import TINY_IMAGENET, load_tiny_imagenet
from deqzoo.errors import UserError
from deqzoo.models.readers import load_processor, to_batch
from deqzoo.tasks import metrics

_KNOWN = (
    (CIFAR10, load_cifar10),
    # As large as they are stored: the processor scales and crops.
    (IMAGENETTE, functools.partial(load_imagenette, size=160)),
    (TINY_IMAGENET, load_tiny_imagenet),
)
WORTH_COMPILING = 2000
"""Pictures from which compiling the norm (half a minute, once) pays."""


@dataclass(frozen=True)
class Outputs:
    """Per-sample results on the CPU: logits (N, C) float32, the rest (N,); and the time taken.

    `interrupted` is the number of pictures measured until Ctrl-C, 0 for all.
    """

    logits: Tensor
    n_steps: Tensor
    residual: Tensor
    converged: Tensor
    seconds: float
    interrupted: int = 0


class ImageEvaluator:
    """An image classifier on CIFAR-10, Imagenette, or pictures of one's own.

    Raises:
        UserError: the model is no image classifier, or the data are missing or have other classes.
    """

    task = "image-classification"
    metric = "accuracy"
    unit = "pictures"
    budget_samples = 1000

    def __init__(
        self,
        model: Any,
        split: str,
        data: str | os.PathLike[str] | None,
        *,
        batch_size: int,
        limit: int | None,
        progress: bool,
    ) -> None:
        self.model = model
        self.batch_size = batch_size
        self.progress = progress
        self.pictures = pictures_of(model, split, data)
        self.processor = load_processor(model)
        self.description = self.pictures.describe()
        if isinstance(self.pictures, OwnPictures):
            record = read_record(model.config._name_or_path)
            self.description |= chose_weights(record, self.pictures.digests())
        if limit is not None and limit < len(self.pictures):
            self.pictures = _first(self.pictures, limit)
            self.description |= {"pictures": limit, "complete": False, "limit": limit}
        self.compiled = _speed_up(model, len(self.pictures))

    def describe(self) -> dict[str, Any]:
        known = {k: v for k, v in self.description.items() if k not in ("split", "pictures")}
        return {"name": known.pop("name"), "samples": len(self.pictures), "unit": self.unit} | known

    def environment(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "compiled_norm": self.compiled}

    def measure(
        self,
        solver: dict[str, Any] | None = None,
        samples: int | None = None,
        title: str = "evaluating",
    ) -> dict[str, Any]:
        pictures = self.pictures if samples is None else _first(self.pictures, samples)
        outputs = run(
            self.model, self.processor, pictures, self.batch_size, solver, self.progress, title
        )
        self.interrupted = outputs.interrupted
        logits = outputs.logits
        labels = pictures.labels[: len(logits)]
        per_class = metrics.per_class_accuracy(logits, labels)
        return {
            **metrics.classification_figures(logits, labels),
            "per_class_accuracy": dict(zip(pictures.classes, per_class, strict=True)),
            **metrics.equilibrium_summary(outputs.n_steps, outputs.residual, outputs.converged),
            "seconds_per_sample": outputs.seconds / len(logits),
        }


def _speed_up(model: Any, n_pictures: int) -> bool:
    """Lay an MDEQ out for convolutions on a CPU; on many pictures also compile its norm.

    Returns:
        Whether the norm is compiled, which changes results by rounding only.
    """
    if model.device.type != "cpu" or not hasattr(model, "use_native_norm"):
        return False
    model.to(memory_format=torch.channels_last)
    return n_pictures >= WORTH_COMPILING and model.use_native_norm()


def run(
    model: Any,
    processor: Any,
    pictures: Pictures | OwnPictures,
    batch_size: int,
    solver: dict[str, Any] | None,
    progress: bool,
    title: str = "evaluating",
) -> Outputs:
    """Forward all pictures without gradients, with per-call solver settings."""
    model.eval()
    collected: list[tuple[Tensor, ...]] = []
    seconds, interrupted = 0.0, 0
    starts = range(0, len(pictures), batch_size)
    for start in tqdm(starts, desc=title, unit="batch", disable=not progress):
        rows = range(start, min(start + batch_size, len(pictures)))
        try:
            batch = to_batch(processor, [pictures.picture(row) for row in rows], model)
            began = time.perf_counter()
            with torch.inference_mode():
                output = model(pixel_values=batch, solver=solver)
        except KeyboardInterrupt:
            if not collected:
                raise
            interrupted = start
            break
        collected.append(
            (
                output.logits.float().cpu(),
                output.n_steps.cpu(),
                output.residual.float().cpu(),
                output.converged.cpu(),
            )
        )
        seconds += time.perf_counter() - began
    tensors: Any = (torch.cat(parts) for parts in zip(*collected, strict=True))
    return Outputs(*tensors, seconds, interrupted)  # type: ignore[call-arg]


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
        f"({', '.join(known.title for known, _ in _KNOWN)}): name pictures of your own with --data"
    )


def _may_hold(source: ImageSource, data: str | os.PathLike[str]) -> bool:
    """Whether local data may be a published set: no file, and no folder without parquet."""
    path = Path(data).expanduser()
    return (
        not path.exists()
        or (path.is_dir() and (path / source.config).is_dir())
        or (path.is_dir() and not any(entry.is_dir() for entry in path.iterdir()))
    )


def _first(pictures: Pictures | OwnPictures, count: int) -> Pictures | OwnPictures:
    if isinstance(pictures, OwnPictures):
        return pictures.part(range(min(count, len(pictures))), pictures.split)
    return Pictures(
        pictures.pixels[:count],
        pictures.labels[:count],
        pictures.classes,
        pictures.split,
        pictures.fingerprint,
        False,
        pictures.source,
    )
