"""Tasks: what a family of models is trained for, measured by and described with.

A task gives batches, a loss, figures and an evaluator; `deqzoo.training` and `deqzoo.hub` ask it
and know no modality themselves.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from deqzoo.errors import UserError
from deqzoo.models.names import FAMILIES, FAMILY_CLASSES


@dataclass(frozen=True)
class TaskInfo:
    """Where a task is found.

    Attributes:
        suffix: how the names of its model classes end.
        training: "module:name" of the class (or function) that makes its `Task` of a recipe.
        evaluator: "module:name" of its `Evaluator`.
        finetuning: "module:name" of the function that makes a `Job` of a model and data of one's
            own; none where a task has no such data.
    """

    suffix: str
    training: str
    evaluator: str
    finetuning: str | None = None


TASKS = {
    "image-classification": TaskInfo(
        "ForImageClassification",
        "deqzoo.tasks.lazy_images:image_task",
        "deqzoo.evaluation.images:ImageEvaluator",
        "deqzoo.tasks.images:finetuning",
    ),
    "language-modeling": TaskInfo(
        "ForCausalLM",
        "deqzoo.tasks.text:LanguageModelingTask",
        "deqzoo.evaluation.text:TextEvaluator",
        "deqzoo.tasks.text:finetuning",
    ),
    "graph-classification": TaskInfo(
        "ForGraphClassification",
        "deqzoo.tasks.graphs:GraphClassificationTask",
        "deqzoo.evaluation.graphs:GraphEvaluator",
        "deqzoo.tasks.graphs:finetuning",
    ),
    "node-classification": TaskInfo(
        "ForNodeClassification",
        "deqzoo.tasks.nodes:NodeClassificationTask",
        "deqzoo.evaluation.graphs:NodeEvaluator",
    ),
}
"""Tasks by the names that recipes and evaluation files use; a task of your own is one entry."""


def task_of(architecture: str) -> TaskInfo | None:
    """The task of a model class by its name; None for models without a head."""
    return next((info for info in TASKS.values() if architecture.endswith(info.suffix)), None)


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
