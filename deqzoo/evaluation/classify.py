"""Naming what pictures show, with the report of the equilibrium solver."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from deqzoo.data.images import HEIC, register_heic
from deqzoo.equilibrium import Solver
from deqzoo.errors import UserError, one_line


@dataclass(frozen=True)
class Classification:
    """One picture's labels, best first with probabilities, and how its equilibrium was found.

    There are no labels where no state of the solve was finite.
    """

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
    model: Any,
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
    model: Any,
    pixels: Tensor,
    *,
    top_k: int = 5,
    solver: Solver | dict[str, Any] | str | None = None,
) -> list[Classification]:
    """Classify one batch of prepared pictures (B, 3, H, W), as `to_batch` makes them."""
    output = model.eval()(pixel_values=pixels, solver=solver)
    best = output.logits.float().softmax(-1).topk(min(top_k, model.config.num_labels))
    found = []
    for row, (probabilities, classes) in enumerate(zip(*best, strict=True)):
        answered = bool(probabilities.isfinite().all())
        names = [model.config.id2label[index] for index in classes.tolist() if answered]
        found.append(
            Classification(
                labels=list(zip(names, probabilities.tolist(), strict=answered)),
                n_steps=int(output.n_steps[row]),
                residual=float(output.residual[row]),
                converged=bool(output.converged[row]),
            )
        )
    return found


def require_image_classifier(model: Any) -> None:
    """Refuse models of other kinds.

    Raises:
        UserError: the model's class is no image classifier.
    """
    if not type(model).__name__.endswith("ForImageClassification"):
        raise UserError(
            f"{Path(model.config._name_or_path).name} is of class {type(model).__name__}, which "
            "cannot classify pictures; name an image model"
        )


def load_processor(model: Any) -> Any:
    """The image processor stored beside a model's weights.

    Raises:
        UserError: there is none, or it is damaged.
    """
    require_image_classifier(model)
    source = model.config._name_or_path
    try:
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
        processor(images=Image.new("RGB", (4, 4)), return_tensors="pt")
        return processor
    except Exception as error:  # damaged settings fail in arbitrary ways, some only when used
        reason = one_line(error, 160)
        raise UserError(f"no usable preprocessor_config.json in {source}: {reason}") from error


def to_batch(processor: Any, pictures: Sequence[Image.Image], model: Any) -> Tensor:
    """Normalised pictures (B, 3, H, W) where the model is."""
    pixels = processor(images=list(pictures), return_tensors="pt")["pixel_values"]
    return pixels.to(model.device)


def picture_files(source: str | os.PathLike[str]) -> list[Path]:
    """The file itself, or all pictures of a folder in the order of their names, no hidden ones.

    Raises:
        UserError: an address, or a folder without pictures.
    """
    if "://" in str(source):
        raise UserError(f"{source} is an address: fetch the picture first and name its file")
    path = Path(source).expanduser()
    if not path.is_dir():
        return [path]
    known = {*Image.registered_extensions(), *HEIC} - {".pdf", ".mpg", ".mpeg"}
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file()
        and file.suffix.lower() in known
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not files:
        raise UserError(f"folder {path} holds no pictures")
    return files


def read_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Open and decode a picture file, or standard input ("-").

    Raises:
        UserError: no file, no picture, or a damaged one.
    """
    if str(path) == "-":
        return decode_picture(sys.stdin.buffer.read(), "standard input")
    path = Path(path).expanduser()
    if path.is_dir():
        raise UserError(f"{path} is a folder; name picture files")
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if path.suffix.lower() in HEIC:
        register_heic(path)
    return decode_picture(content, str(path))


def decode_picture(content: bytes, name: str) -> Image.Image:
    """A picture from the bytes of its file.

    Raises:
        UserError: no bytes, no picture, or a damaged one; the message says `name`.
    """
    if not content:
        raise UserError(f"{name} is empty")
    try:
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
            return picture
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is no picture that can be read") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} is too large to decode safely: {error}") from error
    except Exception as error:  # decoders of damaged files fail in arbitrary ways
        reason = one_line(error)
        raise UserError(f"cannot read {name}: {reason}") from error
