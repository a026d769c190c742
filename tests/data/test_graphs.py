"""Graph data: reading local folders, folds, and figures."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from deqzoo.data.graphs import (
    GraphSet,
    collate_graphs,
    honest_folds,
    load_citations,
    load_graph_set,
    load_localization,
    load_own_graphs,
    load_photo,
    load_ppi,
    load_twitch,
    published_folds,
)
from deqzoo.data.own import graph_digests
from deqzoo.data.tu import GraphEncoding
from deqzoo.errors import UserError
from deqzoo.evaluation.graphs import predict_graphs
from deqzoo.models.ignn.configuration_ignn import IGNNConfig
from deqzoo.models.ignn.modeling_ignn import IGNNForGraphClassification
from deqzoo.tasks.metrics import (
    area_under_curve,
    best_threshold,
    classification_figures,
    micro_f1,
)


def write_graph_set(folder, name="TINY", count=30, node_labels=True):
    """A set in TUDataset's format: paths (class 0) and cycles (class 1) of 3 to 7 nodes."""
    folder.mkdir(parents=True)
    edges, indicator, labels, nodes, first = [], [], [], [], 1
    for i in range(count):
        size, kind = 3 + i % 5, i % 2
        pairs = [(first + j, first + j + 1) for j in range(size - 1)]
        pairs += [(first + size - 1, first)] if kind else []
        edges += pairs + [(b, a) for a, b in pairs]
        indicator += [i + 1] * size
        nodes += [j % 3 for j in range(size)]
        labels.append(2 * kind - 1)
        first += size
    texts = {
        "A": "\n".join(f"{a}, {b}" for a, b in sorted(edges)),
        "graph_indicator": "\n".join(map(str, indicator)),
        "graph_labels": "\n".join(map(str, labels)),
    }
    if node_labels:
        texts["node_labels"] = "\n".join(map(str, nodes))
    for part, text in texts.items():
        (folder / f"{name}_{part}.txt").write_text(text + "\n")


@pytest.mark.parametrize("place", ["TINY", "TINY/raw"])
def test_graph_set(tmp_path, place):
    write_graph_set(tmp_path / place)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    data = load_graph_set("TINY", tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before, "the data folder was written to"
    assert (len(data.graphs), data.num_features, data.num_classes) == (30, 3, 2)
    assert data.labels.tolist() == [0, 1] * 15
    batch = data.batch([1, 4])
    assert batch.num_graphs == 2 and batch.num_nodes == 4 + 7


def test_degrees_stand_in_for_missing_features(tmp_path):
    write_graph_set(tmp_path / "TINY", node_labels=False)
    data = load_graph_set("TINY", tmp_path)
    assert data.graphs[0].x.tolist() == [[1.0], [2.0], [1.0]]


SMALL = {
    "A": "1, 2\n2, 1\n3, 4\n4, 3\n",
    "graph_indicator": "1\n1\n2\n2\n",
    "graph_labels": "1\n2\n",
    "node_labels": "0\n1\n2\n0\n",
}


def write_small(folder, **change):
    folder.mkdir(parents=True, exist_ok=True)
    for part, text in {**SMALL, **change}.items():
        (folder / f"T_{part}.txt").write_text(text)


def test_a_part_of_a_set_keeps_the_numbers_of_the_whole(tmp_path):
    write_graph_set(tmp_path / "TINY")
    whole = load_graph_set("TINY", tmp_path)
    assert whole.encoding.classes == (-1, 1) and whole.encoding.node_labels == ((0, 1, 2),)
    kept = GraphEncoding.from_dict(json.loads(json.dumps(whole.encoding.to_dict())))
    assert kept == whole.encoding
    write_small(tmp_path / "T", graph_labels="1\n1\n", node_labels="1\n2\n2\n1\n")
    part = load_graph_set("T", tmp_path, kept)
    assert part.labels.tolist() == [1, 1] and part.num_features == 3
    assert part.graphs[0].x.tolist() == [[0, 1, 0], [0, 0, 1]]
    write_small(tmp_path / "T", node_labels="1\n2\n3\n1\n")
    with pytest.raises(UserError, match="node 3 has the label 3.*knows 0, 1, 2"):
        load_graph_set("T", tmp_path, kept)
    write_small(tmp_path / "T", graph_labels="-1\n2\n")
    with pytest.raises(UserError, match="graph 2 has the label 2.*classes -1, 1"):
        load_graph_set("T", tmp_path, kept)
    (tmp_path / "T" / "T_graph_labels.txt").unlink()
    assert load_graph_set("T", tmp_path, kept).labels.tolist() == [-1, -1]


@pytest.mark.parametrize("name", ("COX2", "PROTEINS"))
def test_published_sets_equal_torch_geometric(tmp_path, name):
    source = Path("../shared/data/graphs") / name
    if not source.is_dir():
        pytest.skip(f"{name} is not at hand")
    raw = tmp_path / name / "raw"
    raw.mkdir(parents=True)
    for file in source.glob(f"{name}_*.txt"):
        shutil.copy(file, raw)
    expected = pytest.importorskip("torch_geometric.datasets").TUDataset(tmp_path, name)
    found = load_graph_set(name, source.parent)
    assert len(found.graphs) == len(expected)
    for a, b in zip(found.graphs, expected, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("x", "edge_index", "y"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"graph_labels": "a\nb\n"}, "numbers parted by commas"),
        ({"graph_labels": "0.5\n1.7\n"}, "whole numbers"),
        ({"graph_labels": "nan\n1\n"}, "NaN"),
        ({"graph_labels": "1\n"}, "1 labels for 2 graphs"),
        ({"A": "1 2\n2 1\n"}, "commas"),
        ({"A": "1\n2\n"}, "2 numbers"),
        ({"A": "1, 2\n2, 1\n3, 9\n9, 3\n"}, "names node 9"),
        ({"A": "0, 1\n1, 0\n"}, "names node 0"),
        ({"A": "1, 3\n3, 1\n"}, "different graphs"),
        ({"node_labels": "0\n1\n"}, "2 lines for 4 nodes"),
        ({"graph_indicator": "1\n1\n3\n3\n"}, "graph 2 has no nodes"),
        ({"graph_indicator": "1\n1\n2000000000\n2\n"}, "graph 3 has no nodes"),
        ({"graph_indicator": ""}, "names no node"),
        ({"node_labels": "0\n1\n2\n99999999\n"}, "too many features"),
    ],
)
def test_damaged_sets_are_refused_in_one_line(tmp_path, change, said):
    write_small(tmp_path / "T", **change)
    with pytest.raises(UserError, match=said) as caught:
        load_graph_set("T", tmp_path)
    assert "\n" not in str(caught.value)


def test_sets_without_order_or_edges(tmp_path):
    write_small(tmp_path / "T", graph_indicator="2\n2\n1\n1\n")
    first, second = load_graph_set("T", tmp_path).graphs
    assert first.x.tolist() == [[0, 0, 1], [1, 0, 0]] and second.x.tolist()[1] == [0, 1, 0]
    assert first.edge_index.tolist() == second.edge_index.tolist() == [[0, 1], [1, 0]]
    write_small(tmp_path / "T", A="")
    assert load_graph_set("T", tmp_path).graphs[0].edge_index.shape == (2, 0)


def test_own_graphs(tmp_path):
    write_small(tmp_path / "T", node_attributes="0.5\n1\n2\n3\n", node_labels="5\n9\n9\n5\n")
    own = load_own_graphs(tmp_path)
    assert own.name == "T" and own.encoding == GraphEncoding((1, 2), ((5, 9),), 1)
    assert own.graphs[0].x.tolist() == [[0.5, 1, 0], [1, 0, 1]]
    data = pytest.importorskip("torch_geometric.data").Data
    edges = torch.tensor([[0, 1], [1, 0]])
    graphs = [data(x=torch.eye(2), edge_index=edges, y=torch.tensor([y])) for y in (7, 3)]
    torch.save(graphs, tmp_path / "own.pt")
    listed = load_own_graphs(tmp_path / "own.pt")
    assert listed.labels.tolist() == [1, 0] and listed.encoding.classes == (3, 7)
    with pytest.raises(UserError, match="label 7.*classes 3"):
        load_own_graphs(tmp_path / "own.pt", GraphEncoding((3,)))
    torch.save([data(edge_index=edges, num_nodes=3)], tmp_path / "bare.pt")
    bare = load_own_graphs(tmp_path / "bare.pt", GraphEncoding((3, 7)))
    assert bare.labels.tolist() == [-1] and bare.graphs[0].x.tolist() == [[1], [1], [0]]
    with pytest.raises(UserError, match="no label y"):
        load_own_graphs(tmp_path / "bare.pt")
    for content in (b"nothing", b""):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(UserError, match="cannot read"):
            load_own_graphs(tmp_path / "bad.pt")
    for value in ({"x": 1}, [], [torch.eye(2)], [data(x=torch.eye(2))]):
        torch.save(value, tmp_path / "bad.pt")
        with pytest.raises(UserError, match="bad.pt"):
            load_own_graphs(tmp_path / "bad.pt")


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match="no TINY_A.txt"):
        load_graph_set("TINY", tmp_path)
    write_graph_set(tmp_path / "TINY")
    (tmp_path / "TINY" / "TINY_graph_labels.txt").unlink()
    with pytest.raises(UserError, match="lacks TINY_graph_labels.txt"):
        load_graph_set("TINY", tmp_path)
    with pytest.raises(UserError, match="no graph file"):
        load_twitch("EN", tmp_path)


def test_honest_folds_are_stratified_and_disjoint():
    labels = (torch.arange(200) % 5 == 0).long()  # 40 of 200
    folds = honest_folds(labels)
    assert sorted(i for fold in folds for i in fold.test) == list(range(200))
    for fold in folds:
        everything = fold.train + fold.validation + fold.test
        assert sorted(everything) == list(range(200))
        assert int(labels[fold.test].sum()) == int(labels[fold.validation].sum()) == 4


def test_published_folds_repeat_the_mistake():
    """Stratified by stored order, applied to the shuffled set: not balanced in fact."""
    labels = (torch.arange(200) >= 160).long()
    folds = published_folds(labels)
    assert sorted(i for fold in folds for i in fold.test) == list(range(200))
    assert all(not fold.validation and len(fold.train) == 180 for fold in folds)
    counts = [int(labels[fold.test].sum()) for fold in folds]
    assert sum(counts) == 40 and max(counts) - min(counts) > 2
    torch.manual_seed(42)
    order = torch.randperm(200)
    in_order = [sorted((order == i).nonzero().item() for i in fold.test) for fold in folds]
    stored = [int((labels[positions] == 1).sum()) for positions in in_order]
    assert stored == [4] * 10


def test_collate(tmp_path):
    write_graph_set(tmp_path / "TINY")
    data = load_graph_set("TINY", tmp_path)
    fields = collate_graphs(data.graphs[:3])
    assert set(fields) == {"x", "edge_index", "batch", "labels"}
    assert fields["batch"].bincount().tolist() == [3, 4, 5]
    for weight, graph in enumerate(data.graphs[:3]):
        graph.edge_weight = torch.full((graph.num_edges,), float(weight))
    weights = collate_graphs(data.graphs[:3])["edge_weight"]
    assert torch.equal(weights, fields["batch"][fields["edge_index"][0]].float())


def test_node_sets(tmp_path):
    twitch = tmp_path / "Twitch" / "EN" / "raw"
    twitch.mkdir(parents=True)
    np.savez(
        twitch / "EN.npz",
        features=np.eye(4, dtype=np.uint8),
        target=np.array([0, 1, 1, 0], dtype=np.int8),
        edges=np.array([[0, 1], [1, 0], [1, 2], [3, 3]], dtype=np.int32),
    )
    graph = load_twitch("EN", tmp_path)
    assert graph.x.is_sparse and graph.x._nnz() == 4
    assert graph.edge_index.tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]
    (tmp_path / "HumLoc").mkdir()
    np.savez(
        tmp_path / "HumLoc" / "humloc.npz",
        x=np.ones((4, 2), dtype=np.float32),
        y=np.ones((4, 3), dtype=np.uint8),
        edge_index=np.array([[0, 1, 0], [1, 2, 1]], dtype=np.int32),
        train_idx=np.array([0, 1], dtype=np.int32),
        val_idx=np.array([2], dtype=np.int32),
        test_idx=np.array([3], dtype=np.int32),
    )
    graph = load_localization("HumLoc", tmp_path)
    assert graph.edge_index.tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]
    assert graph.train_mask.tolist() == [True, True, False, False]
    assert graph.y.shape == (4, 3) and graph.y.is_floating_point()


def write_ppi(folder, splits=("train", "valid", "test")):
    """Two graphs of four and three nodes per split, in GraphSAGE's layout."""
    folder.mkdir(parents=True)
    for seed, split in enumerate(splits):
        generator = np.random.default_rng(seed)
        links = [(0, 1), (1, 2), (2, 3), (4, 5), (5, 6)]
        content = {
            "directed": False,
            "multigraph": False,
            "graph": {},
            "nodes": [{"id": i} for i in range(7)],
            "links": [{"source": a, "target": b} for a, b in links],
        }
        (folder / f"{split}_graph.json").write_text(json.dumps(content))
        np.save(folder / f"{split}_feats.npy", generator.random((7, 5)))
        np.save(folder / f"{split}_labels.npy", generator.integers(0, 2, (7, 4)))
        np.save(folder / f"{split}_graph_id.npy", np.array([1, 1, 1, 1, 2, 2, 2]))


def test_ppi_layout(tmp_path):
    pytest.importorskip("networkx")
    write_ppi(tmp_path / "PPI" / "raw")
    graphs = load_ppi(tmp_path, "val")
    assert [g.num_nodes for g in graphs] == [4, 3]
    assert graphs[0].x.shape == (4, 5) and graphs[0].y.shape == (4, 4)
    with pytest.raises(UserError, match="lacks train_feats.npy"):
        load_ppi(tmp_path / "nowhere", "train")


def test_figures():
    predicted = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    labels = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert micro_f1(predicted, labels) == pytest.approx(4 / 6)
    assert micro_f1(torch.zeros(2, 3), torch.zeros(2, 3)) == 0.0
    logits = torch.tensor([[0.0, 2.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.5]])
    figures = classification_figures(logits, torch.tensor([1, 0, 0, 1]))
    assert figures["accuracy"] == 0.75 and figures["auc"] == pytest.approx(0.75)
    assert area_under_curve(torch.zeros(4), torch.tensor([0, 1, 0, 1])) == 0.5


@pytest.mark.parametrize("seed", range(5))
def test_the_best_threshold_of_several_labels(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(40, 5, generator=generator).mul(4).round().div(2)  # with ties
    labels = (torch.rand(40, 5, generator=generator) < logits.sigmoid()).float()
    cuts = torch.cat([torch.tensor([0.0]), logits.sigmoid().unique()])
    every = [micro_f1((logits.sigmoid() > cut).float(), labels) for cut in cuts]
    threshold = best_threshold(logits, labels)
    figures = classification_figures(logits, labels, threshold)
    assert figures["micro_f1"] == pytest.approx(max(every))
    assert figures["micro_f1"] >= classification_figures(logits, labels)["micro_f1"]


def test_thresholds_are_probabilities() -> None:
    with pytest.raises(StrictDataclassError, match="decision_threshold=1.5"):
        IGNNConfig(decision_threshold=1.5)


def test_sets_with_public_files(tmp_path):
    """Photo and Cora go through torch_geometric's readers, from a copy."""
    scipy_sparse = pytest.importorskip("scipy.sparse")
    raw = tmp_path / "Photo" / "raw"
    raw.mkdir(parents=True)
    n = 120
    adjacency = scipy_sparse.eye(n, k=1, format="csr")
    features = scipy_sparse.eye(n, 4, format="csr")
    parts = {"labels": np.arange(n) % 2}
    for name, matrix in (("adj", adjacency), ("attr", features)):
        parts[f"{name}_data"] = matrix.data
        parts[f"{name}_indices"] = matrix.indices
        parts[f"{name}_indptr"] = matrix.indptr
        parts[f"{name}_shape"] = matrix.shape
    np.savez(raw / "amazon_electronics_photo.npz", **parts)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    graph = load_photo(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    masks = torch.stack([graph.train_mask, graph.val_mask, graph.test_mask])
    assert masks.sum(1).tolist() == [40, 60, 20] and bool((masks.sum(0) == 1).all())
    with pytest.raises(UserError, match="no ind.cora.x"):
        load_citations("Cora", tmp_path)


def weighted(number: int, weights: bool = True, n: int = 4):
    """A complete graph with weights of its own, one-hot features and a class."""
    data_class = pytest.importorskip("torch_geometric.data").Data
    edges = torch.combinations(torch.arange(n)).T
    generator = torch.Generator().manual_seed(number)
    graph = data_class(x=torch.eye(n), edge_index=torch.cat((edges, edges.flip(0)), 1))
    graph.y = torch.tensor([number % 2])
    if weights:
        graph.edge_weight = torch.rand(edges.shape[1], generator=generator).repeat(2)
    return graph


def test_weights_of_edges_tell_graphs_apart(tmp_path):
    """Networks of one shape differ in their weights alone."""
    graphs = [weighted(number) for number in range(6)]
    digests = graph_digests(graphs)
    assert len(set(digests)) == 6
    plain = [weighted(number, weights=False) for number in range(2)]
    assert not any(digest.startswith("w") for digest in graph_digests(plain))
    # A record from before weights were in the digests still finds its graphs.
    before = graph_digests([weighted(number, weights=False) for number in range(6)])
    assert graph_digests(graphs, {"train": before[:2]}) == before
    assert graph_digests(graphs, {"train": digests[:2]}) == digests
    assert graph_digests(graphs, {}) == digests


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_edges_without_weights_beside_weighted_ones_weigh_one(tmp_path, order):
    pair = [weighted(0), weighted(1, weights=False)]
    pair = [pair[i] for i in order]
    expected = torch.cat(
        [g.edge_weight if g.edge_weight is not None else torch.ones(12) for g in pair]
    )
    assert torch.equal(collate_graphs(pair)["edge_weight"], expected)
    torch.manual_seed(0)
    model = IGNNForGraphClassification(IGNNConfig(num_features=4, hidden_sizes=[8])).eval()
    with torch.no_grad():
        together = model(pair).logits
        alone = torch.cat([model([graph]).logits for graph in pair])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)
    assert pair[order.index(1)].edge_weight is None
    torch.save(pair, tmp_path / "pair.pt")
    assert torch.equal(load_own_graphs(tmp_path / "pair.pt").batch([0, 1]).edge_weight, expected)


def test_features_of_any_storage(tmp_path, caplog):
    graphs = [weighted(number, weights=False) for number in range(3)]
    graphs[0].x = graphs[0].x.requires_grad_()
    graphs[1].x = graphs[1].x.to_sparse()
    graphs[2].edge_attr = torch.rand(12)
    torch.save(graphs, tmp_path / "g.pt")
    loaded = load_own_graphs(tmp_path / "g.pt")
    assert len(graph_digests(loaded.graphs)) == 3
    assert torch.equal(loaded.batch([0, 1, 2]).x, torch.eye(4).repeat(3, 1))
    assert "graph 2" in caplog.text and "edge_weight" in caplog.text
    for x in (torch.eye(4).to(torch.complex64), torch.zeros(4, 0)):
        graphs[1].x = x
        torch.save(graphs, tmp_path / "g.pt")
        with pytest.raises(UserError, match="graph 1 .*real node features"):
            load_own_graphs(tmp_path / "g.pt")


def test_nodes_are_numbered_from_0(tmp_path):
    """Where edges alone count them, a node 0 that no graph uses would be one more."""
    data_class = pytest.importorskip("torch_geometric.data").Data
    edges = torch.tensor([[1, 2], [2, 1]])
    for fields, said in (
        ({}, "numbered from 1: number them from 0"),
        ({"num_nodes": 3}, None),
        ({"x": torch.rand(3, 2)}, None),
        ({"x": torch.rand(2, 2)}, "has 2 nodes, which its edge_index does not fit"),
    ):
        graphs = [data_class(edge_index=edges, y=i, **fields) for i in range(2)]
        torch.save(graphs, tmp_path / "g.pt")
        if said is None:
            assert len(load_own_graphs(tmp_path / "g.pt").graphs[0].x) == 3
        else:
            with pytest.raises(UserError, match=said):
                load_own_graphs(tmp_path / "g.pt")


def test_what_only_some_graphs_hold_is_left_out(tmp_path):
    """Names, positions, even labels: torch_geometric fails where another graph lacks them."""
    graphs = [weighted(number, weights=False) for number in range(3)]
    graphs[0].pos, graphs[1].name, graphs[2].adjacency = torch.rand(4, 3), "a", torch.rand(4, 4)
    del graphs[1].y
    torch.manual_seed(0)
    model = IGNNForGraphClassification(IGNNConfig(num_features=4, hidden_sizes=[8])).eval()
    for order in ((0, 1, 2), (1, 2, 0)):
        chosen = [graphs[i] for i in order]
        with torch.no_grad():
            assert model(chosen).logits.shape == (3, 2)
        torch.save(chosen, tmp_path / "g.pt")
        loaded = load_own_graphs(tmp_path / "g.pt", GraphEncoding((0, 1)))
        answers = list(predict_graphs(model, loaded, [0, 1, 2]))
        assert [a.target for a in answers] == [None if i == 1 else i % 2 for i in order]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("x", torch.full((4, 4), float("nan")), "NaN"),
        ("x", torch.ones(4, 3), "reads .nodes, 4."),
        ("edge_index", torch.tensor([[0], [1]]), "no equal reverse edge"),
        ("edge_weight", -torch.ones(12), "not negative"),
        ("edge_weight", torch.ones(11), "11 entries for 12 edges"),
    ],
)
def test_graphs_that_a_model_cannot_read_are_named(name, value, said):
    graphs = [weighted(number, weights=False) for number in range(3)]
    graphs[1][name] = value
    data = GraphSet("mine", graphs, torch.tensor([0, 1, 0]), 4, 2)
    model = IGNNForGraphClassification(IGNNConfig(num_features=4, hidden_sizes=[8]))
    with pytest.raises(UserError, match=f"^graph 1 of mine: .*{said}"):
        list(predict_graphs(model, data, [0, 1, 2]))
    assert len(list(predict_graphs(model, data, [0, 2]))) == 2
