"""What no network is needed for: constant answers and logistic regression on the graph data sets.

    python benchmarks/ignn/baselines.py --data ROOT

Graphs are described by how many nodes have each label and each degree (up to 10), nodes by their
own features, and in a second row by the mean of their neighbours' features beside them. The
strength of the penalty is chosen on the validation part, as is the threshold of several labels;
figures are of the test part. Graph sets have the ten folds of `table.py`'s honest protocol.
Results: baselines.json and baselines.md beside this script.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from deqzoo.data.graphs import honest_folds, load_graph_set
from deqzoo.files import replace_text
from deqzoo.tasks.metrics import best_threshold, classification_figures
from deqzoo.tasks.nodes import NODE_SETS, SPLITS

HERE = Path(__file__).resolve().parent
GRAPH_SETS = ("COX2", "PROTEINS", "MUTAG", "PTC_MR", "NCI1")
NODES = ("Twitch", "HumLoc", "EukLoc")
PENALTIES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0)
"""Inverse strengths of the penalty; no set chooses the first or the last."""
MOST_DEGREE = 10


def graph_rows(graphs: list[Any]) -> np.ndarray:
    """Counts of node labels and of degrees: one row per graph."""
    rows = []
    for graph in graphs:
        degrees = graph.edge_index[1].bincount(minlength=graph.num_nodes).clamp(max=MOST_DEGREE)
        counts = degrees.bincount(minlength=MOST_DEGREE + 1)
        rows.append(torch.cat([graph.x.sum(0), counts.float()]).numpy())
    return np.stack(rows)


def logits_of(x: np.ndarray, y: np.ndarray, others: list[np.ndarray], c: float) -> list[Tensor]:
    """Logits of a regression that was fitted to (x, y), for the rows of each other array."""
    line = LogisticRegression(C=c, max_iter=300)
    model = make_pipeline(StandardScaler(), OneVsRestClassifier(line) if y.ndim == 2 else line)
    with warnings.catch_warnings():
        # A label that no training row has, and directions that the penalty hardly holds.
        warnings.simplefilter("ignore", (UserWarning, ConvergenceWarning))
        model.fit(x, y)
    logits = [torch.as_tensor(model.decision_function(rows)) for rows in others]
    return [z if z.ndim == 2 else torch.stack([torch.zeros_like(z), z], 1) for z in logits]


def figures(parts: dict[str, tuple[np.ndarray, np.ndarray]], metric: str) -> dict[str, Any]:
    """Figures of the test part, of the penalty that is best on the validation part."""
    rows = [parts["validation"][0], parts["test"][0]]
    labels = {split: torch.as_tensor(y) for split, (_, y) in parts.items()}
    best: dict[str, Any] = {"validation": -1.0}
    for c in PENALTIES:
        held_out, test = logits_of(*parts["train"], rows, c)
        threshold = 0.5
        if labels["test"].ndim == 2:
            threshold = best_threshold(held_out, labels["validation"])
        value = classification_figures(held_out, labels["validation"], threshold)[metric]
        if value > best["validation"]:
            found = classification_figures(test, labels["test"], threshold)
            best = {"validation": value, "penalty": c, "threshold": threshold, **found}
    return best


def graph_baseline(name: str, root: Path) -> dict[str, Any]:
    """Ten folds: mean, standard deviation and standard error (ddof 1) of both baselines."""
    data = load_graph_set(name, root)
    x, y = graph_rows(data.graphs), data.labels.numpy()
    folds = []
    for fold in honest_folds(data.labels):
        index = {"train": fold.train, "validation": fold.validation, "test": fold.test}
        folds.append(figures({k: (x[rows], y[rows]) for k, rows in index.items()}, "accuracy"))
    values = [fold["accuracy"] for fold in folds]
    deviation = statistics.stdev(values)
    return {
        "metric": "accuracy",
        "majority": float(data.labels.bincount().max()) / len(data.labels),
        "logistic_regression": statistics.mean(values),
        "deviation": deviation,
        "standard_error": deviation / len(values) ** 0.5,
        "folds": values,
    }


def neighbour_means(graph: Any) -> Tensor:
    """Mean of the features of every node's neighbours (N, features); zeros where there are none."""
    x, (source, target) = graph.x.to_dense().float(), graph.edge_index
    sums = torch.zeros_like(x).index_add_(0, target, x[source])
    return sums / target.bincount(minlength=len(x)).clamp(min=1).unsqueeze(1)


def node_baseline(name: str, root: Path) -> dict[str, Any]:
    """One split: a regression on each node's own features, and with neighbours' means."""
    task = NODE_SETS[name]
    parts: dict[bool, dict[str, tuple[np.ndarray, np.ndarray]]] = {False: {}, True: {}}
    for split in SPLITS:
        mask = {"validation": "val"}.get(split, split) + "_mask"
        graphs = list(task.load(root, split))
        for neighbours, rows_of in parts.items():
            columns = []
            for graph in graphs:
                kept = getattr(graph, mask, None)
                kept = torch.ones(graph.num_nodes, dtype=torch.bool) if kept is None else kept
                x = graph.x.to_dense().float()
                x = torch.cat([x, neighbour_means(graph)], 1) if neighbours else x
                columns.append((x[kept].numpy(), graph.y[kept].numpy()))
            x, y = (np.concatenate(column) for column in zip(*columns, strict=True))
            rows_of[split] = (x, y)
    own, wider = (figures(parts[neighbours], task.figure) for neighbours in (False, True))
    constant = own.get("constant_micro_f1", 0.5 if task.figure == "auc" else own.get("majority"))
    return {
        "metric": task.figure,
        "constant": constant,
        "logistic_regression": own[task.figure],
        "with_neighbours": wider[task.figure],
        **{key: [own[key], wider[key]] for key in ("validation", "penalty", "threshold")},
    }


def render(content: dict[str, Any]) -> str:
    """Both tables in Markdown."""
    lines = [
        "# Baselines of the graph data sets\n",
        "Written by `python benchmarks/ignn/baselines.py --data ROOT`. In %, graphs as mean ±",
        "standard deviation (standard error) of ten folds, ddof 1.\n",
        "| graphs | most frequent class | logistic regression on label and degree counts |",
        "|---|---|---|",
    ]
    for name, row in content["graphs"].items():
        value = f"{100 * row['logistic_regression']:.1f} ± {100 * row['deviation']:.1f}"
        error = f"{100 * row['standard_error']:.1f}"
        lines.append(f"| {name} | {100 * row['majority']:.1f} | {value} ({error}) |")
    lines += [
        "\n| nodes | figure | best constant answer | logistic regression on own features "
        "| with neighbours' means |",
        "|---|---|---|---|---|",
    ]
    for name, row in content["nodes"].items():
        constant = f"{100 * row['constant']:.1f}"
        values = [row[key] for key in ("logistic_regression", "with_neighbours")]
        cells = " | ".join(f"{100 * value:.1f}" for value in values)
        lines.append(f"| {name} | {row['metric']} | {constant} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the graph data sets")
    root = parser.parse_args().data
    content = {
        "graphs": {name: graph_baseline(name, root) for name in GRAPH_SETS},
        "nodes": {name: node_baseline(name, root) for name in NODES},
    }
    replace_text(HERE / "baselines.json", json.dumps(content, indent=1) + "\n")
    replace_text(HERE / "baselines.md", render(content))
    print(render(content))


if __name__ == "__main__":
    main()
