"""Graph classification sets in TUDataset's text files, read with a numbering that stays.

torch_geometric numbers classes and node labels anew by what a folder holds, so that a few graphs
of a set get other features and classes than within it. Here a `GraphEncoding` says what each number
stands for; a checkpoint stores it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deqzoo.errors import UserError, one_line

REQUIRED = ("A", "graph_indicator")
_WIDEST = 10_000


@dataclass(frozen=True)
class GraphEncoding:
    """What the classes and node features of a graph classifier stand for.

    Attributes:
        classes: the stored label of every class.
        node_labels: per column of node labels the stored value of every feature, None for one that
            no node has; empty where there are none.
        attributes: number of node attributes, which come first.

    Without node labels and attributes the one feature is a node's in-degree.
    """

    classes: tuple[int, ...]
    node_labels: tuple[tuple[int | None, ...], ...] = ()
    attributes: int = 0

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> GraphEncoding:
        """From the plain data that a configuration stores."""
        columns = tuple(tuple(column) for column in content["node_labels"])
        return cls(tuple(content["classes"]), columns, content["attributes"])

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        content = asdict(self)
        content["classes"] = list(self.classes)
        content["node_labels"] = [list(column) for column in self.node_labels]
        return content


def find_tu_folder(name: str, root: Path) -> Path:
    """The folder with NAME_A.txt: ROOT/NAME, ROOT/NAME/raw, or ROOT itself.

    Raises:
        UserError: there is none.
    """
    for folder in (root / name, root / name / "raw", root):
        if (folder / f"{name}_A.txt").is_file():
            return folder
    raise UserError(f"no {name}_A.txt in {root / name}: --data is the folder that holds {name}/")


def find_tu_sets(root: Path) -> dict[str, Path]:
    """The sets of a folder by name: its own files, or those of the folders in it."""
    files = [*root.glob("*_A.txt"), *root.glob("raw/*_A.txt")]
    files = files or [*root.glob("*/*_A.txt"), *root.glob("*/raw/*_A.txt")]
    return {file.name.removesuffix("_A.txt"): file.parent for file in sorted(files)}


def read_tu(
    name: str,
    folder: Path,
    encoding: GraphEncoding | None = None,
    *,
    published: bool = False,
) -> tuple[list[Any], GraphEncoding]:
    """The graphs of a set as torch_geometric `Data`, and what their numbers stand for.

    Args:
        name: the files are NAME_A.txt, NAME_graph_indicator.txt, ...
        folder: that holds them.
        encoding: of the checkpoint that is to read them; None makes a new one from the folder.
        published: lay a new encoding out as torch_geometric does, a feature for every value from
            the smallest to the largest node label, and attributes left out.

    Returns:
        Graphs with x (n, p) float32, edge_index (2, e) int64 and, where the folder has graph
        labels, y (1,) int64; and the encoding.

    Raises:
        UserError: files are missing, damaged or contradict each other, or hold a class or node
            label that the encoding does not know.
    """
    from torch_geometric.data import Data
    from torch_geometric.utils import coalesce, remove_self_loops

    def path(part: str) -> Path:
        return folder / f"{name}_{part}.txt"

    missing_files = [path(part).name for part in REQUIRED if not path(part).is_file()]
    if missing_files or not (path("graph_labels").is_file() or encoding):
        missing_files = missing_files or [path("graph_labels").name]
        raise UserError(f"{folder} lacks {', '.join(missing_files)}")
    graph_of = _whole(path("graph_indicator"), columns=1)[:, 0]
    n = len(graph_of)
    if n == 0:
        raise UserError(f"{path('graph_indicator')} names no node")
    edges = _whole(path("A"), columns=2)
    outside = edges[(edges < 1) | (edges > n)]
    if outside.size:
        raise UserError(f"{path('A')} names node {outside[0]}, but there are the nodes 1 to {n}")
    edges -= 1
    graph_numbers = np.unique(graph_of)
    full_range = np.arange(1, len(graph_numbers) + 1)
    if (graph_numbers != full_range).any():
        raise UserError(
            f"{path('graph_indicator')}: graph {full_range[graph_numbers != full_range][0]} "
            "has no nodes; graphs are numbered 1, 2, 3, ..."
        )
    counts = np.bincount(graph_of - 1)
    if (graph_of[edges[:, 0]] != graph_of[edges[:, 1]]).any():
        raise UserError(f"{path('A')} connects nodes of different graphs")
    labels = _graph_labels(path("graph_labels"), len(counts))
    node_labels = _node_table(path("node_labels"), n, whole=True)
    attributes = None if published else _node_table(path("node_attributes"), n, whole=False)
    if encoding is None:
        assert labels is not None
        encoding = _new_encoding(labels, node_labels, attributes, published)
    features = _features(encoding, node_labels, attributes, folder / name)
    classes = None if labels is None else _classes(encoding, labels, path("graph_labels"))
    graphs = []
    for number, (nodes, edge_index) in enumerate(_by_graph(graph_of - 1, counts, edges)):
        edge_index, _ = remove_self_loops(edge_index)
        edge_index = coalesce(edge_index, num_nodes=len(nodes))
        graph = Data(edge_index=edge_index, num_nodes=len(nodes))
        if features is None:
            graph.x = torch.bincount(edge_index[1], minlength=len(nodes))[:, None].float()
        else:
            graph.x = features[nodes]
        if classes is not None:
            graph.y = classes[number : number + 1]
        graphs.append(graph)
    return graphs, encoding


def _by_graph(
    graph_of: np.ndarray, counts: np.ndarray, edges: np.ndarray
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Each graph's nodes, as rows of the set, and its edges (2, e) between their places.

    Args:
        graph_of: graph of each node, from 0.
        counts: of each graph's nodes.
        edges: (e, 2) between rows of the set.
    """
    order = np.argsort(graph_of, kind="stable")
    starts = np.concatenate([[0], counts.cumsum()])
    place = np.empty(len(graph_of), np.int64)
    place[order] = np.arange(len(graph_of)) - starts[graph_of[order]]
    edge_graph = graph_of[edges[:, 0]]
    by_graph = np.argsort(edge_graph, kind="stable")
    edge_counts = np.bincount(edge_graph, minlength=len(counts))
    local = torch.from_numpy(place[edges[by_graph]].T.copy())
    edges_of = local.split(edge_counts.tolist(), dim=1)
    yield from zip(np.split(order, starts[1:-1]), edges_of, strict=True)


def _new_encoding(
    labels: np.ndarray,
    node_labels: np.ndarray | None,
    attributes: np.ndarray | None,
    published: bool,
) -> GraphEncoding:
    columns: list[tuple[int | None, ...]] = []
    for column in () if node_labels is None else node_labels.T:
        values = set(column.tolist())
        if published:
            if max(values) - min(values) > _WIDEST:
                raise UserError(
                    f"node labels from {min(values)} to {max(values)} make too many features; "
                    "number the kinds of nodes 0, 1, 2, ..."
                )
            columns.append(
                tuple(v if v in values else None for v in range(min(values), max(values) + 1))
            )
        else:
            columns.append(tuple(sorted(values)))
    width = 0 if attributes is None else attributes.shape[1]
    return GraphEncoding(tuple(np.unique(labels).tolist()), tuple(columns), width)


def _features(
    encoding: GraphEncoding,
    node_labels: np.ndarray | None,
    attributes: np.ndarray | None,
    where: Path,
) -> Tensor | None:
    """Node features (n, p) float32; None where the degrees stand in for them."""
    parts = []
    if encoding.attributes:
        width = 0 if attributes is None else attributes.shape[1]
        if width != encoding.attributes:
            raise UserError(
                f"{where}_node_attributes.txt has {width} columns, this model reads "
                f"{encoding.attributes}"
            )
        parts.append(torch.from_numpy(attributes).float())
    width = 0 if node_labels is None else node_labels.shape[1]
    if width != len(encoding.node_labels) and encoding.node_labels:
        raise UserError(
            f"{where}_node_labels.txt has {width} columns, this model reads "
            f"{len(encoding.node_labels)}"
        )
    for number, values in enumerate(encoding.node_labels):
        assert node_labels is not None
        index = {value: i for i, value in enumerate(values) if value is not None}
        column = node_labels[:, number].tolist()
        for node, value in enumerate(column):
            if value not in index:
                raise UserError(
                    f"{where}_node_labels.txt: node {node + 1} has the label {value}, which this "
                    f"model has not seen; it knows {_value_list(index)}"
                )
        one_hot = torch.zeros(len(column), len(values))
        one_hot[torch.arange(len(column)), torch.tensor([index[value] for value in column])] = 1
        parts.append(one_hot)
    return torch.cat(parts, dim=1) if parts else None


def _classes(encoding: GraphEncoding, labels: np.ndarray, path: Path) -> Tensor:
    index = {value: i for i, value in enumerate(encoding.classes)}
    for number, label in enumerate(labels.tolist()):
        if label not in index:
            raise UserError(
                f"{path}: graph {number + 1} has the label {label}, which is none of this model's "
                f"classes {_value_list(index)}"
            )
    return torch.tensor([index[label] for label in labels.tolist()])


def _graph_labels(path: Path, n_graphs: int) -> np.ndarray | None:
    if not path.is_file():
        return None
    labels = _whole(path, columns=1)[:, 0]
    if len(labels) != n_graphs:
        raise UserError(f"{path} has {len(labels)} labels for {n_graphs} graphs")
    return labels


def _node_table(path: Path, n_nodes: int, whole: bool) -> np.ndarray | None:
    if not path.is_file():
        return None
    table = _whole(path) if whole else _numbers(path)
    if len(table) != n_nodes:
        raise UserError(f"{path} has {len(table)} lines for {n_nodes} nodes")
    return table


def _whole(path: Path, columns: int | None = None) -> np.ndarray:
    """Whole numbers (lines, columns) int64."""
    values = _numbers(path, columns)
    if (values != np.round(values)).any() or (np.abs(values) > 2**53).any():
        raise UserError(f"{path} must hold whole numbers")
    return values.astype(np.int64)


def _numbers(path: Path, columns: int | None = None) -> np.ndarray:
    """The numbers of a file (lines, columns) float64, parted by commas.

    Raises:
        UserError: anything else, or another number of columns.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        lines = [line for line in lines if line.strip()]
        if not lines:
            return np.zeros((0, columns or 1))
        values = np.loadtxt(lines, delimiter=",", ndmin=2, comments=None)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, UnicodeDecodeError) as error:
        reason = one_line(error, 120)
        raise UserError(f"{path} must hold numbers parted by commas ({reason})") from error
    if columns is not None and values.shape[1] != columns:
        raise UserError(
            f"{path} must have {columns} numbers, parted by a comma, in a line; it has "
            f"{values.shape[1]}"
        )
    if not np.isfinite(values).all():
        raise UserError(f"{path} holds NaN or infinite numbers")
    return values


def _value_list(values: Any) -> str:
    texts = [str(value) for value in values]
    return ", ".join(texts[:12]) + (", ..." if len(texts) > 12 else "")
