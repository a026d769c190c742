"""Graphs as the models see them: checked features and one block-diagonal adjacency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from deqzoo.errors import UserError
from deqzoo.models.ignn.configuration_ignn import IGNNConfig
from deqzoo.models.ignn.sparse import Adjacency

logger = logging.get_logger(__name__)


@dataclass
class GraphBatch:
    """A batch of graphs, normalised and checked once; pass it to a model in place of tensors.

    Attributes:
        features: (n, p), dense or sparse COO.
        adjacency: of all n nodes, block-diagonal.
        index: (n,) int64, the graph of each node.
        n_graphs: number of graphs.
        counts: (n,), how many equal nodes a row stands for; None is one each.
    """

    features: Tensor
    adjacency: Adjacency
    index: Tensor
    n_graphs: int
    counts: Tensor | None = None
    _radii: list[float] = field(default_factory=list, repr=False, compare=False)

    @property
    def radii(self) -> list[float]:
        """Spectral radius of each graph's adjacency; measured once and kept."""
        if not self._radii:
            for number in range(self.n_graphs):
                rows = (self.index == number).nonzero().squeeze(1)
                self._radii.append(self.adjacency.select(rows).spectral_radius)
        return self._radii

    def to(self, like: Tensor) -> GraphBatch:
        """Return the batch on the device and in the dtype of a tensor."""
        features = self.features.to(like)
        index = self.index.to(like.device)
        counts = None if self.counts is None else self.counts.to(like)
        adjacency = self.adjacency.to(like)
        return GraphBatch(features, adjacency, index, self.n_graphs, counts, self._radii)

    @classmethod
    def build(
        cls,
        config: IGNNConfig,
        x: Tensor,
        edge_index: Tensor,
        edge_weight: Tensor | None = None,
        batch: Tensor | None = None,
        n_graphs: int | None = None,
        symmetrize: bool = False,
    ) -> GraphBatch:
        """Check plain tensors and normalise the adjacency as the configuration says.

        Args:
            config: of the model that will read the batch.
            x: (n, num_features) floating point, dense or sparse. All may be arrays or lists, too.
            edge_index: (2, e) whole numbers; undirected graphs list both directions.
            edge_weight: (e,) not negative, 1 by default.
            batch: (n,) int64, the graph of each node; one graph by default.
            n_graphs: where it is known; else the largest entry of `batch` plus one.
            symmetrize: use A + A^T, as the official evaluation of graph classifiers does.

        Raises:
            UserError: the tensors do not describe graphs that the model can read.
        """
        x, edge_index = _features_of(x), _whole_numbers("edge_index", edge_index)
        edge_weight, batch = _tensor_of("edge_weight", edge_weight), _whole_numbers("batch", batch)
        _check_features(config, x)
        n = x.shape[0]
        index, n_graphs = _graph_index(x, batch, n_graphs)
        raw = Adjacency.from_edges(edge_index, n, edge_weight, "none", dtype=x.dtype)
        if symmetrize:
            raw = raw.symmetrized()
        elif not config.directed and not raw.is_symmetric:
            raise UserError(_directed_message(raw))
        if batch is not None and bool((index[raw.index[0]] != index[raw.index[1]]).any()):
            raise UserError("edge_index connects nodes of different graphs; check batch")
        return cls(x, raw.normalized(config.normalization), index, n_graphs)


def joined_graphs(graphs: Sequence[Any]) -> Any:
    """A torch_geometric `Batch` of graphs, whose edges weigh 1 where only others have weights.

    It holds what models read alone, and labels where all graphs have them. torch_geometric goes by
    the first graph: it would drop the weights of all, or find none, and fail where one has a name
    or positions that another lacks.
    """
    from torch_geometric.data import Batch, Data

    def all_have(name: str) -> bool:
        return all(getattr(graph, name, None) is not None for graph in graphs)

    names = [name for name in ("x", "edge_index", "y") if all_have(name)]
    plain_graphs = [Data(**{name: getattr(graph, name) for name in names}) for graph in graphs]
    weights = [getattr(graph, "edge_weight", None) for graph in graphs]
    like = next((weight for weight in weights if weight is not None), None)
    if like is not None:
        for graph, weight in zip(plain_graphs, weights, strict=True):
            ones = like.new_ones((graph.edge_index.shape[1], *like.shape[1:]))
            graph.edge_weight = ones if weight is None else weight
    return Batch.from_data_list(plain_graphs)


def graph_fields(data: Any) -> dict[str, Any]:
    """Return the model's arguments from a torch_geometric `Data` or `Batch` (or anything alike).

    A list of `Data` is taken as a batch, and a dict by its keys.

    Raises:
        UserError: it has no node features or no edges attribute.
    """
    attributes = None
    if isinstance(data, (list, tuple)) and data and all(hasattr(d, "edge_index") for d in data):
        attributes = getattr(data[0], "edge_attr", None)
        data = joined_graphs(data)
    read = data.get if isinstance(data, dict) else partial(getattr, data)
    fields = {"edge_weight": None, "batch": None}
    for name in ("x", "edge_index", "edge_weight", "batch"):
        value = read(name, None)
        if value is None and name in ("x", "edge_index"):
            what = (
                "graph"
                if hasattr(data, "edge_index") or isinstance(data, dict)
                else (f"input of type {type(data).__name__}")
            )
            raise UserError(
                f"the {what} has no {name}: the model needs node features x (n, num_features) and "
                "edge_index (2, edges), a torch_geometric Data, or a list of them"
            )
        fields[name] = value
    attributes = read("edge_attr", attributes)
    if fields["edge_weight"] is None and isinstance(attributes, Tensor):
        if attributes.is_floating_point() and attributes.numel() == attributes.shape[0]:
            logger.warning_once(
                "the graph's edge_attr is not read: numbers that weigh its edges belong into "
                "edge_weight"
            )
    fields["n_graphs"] = read("num_graphs", None) if fields["batch"] is not None else None
    return fields


def _tensor_of(name: str, value: Any) -> Any:
    """A tensor from an array or nested list; None stays."""
    if value is None or isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{name} must be a tensor, an array or a list of numbers, got {type(value).__name__}"
        ) from error


def _features_of(x: Any) -> Tensor:
    x = _tensor_of("x", x)
    if x is None:
        raise UserError("x is missing: pass node features and edge_index, or one graph object")
    if x.layout in (torch.sparse_csr, torch.sparse_csc):
        return x.to_sparse_coo()
    return x


def _whole_numbers(name: str, value: Any) -> Any:
    """Whole numbers of any width as int64."""
    value = _tensor_of(name, value)
    if value is None or value.dtype == torch.bool or value.is_floating_point():
        return value
    return value.long()


def _check_features(config: IGNNConfig, x: Tensor) -> None:
    if x.ndim != 2 or x.shape[1] != config.num_features:
        raise UserError(
            f"x has shape {tuple(x.shape)}, but this model reads (nodes, {config.num_features})"
        )
    if not x.is_floating_point():
        raise UserError(f"x has dtype {x.dtype}; convert the node features to floating point")
    if x.shape[0] == 0:
        raise UserError("the graph has no nodes, so there is nothing to predict; leave it out")
    values = x._values() if x.is_sparse else x
    if not bool(values.isfinite().all()):
        raise UserError("x holds NaN or infinite values; clean the node features first")


def _graph_index(x: Tensor, batch: Tensor | None, n_graphs: int | None) -> tuple[Tensor, int]:
    n = x.shape[0]
    if batch is None:
        return torch.zeros(n, dtype=torch.int64, device=x.device), 1
    if batch.shape != (n,) or batch.dtype != torch.int64:
        raise UserError(
            f"batch must be int64 of shape ({n},), one entry per node, got {batch.dtype} of shape "
            f"{tuple(batch.shape)}"
        )
    if int(batch.min()) < 0:
        raise UserError("batch numbers graphs from 0 up, but holds a negative entry")
    n_graphs = n_graphs or int(batch.max()) + 1
    if int(batch.max()) >= n_graphs:
        raise UserError(f"batch names graph {int(batch.max())}, but there are {n_graphs} graphs")
    sizes = torch.bincount(batch, minlength=n_graphs)
    if bool((sizes == 0).any()):
        empty = int((sizes == 0).nonzero()[0])
        raise UserError(f"graph {empty} of the batch has no nodes; leave it out")
    return batch, n_graphs


def _directed_message(raw: Adjacency) -> str:
    """Name one edge whose reverse is missing or weighs differently."""
    n = raw.shape[0]
    weights = dict(
        zip((raw.index[0] * n + raw.index[1]).tolist(), raw.values.tolist(), strict=True)
    )
    for key, weight in weights.items():
        source, target = divmod(key, n)
        back = weights.get(target * n + source, math.inf)
        if not math.isclose(back, weight, rel_tol=raw.rounding):
            break
    return (
        f"edge ({source}, {target}) has no equal reverse edge, but this model reads undirected "
        "graphs: add reverse edges (torch_geometric.utils.to_undirected)"
    )
