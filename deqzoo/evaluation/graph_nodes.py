"""Node data sets as parts of fixed graphs, and the figures of node classifiers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deqzoo.data.graphs import (
    load_citations,
    load_localization,
    load_photo,
    load_ppi,
    load_twitch,
    micro_f1,
)
from deqzoo.models.ignn.configuration_ignn import IGNNConfig
from deqzoo.models.ignn.inputs import GraphBatch, graph_fields
from deqzoo.models.ignn.modeling_ignn import IGNNForNodeClassification

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class NodeTask:
    """A data set of nodes.

    Attributes:
        load: returns the `Data` objects of a split under a root folder. Transductive sets return
            one graph with the masks `train_mask`, `val_mask` and `test_mask` for all three.
        multi_label: several labels per node, instead of one class.
        figure: name of the figure that chooses the epoch.
    """

    load: Callable[[Path, str], list[Any]]
    multi_label: bool
    figure: str


_TWITCH = {"train": ("DE", "ES", "FR", "RU"), "validation": ("PT",), "test": ("EN",)}

NODE_TASKS = {
    "Twitch": NodeTask(
        lambda root, split: [load_twitch(code, root) for code in _TWITCH[split]], False, "auc"
    ),
    "HumLoc": NodeTask(lambda root, split: [load_localization("HumLoc", root)], True, "micro_f1"),
    "EukLoc": NodeTask(lambda root, split: [load_localization("EukLoc", root)], True, "micro_f1"),
    "Cora": NodeTask(lambda root, split: [load_citations("Cora", root)], False, "accuracy"),
    "CiteSeer": NodeTask(lambda root, split: [load_citations("CiteSeer", root)], False, "accuracy"),
    "Photo": NodeTask(lambda root, split: [load_photo(root)], False, "accuracy"),
    "PPI": NodeTask(
        lambda root, split: load_ppi(root, {"validation": "val"}.get(split, split)),
        True,
        "micro_f1",
    ),
}


@dataclass
class NodePart:
    """One graph with labels, the nodes that count, and the last equilibria found on it."""

    graphs: GraphBatch
    labels: Tensor
    mask: Tensor | None
    states: tuple[Tensor, ...] | None = None

    def run(self, model: IGNNForNodeClassification) -> Any:
        """Call the model, starting from the last equilibria."""
        output = model(
            self.graphs,
            labels=self.labels,
            mask=self.mask,
            initial_states=self.states,
            output_hidden_states=True,
        )
        self.states = output.hidden_states
        return output


def node_parts(config: IGNNConfig, graphs: list[Any], split: str) -> list[NodePart]:
    """Normalise the graphs of a split once; masks of transductive sets are taken along."""
    parts = []
    name = {"validation": "val"}.get(split, split)
    for graph in graphs:
        batch = GraphBatch.build(config, **graph_fields(graph))
        parts.append(NodePart(batch, graph.y, getattr(graph, f"{name}_mask", None)))
    return parts


@torch.inference_mode()
def evaluate_parts(model: IGNNForNodeClassification, parts: list[NodePart]) -> dict[str, float]:
    """Return the figures over all nodes that count, all parts together."""
    model.eval()
    logits, labels, steps, converged = [], [], [], []
    for part in parts:
        output = part.run(model)
        chosen = slice(None) if part.mask is None else part.mask
        logits.append(output.logits[chosen])
        labels.append(part.labels[chosen])
        steps.append(output.n_steps)
        converged.append(output.converged)
    figures = node_figures(torch.cat(logits), torch.cat(labels))
    figures["steps"] = float(torch.cat(steps).double().mean())
    figures["converged"] = float(torch.cat(converged).double().mean())
    return figures


def node_figures(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return micro-F1 for multi-label problems; else accuracy, and AUC where there are two classes.

    Args:
        logits: (n, c).
        labels: (n,) int64, or (n, c) of 0 and 1.
    """
    if labels.ndim == 2:
        return {"micro_f1": micro_f1((logits > 0).float(), labels), "samples": len(labels)}
    figures = {
        "accuracy": float((logits.argmax(1) == labels).double().mean()),
        "majority": float(torch.bincount(labels).max() / len(labels)),
        "samples": len(labels),
    }
    if logits.shape[1] == 2:
        figures["auc"] = area_under_curve(logits[:, 1] - logits[:, 0], labels)
    return figures


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """Return the area under the ROC curve, ties counted half; labels are 0 or 1."""
    values, inverse, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    below = counts.cumsum(0) - counts
    rank = (below + (counts + 1) / 2).double()[inverse]  # mean rank of equal scores, from 1
    positive = labels == 1
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if n_positive == 0 or n_negative == 0:
        return float("nan")
    excess = float(rank[positive].sum()) - n_positive * (n_positive + 1) / 2
    return excess / (n_positive * n_negative)
