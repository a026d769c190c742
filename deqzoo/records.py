"""Evaluation files: one schema for every task, and the upgrade of files of earlier versions.

An evaluation file says what was measured with which weights on which data:

| key | content |
|---|---|
| `format` | 2 |
| `task` | `image-classification`, `language-modeling`, `graph-classification`, ... |
| `metric` | the figure that the evaluation is known by, a key of `deqzoo.tasks.metrics.METRICS` |
| `model` | name, class, parameters, SHA-256 of the weights, solver and gradient |
| `data` | `name`, `split`, number of `samples` and their `unit`, `complete`, fingerprint or fold, |
| | `chose_weights` where the samples had to end the training as well; `looks`: how many |
| | different weights of this name were measured on the test split |
| `results` | figures by their names in `METRICS`, per-class figures as mappings |
| `budget` | quality after fixed numbers of solver steps, or null: `samples`, `tol`, `default` |
| | (with the model's own solver) and `steps`, rows of `max_steps` and figures |
| `environment`, `command` | versions, machine, date, for pictures `inference`, the path that |
| | forwards took (`inference_path` of the model); how to repeat the measurement |
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deqzoo.errors import UserError
from deqzoo.zoo import TASKS, read_json, task_of

FORMAT = 2

#: Formats 0 (graphs) and 1: figures that had other names.
_NEW_NAMES = {
    "mean_steps": "n_steps_mean",
    "steps": "n_steps_mean",
    "max_residual": "residual_max",
    "converged": "converged_share",
    "seconds_per_picture": "seconds_per_sample",
}
#: The metric of a file that names none: the first of these that it has.
_MAIN_METRICS = ("auc", "accuracy", "perplexity", "micro_f1")


def read_evaluation(path: Path) -> dict[str, Any]:
    """An evaluation file in the current format.

    Raises:
        UserError: unreadable, damaged, or of a newer version of the package.
    """
    return upgraded(read_json(path), str(path))


def training_record(folder: Path) -> dict[str, Any]:
    """What a run left beside the weights, under the names of all versions; empty if nothing.

    Raises:
        UserError: it is damaged.
    """
    files = (folder / name for name in ("training.json", "run.json", "fold.json"))
    record_file = next((file for file in files if file.is_file()), None)
    return {} if record_file is None else read_json(record_file)


def upgraded(content: Mapping[str, Any], place: str = "the evaluation") -> dict[str, Any]:
    """The content of an evaluation file of any version, in the current format.

    Raises:
        UserError: it is of a newer version.
    """
    version = content.get("format", 0)
    if version == FORMAT:
        return dict(content)
    if not isinstance(version, int) or version > FORMAT:
        raise UserError(f"{place} has format {version!r}; this version reads up to {FORMAT}")
    model, data = dict(content.get("model", {})), dict(content.get("data", {}))
    results = _renamed_figures(content.get("results", {}))
    task = content.get("task") or task_of(model.get("architecture", ""))
    metric = next((name for name in _MAIN_METRICS if name in results), None)
    samples = _take_count(data, results)
    if samples is not None:
        results.pop("unconverged_tokens", None)
        if "seconds" in results:
            results["seconds_per_sample"] = results.pop("seconds") / samples
        data = {
            **{key: data.pop(key) for key in ("name", "split") if key in data},
            "samples": samples,
            "unit": TASKS[task].unit if task in TASKS else "samples",
            **data,
        }
        data.setdefault("complete", True)
    if "n_steps_mean" in results:
        results.setdefault("f_evaluations_per_sample", results["n_steps_mean"] + 1)
    budget = content.get("budget")
    return {
        **{key: value for key, value in content.items() if key != "format"},
        "format": FORMAT,
        "task": task,
        "metric": metric,
        "model": model,
        "data": data,
        "results": results,
        "budget": _upgraded_budget(dict(budget), metric) if budget else None,
    }


def _renamed_figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    new_figures = {_NEW_NAMES.get(key, key): value for key, value in figures.items()}
    if "tokens_per_second" in new_figures:
        new_figures["seconds_per_sample"] = 1 / new_figures.pop("tokens_per_second")
    return new_figures


def _take_count(*sources: dict[str, Any]) -> int | None:
    """Take the number of samples out of wherever it stands."""
    count = None
    for source in sources:
        for key in ("samples", "pictures", "tokens"):
            value = source.pop(key, None)
            count = value if count is None else count
    return count


def _upgraded_budget(budget: dict[str, Any], metric: str | None) -> dict[str, Any]:
    return {
        "samples": _take_count(budget),
        "tol": budget.get("tol"),
        "default": budget.get(f"default_{metric}"),
        "steps": [_renamed_figures(row) for row in budget["steps"]],
    }
