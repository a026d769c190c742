"""Image classification on a data set: accuracy, calibration, and what the equilibrium costs."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
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
from deqzoo.evaluation import metrics
from deqzoo.evaluation.classify import load_processor, to_batch
from deqzoo.evaluation.files import describe_environment, describe_model

BUDGETS = (2, 4, 8, 16, 30)
# Budget curves show what a number of steps gives, so the tolerance must not end a solve earlier.
BUDGET_TOLERANCE = 1e-7
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


def evaluate_images(
    model: PreTrainedModel,
    name: str,
    *,
    split: str = "test",
    data: str | os.PathLike[str] | None = None,
    batch_size: int = 128,
    limit: int | None = None,
    budget_pictures: int = 1000,
    progress: bool = True,
) -> dict[str, Any]:
    """The content of an evaluation file.

    Args:
        model: an image classifier whose labels are those of CIFAR-10 or Imagenette, loaded from a
            folder with its processor.
        name: what the file calls the model.
        split: of the data set.
        data: local folder or repository of the data; the data set's own repository if None.
        batch_size: pictures per forward.
        limit: evaluate only the first so many pictures; the file says so.
        budget_pictures: pictures for accuracy against solver budget; 0 leaves it out.
        progress: show bars on stderr.

    Raises:
        UserError: the model is no image classifier of a known data set, or the data are missing.
    """
    pictures = _pictures_of(model, split, data)
    processor = load_processor(model)
    description = pictures.describe()
    if limit is not None and limit < len(pictures):
        pictures = _first(pictures, limit)
        description |= {"pictures": limit, "complete": False, "limit": limit}
    compiled = _speed_up(model, len(pictures))
    outputs = run(model, processor, pictures, batch_size, None, progress)
    return {
        "format": 1,
        "task": "image-classification",
        "model": describe_model(model, name),
        "data": description,
        "results": _results(outputs, pictures),
        "budget": budget_curve(
            model, processor, pictures, outputs, budget_pictures, batch_size, progress
        ),
        "environment": describe_environment(model)
        | {"batch_size": batch_size, "compiled_norm": compiled},
        "command": f"deqzoo evaluate {name} --split {split}"
        + (f" --limit {limit}" if "limit" in description else ""),
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
) -> Outputs:
    """Forward all pictures without gradients, with per-call solver settings."""
    model.eval()
    collected: list[tuple[Tensor, ...]] = []
    seconds = 0.0
    starts = range(0, len(pictures), batch_size)
    for start in tqdm(starts, desc=_bar_title(solver), unit="batch", disable=not progress):
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


def budget_curve(
    model: PreTrainedModel,
    processor: Any,
    pictures: Pictures,
    outputs: Outputs,
    n_pictures: int,
    batch_size: int,
    progress: bool,
    budgets: Sequence[int] = BUDGETS,
) -> dict[str, Any] | None:
    """Accuracy and residual after a fixed number of solver steps, on the first pictures.

    Args:
        outputs: of all pictures with the model's own solver, to compare with.
    """
    if n_pictures < 1:
        return None
    subset = _first(pictures, n_pictures)
    rows = []
    for steps in budgets:
        solver = {"max_steps": steps, "tol": BUDGET_TOLERANCE}
        limited = run(model, processor, subset, batch_size, solver, progress)
        rows.append(
            {
                "max_steps": steps,
                "accuracy": metrics.accuracy(limited.logits, subset.labels),
                "residual_median": limited.residual.nanquantile(0.5).item(),
                "seconds_per_picture": limited.seconds / len(subset),
            }
        )
    return {
        "pictures": len(subset),
        "tol": BUDGET_TOLERANCE,
        "default_accuracy": metrics.accuracy(outputs.logits[: len(subset)], subset.labels),
        "steps": rows,
    }


def _results(outputs: Outputs, pictures: Pictures) -> dict[str, Any]:
    logits, labels = outputs.logits, pictures.labels
    per_class = metrics.per_class_accuracy(logits, labels)
    return {
        "accuracy": metrics.accuracy(logits, labels),
        "negative_log_likelihood": metrics.negative_log_likelihood(logits, labels),
        "expected_calibration_error": metrics.expected_calibration_error(logits, labels),
        "per_class_accuracy": dict(zip(pictures.classes, per_class, strict=True)),
        **metrics.equilibrium_summary(outputs.n_steps, outputs.residual, outputs.converged),
        "seconds_per_picture": outputs.seconds / len(pictures),
    }


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


def _bar_title(solver: dict[str, Any] | None) -> str:
    return "evaluating" if solver is None else f"{solver['max_steps']} steps"
