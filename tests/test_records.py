"""One schema for the evaluation files of every task, and files of earlier versions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deqzoo import UserError
from deqzoo.evaluation.files import write_evaluation
from deqzoo.records import read_evaluation, upgraded
from deqzoo.tasks.metrics import METRICS
from deqzoo.zoo import list_models, resolve_bundled

FILES = [
    path for name in list_models() for path in (resolve_bundled(name) / "evaluation").glob("*.json")
]


def faults(content: dict) -> list[str]:
    """What the schema forbids."""
    found = [
        f"no {key}"
        for key in ("format", "task", "metric", "model", "data", "results", "budget", "command")
        if key not in content
    ]
    found += [
        f"data lack {k}" for k in ("name", "split", "samples", "unit") if k not in content["data"]
    ]
    figures = {k: v for k, v in content["results"].items() if not isinstance(v, dict)}
    rows = content["budget"]["steps"] if content["budget"] else []
    for row in (figures, *rows):
        found += [f"unknown figure {name}" for name in row.keys() - METRICS.keys() - {"max_steps"}]
    found += [f"no {content['metric']}" for row in (figures, *rows) if content["metric"] not in row]
    needed = {"n_steps_mean", "residual_median", "converged_share", "seconds_per_sample"}
    return found + [f"no {name}" for name in needed - figures.keys()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_stored_files_follow_the_schema(path: Path) -> None:
    content = json.loads(path.read_text())
    assert content["format"] == 2 and read_evaluation(path) == content
    assert faults(content) == []


OLD_PICTURES = {
    "format": 1,
    "task": "image-classification",
    "data": {"name": "cifar10", "split": "test", "pictures": 40, "complete": True},
    "results": {"accuracy": 0.5, "n_steps_mean": 3.0, "seconds_per_picture": 0.1},
    "budget": {
        "pictures": 10,
        "tol": 1e-7,
        "default_accuracy": 0.4,
        "steps": [{"max_steps": 2, "accuracy": 0.3, "seconds_per_picture": 0.2}],
    },
}
OLD_TEXT = {
    "format": 1,
    "task": "language-modeling",
    "data": {"name": "ptb", "split": "test", "tokens": 40},
    "results": {"perplexity": 9.0, "tokens": 40, "unconverged_tokens": 1, "tokens_per_second": 4.0},
    "budget": {"tokens": 20, "default_perplexity": 8.0, "steps": []},
}
OLD_GRAPHS = {
    "model": {"architecture": "IGNNForGraphClassification"},
    "data": {"name": "cox2", "fold": 0, "split": "test"},
    "results": {
        "accuracy": 0.5, "majority": 0.4, "samples": 4, "mean_steps": 7.0, "max_residual": 1e-5,
        "converged": 1.0, "seconds": 2.0,
    },
}  # fmt: skip
OLD_NODES = {
    "model": {"architecture": "IGNNForNodeClassification"},
    "data": {"name": "twitch", "split": "test"},
    "results": {"accuracy": 0.5, "auc": 0.6, "samples": 4, "steps": 7.0, "converged": 1.0},
}


def test_older_files_are_upgraded() -> None:
    pictures, text, graphs, nodes = map(upgraded, (OLD_PICTURES, OLD_TEXT, OLD_GRAPHS, OLD_NODES))
    assert pictures["data"] == {
        "name": "cifar10", "split": "test", "samples": 40, "unit": "pictures", "complete": True
    }  # fmt: skip
    assert pictures["metric"] == "accuracy" and pictures["results"]["seconds_per_sample"] == 0.1
    (row,) = pictures["budget"]["steps"]
    assert pictures["budget"]["samples"] == 10 and pictures["budget"]["default"] == 0.4
    assert row == {"max_steps": 2, "accuracy": 0.3, "seconds_per_sample": 0.2}
    assert text["results"] == {"perplexity": 9.0, "seconds_per_sample": 0.25}
    assert text["data"]["samples"] == 40 and text["budget"]["default"] == 8.0
    assert graphs["task"] == "graph-classification" and graphs["data"]["unit"] == "graphs"
    assert graphs["results"]["n_steps_mean"] == 7 and graphs["results"]["seconds_per_sample"] == 0.5
    assert graphs["results"]["converged_share"] == 1 and graphs["budget"] is None
    assert nodes["task"] == "node-classification" and nodes["metric"] == "auc"
    for content in (pictures, text, graphs, nodes):
        assert content["format"] == 2 and upgraded(content) == content


def test_files_of_a_newer_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"format": 3}))
    with pytest.raises(UserError, match="reads up to 2"):
        read_evaluation(path)


def test_looks_at_the_test_split_are_counted(tmp_path: Path) -> None:
    """Another look is that of other weights; repeating a measurement is none."""

    def written(weights: str, split: str = "test", before: Path | None = None) -> dict:
        data = {"name": "x", "split": split, "samples": 9, "unit": "pictures", "complete": True}
        content = {"format": 2, "model": {"weights_sha256": weights}, "data": data, "results": {}}
        path = tmp_path / f"x-{split}.json"
        return read_evaluation(write_evaluation(path, content, before))["data"]

    assert written("a")["looks"] == 1
    assert written("a")["looks"] == 1
    assert written("b")["looks"] == 2
    stored = (tmp_path / "x-test.json").rename(tmp_path / "stored.json")
    assert written("c", before=stored)["looks"] == 3
    assert "looks" not in written("a", "validation")


def test_every_stored_test_figure_says_how_often_its_split_was_measured() -> None:
    looks = [read_evaluation(path)["data"].get("looks") for path in FILES if "-test" in path.stem]
    assert looks and all(isinstance(count, int) and count >= 1 for count in looks)
