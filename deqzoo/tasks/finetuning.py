"""Runs on data of one's own: the user's settings, and the job that a task makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from deqzoo.data.own import HELD_OUT
from deqzoo.errors import UserError

FREEZE = ("none", "norms", "backbone")
TOKENIZERS = ("keep", "extend", "build")
LEAST_STEPS = 200
"""Optimiser steps on small data where the settings name no number."""
FEW = 50
"""A hold-out of fewer samples says little."""


@dataclass(frozen=True)
class Settings:
    """How a model is trained on data of one's own.

    Attributes:
        epochs: passes over the data; None for three, or as many as make `LEAST_STEPS` steps.
        batch_size: samples per step; None for a tenth of them, from 8 to 32.
        lr: peak learning rate of AdamW; None for the task's own.
        solver: of training steps, a name or settings; if None the model's own, for pictures with at
            most ten steps.
        gradient: likewise.
        freeze: "norms" keeps the statistics of batch norms, "backbone" also all weights but the
            last layers'; "none" trains everything.
        seed: of the hold-out, the new weights and the order.
        report_to: as in `TrainingArguments`: tensorboard, wandb, trackio, ... or none.
        held_out: share of every class that is kept to be measured where the data have no test
            split; half as much chooses the weights. Of texts half of each.
        max_steps: stop after so many optimiser steps.
        augment: vary pictures.
        tokenizer: of texts: "keep" the model's, "extend" it by the new words, or "build" one of
            the text's own words.
        label_column: of the labels in a table of pictures.
        column: of the texts in a table of them.
    """

    epochs: float | None = None
    batch_size: int | None = None
    lr: float | None = None
    solver: dict[str, Any] | str | None = None
    gradient: dict[str, Any] | str | None = None
    freeze: str = "norms"
    seed: int = 0
    report_to: tuple[str, ...] = ("none",)
    held_out: float = HELD_OUT
    max_steps: int | None = None
    augment: bool = True
    tokenizer: str = "keep"
    label_column: str | None = None
    column: str | None = None

    def __post_init__(self) -> None:
        for name, choices in (("freeze", FREEZE), ("tokenizer", TOKENIZERS)):
            if getattr(self, name) not in choices:
                raise UserError(
                    f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        for name in ("epochs", "lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} must be positive and finite, got {value}")
        if not 0 < self.held_out < 1:
            raise UserError(f"held_out must be a share between 0 and 1, got {self.held_out}")


@dataclass
class Job:
    """A model with the data that it is to learn.

    Attributes:
        model: to train.
        train: samples to learn, a list or a data set of torch.
        held_out: samples that choose the weights, likewise.
        n_test: other samples, which the figure is measured on; 0 where `held_out` serves for both.
        collate: samples to the model's arguments.
        save_processor: writes what belongs beside the weights.
        record: what `own_data.json` holds.
        last_layers: beginnings of the names of parameters that "backbone" does not freeze.
        lr: default learning rate.
        least_steps: optimiser steps where the settings name no number of epochs.
        unit: name of the samples, in the plural.
        accuracy: whether the figure is an accuracy.
        solver: of training steps where the settings name none.
        notes: what a user should know about the data.
        fingerprints: of data that `record` cannot tell apart, checked when a run is resumed.
    """

    model: PreTrainedModel
    train: Any
    held_out: Any
    collate: Callable[[list[Any]], dict[str, Any]] | None
    save_processor: Callable[[Path], Any]
    record: dict[str, Any]
    last_layers: tuple[str, ...]
    lr: float
    unit: str
    n_test: int
    accuracy: bool = True
    least_steps: int = LEAST_STEPS
    solver: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    fingerprints: list[str] = field(default_factory=list)


def warnings_of(job: Job) -> list[str]:
    """What a user should know about the data before the run."""
    n_test = job.n_test or len(job.held_out)
    warnings = list(job.notes)
    if not job.n_test:
        warnings.append(
            f"so few {job.unit} give one hold-out, which chooses the weights and is measured: its "
            "figure flatters"
        )
    if job.accuracy and n_test < FEW:
        spread = 100 / math.sqrt(max(n_test, 1))
        warnings.append(
            f"the test part has {n_test} {job.unit} only: its accuracy is known to about "
            f"±{spread:.0f} points (two standard errors)"
        )
    return warnings
