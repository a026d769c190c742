"""One evaluation for every task: figures of a split, and quality against solver steps."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel

from deqzoo.data.own import require_task_of
from deqzoo.errors import UserError
from deqzoo.evaluation.base import Evaluator
from deqzoo.evaluation.files import describe_environment, describe_model
from deqzoo.records import FORMAT
from deqzoo.tasks import load
from deqzoo.zoo import TASKS, task_of

BUDGETS = (2, 4, 8, 16, 30)
"""Solver steps of the budget curve; the model's own `max_steps` comes last if it is larger."""
# Budget curves show what a number of steps gives, so the tolerance must not end a solve earlier.
BUDGET_TOLERANCE = 1e-7
_CURVE = ("residual_median", "residual_p95", "seconds_per_sample")


def evaluator_of(
    model: PreTrainedModel,
    split: str = "test",
    data: str | os.PathLike[str] | None = None,
    *,
    column: str | None = None,
    batch_size: int = 128,
    limit: int | None = None,
    progress: bool = True,
) -> Evaluator:
    """The evaluator of a model's task, with the split loaded; arguments as in `evaluate_model`.

    Raises:
        UserError: no evaluation for this model, or no data.
    """
    task = task_of(type(model).__name__)
    info = TASKS.get(task or "")
    if info is None:
        raise UserError(f"{type(model).__name__} has no evaluation here")
    make = load(info.evaluator)
    if column is not None:
        require_task_of("--column", task)
    how: dict[str, Any] = {"batch_size": batch_size, "limit": limit, "progress": progress}
    return make(model, split, data, **how, **({} if column is None else {"column": column}))


def evaluate_model(
    model: PreTrainedModel,
    name: str,
    *,
    split: str = "test",
    data: str | os.PathLike[str] | None = None,
    column: str | None = None,
    batch_size: int = 128,
    limit: int | None = None,
    budget_samples: int | None = None,
    progress: bool = True,
    on_data: Callable[[str], None] | None = None,
    on_figures: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """The content of a model's evaluation file, on the data set it was made for.

    Args:
        model: loaded by `DEQModel.from_pretrained`.
        name: what the file calls the model.
        split: of the data set.
        data: local copy of the data set; its own repository if None.
        column: of the texts in a table of one's own; if None the one that the model was trained on.
        batch_size: samples per forward.
        limit: only the first samples; the file says so.
        budget_samples: samples for quality against solver steps; 0 leaves that out, None takes
            the task's own number.
        progress: show bars on stderr.
        on_data: called with the data's name before anything is measured; what it raises ends the
            work.
        on_figures: called with the content as soon as the figures are there, and again after every
            row of the budget curve, so that nothing is lost where the rest is cut off.

    Raises:
        UserError: no evaluation for this model, or no data.
    """
    evaluator = evaluator_of(
        model, split, data, column=column, batch_size=batch_size, limit=limit, progress=progress
    )
    description = evaluator.describe()
    if on_data is not None:
        on_data(description["name"])
    is_limited = limit is not None and description.get("limit") == limit
    source = " --data ROOT" if description.pop("local", False) else ""
    content: dict[str, Any] = {
        "format": FORMAT,
        "task": evaluator.task,
        "metric": evaluator.metric,
        "model": describe_model(model, name),
        "data": {"name": description.pop("name"), "split": split, **description},
        "results": evaluator.measure(),
        "budget": None,
        "environment": describe_environment(model) | evaluator.environment(),
        "command": f"deqzoo evaluate {name}{source} --split {split}"
        + ("" if column is None else f" --column {shlex.quote(column)}")
        + (f" --limit {limit}" if is_limited else ""),
    }
    if n_measured := evaluator.interrupted:
        content["data"] |= {"samples": n_measured, "complete": False, "interrupted": True}
    if on_figures is not None:
        on_figures(content)
    if n_measured:
        raise KeyboardInterrupt

    def keep(curve: dict[str, Any]) -> None:
        if on_figures is not None:
            on_figures({**content, "budget": curve})

    content["budget"] = budget_curve(
        evaluator, model, description["samples"], budget_samples, on_row=keep
    )
    return content


def budget_curve(
    evaluator: Evaluator,
    model: PreTrainedModel,
    available: int,
    samples: int | None = None,
    budgets: Sequence[int] | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any] | None:
    """Quality and residual after fixed numbers of solver steps, on the first samples.

    Args:
        evaluator: of the model.
        model: the model; one without an equilibrium has no such curve.
        available: samples that there are.
        samples: how many to take; the evaluator's own number by default.
        budgets: numbers of steps; `BUDGETS` and the model's own `max_steps` by default.
        on_row: called with the curve so far after each of its rows.
    """
    samples = evaluator.budget_samples if samples is None else samples
    if samples == 0 or not getattr(model.config, "has_equilibrium", True):
        return None
    n_samples = available if samples is None else min(samples, available)
    if budgets is None:
        own = model.config.solver["max_steps"]
        budgets = (*BUDGETS, own) if own > BUDGETS[-1] else BUDGETS
    curve: dict[str, Any] = {
        "samples": n_samples,
        "tol": BUDGET_TOLERANCE,
        "default": evaluator.measure(None, n_samples)[evaluator.metric],
        "steps": [],
    }
    for steps in budgets:
        solver = {"max_steps": steps, "tol": BUDGET_TOLERANCE}
        figures = evaluator.measure(solver, n_samples, f"{steps} steps")
        if evaluator.interrupted:
            raise KeyboardInterrupt
        row = {key: figures[key] for key in (evaluator.metric, *_CURVE)}
        curve["steps"].append({"max_steps": steps, **row})
        if on_row is not None:
            on_row(curve)
    return curve
