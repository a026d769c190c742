"""Merging nodes that no number of message-passing steps can tell apart.

Two nodes of a graph with equal features, whose in-edges have the same weights and come from nodes
of the same kinds, have the same state in every iteration, hence the same equilibrium (colour
refinement, the 1-dimensional Weisfeiler-Leman test). Solving for one of them is enough: COX2's
molecules shrink by 30 %, PROTEINS' graphs by 9 %.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deqzoo.models.ignn.inputs import GraphBatch
from deqzoo.models.ignn.sparse import Adjacency


def merge_equal_nodes(graphs: GraphBatch) -> GraphBatch:
    """Return a batch with one row per kind of node and graph, and how many nodes each stands for.

    Results for graphs are the same up to rounding; rows are no longer nodes.

    Args:
        graphs: a batch with dense features.
    """
    kind = refine(graphs)
    n_kinds = int(kind.max()) + 1
    n = len(kind)
    first = kind.new_full((n_kinds,), n)
    first = first.scatter_reduce(0, kind, torch.arange(n, device=kind.device), "amin")
    source, target = graphs.adjacency.index
    edge_mask = first[kind[target]] == target  # in-edges of one node of each kind
    index = torch.stack([kind[source[edge_mask]], kind[target[edge_mask]]])
    adjacency = Adjacency(index, graphs.adjacency.values[edge_mask], n_kinds)
    counts = torch.bincount(kind, minlength=n_kinds).to(graphs.features.dtype)
    if graphs.counts is not None:
        counts = torch.zeros_like(counts).index_add_(0, kind, graphs.counts)
    return GraphBatch(
        graphs.features[first], adjacency, graphs.index[first], graphs.n_graphs, counts
    )


def refine(graphs: GraphBatch) -> Tensor:
    """Return the kind of each node, numbered from 0: (n,) int64, the coarsest stable colouring.

    In-edges are compared by sums of 64-bit hashes of (weight, kind of the other end).
    """
    feature_kind = torch.unique(graphs.features, dim=0, return_inverse=True)[1]
    graph_and_kind = torch.stack([graphs.index, feature_kind], dim=1)
    kind = torch.unique(graph_and_kind, dim=0, return_inverse=True)[1]
    source, target = graphs.adjacency.index
    weights = torch.unique(graphs.adjacency.values, return_inverse=True)[1]
    generator = torch.Generator().manual_seed(0)
    n = len(kind)
    while True:
        n_kinds = int(kind.max()) + 1
        if n_kinds == n:
            return kind
        hashes = _random(n_kinds, generator).to(kind.device)
        salts = _random(int(weights.max()) + 1 if len(weights) else 1, generator).to(kind.device)
        messages = (hashes[kind[source]] ^ salts[weights]) * 0x9E3779B97F4A7C1
        messages = messages ^ (messages >> 29)
        sums = torch.zeros_like(kind).index_add_(0, target, messages)
        pairs = torch.stack([kind, sums], dim=1)
        kind = torch.unique(pairs, dim=0, return_inverse=True)[1]
        if int(kind.max()) + 1 == n_kinds:
            return kind


def _random(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-(2**62), 2**62, (count,), generator=generator)
