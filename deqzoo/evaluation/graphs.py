"""Evaluation of graph models: single checkpoints, predictions for a folder, and the graph table."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deqzoo.data.graphs import GraphSet, load_graph_set
from deqzoo.data.tu import GraphEncoding
from deqzoo.errors import UserError
from deqzoo.evaluation.files import describe_environment, describe_model
from deqzoo.evaluation.graph_nodes import NODE_TASKS, evaluate_parts, node_parts
from deqzoo.models.ignn.modeling_ignn import (
    IGNNForGraphClassification,
    IGNNForNodeClassification,
    IGNNPreTrainedModel,
)


@dataclass(frozen=True)
class GraphPrediction:
    """What a model says about one graph.

    Attributes:
        number: position in the data set.
        label: predicted class.
        probability: of that class.
        target: stored class; None for a graph without a label.
        n_steps, residual, converged: the solver's report.
    """

    number: int
    label: int
    probability: float
    target: int | None
    n_steps: int
    residual: float
    converged: bool


@torch.inference_mode()
def predict_graphs(
    model: IGNNForGraphClassification,
    data: GraphSet,
    index: list[int],
    batch_size: int = 128,
    solver: dict[str, Any] | None = None,
) -> Iterator[GraphPrediction]:
    """Predict the class of chosen graphs.

    Raises:
        UserError: the model classifies no graphs, or reads other features.
    """
    require_graph_classifier(model)
    model.eval()
    for start in range(0, len(index), batch_size):
        chosen = index[start : start + batch_size]
        output = model(data.batch(chosen), solver=solver)
        probabilities, labels = output.logits.softmax(1).max(1)
        for i, number in enumerate(chosen):
            yield GraphPrediction(
                number=number,
                label=int(labels[i]),
                probability=float(probabilities[i]),
                target=int(data.labels[number]) if data.labels[number] >= 0 else None,
                n_steps=int(output.n_steps[i]),
                residual=float(output.residual[i]),
                converged=bool(output.converged[i]),
            )


def require_graph_classifier(model: Any) -> None:
    """Refuse models of other kinds.

    Raises:
        UserError: the model classifies no graphs.
    """
    if not isinstance(model, IGNNForGraphClassification):
        raise UserError(f"{type(model).__name__} classifies no graphs; choose a graph classifier")


def encoding_of(model: IGNNPreTrainedModel) -> GraphEncoding | None:
    """What a checkpoint's classes and node features stand for; None where it does not say.

    Raises:
        UserError: the configuration's description is damaged.
    """
    content = model.config.graph_encoding
    try:
        return None if content is None else GraphEncoding.from_dict(content)
    except (KeyError, TypeError) as error:
        raise UserError(f"graph_encoding of the configuration is damaged: {error}") from error


def stored_fold(model: IGNNPreTrainedModel) -> dict[str, Any]:
    """Return the indices and figures that lie beside a checkpoint's weights in fold.json.

    Raises:
        UserError: the checkpoint has none.
    """
    file = Path(model.config._name_or_path) / "fold.json"
    if not file.is_file():
        raise UserError(f"no {file}: this checkpoint stores no fold to evaluate on")
    return json.loads(file.read_text(encoding="utf-8"))


def split_indices(model: IGNNPreTrainedModel, name: str, split: str) -> list[int]:
    """Return the graphs of a split of the checkpoint's own fold.

    Raises:
        UserError: the checkpoint was trained on another data set, or has no such split.
    """
    fold = stored_fold(model)
    if fold["data"] != name:
        raise UserError(
            f"this checkpoint knows the splits of {fold['data']} only; use --split all for {name}"
        )
    if split not in fold or not isinstance(fold[split], list):
        raise UserError(f"unknown split {split!r}; choose from train, validation, test, all")
    return fold[split]


def evaluate_graphs(
    model: IGNNPreTrainedModel,
    name: str,
    *,
    split: str = "test",
    data: str | Path | None = None,
    batch_size: int = 128,
    limit: int | None = None,
) -> dict[str, Any]:
    """Measure a checkpoint on its own fold, or a node classifier on its data set.

    Args:
        model: the loaded checkpoint.
        name: for the record.
        split: "train", "validation" or "test".
        data: folder of the graph data sets.
        batch_size: graphs per forward.
        limit: only the first graphs; the file says so.

    Returns:
        The content of an evaluation file.

    Raises:
        UserError: no data folder, an unknown split, a checkpoint without a record, or a limit on
            nodes.
    """
    if split not in ("train", "validation", "test"):
        raise UserError(f"unknown split {split!r}; choose from train, validation, test")
    if data is None:
        raise UserError("graph data are read from a local folder: name it with --data")
    start = time.perf_counter()
    if isinstance(model, IGNNForNodeClassification):
        if limit is not None:
            raise UserError("a node classifier reads whole graphs; leave --limit out")
        described, results = _evaluate_nodes(model, split, Path(data))
    else:
        fold = stored_fold(model)
        described, results = _evaluate_fold(model, fold, split, Path(data), batch_size, limit)
    return {
        "model": describe_model(model, name),
        "data": {**described, "split": split},
        "results": {**results, "seconds": round(time.perf_counter() - start, 2)},
        "environment": describe_environment(model),
        "command": f"deqzoo evaluate {name} --data ROOT --split {split}"
        + (f" --limit {limit}" if "limit" in described else ""),
    }


def _evaluate_fold(
    model: IGNNForGraphClassification,
    fold: dict[str, Any],
    split: str,
    root: Path,
    batch_size: int,
    limit: int | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    graphs = load_graph_set(fold["data"], root, encoding_of(model))
    if not fold[split]:
        raise UserError(f"the {split} split of this checkpoint's fold is empty")
    found = list(predict_graphs(model, graphs, fold[split][:limit], batch_size))
    described: dict[str, Any] = {
        "name": fold["data"].lower(),
        "protocol": fold["protocol"],
        "fold": fold["fold"],
    }
    if limit is not None and limit < len(fold[split]):
        described |= {"complete": False, "limit": limit}
    results = {
        "accuracy": sum(p.label == p.target for p in found) / len(found),
        "majority": max(Counter(p.target for p in found).values()) / len(found),
        "samples": len(found),
        "mean_steps": sum(p.n_steps for p in found) / len(found),
        "max_residual": max(p.residual for p in found),
        "converged": sum(p.converged for p in found) / len(found),
    }
    return described, results


def _evaluate_nodes(
    model: IGNNForNodeClassification, split: str, root: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    file = Path(model.config._name_or_path) / "run.json"
    if not file.is_file():
        raise UserError(f"no {file}: this checkpoint does not say what it was trained on")
    name = json.loads(file.read_text(encoding="utf-8"))["recipe"]["data"]
    graphs = NODE_TASKS[name].load(root, split)
    figures = evaluate_parts(model, node_parts(model.config, graphs, split))
    return {"name": name.lower()}, figures
