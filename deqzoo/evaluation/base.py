"""The interface of an evaluation: the data of a task, and figures measured on them."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from deqzoo.tasks.metrics import classification_figures, equilibrium_summary, per_class_accuracy


class Evaluator(ABC):
    """A model on a split of the data that it was made for.

    Attributes:
        task: the name of the task, as on the Hub.
        metric: the figure that the evaluation is known by.
        unit: what a sample is, in the plural.
        description: `name` of the data, and what identifies them; set by `load`.
        count: how many samples are measured; set by `load`.
        budget_samples: samples of the budget curve; None for all.
        interrupted: how many samples were measured until Ctrl-C ended it; 0 for all.
    """

    task: str
    metric: str
    unit: str
    description: dict[str, Any]
    count: int
    budget_samples: int | None = None
    interrupted: int = 0

    def __init__(
        self,
        model: Any,
        split: str,
        data: str | os.PathLike[str] | None,
        *,
        batch_size: int,
        limit: int | None,
        progress: bool,
    ) -> None:
        self.model, self.batch_size, self.progress = model.eval(), batch_size, progress
        self.load(split, data, limit)

    @abstractmethod
    def load(self, split: str, data: str | os.PathLike[str] | None, limit: int | None) -> None:
        """Read the split, at most `limit` samples of it.

        Raises:
            UserError: there is none, or it does not fit the model.
        """

    def limit_to(self, limit: int | None) -> None:
        """Measure the first `limit` samples only, and note it in the description; None for all."""
        if limit is not None and limit < self.count:
            self.count = limit
            self.description |= {"complete": False, "limit": limit}

    def describe(self) -> dict[str, Any]:
        """`name` of the data set, number of `samples`, and what identifies them."""
        # Repeated elsewhere, or in `samples`.
        redundant_keys = ("name", "split", "pictures", "tokens")
        identity = {k: v for k, v in self.description.items() if k not in redundant_keys}
        samples = {"samples": self.count, "unit": self.unit}
        return {"name": self.description["name"], **samples, **identity}

    def environment(self) -> dict[str, Any]:
        """What else the figures depend on."""
        return {}

    @abstractmethod
    def measure(
        self,
        solver: dict[str, Any] | None = None,
        samples: int | None = None,
        title: str = "evaluating",
    ) -> dict[str, Any]:
        """Figures by their names in `deqzoo.tasks.metrics.METRICS`.

        Args:
            solver: change of the model's settings.
            samples: the first so many only.
            title: of the progress bar.
        """


@dataclass(frozen=True)
class Batches:
    """Batches of a classifier.

    Attributes:
        inputs: keyword arguments of the model with the index of the rows that count, one by one.
        count: how many batches.
        labels: of all rows that count, in their order.
    """

    inputs: Iterable[tuple[dict[str, Any], Any]]
    count: int
    labels: Tensor


@dataclass(frozen=True)
class Outputs:
    """Results on the CPU: logits (N, C) float32, the solver's report (N,), and the time taken."""

    logits: Tensor
    n_steps: Tensor
    residual: Tensor
    converged: Tensor
    seconds: float
    complete: bool


class ClassifierEvaluator(Evaluator):
    """An evaluator of classes, or of several labels per sample.

    Attributes:
        classes: names in label order, where each has a figure of its own.
    """

    classes: tuple[str, ...] = ()

    @abstractmethod
    def batches(self, samples: int | None) -> Batches:
        """The first so many samples, all if None."""

    def measure(
        self,
        solver: dict[str, Any] | None = None,
        samples: int | None = None,
        title: str = "evaluating",
    ) -> dict[str, Any]:
        batches = self.batches(samples)
        outputs = forward_all(self.model, batches, solver, title, self.progress)
        logits, n = outputs.logits, len(outputs.logits)
        labels = batches.labels[:n]
        self.interrupted = 0 if outputs.complete else n
        threshold = getattr(self.model.config, "decision_threshold", 0.5)
        figures = classification_figures(logits, labels, threshold)
        if self.classes:
            shares = per_class_accuracy(logits, labels)
            figures["per_class_accuracy"] = dict(zip(self.classes, shares, strict=True))
        return {
            **figures,
            **equilibrium_summary(outputs.n_steps, outputs.residual, outputs.converged),
            "seconds_per_sample": outputs.seconds / n,
        }


def forward_all(
    model: Any,
    batches: Batches,
    solver: dict[str, Any] | None = None,
    title: str = "evaluating",
    progress: bool = False,
) -> Outputs:
    """Forward all batches without gradients; Ctrl-C ends it with what there is by then."""
    parts: list[tuple[Tensor, ...]] = []
    seconds, complete = 0.0, True
    disable = None if progress else True  # None: in a terminal only
    bar = tqdm(batches.inputs, desc=title, total=batches.count, unit="batch", disable=disable)
    try:
        for inputs, rows in bar:
            began = time.perf_counter()
            with torch.inference_mode():
                output = model(**inputs, solver=solver)
            report = output.n_steps.cpu(), output.residual.float().cpu(), output.converged.cpu()
            parts.append((output.logits[rows].float().cpu(), *report))
            seconds += time.perf_counter() - began
    except KeyboardInterrupt:
        if not parts:
            raise
        complete = False
    logits, n_steps, residual, converged = (torch.cat(part) for part in zip(*parts, strict=True))
    return Outputs(logits, n_steps, residual, converged, seconds, complete)
