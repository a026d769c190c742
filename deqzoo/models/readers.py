"""The image processor or tokenizer stored beside a model's weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from deqzoo.errors import UserError, as_user_error


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
    # Damaged settings fail in arbitrary ways, some only when used.
    with as_user_error(f"no usable preprocessor_config.json in {source}", Exception, most=160):
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
        processor(images=Image.new("RGB", (4, 4)), return_tensors="pt")
        return processor


def to_batch(processor: Any, pictures: Sequence[Image.Image], model: Any) -> Tensor:
    """Normalised pictures (B, 3, H, W) where the model is."""
    pixels = processor(images=list(pictures), return_tensors="pt")["pixel_values"]
    return pixels.to(model.device)


def load_tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerFast:
    """The tokenizer stored beside a model's weights.

    Raises:
        UserError: there is none.
    """
    folder = model.config._name_or_path
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"no tokenizer beside the weights in {folder or 'memory'}") from error
