"""What a run keeps beside weights and optimiser, whichever engine trains it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from deqzoo.errors import UserError
from deqzoo.recipe import Recipe, Stage
from deqzoo.tasks.base import Task
from deqzoo.training.best import BestWeights
from deqzoo.training.checkpoints import differences

_STORED_NAMES = ("spent", "inherited", "earlier", "changes")


@dataclass
class RunHistory:
    """What a run has cost, its best weights, and what changed on the way.

    Attributes:
        best: the weights of the best validation, where the recipe keeps those.
        spent: FLOPs, with those of the weights that the run began with.
        inherited: FLOPs of the weights that the run began with.
        earlier: validation figures of the run that made those weights.
        changes: of data, threads or settings, which the user accepted when the run was resumed.
    """

    best: BestWeights | None = None
    spent: float = 0.0
    inherited: float = 0.0
    earlier: list[dict[str, float]] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, recipe: Recipe, task: Task) -> RunHistory:
        """The history of a new run."""
        return cls(BestWeights(task.metric) if recipe.evaluation.keep == "best" else None)

    @property
    def pflop(self) -> float:
        """What was spent, in 1e15 FLOPs."""
        return round(self.spent / 1e15, 6)

    def inherit(self, record: Mapping[str, Any]) -> None:
        """Count the cost of the weights that the run begins with, from the record of their run."""
        self.earlier = record.get("validation", [])
        self.spent = self.inherited = 1e15 * record.get("pflop", 0.0)

    @torch.no_grad()
    def validate(
        self, task: Task, model: PreTrainedModel, stage: Stage, samples: int, step: int
    ) -> dict[str, float]:
        """Validation figures of a model, whose weights may be the best so far."""
        was_training = model.training
        model.eval()
        figures = task.evaluate(model, stage, samples)
        model.train(was_training)
        if self.best is not None:
            self.best.see(model, figures, step)
        return figures

    def result(self, average: PreTrainedModel) -> PreTrainedModel:
        """The weights that the run results in: the best, else the evaluated ones in `average`."""
        return average if self.best is None else self.best.applied(average)

    def state_dict(self, conditions: Mapping[str, Any]) -> dict[str, Any]:
        """For a checkpoint, with the conditions under which the run goes on."""
        best = None if self.best is None else self.best.state_dict()
        attributes = {name: getattr(self, name) for name in _STORED_NAMES}
        return {**attributes, "best": best, "conditions": conditions}

    def resume(
        self,
        checkpoint: str | Path,
        state: Mapping[str, Any],
        conditions: Mapping[str, Any],
        accept_changes: bool,
    ) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            UserError: the conditions have changed, and that is not accepted.
        """
        for name in _STORED_NAMES:  # older versions stored fewer
            setattr(self, name, state.get(name, getattr(self, name)))
        if self.best is not None and state.get("best"):
            self.best.load_state_dict(state["best"])
        changes = differences(state.get("conditions", {}), conditions)
        if changes and not accept_changes:
            raise UserError(
                f"{checkpoint} was made under other conditions: {'; '.join(changes)}. Go on under "
                "the same ones, or add --accept-changes, and the record will say so"
            )
        if changes:
            step = int(Path(checkpoint).name.rsplit("-", 1)[1])
            self.changes.append({"step": step, "changed": changes})
