"""What the zoo holds, read from the checkpoints' own files without loading any weights."""

from __future__ import annotations

import csv
import io
import json
import math
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deqzoo.errors import UserError, as_user_error
from deqzoo.hub.card_texts import DATA_TEXTS
from deqzoo.models.names import FAMILIES
from deqzoo.records import read_evaluation, training_record
from deqzoo.tasks.metrics import METRICS
from deqzoo.zoo import TASKS, list_models, read_json, resolve_bundled, task_words

#: Last parts of names in weight files that are no parameters: batch norms', and spectral norms'.
BUFFERS = {"running_mean", "running_var", "num_batches_tracked", "left", "right"}


@dataclass(frozen=True)
class Entry:
    """One checkpoint.

    Attributes:
        name: zoo name, or the folder's name.
        folder: where it is.
        config: content of config.json.
        evaluations: contents of the evaluation files by file stem, in the current format.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    evaluations: dict[str, dict[str, Any]]

    @property
    def architecture(self) -> str:
        """Name of the model's class."""
        return (self.config.get("architectures") or ["?"])[0]

    @property
    def task(self) -> str:
        """What the model does, in words."""
        return task_words(self.architecture)

    @property
    def parameters(self) -> int:
        """Number of parameters; normalisation statistics are none."""
        return sum(count_parameters(file) for file in self.weight_files)

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files, sorted."""
        return sorted(self.folder.glob("*.safetensors"))

    @property
    def size(self) -> int:
        """Bytes of the weights."""
        return sum(file.stat().st_size for file in self.weight_files)

    @property
    def record(self) -> dict[str, Any]:
        """What the run left beside the weights; empty if nothing."""
        return training_record(self.folder)

    def headline(self) -> str:
        """The main figure of the test evaluation with its data, or what is missing."""
        figures = (main_figure(evaluation) for evaluation in self.tests())
        return next((figure for figure in figures if figure), "not evaluated yet")

    def tests(self) -> list[dict[str, Any]]:
        """The evaluations of test splits."""
        return [e for e in self.evaluations.values() if e.get("data", {}).get("split") == "test"]

    def best_test(self, metric: str) -> float | None:
        """The best figure of a metric ("accuracy", "perplexity") on a test split, or None."""
        values = (e.get("results", {}).get(metric) for e in self.tests())
        figures = [float(figure) for figure in values if figure is not None]
        best = max if METRICS[metric].higher_is_better else min
        return best(figures, default=None)


def best_first(checkpoints: Iterable[Entry], metric: str) -> list[Entry]:
    """Checkpoints by their test figure of a metric, the best first, those without one last."""
    sign = -1.0 if METRICS[metric].higher_is_better else 1.0

    def rank(checkpoint: Entry) -> tuple[float, str]:
        figure = checkpoint.best_test(metric)
        return math.inf if figure is None else sign * figure, checkpoint.name

    return sorted(checkpoints, key=rank)


def rank(checkpoint: Entry) -> tuple[Any, ...]:
    """Where a checkpoint stands by result: task, data set, then the best test figure."""
    tasks, data = [info.words for info in TASKS.values()], list(DATA_TEXTS)
    task = tasks.index(checkpoint.task) if checkpoint.task in tasks else len(tasks)
    if not checkpoint.tests():
        return task, len(data) + 1, 0.0, checkpoint.name
    evaluation = checkpoint.tests()[0]
    name, source = evaluation.get("metric") or "", evaluation.get("data", {}).get("name", "?")
    value = evaluation["results"].get(name, 0.0)
    return (
        task,
        data.index(source) if source in data else len(data),
        -value if name in METRICS and METRICS[name].higher_is_better else value,
        checkpoint.name,
    )


#: Orders of a list of checkpoints.
ORDERS: dict[str, Callable[[Entry], Any]] = {
    "name": lambda checkpoint: checkpoint.name,
    "parameters": lambda checkpoint: (checkpoint.parameters, checkpoint.name),
    "result": rank,
}


def results_csv(checkpoints: Iterable[Entry]) -> str:
    """A row per test evaluation: what timm keeps in its results files."""
    stream = io.StringIO()
    head = ("name", "task", "data", "split", "samples", "metric", "value", "parameters",
            "n_steps_mean", "converged_share", "max_steps", "tol", "weights_sha256")  # fmt: skip
    table = csv.DictWriter(stream, head, lineterminator="\n", extrasaction="ignore")
    table.writeheader()
    for checkpoint in checkpoints:
        for test in checkpoint.tests():
            data, results, model = test.get("data", {}), test["results"], test.get("model", {})
            solver = model.get("solver") or {}
            table.writerow(
                {**solver, **results, **data, **model, "data": data.get("name"),
                 "name": checkpoint.name, "task": checkpoint.task, "metric": test.get("metric"),
                 "value": results.get(test.get("metric")), "parameters": checkpoint.parameters}
            )  # fmt: skip
    return stream.getvalue()


def short_count(parameters: int) -> str:
    """ "11.1M" or "159k": a number of parameters as tables give it."""
    return f"{parameters / 1e6:.1f}M" if parameters >= 1e6 else f"{parameters / 1e3:.0f}k"


def main_value(evaluation: dict[str, Any]) -> str | None:
    """ "85.20 %" or "perplexity 71.30": the figure without what it was measured on."""
    metric = evaluation.get("metric")
    return None if metric is None else METRICS[metric].show(evaluation["results"][metric])


def main_figure(evaluation: dict[str, Any]) -> str | None:
    """ "85.20 % on cifar10 test" or "perplexity 71.30 on wikitext2 test"; None without a figure."""
    data = evaluation.get("data", {})
    where = f"{data.get('name', '?')} {data.get('split', '?')}"
    if "fold" in data:
        where += f", fold {data['fold']}"
    value = main_value(evaluation)
    if "limit" in data:
        unit = TASKS[evaluation["task"]].unit if evaluation.get("task") in TASKS else "samples"
        where += f" (the first {data['limit']:,} {unit} only)"
    if data.get("chose_weights"):
        where += " (which chose the weights, too)"
    return None if value is None else f"{value} on {where}"


def below_baseline(evaluation: dict[str, Any]) -> bool:
    """Whether an answer that is always the same does as well."""
    name, results = evaluation.get("metric"), evaluation.get("results", {})
    metric = METRICS.get(name or "")
    if metric is None or metric.baseline not in results:
        return False
    return not metric.better(results[name], results[metric.baseline])


def entry(name: str) -> Entry:
    """A bundled checkpoint or a local folder.

    Raises:
        UserError: unknown name, a folder whose files are damaged, or another library's model.
    """
    folder = resolve_bundled(name)
    config = read_json(folder / "config.json")
    if config.get("model_type") not in FAMILIES:
        raise UserError(
            f"{folder} is of model type {config.get('model_type')!r}; the zoo's types are "
            f"{', '.join(FAMILIES)}"
        )
    evaluations = {
        file.stem: read_evaluation(file) for file in sorted((folder / "evaluation").glob("*.json"))
    }
    return Entry(folder.name, folder, config, evaluations)


def entries(pattern: str = "*", task: str | None = None) -> list[Entry]:
    """The bundled checkpoints, sorted by name; arguments as in `list_models`."""
    return [entry(name) for name in list_models(pattern, task)]


def count_parameters(path: Path) -> int:
    """Number of parameters in a safetensors file, from its header.

    Raises:
        UserError: the file is no safetensors file.
    """
    faults = (OSError, ValueError, KeyError, TypeError, struct.error)
    with as_user_error(f"{path} is no sound safetensors file", *faults):
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > path.stat().st_size:
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length))
        return sum(
            math.prod(tensor["shape"])
            for name, tensor in header.items()
            if name != "__metadata__" and name.rpartition(".")[2] not in BUFFERS
        )
