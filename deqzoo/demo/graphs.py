"""What the demo finds out about graphs, and how it draws them."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deqzoo.data.graphs import load_graph_set
from deqzoo.data.tu import GraphEncoding
from deqzoo.errors import UserError
from deqzoo.evaluation.chart import page_chart
from deqzoo.evaluation.graphs import encoding_of
from deqzoo.evaluation.watch import watched_solver
from deqzoo.tasks.graphs import read_fold

from .guard import MAX_GRAPH_FILE_BYTES, Deadline, whole_number
from .molecules import ELEMENTS, MOLECULES, read_smiles
from .shelf import LoadedCheckpoint

MADE_UP = "examples"
UPLOADED = "uploaded files"
KNOWN_SETS = ("COX2", "PROTEINS")
N_MADE_UP = 12
MAX_NODES = 1000
#: Of uploads: graphs, and numbers in the one-hot features of all nodes together.
MAX_GRAPHS = 10_000
MAX_FEATURE_VALUES = 20_000_000
_PARTS = ("A", "graph_indicator", "graph_labels", "node_labels")
SIDE = 420.0
RING = ' class="dz-ringed"'


@dataclass(frozen=True)
class Graph:
    """Node features (n, p), edges (2, e), the stored class and a title where there are any."""

    x: Tensor
    edge_index: Tensor
    label: int | None
    title: str = ""


@dataclass(frozen=True)
class Reading:
    """What a model says about a graph.

    Attributes:
        probabilities: class name -> probability, best first.
        norms: norm of every node's equilibrium (n,).
        n_steps, residual, converged: the solver's report.
        residuals: after each step of the solve, for every layer that has an equilibrium.
        tolerance: of the solver.
    """

    probabilities: dict[str, float]
    norms: Tensor
    n_steps: int
    residual: float
    converged: bool
    residuals: list[list[float]]
    tolerance: float


def data_of(checkpoint: LoadedCheckpoint) -> str | None:
    """The data set that a checkpoint was trained on, if its files say so."""
    with contextlib.suppress(UserError):
        return read_fold(checkpoint.entry.folder)["data"]
    for evaluation in checkpoint.entry.evaluations.values():
        return evaluation.get("data", {}).get("name")
    return None


def available_sets(root: Path | None) -> list[str]:
    """Names of the graph sources on this machine; the made-up examples always work."""
    names = []
    if root is not None and importlib.util.find_spec("torch_geometric"):
        for name in KNOWN_SETS:
            folders = (root / name, root / name / "raw")
            if any((folder / f"{name}_A.txt").is_file() for folder in folders):
                names.append(name)
    return [*names, MADE_UP]


@lru_cache(maxsize=4)
def stored_graphs(name: str, root: Path, encoding: GraphEncoding | None) -> tuple[Graph, ...]:
    """A data set from a local folder, read once, with a checkpoint's numbering."""
    graph_set = load_graph_set(name, root, encoding)
    return tuple(
        Graph(graph.x.float(), graph.edge_index, int(label) if label >= 0 else None)
        for graph, label in zip(graph_set.graphs, graph_set.labels, strict=True)
    )


def uploaded_graphs(paths: Sequence[Any], encoding: GraphEncoding | None) -> tuple[Graph, ...]:
    """Graphs from uploaded files in TUDataset's format (NAME_A.txt and so on).

    Raises:
        UserError: files or tensors that are too large, or files that do not belong together.
    """
    files = [Path(path) for path in paths]
    if sum(file.stat().st_size for file in files) > MAX_GRAPH_FILE_BYTES:
        raise UserError(f"graph files may have {MAX_GRAPH_FILE_BYTES / 1e6:.0f} MB together")
    names = [f.name.removesuffix("_A.txt") for f in files if f.name.endswith("_A.txt")]
    if len(names) != 1:
        raise UserError(
            "upload the files of one data set: NAME_A.txt, NAME_graph_indicator.txt, "
            "NAME_graph_labels.txt and NAME_node_labels.txt"
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / names[0]
        folder.mkdir()
        file_names = {f"{names[0]}_{part}.txt" for part in _PARTS}
        for file in files:
            if file.name in file_names:  # no other file has a part in the answer
                shutil.copy(file, folder / file.name)
        try:
            _check_sizes(folder)
            return stored_graphs.__wrapped__(names[0], Path(scratch), encoding)
        except UserError as error:
            raise UserError(str(error).replace(str(folder), "the upload")) from error
        except Exception as error:  # whatever a broken file makes the reader stumble over
            raise UserError(f"the files do not describe graphs: {error}") from error


def _check_sizes(folder: Path) -> None:
    """Refuse short files whose numbers would make large tensors.

    Raises:
        UserError: too many graphs, or too many different node labels.
    """
    indicator, labels = (
        folder / f"{folder.name}_{part}.txt" for part in ("graph_indicator", "node_labels")
    )
    if indicator.is_file():
        last = np.loadtxt(indicator, encoding="utf-8-sig").max()
        if not last <= MAX_GRAPHS:
            raise UserError(f"{indicator.name} names graph {last:.0f}; up to {MAX_GRAPHS:,} fit")
    if labels.is_file():
        kinds = np.loadtxt(labels, delimiter=",", ndmin=2, encoding="utf-8-sig")
        width = (np.ptp(kinds, axis=0) + 1).sum()
        if not len(kinds) * width <= MAX_FEATURE_VALUES:
            raise UserError(
                f"the labels in {labels.name} make {width:.0f} features for each of {len(kinds):,} "
                "nodes, which is too much; number the kinds of nodes 0, 1, 2, ..."
            )


def node_kinds(checkpoint: LoadedCheckpoint) -> list[str]:
    """What each node feature stands for: atoms by their symbols, other kinds by their numbers."""
    config = checkpoint.model.config
    columns = ((config.graph_encoding or {}).get("node_labels") or [[]])[0]
    if (data_of(checkpoint) or "").upper() == "COX2":
        symbols = {number: symbol for symbol, (number, _) in ELEMENTS.items()}
        return [symbols.get(number, "?") for number in columns]
    return [f"kind {i}" for i in range(config.num_features)]


def example_graphs(checkpoint: LoadedCheckpoint) -> tuple[Graph, ...]:
    """Known molecules for a model of molecules, made-up graphs for others."""
    kinds = node_kinds(checkpoint)
    if "C" not in kinds:
        return made_up_graphs(checkpoint.model.config.num_features)
    return tuple(_molecule_graph(name, smiles, tuple(kinds)) for name, smiles in MOLECULES.items())


@lru_cache(maxsize=32)
def _molecule_graph(name: str, smiles: str, kinds: tuple[str, ...]) -> Graph:
    atoms, bonds = read_smiles(smiles)
    pairs = torch.tensor(bonds, dtype=torch.int64).T
    numbers = torch.tensor([kinds.index(atom) for atom in atoms])
    x = torch.nn.functional.one_hot(numbers, len(kinds)).float()
    return Graph(x, torch.cat([pairs, pairs.flip(0)], dim=1), None, name)


@lru_cache(maxsize=8)
def made_up_graphs(n_features: int) -> tuple[Graph, ...]:
    """Graphs like small molecules, always the same: rings, chains and branches of random kinds."""
    generator = np.random.default_rng(7)
    graphs = []
    for _ in range(N_MADE_UP):
        edges: list[tuple[int, int]] = []
        n = 1
        for _ in range(int(generator.integers(3, 7))):
            anchor, size = int(generator.integers(0, n)), int(generator.integers(2, 7))
            chain = [anchor, *range(n, n + size)]
            edges += list(zip(chain[:-1], chain[1:], strict=True))
            if size >= 4:  # close the chain to a ring
                edges.append((chain[-1], chain[1]))
            n += size
        pairs = torch.tensor(edges, dtype=torch.int64).T
        kinds = torch.from_numpy(generator.zipf(1.8, n)).sub(1).clamp_max(n_features - 1)
        x = torch.nn.functional.one_hot(kinds, n_features).float()
        graphs.append(Graph(x, torch.cat([pairs, pairs.flip(0)], dim=1), None))
    return tuple(graphs)


def pick(
    checkpoint: LoadedCheckpoint,
    source: Any,
    number: Any,
    root: Path | None,
    files: Sequence[Any] | None,
) -> Graph:
    """The graph that a user asked for.

    Raises:
        UserError: unknown source, number out of range, or features that do not fit the model.
    """
    width = checkpoint.model.config.num_features
    if files:
        source, graphs = UPLOADED, uploaded_graphs(files, encoding_of(checkpoint.model))
    elif source == MADE_UP:
        graphs = example_graphs(checkpoint)
    elif source in available_sets(root) and root is not None:
        graphs = stored_graphs(source, root, encoding_of(checkpoint.model))
    else:
        choices = ", ".join(available_sets(root))
        raise UserError(f"unknown graphs {str(source)[:80]!r}; available here: {choices}")
    graph = graphs[whole_number(number, "the graph number", 0, len(graphs) - 1)]
    if graph.x.shape[1] != width:
        raise UserError(
            f"graphs of {source} have {graph.x.shape[1]} node features, but "
            f"{checkpoint.entry.name} reads {width}; choose another checkpoint or other graphs"
        )
    if len(graph.x) > MAX_NODES:
        raise UserError(f"this graph has {len(graph.x)} nodes; up to {MAX_NODES} are drawn here")
    return graph


@torch.inference_mode()
def read_graph(
    checkpoint: LoadedCheckpoint, graph: Graph, solver: dict[str, Any] | None = None
) -> Reading:
    """Classify one graph and measure the equilibrium at every node.

    Raises:
        UserError: the time limit is over.
    """
    deadline = Deadline()
    settings = {**checkpoint.model.config.solver, **(solver or {})}
    residuals: list[list[float]] = []

    def watch(step: int, _: Tensor, residual: Tensor) -> None:
        deadline.check()
        if step == 1:
            residuals.append([])
        residuals[-1].append(float(residual.max()))

    output = checkpoint.model(
        graph.x, graph.edge_index, output_hidden_states=True, solver=watched_solver(settings, watch)
    )
    probabilities = output.logits[0].float().softmax(-1)
    names = [class_name(checkpoint, i) for i in range(len(probabilities))]
    order = probabilities.argsort(descending=True).tolist()
    return Reading(
        probabilities={names[i]: float(probabilities[i]) for i in order},
        norms=output.hidden_states[-1].norm(dim=1),
        n_steps=int(output.n_steps[0]),
        residual=float(output.residual[0]),
        converged=bool(output.converged[0]),
        residuals=residuals,
        tolerance=float(settings["tol"]),
    )


def class_name(checkpoint: LoadedCheckpoint, index: int) -> str:
    """A class's name; "class 0", or "label 0" of several, where the checkpoint has none."""
    config = checkpoint.model.config
    name = config.id2label.get(index, "")
    kind = "label" if config.problem_type == "multi_label_classification" else "class"
    return f"{kind} {index}" if not name or name.startswith("LABEL_") else name


def _hops(n: int, edges: np.ndarray, pivots: np.ndarray) -> np.ndarray:
    """Number of edges on the shortest path from each node to each pivot (n, k).

    Pairs without a path get one more than the longest path; no number is above 200.
    """
    near = np.zeros((n, n), np.float32)
    near[edges[0], edges[1]] = near[edges[1], edges[0]] = 1.0
    hops = np.full((n, len(pivots)), np.inf)
    hops[pivots, np.arange(len(pivots))] = 0.0
    front, length = hops == 0, 0
    while True:
        length += 1
        next_front = (near @ front.astype(np.float32) > 0) & np.isinf(hops)
        if length == 200 or not next_front.any():
            return np.where(np.isinf(hops), float(length), hops)
        hops[next_front], front = length, next_front


def positions(n: int, edges: np.ndarray, rounds: int = 200) -> np.ndarray:
    """Where to draw the nodes, (n, 2) in [0, 1]: springs along edges, repulsion between all.

    They start on a spiral, and where distances in the plane are nearest to numbers of edges
    (Brandes and Pich 2006, "Eigensolver methods for progressive multidimensional scaling"),
    which unfolds chains and rings. The drawing with fewer crossings of edges is returned.
    """
    angle = np.arange(n) * 2.399963  # the golden angle spreads them evenly
    turns = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    scaled_places = (
        _scaled_places(n, edges) + 0.1 / np.sqrt(max(n, 1)) * turns
    )  # nodes in one place must part
    spiral = np.sqrt((np.arange(n)[:, None] + 0.5) / n) / 2 * turns
    starts = (scaled_places, spiral) if n <= 300 else (scaled_places,)  # rounds cost n²
    layouts = [_spring_layout(place, edges, rounds) for place in starts]
    place = min(layouts, key=lambda place: _crossings(place, edges))
    place = place - place.min(0)
    return place / max(float(place.max()), 1e-9)


def _scaled_places(n: int, edges: np.ndarray) -> np.ndarray:
    """Places (n, 2) whose distances are nearest to hops, by at most fifty pivots."""
    pivots = np.unique(np.linspace(0, n - 1, min(n, 50)).round().astype(int))
    squares = _hops(n, edges, pivots) ** 2
    squares = squares - squares.mean(0) - squares.mean(1, keepdims=True) + squares.mean()
    values, vectors = np.linalg.eigh(squares.T @ squares)
    # The variance of a coordinate is a root of its eigenvalue; a hop is 1/√n long.
    scale = (n / len(pivots) / n**2 / np.maximum(values[:-3:-1], 1e-9)) ** 0.25
    place = squares @ vectors[:, :-3:-1] * scale
    return np.pad(place, ((0, 0), (0, 2 - place.shape[1])))  # a single node has one coordinate


def _spring_layout(place: np.ndarray, edges: np.ndarray, rounds: int) -> np.ndarray:
    """Places after so many rounds of the springs (Fruchterman and Reingold 1991)."""
    n, (source, target) = len(place), edges
    ideal = 1 / np.sqrt(max(n, 1))
    for step in range(rounds):
        difference = place[:, None] - place[None]
        squared_distance = (difference**2).sum(-1) + 1e-6
        force = (difference * (ideal**2 / squared_distance)[..., None]).sum(1)
        pull = place[source] - place[target]
        pull = pull * np.linalg.norm(pull, axis=1, keepdims=True) / ideal
        np.add.at(force, source, -pull / 2)
        np.add.at(force, target, pull / 2)
        force -= 0.3 * place  # parts without an edge between them stay together
        length = np.linalg.norm(force, axis=1, keepdims=True) + 1e-9
        place = place + force / length * np.minimum(length, 0.12 * (1 - step / rounds) + 1e-3)
    return place


def _crossings(place: np.ndarray, edges: np.ndarray) -> int:
    """Pairs of edges that cross, among the first five hundred."""
    a, b = edges[:, edges[0] < edges[1]][:, :500]
    first, second = place[a], place[b]
    along = second - first

    def side(points: np.ndarray) -> np.ndarray:  # of every edge's line, (edges, points)
        away = points[None] - first[:, None]
        return along[:, None, 0] * away[..., 1] > along[:, None, 1] * away[..., 0]

    separates = side(first) != side(second)
    joint = (a[:, None] == a) | (a[:, None] == b) | (b[:, None] == a) | (b[:, None] == b)
    return int((separates & separates.T & ~joint).sum()) // 2


def graph_html(graph: Graph, reading: Reading, kinds: Sequence[str]) -> str:
    """The graph, its nodes coloured by the norm of their equilibrium and named by their kinds."""
    low, high = float(reading.norms.min()), float(reading.norms.max())
    names = [kinds[kind] for kind in graph.x.argmax(1).tolist()]
    tips = [
        f"node {i}, {name}: norm {norm:.3g}"
        for i, (name, norm) in enumerate(zip(names, reading.norms.tolist(), strict=True))
    ]
    caption = (
        "The fuller the colour, the larger the equilibrium at a node: "
        f'<span class="dz-scale"><i></i></span> norm {low:.3g} to {high:.3g}'
    )
    edges = graph.edge_index.shape[1] // 2
    label = graph.title or f"graph with {len(names)} nodes and {edges} edges"
    share = (reading.norms - low) / max(high - low, 1e-9)
    symbols = names if "C" in kinds else ()  # atoms
    return drawing(graph.edge_index, share, tips, caption, label, names=symbols)


def drawing(
    edge_index: Tensor,
    share: Tensor,
    tips: Sequence[str],
    caption: str,
    label: str,
    names: Sequence[str] = (),
    marked_node: int | None = None,
) -> str:
    """A graph as SVG.

    Args:
        edge_index: (2, e), both directions.
        share: fullness of every node's colour (n,), 0 to 1.
        tips: what every node says when pointed at.
        caption: HTML below the drawing.
        label: what the drawing shows, for those who do not see it.
        names: written into the nodes.
        marked_node: gets a ring.
    """
    n, edges = len(tips), edge_index.numpy()
    place = positions(n, edges) * (SIDE - 40) + 20
    radius = max(3.0, min(9.0, 70 / np.sqrt(n)))
    lines = "".join(
        f'<line x1="{place[a, 0]:.1f}" y1="{place[a, 1]:.1f}" '
        f'x2="{place[b, 0]:.1f}" y2="{place[b, 1]:.1f}"/>'
        for a, b in edges.T
        if a < b
    )
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" style="--s:{full:.2f}"'
        f"{RING if i == marked_node else ''}><title>{escape(tip)}</title></circle>"
        for i, ((x, y), full, tip) in enumerate(zip(place, share.tolist(), tips, strict=True))
    )
    words = "".join(
        f'<text x="{x:.1f}" y="{y + 4:.1f}">{escape(name)}</text>'
        for (x, y), name in zip(place, names, strict=False)
    )
    top = float(place[:, 1].max()) + 20
    wide = float(place[:, 0].max()) + 20
    width = 240 if n < 8 else 460
    return (
        f'<figure class="dz-graph" style="max-width:{width}px">'
        f'<svg viewBox="0 0 {wide:.0f} {top:.0f}" role="img" aria-label="{escape(label)}">'
        f'<g class="dz-edges">{lines}</g><g class="dz-nodes">{dots}{words}</g></svg>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def residuals_html(reading: Reading) -> str:
    """Distance to the equilibrium after every step, a line for every layer."""
    several = len(reading.residuals) > 1
    series = {
        f"layer {i}" if several else "residual": [(k + 1.0, r) for k, r in enumerate(path)]
        for i, path in enumerate(reading.residuals, start=1)
    }
    return page_chart(
        series, title="Distance to the equilibrium", tip="step {x:.0f}: residual {y:.1e}",
        log_y=True, level=reading.tolerance,
    )  # fmt: skip


def verdict_html(graph: Graph, reading: Reading, stored_class: str | None) -> str:
    """Steps, convergence, and the stored class."""
    truth = "" if stored_class is None else f" The data set says: <b>{escape(stored_class)}</b>."
    title = f"<b>{escape(graph.title)}</b>: " if graph.title else ""
    things = ("atoms", "bonds") if graph.title else ("nodes", "edges")
    count = len(reading.residuals)
    layers = f" in {count} layers" if count > 1 else ""
    text = f"after <b>{reading.n_steps}</b> steps{layers}, residual {reading.residual:.2g}."
    edges = f"{graph.edge_index.shape[1] // 2} {things[1]}"
    return verdict(reading.converged, text, f"{title}{len(graph.x)} {things[0]}, {edges}.{truth}")


def verdict(converged: bool, text: str, note: str) -> str:
    """How a solve ended, as a badge, and what there is to say of it; HTML."""
    mood, badge = ("good", "Equilibrium found") if converged else ("late", "Stopped early")
    return (
        f'<div class="dz-verdict dz-{mood}"><div><span class="dz-badge">{badge}</span> {text}'
        f'<div class="dz-note">{note}</div></div></div>'
    )
