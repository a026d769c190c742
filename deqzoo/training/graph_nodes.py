"""Training of node classifiers from a recipe: whole graphs, one optimiser step each."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from deqzoo.errors import UserError
from deqzoo.evaluation.graph_nodes import (
    NODE_TASKS,
    SPLITS,
    NodePart,
    NodeTask,
    evaluate_parts,
    node_parts,
)
from deqzoo.models.ignn.configuration_ignn import IGNNConfig
from deqzoo.models.ignn.modeling_ignn import IGNNForNodeClassification
from deqzoo.training.graphs import read_yaml


@dataclass(frozen=True)
class NodeRecipe:
    """What recipes/ignn-*.yaml of node tasks hold.

    Attributes:
        name: of the checkpoint.
        data: a key of `NODE_TASKS`.
        model: settings of `IGNNConfig`; sizes of features and labels come from the data.
        epochs: passes over the training graphs.
        lr: of Adam.
        weight_decay: of Adam.
        seed: of weights, dropout and order.
        evaluate_every: epochs between evaluations.
    """

    name: str
    data: str
    model: dict[str, Any] = field(default_factory=dict)
    epochs: int = 200
    lr: float = 1e-2
    weight_decay: float = 0.0
    seed: int = 0
    evaluate_every: int = 5

    @classmethod
    def read(cls, path: str | Path) -> NodeRecipe:
        """Read a YAML file.

        Raises:
            UserError: missing or damaged file, unknown keys, or an unknown data set.
        """
        recipe = read_yaml(cls, path)
        if recipe.data not in NODE_TASKS:
            raise UserError(f"{path}: set data to one of {', '.join(NODE_TASKS)}")
        return recipe


def node_config(task: NodeTask, example: Any, settings: dict[str, Any]) -> IGNNConfig:
    """Return the configuration for a data set's sizes.

    Raises:
        UserError: settings that do not fit together.
    """
    n_labels = example.y.shape[1] if task.multi_label else int(example.y.max()) + 1
    kind = "multi" if task.multi_label else "single"
    try:
        return IGNNConfig(
            num_features=example.x.shape[1],
            num_labels=n_labels,
            problem_type=f"{kind}_label_classification",
            **settings,
        )
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"model settings: {' '.join(str(error).split())}") from error


def train_nodes(
    recipe: NodeRecipe, root: str | Path, output: str | Path, report: Callable[[str], None] = print
) -> dict[str, Any]:
    """Train a node classifier, keep the weights of the best validation epoch, and write them.

    Args:
        recipe: what to train.
        root: folder of the data sets.
        output: folder for the checkpoint, with the record of the run in `run.json`.
        report: gets one line per evaluation.

    Returns:
        The record.
    """
    task = NODE_TASKS[recipe.data]
    torch.manual_seed(recipe.seed)
    loaded = {split: task.load(Path(root), split) for split in SPLITS}
    config = node_config(task, loaded["train"][0], recipe.model)
    model = IGNNForNodeClassification(config)
    parts = {split: node_parts(config, loaded[split], split) for split in SPLITS}
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    best, weights, curve = -1.0, model.state_dict(), []
    start, cpu_start = time.perf_counter(), time.process_time()
    for epoch in range(1, recipe.epochs + 1):
        loss = _train_epoch(model, parts["train"], optimizer)
        if epoch % recipe.evaluate_every and epoch != recipe.epochs:
            continue
        figures = evaluate_parts(model, parts["validation"])
        curve.append({"epoch": epoch, "loss": round(loss, 5), **figures})
        shown = f"{task.figure} {figures[task.figure]:.4f}"
        report(f"{recipe.name} epoch {epoch}: loss {loss:.4f}, {shown}")
        if figures[task.figure] > best:
            best = figures[task.figure]
            weights = {key: value.clone() for key, value in model.state_dict().items()}
    record = {
        "recipe": dataclasses.asdict(recipe),
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu_start, 1),
        "curve": curve,
    }
    model.load_state_dict(weights)
    for part in (*parts["validation"], *parts["test"]):
        part.states = None  # the reported steps are those of a cold start
    record["validation"] = evaluate_parts(model, parts["validation"])
    record["test"] = evaluate_parts(model, parts["test"])
    model.eval().save_pretrained(output)
    (Path(output) / "run.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def _train_epoch(
    model: IGNNForNodeClassification, parts: list[NodePart], optimizer: torch.optim.Optimizer
) -> float:
    model.train()
    total = 0.0
    for i in torch.randperm(len(parts)).tolist():
        output = parts[i].run(model)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        model.project_()
        total += float(output.loss.detach())
    return total / len(parts)
