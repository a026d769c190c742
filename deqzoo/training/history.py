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

_STORED = ("spent", "inherited", "earlier", "changes")


@dataclass
class RunHistory:
    """What a run has cost, its best weights, and what changed on the way.

    Attributes:
        best: the weights of the best validation, where the recipe keeps those.
        spent: FLOPs, with those of the weights that the run began with.
        inherited: FLOPs of the weights that the run began with.
        earlier: validation figures of those weights.
        changes: what was otherwise when the run was gone on with, as its user accepted.
    """

    best: BestWeights | None = None
    spent: float = 0.0
    inherited: float = 0.0
    earlier: list[dict[str, float]] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, recipe: Recipe, task: Task) -> RunHistory:
        """That of a run which begins."""
        return cls(BestWeights(task.metric) if recipe.evaluation.keep == "best" else None)

    @property
    def pflop(self) -> float:
        """What was spent, in 1e15 FLOPs."""
        return round(self.spent / 1e15, 6)

    def inherit(self, record: Mapping[str, Any]) -> None:
        """Count what the weights that the run begins with had cost, by the record of their run."""
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

    def result(self, averaged: PreTrainedModel) -> PreTrainedModel:
        """The weights that are kept, where `averaged` are those that are evaluated."""
        return averaged if self.best is None else self.best.applied(averaged)

    def state_dict(self, conditions: Mapping[str, Any]) -> dict[str, Any]:
        """For a checkpoint, with the conditions under which the run goes on."""
        best = None if self.best is None else self.best.state_dict()
        stored = {name: getattr(self, name) for name in _STORED}
        return {**stored, "best": best, "conditions": conditions}

    def resume(
        self,
        checkpoint: str | Path,
        state: Mapping[str, Any],
        conditions: Mapping[str, Any],
        accept_changes: bool,
    ) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            UserError: the conditions are others now, and that is not accepted.
        """
        for name in _STORED:  # older versions stored fewer
            setattr(self, name, state.get(name, getattr(self, name)))
        if self.best is not None and state.get("best"):
            self.best.load_state_dict(state["best"])
        changed = differences(state.get("conditions", {}), conditions)
        if changed and not accept_changes:
            raise UserError(
                f"{checkpoint} was made under other conditions: {'; '.join(changed)}. Go on under "
                "the same ones, or add --accept-changes, and the record will say so"
            )
        if changed:
            step = int(Path(checkpoint).name.rsplit("-", 1)[1])
            self.changes.append({"step": step, "changed": changed})
