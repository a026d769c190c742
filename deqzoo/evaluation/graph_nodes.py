"""Node data sets as parts of fixed graphs, and the evaluation of their classifiers."""

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
)
from deqzoo.models.ignn.configuration_ignn import IGNNConfig
from deqzoo.models.ignn.inputs import GraphBatch, graph_fields
from deqzoo.models.ignn.modeling_ignn import IGNNForNodeClassification
from deqzoo.tasks.metrics import classification_figures, equilibrium_summary

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

    @property
    def rows(self) -> Any:
        """Index of the nodes that count."""
        return slice(None) if self.mask is None else self.mask

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
    outputs = [part.run(model) for part in parts]
    logits = torch.cat([out.logits[part.rows] for out, part in zip(outputs, parts, strict=True)])
    labels = torch.cat([part.labels[part.rows] for part in parts])
    reports = zip(*((out.n_steps, out.residual, out.converged) for out in outputs), strict=True)
    return {
        **classification_figures(logits, labels, model.config.decision_threshold),
        **equilibrium_summary(*(torch.cat(report) for report in reports)),
    }
