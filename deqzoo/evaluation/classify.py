"""Naming what pictures show, with the report of the equilibrium solver."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from deqzoo.errors import UserError


@dataclass(frozen=True)
class Classification:
    """One picture's labels, best first with probabilities, and how its equilibrium was found."""

    labels: list[tuple[str, float]]
    n_steps: int
    residual: float
    converged: bool

    def to_dict(self) -> dict[str, Any]:
        """As JSON shows it."""
        content = asdict(self)
        content["labels"] = [{"label": name, "probability": p} for name, p in self.labels]
        return content


def classify(
    model: PreTrainedModel,
    pictures: Sequence[Image.Image],
    *,
    top_k: int = 5,
    processor: Any = None,
    batch_size: int = 32,
    solver: dict[str, Any] | str | None = None,
) -> list[Classification]:
    """Classify pictures of any size and mode.

    Args:
        model: an image classifier of the zoo.
        pictures: PIL pictures.
        top_k: how many labels to give, at most the model's number of labels.
        processor: the model's image processor; loaded from where the model came from if None.
        batch_size: pictures per forward.
        solver: per-call solver settings.

    Raises:
        UserError: the model classifies no pictures.
    """
    require_image_classifier(model)
    processor = processor or load_processor(model)
    found: list[Classification] = []
    for start in range(0, len(pictures), batch_size):
        batch = to_batch(processor, pictures[start : start + batch_size], model)
        found += classify_pixels(model, batch, top_k=top_k, solver=solver)
    return found


@torch.inference_mode()
def classify_pixels(
    model: PreTrainedModel,
    pixels: Tensor,
    *,
    top_k: int = 5,
    solver: dict[str, Any] | str | None = None,
) -> list[Classification]:
    """Classify one batch of prepared pictures (B, 3, H, W), as `to_batch` makes them."""
    output = model.eval()(pixel_values=pixels, solver=solver)
    best = output.logits.float().softmax(-1).topk(min(top_k, model.config.num_labels))
    found = []
    for row, (probabilities, classes) in enumerate(zip(*best, strict=True)):
        names = [model.config.id2label[index] for index in classes.tolist()]
        found.append(
            Classification(
                labels=list(zip(names, probabilities.tolist(), strict=True)),
                n_steps=int(output.n_steps[row]),
                residual=float(output.residual[row]),
                converged=bool(output.converged[row]),
            )
        )
    return found


def require_image_classifier(model: PreTrainedModel) -> None:
    """Refuse models of other kinds.

    Raises:
        UserError: the model's class is no image classifier.
    """
    if not type(model).__name__.endswith("ForImageClassification"):
        raise UserError(
            f"{Path(model.config._name_or_path).name} is of class {type(model).__name__}, which "
            "cannot classify pictures; name an image model"
        )


def load_processor(model: PreTrainedModel) -> Any:
    """The image processor stored beside a model's weights.

    Raises:
        UserError: there is none, or it is damaged.
    """
    require_image_classifier(model)
    source = model.config._name_or_path
    try:
        return AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"no usable preprocessor_config.json in {source}: {reason}") from error


def to_batch(processor: Any, pictures: Sequence[Image.Image], model: PreTrainedModel) -> Tensor:
    """Normalised pictures (B, 3, H, W) where the model is."""
    pixels = processor(images=list(pictures), return_tensors="pt")["pixel_values"]
    return pixels.to(model.device)


def read_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Open and decode a picture file.

    Raises:
        UserError: no file, no picture, or a damaged one.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise UserError(f"{path} is a folder; name picture files")
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty")
        with Image.open(path) as picture:
            picture.load()
            return picture
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is no picture that can be read") from error
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} is too large to decode safely: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error
