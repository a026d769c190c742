"""Naming what pictures show, with the report of the equilibrium solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from deqzoo.equilibrium import Solver
from deqzoo.models.readers import load_processor, require_image_classifier, to_batch


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
    results: list[Classification] = []
    for start in range(0, len(pictures), batch_size):
        batch = to_batch(processor, pictures[start : start + batch_size], model)
        results += classify_pixels(model, batch, top_k=top_k, solver=solver)
    return results


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
    results = []
    for row, (probabilities, classes) in enumerate(zip(*best, strict=True)):
        has_answer = bool(probabilities.isfinite().all())
        names = [model.config.id2label[index] for index in classes.tolist() if has_answer]
        results.append(
            Classification(
                labels=list(zip(names, probabilities.tolist(), strict=has_answer)),
                n_steps=int(output.n_steps[row]),
                residual=float(output.residual[row]),
                converged=bool(output.converged[row]),
            )
        )
    return results
