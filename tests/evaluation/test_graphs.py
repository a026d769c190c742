"""Evaluation of graph classifiers on their own fold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import deqzoo
from deqzoo.data.graphs import GraphSet
from deqzoo.evaluation.graphs import evaluate_graphs

data_class = pytest.importorskip("torch_geometric.data").Data


def test_a_fold_records_its_majority_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.tensor([0, 1, 1, 1, 0, 1])
    edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    graphs = [data_class(x=torch.eye(3), edge_index=edges, y=label[None]) for label in labels]
    known = GraphSet("TINY", graphs, labels, num_features=3, num_classes=2)
    monkeypatch.setattr("deqzoo.evaluation.graphs.load_graph_set", lambda *_: known)
    config = deqzoo.IGNNConfig(num_features=3, hidden_sizes=[4], num_labels=2)
    deqzoo.IGNNForGraphClassification(config).save_pretrained(tmp_path)
    fold = {"data": "TINY", "protocol": "honest", "fold": 0, "test": [0, 1, 4], "train": [2]}
    (tmp_path / "fold.json").write_text(json.dumps(fold))
    model = deqzoo.DEQModel.from_pretrained(tmp_path)
    results = evaluate_graphs(model, "tiny", data=tmp_path)["results"]
    assert results["samples"] == 3 and results["majority"] == 2 / 3  # of the fold, not of the set
    assert evaluate_graphs(model, "tiny", split="train", data=tmp_path)["results"]["majority"] == 1
