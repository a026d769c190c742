"""What the demo finds out about models of nodes: their answers, and how far a change travels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deqzoo.errors import UserError
from deqzoo.evaluation.chart import page_chart
from deqzoo.evaluation.watch import watched_solver
from deqzoo.tasks.nodes import NODE_SETS

from .graphs import class_name, drawing, verdict
from .guard import Deadline, whole_number
from .shelf import LoadedCheckpoint

CLUB, CHAIN = "karate club", "chain of 40 nodes"
MAX_DRAWN = 60
#: Change, relative to a state's size, below which a node counts as not reached: float32's noise.
UNMOVED = 1e-6
#: Who met whom outside the club: Zachary, An information flow model for conflict and fission in
#: small groups, 1977. Members after each one whose number is larger.
_FRIENDS = (
    (1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 17, 19, 21, 31), (2, 3, 7, 13, 17, 19, 21, 30),
    (3, 7, 8, 9, 13, 27, 28, 32), (7, 12, 13), (6, 10), (6, 10, 16), (16,), (), (30, 32, 33), (33,),
    (), (), (), (33,), (32, 33), (32, 33), (), (), (32, 33), (33,), (32, 33), (), (32, 33),
    (25, 27, 29, 32, 33), (25, 27, 31), (31,), (29, 33), (33,), (31, 33), (32, 33), (32, 33),
    (32, 33), (33,), (),
)  # fmt: skip


@dataclass(frozen=True)
class Network:
    """Features (n, p), dense or sparse; edges (2, e) in both directions; labels, if they are known.

    Attributes:
        labels: (n,) classes, or (n, labels) of 0 and 1.
    """

    name: str
    x: Tensor
    edge_index: Tensor
    labels: Tensor | None


@dataclass(frozen=True)
class Reach:
    """What a model says about one node, and what changing that node does to all others.

    Attributes:
        answer: class or label -> probability, the likeliest first.
        distance: edges from the node (n,); -1 where no path leads.
        change: of every node's state (n,), relative to its size, once the node has no features.
        n_steps, residual, converged: the solver's report.
    """

    answer: dict[str, float]
    distance: Tensor
    change: Tensor
    n_steps: int
    residual: float
    converged: bool


def available_networks(root: Path | None) -> list[str]:
    """Small networks that always work, then the data sets on this machine."""
    if root is None:
        return [CHAIN, CLUB]
    stored_names = (n for n in ("HumLoc", "EukLoc", "Twitch") if any((root / n).glob("**/*.npz")))
    return [CHAIN, CLUB, *stored_names]


@lru_cache(maxsize=2)
def _stored_network(name: str, root: Path) -> Network:
    graph = NODE_SETS[name].load(root, "test")[0]
    return Network(name, graph.x, graph.edge_index, graph.y)


@lru_cache(maxsize=8)
def made_up_network(name: str, width: int) -> Network:
    """A small network whose features are drawn, always the same ones: about 20 of each node."""
    rows = _FRIENDS if name == CLUB else tuple((i + 1,) for i in range(39)) + ((),)
    pairs = torch.tensor([(a, b) for a, others in enumerate(rows) for b in others]).T
    chance = torch.full((len(rows), width), min(0.5, 20 / width))
    x = torch.bernoulli(chance, generator=torch.Generator().manual_seed(0))
    return Network(name, x, torch.cat([pairs, pairs.flip(0)], dim=1), None)


def pick(checkpoint: LoadedCheckpoint, source: Any, root: Path | None) -> Network:
    """The network that a user asked for.

    Raises:
        UserError: an unknown one, or one whose features the model does not read.
    """
    width = checkpoint.model.config.num_features
    if source in (CLUB, CHAIN):
        return made_up_network(source, width)
    if source not in available_networks(root) or root is None:
        choices = ", ".join(available_networks(root))
        raise UserError(f"unknown network {str(source)[:80]!r}; available here: {choices}")
    network = _stored_network(source, root)
    if network.x.shape[1] != width:
        raise UserError(
            f"nodes of {source} have {network.x.shape[1]} features, but {checkpoint.entry.name} "
            f"reads {width}; choose another checkpoint or another network"
        )
    return network


@torch.inference_mode()
def reach(
    checkpoint: LoadedCheckpoint, network: Network, node: Any, solver: dict[str, Any] | None = None
) -> Reach:
    """Read a network as it is and with one node's features taken away.

    Raises:
        UserError: no such node, or the time limit is over.
    """
    model, deadline = checkpoint.model, Deadline()
    number = whole_number(node, "the node", 0, len(network.x) - 1)
    # The changes are far smaller than the states: solve to the limit of float32.
    settings = {**model.config.solver, **(solver or {}), "tol": UNMOVED / 10}
    deadline_solver = watched_solver(settings, deadline.check)
    x = network.x.to_dense() if network.x.is_sparse else network.x
    masked_features = x.clone()
    masked_features[number] = 0
    output, masked_output = (
        model(features, network.edge_index, output_hidden_states=True, solver=deadline_solver)
        for features in (x, masked_features)
    )
    states = output.hidden_states[-1]
    change = (masked_output.hidden_states[-1] - states).norm(dim=1) / states.norm(dim=1).clamp_min(
        1e-12
    )
    multi_label = model.config.problem_type == "multi_label_classification"
    logits = output.logits[number].float()
    probabilities = logits.sigmoid() if multi_label else logits.softmax(-1)
    order = probabilities.argsort(descending=True).tolist()
    return Reach(
        answer={class_name(checkpoint, i): float(probabilities[i]) for i in order},
        distance=_distances(network.edge_index, len(x), number),
        change=change,
        n_steps=int(output.n_steps[0]),
        residual=float(output.residual[0]),
        converged=bool(output.converged[0]),
    )


def _distances(edge_index: Tensor, n: int, start: int) -> Tensor:
    distance = torch.full((n,), -1)
    front = torch.zeros(n, dtype=torch.bool)
    front[start] = True
    step = 0
    while front.any():
        distance[front] = step
        neighbours = torch.zeros(n, dtype=torch.bool)
        neighbours[edge_index[1][front[edge_index[0]]]] = True
        front, step = neighbours & (distance < 0), step + 1
    return distance


def verdict_html(network: Network, result: Reach, node: int) -> str:
    """The node's answer where its features are real, and how far a change there is felt."""
    changed_nodes = (result.change > UNMOVED) & (result.distance > 0)
    farthest = int(result.distance[changed_nodes].max()) if changed_nodes.any() else 0
    n_others = int((result.distance > 0).sum())
    text = (
        f"Node {node} has no edges, so its features change no other node."
        if not n_others
        else (
            f"Without the features of node {node}, the states of "
            f"<b>{int(changed_nodes.sum()):,}</b> of the {n_others:,} other nodes that it is "
            f"connected with change, up to <b>{farthest}</b> "
            f"edge{'s' * (farthest != 1)} away. A network of two layers would reach two edges."
        )
    )
    if network.labels is None:
        answer = "The features are drawn at random, so the answers mean nothing here."
    else:
        truth = network.labels[node]
        true_labels = truth.nonzero().flatten().tolist() if truth.dim() else [int(truth)]
        top_answers = ", ".join(f"{escape(n)} {p:.0%}" for n, p in list(result.answer.items())[:3])
        kind = "labels" if truth.dim() else "class"
        answer = (
            f"The model says of node {node}: <b>{top_answers}</b>; the data set: {kind} "
            f"{', '.join(map(str, true_labels)) or 'none'}."
        )
    solve = f"after <b>{result.n_steps}</b> steps, residual {result.residual:.2g}."
    return verdict(result.converged, f"{solve} {text}", answer)


def network_html(network: Network, result: Reach, node: int) -> str:
    """The nodes around the chosen one, coloured by how much they change."""
    connected_nodes = result.distance >= 0
    order = torch.where(connected_nodes, result.distance, len(connected_nodes)).argsort(stable=True)
    shown_nodes = order[: min(MAX_DRAWN, int(connected_nodes.sum()))]
    place = torch.full((len(connected_nodes),), -1)
    place[shown_nodes] = torch.arange(len(shown_nodes))
    pairs = place[network.edge_index]
    pairs = pairs[:, (pairs >= 0).all(0)]
    change = result.change[shown_nodes].clamp_min(UNMOVED)
    low, high = math.log10(UNMOVED), math.log10(float(change.max()))
    share = (change.log10() - low) / max(high - low, 1e-9)
    tips = [
        f"node {int(i)}, {int(result.distance[i])} edges away: changes by {result.change[i]:.1g}"
        for i in shown_nodes
    ]
    rest = len(connected_nodes) - len(shown_nodes)
    caption = (
        f"The fuller the colour, the more a node’s state changes without the features of node "
        f'{node}, which has a ring: <span class="dz-scale"><i></i></span> 10⁻⁶ or less to '
        f"{10**high:.1g} of its size."
        + (f" {rest:,} nodes farther away not drawn." if rest else "")
    )
    label = f"{network.name}: {len(shown_nodes)} nodes around node {node}"
    return drawing(pairs, share, tips, caption, label, marked_node=0)


def distance_html(result: Reach) -> str:
    """Mean change by the distance in edges."""
    last = int(result.distance.max())
    if not last:
        return ""
    points = [
        (float(d), max(float(result.change[result.distance == d].mean()), UNMOVED / 10))
        for d in range(1, last + 1)
    ]
    return page_chart(
        {"mean over the nodes": points}, title="Change of the state, by distance",
        tip="{x:.0f} edges away: {y:.1e}", x_label="edges away", log_y=True,
    )  # fmt: skip
