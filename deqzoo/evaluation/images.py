"""Image classification on a data set: accuracy, calibration, and what the equilibrium costs."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from deqzoo.data.cifar import CIFAR10
from deqzoo.data.imagenette import IMAGENETTE, load_imagenette
from deqzoo.data.images import Pictures, load_pictures
from deqzoo.errors import UserError
from deqzoo.evaluation.classify import load_processor, to_batch
from deqzoo.tasks import metrics

WORTH_COMPILING = 2000
"""Pictures from which compiling the norm (half a minute, once) pays."""


@dataclass(frozen=True)
class Outputs:
    """Per-sample results on the CPU: logits (N, C) float32, the rest (N,); and the time taken."""

    logits: Tensor
    n_steps: Tensor
    residual: Tensor
    converged: Tensor
    seconds: float


class ImageEvaluator:
    """An image classifier whose labels are those of CIFAR-10 or Imagenette.

    Raises:
        UserError: the model is no image classifier of a known data set, or the data are missing.
    """

    task = "image-classification"
    metric = "accuracy"
    unit = "pictures"
    budget_samples = 1000

    def __init__(
        self,
        model: PreTrainedModel,
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
        self.pictures = _pictures_of(model, split, data)
        self.processor = load_processor(model)
        self.description = self.pictures.describe()
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
        logits, labels = outputs.logits, pictures.labels
        per_class = metrics.per_class_accuracy(logits, labels)
        return {
            **metrics.classification_figures(logits, labels),
            "per_class_accuracy": dict(zip(pictures.classes, per_class, strict=True)),
            **metrics.equilibrium_summary(outputs.n_steps, outputs.residual, outputs.converged),
            "seconds_per_sample": outputs.seconds / len(pictures),
        }


def _speed_up(model: PreTrainedModel, n_pictures: int) -> bool:
    """Lay an MDEQ out for convolutions on a CPU; on many pictures also compile its norm.

    Returns:
        Whether the norm is compiled, which changes results by rounding only.
    """
    if model.device.type != "cpu" or not hasattr(model, "use_native_norm"):
        return False
    model.to(memory_format=torch.channels_last)
    return n_pictures >= WORTH_COMPILING and model.use_native_norm()


def run(
    model: PreTrainedModel,
    processor: Any,
    pictures: Pictures,
    batch_size: int,
    solver: dict[str, Any] | None,
    progress: bool,
    title: str = "evaluating",
) -> Outputs:
    """Forward all pictures without gradients, with per-call solver settings."""
    model.eval()
    collected: list[tuple[Tensor, ...]] = []
    seconds = 0.0
    starts = range(0, len(pictures), batch_size)
    for start in tqdm(starts, desc=title, unit="batch", disable=not progress):
        rows = pictures.pixels[start : start + batch_size].permute(0, 2, 3, 1).numpy()
        batch = to_batch(processor, [Image.fromarray(row) for row in rows], model)
        began = time.perf_counter()
        with torch.inference_mode():
            output = model(pixel_values=batch, solver=solver)
        collected.append(
            (
                output.logits.float().cpu(),
                output.n_steps.cpu(),
                output.residual.float().cpu(),
                output.converged.cpu(),
            )
        )
        seconds += time.perf_counter() - began
    return Outputs(*(torch.cat(parts) for parts in zip(*collected, strict=True)), seconds)


def _pictures_of(
    model: PreTrainedModel, split: str, data: str | os.PathLike[str] | None
) -> Pictures:
    """The split of the data set whose class names are the model's labels."""
    labels = tuple(model.config.id2label[i] for i in range(model.config.num_labels))
    if labels == CIFAR10.classes:
        return load_pictures(CIFAR10, split, data)
    if labels == IMAGENETTE.classes:
        # As large as they are stored: the processor scales and crops.
        return load_imagenette(split, data, size=160)
    raise UserError(
        f"the model's labels ({', '.join(labels[:4])}, ...) are those of no known data set; "
        f"known are {CIFAR10.title} and {IMAGENETTE.title}"
    )


def _first(pictures: Pictures, count: int) -> Pictures:
    return Pictures(
        pictures.pixels[:count],
        pictures.labels[:count],
        pictures.classes,
        pictures.split,
        pictures.fingerprint,
        False,
        pictures.source,
    )
