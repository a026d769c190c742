"""Graph models: evaluation of checkpoints, and predictions for a folder."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deqzoo.data.graphs import GraphSet, load_graph_set, load_own_graphs
from deqzoo.data.own import chose_weights, graph_digests, read_record, unseen
from deqzoo.data.tu import GraphEncoding
from deqzoo.errors import UserError, as_user_error
from deqzoo.evaluation.base import Batches, ClassifierEvaluator
from deqzoo.models.ignn.modeling_ignn import IGNNForGraphClassification, IGNNPreTrainedModel
from deqzoo.tasks.graphs import FOLD, read_fold
from deqzoo.tasks.nodes import NODE_SETS, SPLITS, node_parts


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
    data.require_readable(model.config, index)
    model.eval()
    for start in range(0, len(index), batch_size):
        numbers = index[start : start + batch_size]
        output = model(data.batch(numbers), solver=solver)
        probabilities, labels = output.logits.softmax(1).max(1)
        for i, number in enumerate(numbers):
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
    with as_user_error("graph_encoding of the configuration is damaged", KeyError, TypeError):
        return None if content is None else GraphEncoding.from_dict(content)


def split_indices(model: IGNNPreTrainedModel, name: str, split: str) -> list[int]:
    """Return the graphs of a split of the checkpoint's own fold.

    Raises:
        UserError: the checkpoint was trained on another data set, or has no such split.
    """
    fold = read_fold(model.config._name_or_path)
    if fold["data"] != name:
        raise UserError(
            f"this checkpoint knows the splits of {fold['data']} only; use --split all for {name}"
        )
    if split not in fold or not isinstance(fold[split], list):
        raise UserError(f"unknown split {split!r}; choose from train, validation, test, all")
    return fold[split]


class _GraphData(ClassifierEvaluator):
    """What the evaluators of graph models share: a local folder, and one of three splits."""

    knows_all = False
    """Whether all graphs can be measured together."""

    def load(self, split: str, data: str | os.PathLike[str] | None, limit: int | None) -> None:
        if split not in (*SPLITS, *(["all"] if self.knows_all else [])):
            raise UserError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
        if data is None:
            raise UserError("graph data are read from a local folder: name it with --data")
        self._load(Path(data), split, limit)

    @abstractmethod
    def _load(self, root: Path, split: str, limit: int | None) -> None:
        """Read a split."""


class GraphEvaluator(_GraphData):
    """A graph classifier on the fold that it was trained on, or on graphs of one's own.

    Raises:
        UserError: no data folder, an unknown split, or a checkpoint without its fold.
    """

    task = "graph-classification"
    metric = "accuracy"
    unit = "graphs"
    knows_all = True

    def _load(self, root: Path, split: str, limit: int | None) -> None:
        chose: dict[str, bool] = {}
        folder = Path(self.model.config._name_or_path)
        record = read_record(folder)
        if record is None and (folder / FOLD).is_file():
            fold = read_fold(folder)
            fold["all"] = sorted({row for name in SPLITS for row in fold.get(name, [])})
            if not fold.get(split):
                raise UserError(f"the {split} split of this checkpoint's fold is empty")
            self.graphs = load_graph_set(fold["data"], root, encoding_of(self.model))
            if limit is not None:  # in the order of their classes, too
                digests = graph_digests(self.graphs.graphs)
                fold = {**fold, split: sorted(fold[split], key=digests.__getitem__)}
        else:
            self.graphs = load_own_graphs(root, encoding_of(self.model))
            if bool((self.graphs.labels < 0).any()):
                raise UserError(f"{root} has graphs without labels: nothing to measure against")
            digests = graph_digests(self.graphs.graphs, record)
            # Lists are often in the order of their classes: the first graphs would be of one class.
            rows = sorted(unseen(digests, record or {}, split), key=digests.__getitem__)
            self.graphs.require_readable(self.model.config, rows)
            fold = {"data": self.graphs.name, split: rows}
            chose = chose_weights(record, [digests[row] for row in rows])
        part: dict[str, Any] = {key: fold[key] for key in ("protocol", "fold") if key in fold}
        flags = {"complete": True, "local": True, **chose}
        self.description = {"name": fold["data"].lower(), **part, **flags}
        self.count = len(fold[split])
        self.limit_to(limit)
        self.index = fold[split][: self.count]

    def batches(self, samples: int | None) -> Batches:
        index = self.index[:samples]
        starts = range(0, len(index), self.batch_size)
        parts = (self.graphs.batch(index[i : i + self.batch_size]) for i in starts)
        inputs = (({"x": part}, slice(None)) for part in parts)
        return Batches(inputs, len(starts), self.graphs.labels[index])


class NodeEvaluator(_GraphData):
    """A node classifier on the data set that it was trained on.

    Raises:
        UserError: no data folder, an unknown split, a checkpoint that does not say what it was
            trained on, or a limit.
    """

    task = "node-classification"
    unit = "nodes"

    def _load(self, root: Path, split: str, limit: int | None) -> None:
        if limit is not None:
            raise UserError("a node classifier reads whole graphs; leave --limit out")
        name = read_fold(self.model.config._name_or_path)["data"]
        self.metric = NODE_SETS[name].figure
        graphs = NODE_SETS[name].load(root, split)
        self.parts = node_parts(self.model.config, graphs, split)
        self.labels = torch.cat([part.labels[part.rows] for part in self.parts])
        self.description = {"name": name.lower(), "complete": True, "local": True}
        self.count = len(self.labels)

    def batches(self, samples: int | None) -> Batches:
        inputs = (({"x": part.graphs}, part.rows) for part in self.parts)
        return Batches(inputs, len(self.parts), self.labels)
