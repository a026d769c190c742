"""Nodes in the engine of recipes: whole graphs, one a step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deqzoo.data.graphs import load_citations, load_localization, load_photo, load_ppi, load_twitch
from deqzoo.errors import UserError
from deqzoo.models.ignn.configuration_ignn import IGNNConfig
from deqzoo.models.ignn.inputs import GraphBatch, graph_fields
from deqzoo.tasks.graphs import GraphPart, GraphTask

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class NodeSet:
    """A data set of nodes.

    Attributes:
        load: returns the `Data` objects of a split under a root folder. Transductive sets return
            one graph with the masks `train_mask`, `val_mask` and `test_mask` for all three.
        multi_label: several labels per node, instead of one class.
        figure: name of the figure that chooses among weights.
    """

    load: Callable[[Path, str], list[Any]]
    multi_label: bool
    figure: str


_TWITCH = {"train": ("DE", "ES", "FR", "RU"), "validation": ("PT",), "test": ("EN",)}

NODE_SETS = {
    "Twitch": NodeSet(
        lambda root, split: [load_twitch(code, root) for code in _TWITCH[split]], False, "auc"
    ),
    "HumLoc": NodeSet(lambda root, split: [load_localization("HumLoc", root)], True, "micro_f1"),
    "EukLoc": NodeSet(lambda root, split: [load_localization("EukLoc", root)], True, "micro_f1"),
    "Cora": NodeSet(lambda root, split: [load_citations("Cora", root)], False, "accuracy"),
    "CiteSeer": NodeSet(lambda root, split: [load_citations("CiteSeer", root)], False, "accuracy"),
    "Photo": NodeSet(lambda root, split: [load_photo(root)], False, "accuracy"),
    "PPI": NodeSet(
        lambda root, split: load_ppi(root, {"validation": "val"}.get(split, split)),
        True,
        "micro_f1",
    ),
}


class NodeClassificationTask(GraphTask):
    """Classes or labels of nodes; a step takes one graph, whole."""

    head = "ForNodeClassification"
    of_nodes = True
    shuffled = True

    def _load(self, root: Path) -> None:
        name = self.recipe.data.name
        if name not in NODE_SETS:
            raise UserError(f"unknown data set of nodes {name!r}; choose {', '.join(NODE_SETS)}")
        if self.recipe.data.options:
            raise UserError(f"data.options: {name} has none; remove it")
        if self.recipe.batch_size != 1:
            raise UserError(
                f"batch_size counts whole graphs here and must be 1, got {self.recipe.batch_size}"
            )
        node_set = NODE_SETS[name]
        self.metric = node_set.figure
        graphs = {split: node_set.load(root, split) for split in ("train", "validation")}
        example = graphs["train"][0]
        self.config = self._config(
            num_features=example.x.shape[1],
            num_labels=example.y.shape[1] if node_set.multi_label else int(example.y.max()) + 1,
            problem_type=f"{'multi' if node_set.multi_label else 'single'}_label_classification",
        )
        self.training = node_parts(self.config, graphs["train"], "train")
        self.validation = node_parts(self.config, graphs["validation"], "validation")
        self.fingerprints = {
            split: fingerprint(split_graphs) for split, split_graphs in graphs.items()
        }
        self.fold = {"data": name}

    def _typical_graph(self) -> GraphBatch:
        sizes = sorted((part.graphs.features.shape[0], i) for i, part in enumerate(self.training))
        return self.training[sizes[len(sizes) // 2][1]].graphs

    def describe(self) -> dict[str, Any]:
        return {
            split: {
                "name": self.recipe.data.name.lower(),
                "split": split,
                "nodes": sum(len(part.labels[part.rows]) for part in parts),
                "fingerprint": self.fingerprints[split],
            }
            for split, parts in (("train", self.training), ("validation", self.validation))
        }


def node_parts(config: IGNNConfig, graphs: list[Any], split: str) -> list[GraphPart]:
    """Normalise the graphs of a split once; masks of transductive sets are taken along."""
    name = {"validation": "val"}.get(split, split)
    return [
        GraphPart(
            GraphBatch.build(config, **graph_fields(graph)),
            graph.y,
            getattr(graph, f"{name}_mask", None),
        )
        for graph in graphs
    ]


def fingerprint(graphs: list[Any]) -> str:
    """SHA-256 over features, edges, labels and masks."""
    digest = hashlib.sha256()
    for graph in graphs:
        for name in ("x", "edge_index", "y", "train_mask", "val_mask", "test_mask"):
            value = getattr(graph, name, None)
            if isinstance(value, torch.Tensor):
                digest.update(f"{name} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().to_dense().contiguous().numpy().tobytes())
    return digest.hexdigest()
