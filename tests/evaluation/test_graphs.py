"""Evaluation of graph classifiers on their own fold."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import deqzoo
from deqzoo.cli import run
from deqzoo.data.graphs import GraphSet
from deqzoo.evaluation.dispatch import evaluate_model
from deqzoo.hub.store import instabilities

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
    content = evaluate_model(model, "tiny", data=tmp_path)
    assert content["data"]["samples"] == 3
    assert content["results"]["majority"] == 2 / 3  # of the fold, not of the set
    trained = evaluate_model(model, "tiny", split="train", data=tmp_path)
    assert trained["results"]["majority"] == 1
    # What the store decides by: a residual, and the figure after more steps than the default's.
    assert instabilities(content) == []
    assert content["budget"]["steps"][-1]["max_steps"] >= model.config.solver["max_steps"]


def test_the_first_graphs_of_a_fold_are_of_several_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folds are stored in the order of their classes."""
    labels = torch.tensor([0] * 20 + [1] * 20)
    edges = torch.tensor([[0, 1], [1, 0]])
    graphs = [
        data_class(x=torch.rand(3 + i, 3), edge_index=edges, y=label[None])
        for i, label in enumerate(labels)
    ]
    known = GraphSet("TINY", graphs, labels, num_features=3, num_classes=2)
    monkeypatch.setattr("deqzoo.evaluation.graphs.load_graph_set", lambda *_: known)
    config = deqzoo.IGNNConfig(num_features=3, hidden_sizes=[4], num_labels=2)
    deqzoo.IGNNForGraphClassification(config).save_pretrained(tmp_path)
    fold = {"data": "TINY", "protocol": "honest", "fold": 0, "test": [*range(1, 39)], "train": [0]}
    (tmp_path / "fold.json").write_text(json.dumps(fold))
    model = deqzoo.DEQModel.from_pretrained(tmp_path)
    limited = evaluate_model(model, "tiny", data=tmp_path, limit=10, budget_samples=0)
    assert limited["data"]["samples"] == 10 and limited["results"]["majority"] < 1
    everything = evaluate_model(model, "tiny", split="all", data=tmp_path, budget_samples=0)
    assert everything["data"]["samples"] == 39


SMALL = {
    "A": "1, 2\n2, 1\n3, 4\n4, 3\n",
    "graph_indicator": "1\n1\n2\n2\n",
    "graph_labels": "2\n2\n",
    "node_labels": "0\n1\n2\n0\n",
}


def predicted(capsys: pytest.CaptureFixture, *arguments: object) -> list[dict]:
    assert run(["predict-graphs", *map(str, arguments), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    encoding = {"classes": [1, 2], "node_labels": [[0, 1, 2, None, 4]], "attributes": 0}
    config = deqzoo.IGNNConfig(
        num_features=5, hidden_sizes=[4], id2label={0: "1", 1: "2"}, graph_encoding=encoding
    )
    folder = tmp_path / "checkpoint"
    deqzoo.IGNNForGraphClassification(config).save_pretrained(folder)
    return folder


def test_traces_hold_every_graph(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """More of them than a batch holds."""
    edges = torch.tensor([[0, 1], [1, 0]])
    graphs = [data_class(x=torch.eye(5)[[i % 5, 0]], edge_index=edges) for i in range(150)]
    torch.save(graphs, tmp_path / "many.pt")
    trace = tmp_path / "trace.json"
    rows = predicted(capsys, checkpoint, tmp_path / "many.pt", "--trace", trace)
    assert len(rows) == len(json.loads(trace.read_text())) == 150


def test_own_graphs_keep_the_numbers_of_the_checkpoint(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for part, text in SMALL.items():
        (tmp_path / f"T_{part}.txt").write_text(text)
    rows = predicted(capsys, checkpoint, tmp_path)
    assert [row["target"] for row in rows] == ["2", "2"]  # though no graph of class 1 is there
    x = torch.eye(5)
    graphs = [x[[0, 1]], x[[2, 0]]]
    model = deqzoo.DEQModel.from_pretrained(checkpoint)
    edges = torch.tensor([[0, 1], [1, 0]])
    for row, features in zip(rows, graphs, strict=True):
        best = model(features, edges).logits.softmax(1)[0].max(0)
        assert row["label"] == ["1", "2"][int(best.indices)]
        assert row["probability"] == pytest.approx(float(best.values), abs=1e-5)
    saved = [data_class(x=features, edge_index=edges) for features in graphs]
    torch.save(saved, tmp_path / "own.pt")
    listed = predicted(capsys, checkpoint, tmp_path / "own.pt")
    assert [r["label"] for r in listed] == [r["label"] for r in rows]
    assert listed[0]["target"] is None
    (tmp_path / "T_node_labels.txt").write_text("1\n2\n3\n1\n")
    assert run(["predict-graphs", str(checkpoint), str(tmp_path)]) == 2
    assert "label 3" in capsys.readouterr().err
    mixed = ["predict-graphs", str(checkpoint), str(tmp_path), str(tmp_path / "own.pt"), "--json"]
    assert run(mixed) == 1
    assert len(capsys.readouterr().out.splitlines()) == 2
    trace = tmp_path / "trace.json"
    options = ["--max-steps", 2, "--tol", 0, "--trace", trace]
    rows = predicted(capsys, checkpoint, tmp_path / "own.pt", *options)
    assert rows[0]["n_steps"] == 2 and len(json.loads(trace.read_text())) == 2


def test_an_empty_split_is_said(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for part, text in SMALL.items():
        (tmp_path / f"T_{part}.txt").write_text(text)
    fold = {"data": "T", "protocol": "published", "fold": 0, "test": [1], "validation": []}
    (checkpoint / "fold.json").write_text(json.dumps(fold))
    for command in ("predict-graphs", "evaluate"):
        arguments = [command, str(checkpoint), "--data", str(tmp_path), "--split", "validation"]
        assert run(arguments) == 2
        assert "validation split" in capsys.readouterr().err
    assert len(predicted(capsys, checkpoint, "--data", tmp_path)) == 1


def test_an_interrupted_evaluation_keeps_what_it_has(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    edges = torch.tensor([[0, 1], [1, 0]])
    graphs = [data_class(x=torch.eye(5)[[i, 4]], edge_index=edges, y=1 + i % 2) for i in (0, 1, 2)]
    torch.save(graphs * 3, tmp_path / "own.pt")
    forward, calls = deqzoo.IGNNForGraphClassification.forward, []

    def interrupted(self, *values, **keywords):
        calls.append(1)
        if len(calls) == limit:
            raise KeyboardInterrupt
        return forward(self, *values, **keywords)

    output = tmp_path / "evaluation.json"
    arguments = ["evaluate", checkpoint, "--data", tmp_path / "own.pt", "--output", output]
    arguments = [*map(str, arguments), "--split", "all"]
    limit = 0
    assert run([*arguments, "--limit", "6"]) == 0
    first = json.loads(output.read_text())["results"]
    monkeypatch.setattr(deqzoo.IGNNForGraphClassification, "forward", interrupted)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # a bar is for a terminal
    limit = 3  # of three batches
    assert run([*arguments, "--batch-size", "3"]) == 130
    content = json.loads(output.read_text())
    assert content["data"]["samples"] == 6 and content["data"]["complete"] is False
    assert content["results"]["accuracy"] == pytest.approx(first["accuracy"])
    assert "batch/s" in capsys.readouterr().err
    calls.clear()
    limit = 3  # the figures, the budget's own, one of its rows
    assert run([*arguments, "--batch-size", "9", "--budget"]) == 130
    assert json.loads(output.read_text())["data"]["samples"] == 9
    calls.clear()
    limit = 1
    output.unlink()
    assert run(arguments) == 130 and not output.exists()
