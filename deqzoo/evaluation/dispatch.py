"""One evaluation for every family."""

from __future__ import annotations

import importlib
import os
from typing import Any

from transformers import PreTrainedModel

from deqzoo.errors import UserError

#: model_type -> module with `evaluate_...(model, name, *, split, data, batch_size, limit)`.
_EVALUATORS = {
    "mdeq": ("deqzoo.evaluation.images", "evaluate_images"),
    "deq_transformer": ("deqzoo.evaluation.text", "evaluate_text"),
    "ignn": ("deqzoo.evaluation.graphs", "evaluate_graphs"),
}


def evaluate_model(
    model: PreTrainedModel,
    name: str,
    *,
    split: str = "test",
    data: str | os.PathLike[str] | None = None,
    batch_size: int = 128,
    limit: int | None = None,
) -> dict[str, Any]:
    """The content of a model's evaluation file, on the data set it was made for.

    Args:
        model: loaded by `DEQModel.from_pretrained`.
        name: what the file calls the model.
        split: of the data set.
        data: local copy of the data set; its own repository if None.
        batch_size: samples per forward.
        limit: only the first samples; the file says so.

    Raises:
        UserError: no evaluation for this model, or no data.
    """
    if model.config.model_type not in _EVALUATORS:
        raise UserError(f"models of type {model.config.model_type!r} have no evaluation here")
    module, function = _EVALUATORS[model.config.model_type]
    evaluate = getattr(importlib.import_module(module), function)
    return evaluate(model, name, split=split, data=data, batch_size=batch_size, limit=limit)
