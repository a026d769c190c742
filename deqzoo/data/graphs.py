"""Graph data sets through torch_geometric, read from local folders without touching them.

`root` is a folder with one folder per data set. Classification sets (COX2, PROTEINS, ...) hold the
`NAME_*.txt` files directly or under `raw`; the node sets lie as torch_geometric lays them out, and
HumLoc and EukLoc are single `.npz` files.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deqzoo.data.tu import GraphEncoding, find_tu_folder, find_tu_sets, read_tu
from deqzoo.errors import UserError, as_user_error
from deqzoo.models.ignn.configuration_ignn import IGNNConfig
from deqzoo.models.ignn.inputs import GraphBatch, graph_fields, joined_graphs

PUBLISHED_SEED = 42
N_FOLDS = 10
_PPI_PARTS = ("feats.npy", "graph_id.npy", "graph.json", "labels.npy")


@dataclass(frozen=True)
class GraphSet:
    """Graphs with a class each, in memory.

    Attributes:
        name: of the data set.
        graphs: torch_geometric `Data` objects in stored order, with x, edge_index and y.
        labels: (n,) int64, -1 for a graph without a label.
        num_features: width of the node features.
        num_classes: number of classes.
        encoding: what the numbers of classes and features stand for.
    """

    name: str
    graphs: list[Any]
    labels: Tensor
    num_features: int
    num_classes: int
    encoding: GraphEncoding | None = None

    def batch(self, index: Sequence[int] | Tensor) -> Any:
        """Return the chosen graphs as one torch_geometric `Batch`."""
        return joined_graphs([self.graphs[int(i)] for i in index])

    def require_readable(self, config: IGNNConfig, index: Sequence[int] | None = None) -> None:
        """Check the graphs, or the chosen ones, before a model reads them in batches.

        Raises:
            UserError: the model cannot read one; the message says its number.
        """
        for number in range(len(self.graphs)) if index is None else index:
            with as_user_error(f"graph {number} of {self.name}", UserError):
                GraphBatch.build(config, **graph_fields(self.graphs[number]))


@dataclass(frozen=True)
class Fold:
    """Indices into a `GraphSet`; `validation` is empty where the protocol has none."""

    train: list[int]
    validation: list[int]
    test: list[int]


def load_graph_set(name: str, root: str | Path, encoding: GraphEncoding | None = None) -> GraphSet:
    """Read a graph classification set in TUDataset's format, features from node labels alone.

    A set without node labels gets the in-degree as its one feature.

    Args:
        name: of the set.
        root: folder that holds it.
        encoding: of the checkpoint that is to read it, so that classes and node labels keep their
            numbers; None numbers them by what this folder holds, as the published sets are.

    Raises:
        UserError: torch_geometric is missing, `root` does not hold the files, they are damaged, or
            hold a class or node label that the encoding does not know.
    """
    _import_datasets()
    root = Path(root).expanduser()
    folder = find_tu_folder(name, root)
    graphs, encoding = read_tu(name, folder, encoding, published=True)
    return _graph_set(name, graphs, encoding)


def load_own_graphs(path: str | Path, encoding: GraphEncoding | None = None) -> GraphSet:
    """Graphs of one's own: a folder in TUDataset's format, or a saved list of PyG `Data`.

    Args:
        path: the folder (or one that holds it), a `.pt` file written by `torch.save`, or "-" for
            such a file from standard input. Lists keep their x, the in-degrees stand in where
            there is none; y is one whole number per graph.
        encoding: as of `load_graph_set`. Graphs need no labels where it is given.

    Raises:
        UserError: nothing there that is read, or what `load_graph_set` refuses.
    """
    _import_datasets()
    if str(path) == "-":
        content = io.BytesIO(sys.stdin.buffer.read())
        graphs, encoding = _saved_graphs(content, "standard input", encoding)
        return _graph_set("standard input", graphs, encoding)
    path = Path(path).expanduser()
    if path.is_file():
        graphs, encoding = _saved_graphs(path, str(path), encoding)
        return _graph_set(path.stem, graphs, encoding)
    if not path.is_dir():
        raise UserError(f"there is no file or folder {path}")
    folders = find_tu_sets(path)
    if len(folders) != 1:
        what = f"several sets ({', '.join(folders)}); name one's folder" if folders else "no graphs"
        raise UserError(
            f"{path} holds {what}: files in TUDataset's format (NAME_A.txt, "
            "NAME_graph_indicator.txt, NAME_graph_labels.txt)"
        )
    ((name, folder),) = folders.items()
    graphs, encoding = read_tu(name, folder, encoding)
    return _graph_set(name, graphs, encoding)


def _graph_set(name: str, graphs: list[Any], encoding: GraphEncoding) -> GraphSet:
    labels = torch.tensor([-1 if graph.y is None else int(graph.y) for graph in graphs])
    width = graphs[0].x.shape[1]
    return GraphSet(name, graphs, labels, width, len(encoding.classes), encoding)


def _saved_graphs(
    file: Path | io.BytesIO, path: str, encoding: GraphEncoding | None
) -> tuple[list[Any], GraphEncoding]:
    """A list of `Data` from a file, read without running code in it."""
    from torch_geometric.data import Data
    from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
    from torch_geometric.data.storage import GlobalStorage

    try:
        with torch.serialization.safe_globals([Data, DataEdgeAttr, DataTensorAttr, GlobalStorage]):
            graphs = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling arbitrary bytes fails in arbitrary ways
        raise UserError(
            f"cannot read {path} as a list of torch_geometric Data ({type(error).__name__}): save "
            "it by torch.save([Data(...), ...], file), with tensors only"
        ) from error
    if isinstance(graphs, Data):
        graphs = [graphs]
    if not isinstance(graphs, (list, tuple)) or not graphs:
        raise UserError(
            f"{path} holds no list of graphs but {type(graphs).__name__}: save one by "
            "torch.save([Data(...), ...], file)"
        )
    labels: list[int | None] = []
    first_nodes: list[int] = []  # of each graph whose nodes are counted by its edges
    for number, graph in enumerate(graphs):
        where = f"graph {number} of {path}"
        if not isinstance(graph, Data) or not isinstance(graph.edge_index, Tensor):
            raise UserError(f"{where} is no torch_geometric Data with edge_index (2, e)")
        lacks_count = graph.x is None and "num_nodes" not in graph
        _complete(graph, where)
        if lacks_count and graph.edge_index.numel():
            first_nodes.append(int(graph.edge_index.min()))
        if graph.x.shape[1] != graphs[0].x.shape[1]:
            raise UserError(
                f"{where} has {graph.x.shape[1]} node features, the first {graphs[0].x.shape[1]}"
            )
        labels.append(_stored_label(graph, where))
    if first_nodes and min(first_nodes) > 0:
        raise UserError(
            f"the nodes of {path} are numbered from {min(first_nodes)}: number them from 0, "
            "or give num_nodes where the first ones have no edges"
        )
    if encoding is None:
        unlabelled_graphs = [i for i, label in enumerate(labels) if label is None]
        if unlabelled_graphs:
            raise UserError(f"graph {unlabelled_graphs[0]} of {path} has no label y")
        encoding = GraphEncoding(
            tuple(sorted({int(label) for label in labels if label is not None}))
        )
    for number, (graph, label) in enumerate(zip(graphs, labels, strict=True)):
        if label is not None and label not in encoding.classes:
            raise UserError(
                f"graph {number} of {path} has the label {label}, which is none of this model's "
                f"classes {', '.join(map(str, encoding.classes))}"
            )
        graph.y = None if label is None else torch.tensor([encoding.classes.index(label)])
    return list(graphs), encoding


def _complete(graph: Any, where: str) -> None:
    """Check a graph's edges and give it x (n, p) float32, of degrees where it has none."""
    edges = graph.edge_index
    if edges.ndim != 2 or len(edges) != 2 or edges.is_floating_point() or edges.is_complex():
        raise UserError(
            f"{where} needs edge_index as whole numbers (2, e), got {edges.dtype} of shape "
            f"{list(edges.shape)}"
        )
    n = len(graph.x) if isinstance(graph.x, Tensor) and graph.x.ndim else graph.num_nodes
    if not n or (edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < n):
        raise UserError(f"{where} has {n or 0} nodes, which its edge_index does not fit")
    if graph.x is None:
        graph.x = torch.bincount(edges[1].long(), minlength=n)[:, None].float()
    if not isinstance(graph.x, Tensor) or graph.x.ndim != 2:
        raise UserError(f"{where} has node features x that are no matrix (n, p)")
    if graph.x.is_complex() or not graph.x.shape[1]:
        description = f"{graph.x.dtype} of shape {list(graph.x.shape)}"
        raise UserError(
            f"{where} needs real node features x (n, p), p at least 1, got {description}"
        )
    graph.x = graph.x.detach().to_dense().float()
    if graph.edge_weight is not None:
        if not isinstance(graph.edge_weight, Tensor):
            raise UserError(f"{where} needs edge_weight as a tensor (e,)")
        graph.edge_weight = graph.edge_weight.detach()
    elif isinstance(graph.edge_attr, Tensor) and graph.edge_attr.is_floating_point():
        if graph.edge_attr.numel() == len(graph.edge_attr):
            logging.getLogger(__name__).warning(
                "%s has numbers in edge_attr, which are not read: numbers that weigh its edges "
                "belong into edge_weight",
                where,
            )


def _stored_label(graph: Any, where: str) -> int | None:
    if graph.y is None:
        return None
    try:
        y = torch.as_tensor(graph.y)
    except (TypeError, ValueError, RuntimeError):
        y = torch.zeros(0)
    if y.numel() != 1 or y.is_complex() or not float(y).is_integer():
        description = " ".join(str(graph.y).split())[:60]
        raise UserError(f"{where} needs one whole number as its label y, got {description}")
    return int(y)


def load_twitch(code: str, root: str | Path) -> Any:
    """Read one of the six Twitch networks as a `Data` whose features are sparse COO (n, 3170)."""
    raw = Path(root) / "Twitch" / code / "raw" / f"{code}.npz"
    arrays = _read_npz(raw)
    graph = _data_class()(
        edge_index=_undirected_edges(torch.from_numpy(arrays["edges"].astype(np.int64).T)),
        y=torch.from_numpy(arrays["target"].astype(np.int64)),
    )
    graph.x = torch.from_numpy(arrays["features"]).float().to_sparse_coo()
    graph.num_nodes = graph.x.shape[0]
    return graph


def load_localization(name: str, root: str | Path) -> Any:
    """Read HumLoc or EukLoc as a `Data` with multi-hot y (n, labels) float and three masks."""
    arrays = _read_npz(Path(root) / name / f"{name.lower()}.npz")
    graph = _data_class()(
        x=torch.from_numpy(arrays["x"]),
        edge_index=_undirected_edges(torch.from_numpy(arrays["edge_index"].astype(np.int64))),
        y=torch.from_numpy(arrays["y"].astype(np.float32)),
    )
    for split in ("train", "val", "test"):
        mask = torch.zeros(len(graph.y), dtype=torch.bool)
        mask[torch.from_numpy(arrays[f"{split}_idx"].astype(np.int64))] = True
        setattr(graph, f"{split}_mask", mask)
    return graph


def load_citations(name: str, root: str | Path) -> Any:
    """Read Cora or CiteSeer as a `Data` with the masks of the public split."""
    with _scratch_copy(Path(root) / name / "raw", f"ind.{name.lower()}.x", name) as scratch:
        graph = _import_datasets().Planetoid(scratch, name)[0]
    graph.edge_index = _undirected_edges(graph.edge_index)
    return graph


def load_photo(root: str | Path) -> Any:
    """Read Amazon's Photo; per class a seeded 20 nodes train, 30 choose, and the rest test."""
    file = "amazon_electronics_photo.npz"
    with _scratch_copy(Path(root) / "Photo" / "raw", file, "Photo") as scratch:
        graph = _import_datasets().Amazon(scratch, "Photo")[0]
    graph.edge_index = _undirected_edges(graph.edge_index)
    order = torch.randperm(len(graph.y), generator=torch.Generator().manual_seed(PUBLISHED_SEED))
    rank = torch.zeros_like(graph.y)
    for label in graph.y.unique():
        members = order[graph.y[order] == label]
        rank[members] = torch.arange(len(members))
    graph.train_mask, graph.test_mask = rank < 20, rank >= 50
    graph.val_mask = ~(graph.train_mask | graph.test_mask)
    return graph


def load_ppi(root: str | Path, split: str) -> list[Any]:
    """Read the graphs of one split ("train", "val" or "test") of PPI, in GraphSAGE's layout.

    Raises:
        UserError: torch_geometric is missing, or `root` does not hold PPI's raw files.
    """
    datasets = _import_datasets()
    stem = {"train": "train", "val": "valid", "test": "test"}[split]
    source = Path(root) / "PPI" / "raw"
    files = [f"{stem}_{part}" for part in _PPI_PARTS]
    missing_files = [file for file in files if not (source / file).is_file()]
    if missing_files:
        raise UserError(f"{source} lacks {', '.join(missing_files)}; unpack PPI's files there")
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(source, Path(scratch) / "raw")
        for other in ("train", "valid", "test"):  # torch_geometric reads all three at once
            for part in _PPI_PARTS:
                target = Path(scratch) / "raw" / f"{other}_{part}"
                if not target.is_file():
                    shutil.copy(source / f"{stem}_{part}", target)
        with contextlib.redirect_stderr(io.StringIO()):
            dataset = datasets.PPI(scratch, split=split)
        return [dataset[i] for i in range(len(dataset))]


def published_folds(labels: Tensor) -> list[Fold]:
    """Return the ten folds of the published protocol, its mistake included.

    The data set is shuffled once, but the folds are stratified by the labels in stored order, so
    that the classes are in fact not balanced over the folds. There is no validation part.
    """
    generator = torch.Generator().manual_seed(PUBLISHED_SEED)
    order = torch.randperm(len(labels), generator=generator)
    return [
        Fold(order[train].tolist(), [], order[test].tolist())
        for train, test in _stratified_splits(labels)
    ]


def honest_folds(labels: Tensor) -> list[Fold]:
    """Return ten stratified folds; the next fold of each test fold is its validation part."""
    parts = [test for _, test in _stratified_splits(labels)]
    folds = []
    for i, test in enumerate(parts):
        validation = parts[(i + 1) % N_FOLDS]
        held_out = set(test) | set(validation)
        train = [j for j in range(len(labels)) if j not in held_out]
        generator = torch.Generator().manual_seed(PUBLISHED_SEED)
        order = torch.randperm(len(train), generator=generator)
        folds.append(Fold([train[j] for j in order], validation.tolist(), test.tolist()))
    return folds


def collate_graphs(graphs: Sequence[Any]) -> dict[str, Tensor]:
    """Collate `Data` objects for `Trainer`: the keyword arguments of a graph classifier.

    x (n, p) float, edge_index (2, e) int64, batch (n,) int64, and where the graphs have them
    edge_weight (e,) float and labels, their `y`.
    """
    batch = joined_graphs(graphs)
    fields = {"x": batch.x, "edge_index": batch.edge_index, "batch": batch.batch}
    if batch.edge_weight is not None:
        fields["edge_weight"] = batch.edge_weight
    if batch.y is not None:
        fields["labels"] = batch.y
    return fields


def _stratified_splits(labels: Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    try:
        from sklearn.model_selection import StratifiedKFold
    except ImportError as error:
        raise UserError("folds need scikit-learn: pip install 'deqzoo[graph]'") from error
    splitter = StratifiedKFold(N_FOLDS, shuffle=True, random_state=PUBLISHED_SEED)
    return list(splitter.split(np.zeros(len(labels)), labels.numpy()))


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UserError(f"no graph file at {path}")
    with np.load(path) as arrays:
        return {key: arrays[key] for key in arrays.files}


def _undirected_edges(edge_index: Tensor) -> Tensor:
    """Return both directions of every edge once, without self loops."""
    pairs = torch.cat([edge_index, edge_index.flip(0)], dim=1)
    pairs = pairs[:, pairs[0] != pairs[1]]
    return torch.unique(pairs, dim=1)


@contextlib.contextmanager
def _scratch_copy(raw: Path, file_name: str, name: str) -> Iterator[str]:
    """Copy a raw folder to where torch_geometric may write beside it; yield the new root."""
    if not (raw / file_name).is_file():
        raise UserError(f"no {file_name} in {raw}: --data is the folder that holds {name}/")
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stderr(io.StringIO()):
        shutil.copytree(raw, Path(scratch) / name / "raw")
        yield scratch


def _import_datasets() -> Any:
    try:
        from torch_geometric import datasets
    except ImportError as error:
        raise UserError("graph data need torch_geometric: pip install 'deqzoo[graph]'") from error
    return datasets


def _data_class() -> Any:
    _import_datasets()
    from torch_geometric.data import Data

    return Data
