"""Tasks: what a family of models is trained for, measured by and described with.

A task gives batches, a loss, figures and an evaluator; `deqzoo.training` and `deqzoo.hub` ask it
and know no modality themselves.
"""

from __future__ import annotations

import importlib
from typing import Any

from deqzoo.errors import UserError
from deqzoo.models.names import FAMILIES, FAMILY_CLASSES
from deqzoo.zoo import TASKS


def load(place: str) -> Any:
    """What "module:name" names."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def build_task(recipe: Any, data: Any, stand_in: bool = False) -> Any:
    """The task of a recipe, with its data loaded.

    Args:
        recipe: what is to be trained.
        data: local folder of the data set; None fetches it from the Hub where it is there.
        stand_in: take data of the right shape and published size where no folder is given; enough
            to build the model and estimate the cost.

    Raises:
        UserError: an unknown task or family, or data or settings that do not fit.
    """
    if recipe.task not in TASKS:
        raise UserError(f"task must be one of {', '.join(TASKS)}, got {recipe.task!r}")
    info = TASKS[recipe.task]
    families = [
        family
        for family in FAMILIES
        if any(name.endswith(info.suffix) for name in FAMILY_CLASSES[family])
    ]
    if recipe.model.family not in families:
        raise UserError(
            f"model.family of task {recipe.task} must be {' or '.join(families)}, "
            f"got {recipe.model.family}"
        )
    return load(info.training)(recipe, data, stand_in=stand_in and data is None)
