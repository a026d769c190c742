"""Constraints on weights that keep an equilibrium well posed, kept through training."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class ProjectionCallback(TrainerCallback):
    """Projects a model's weights onto its constraint after each optimiser step of a `Trainer`.

    For models with a method `project_`, as those of the IGNN family; `DEQTrainer` adds it itself.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _project(kwargs["model"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _project(kwargs["model"])


def _project(model: Any) -> None:
    getattr(model, "module", model).project_()
