"""The weights of the best validation, where a recipe keeps those."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from deqzoo.tasks.metrics import METRICS

CHOSEN_SETTINGS = ("decision_threshold",)
"""Settings of a configuration that a validation chooses."""


class BestWeights:
    """Keeps the weights whose validation was the best so far; ties go to the likelier answers.

    Args:
        metric: name of the figure that decides, a key of `METRICS`.

    Attributes:
        samples: of every validation, where a run chose their number; figures of more and fewer
            could not be compared.
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.samples = 0
        self.step = 0
        self.figures: dict[str, float] = {}
        self.config: dict[str, Any] = {}
        self.weights: dict[str, Tensor] = {}

    def see(self, model: PreTrainedModel, figures: Mapping[str, float], step: int) -> None:
        """Take over a model's weights if its figures are the best so far, and finite."""
        if not math.isfinite(figures[self.metric]):
            return
        if self.figures and self._rank(figures) <= self._rank(self.figures):
            return
        self.step, self.figures = step, dict(figures)
        self.config = {name: getattr(model.config, name, None) for name in CHOSEN_SETTINGS}
        self.weights = {name: t.detach().clone() for name, t in model.state_dict().items()}

    def _rank(self, figures: Mapping[str, float]) -> tuple[float, float]:
        sign = 1 if METRICS[self.metric].higher_is_better else -1
        return sign * figures[self.metric], -figures.get("negative_log_likelihood", 0.0)

    def applied(self, model: PreTrainedModel) -> PreTrainedModel:
        """A copy of a model with the best weights; the model itself before any validation."""
        if not self.weights:
            return model
        best = copy.deepcopy(model)
        best.load_state_dict(self.weights)
        for name, value in self.config.items():
            if value is not None:
                setattr(best.config, name, value)
        return best

    def state_dict(self) -> dict[str, Any]:
        names = ("samples", "step", "figures", "config", "weights")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.samples = state.get("samples", 0)  # older versions stored none
        self.step, self.figures = state["step"], dict(state["figures"])
        self.config, self.weights = dict(state["config"]), dict(state["weights"])

    def describe(self) -> dict[str, Any]:
        """For the record of a run."""
        return {"step": self.step, **self.figures}
