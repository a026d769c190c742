"""Training of node classifiers from a recipe: whole graphs, one optimiser step each.

A run's folder holds `model/` (the weights of the best validation epoch, and `run.json`, the run's
record), `snapshots/` (half-precision weights from initialisation to the end), and until the run is
finished `checkpoints/`, from which it can be resumed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from deqzoo.errors import UserError
from deqzoo.evaluation.graph_nodes import (
    NODE_TASKS,
    SPLITS,
    NodeTask,
    evaluate_parts,
    node_parts,
)
from deqzoo.files import mark_complete, replacing, restore
from deqzoo.models.ignn.configuration_ignn import IGNNConfig
from deqzoo.models.ignn.modeling_ignn import IGNNForNodeClassification
from deqzoo.training.checkpoints import (
    complete_checkpoints,
    differences,
    keep_newest,
    latest_checkpoint,
    refuse_changes,
)
from deqzoo.training.graphs import read_yaml
from deqzoo.training.run import make_folder, peak_memory, versions
from deqzoo.training.task import settings_checked

N_SNAPSHOTS = 10
SAVE_SECONDS = 60.0
"""Time between two states that a run can be resumed from."""


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
        for key, least in (("epochs", 1), ("evaluate_every", 1), ("lr", 0), ("weight_decay", 0)):
            if not getattr(recipe, key) >= least:
                raise UserError(f"{path}: {key} must be at least {least}")
        return recipe

    @staticmethod
    def describes(path: str | Path) -> bool:
        """Whether a file looks like such a recipe: its `data` is a name and not a mapping."""
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return False
        return isinstance(content, dict) and isinstance(content.get("data"), str)


def node_config(task: NodeTask, example: Any, settings: dict[str, Any]) -> IGNNConfig:
    """Return the configuration for a data set's sizes.

    Raises:
        UserError: settings that do not fit together.
    """
    n_labels = example.y.shape[1] if task.multi_label else int(example.y.max()) + 1
    kind = "multi" if task.multi_label else "single"
    with settings_checked(IGNNConfig, settings, "model"):
        return IGNNConfig(
            num_features=example.x.shape[1],
            num_labels=n_labels,
            problem_type=f"{kind}_label_classification",
            **settings,
        )


class NodeRun:
    """A node classifier in training.

    Args:
        recipe: what to train.
        root: folder of the data sets.

    Raises:
        UserError: data that cannot be read, or model settings that do not fit together.
    """

    def __init__(self, recipe: NodeRecipe, root: str | Path) -> None:
        self.recipe = recipe
        self.task = NODE_TASKS[recipe.data]
        torch.manual_seed(recipe.seed)
        loaded = {split: self.task.load(Path(root), split) for split in SPLITS}
        self.fingerprint = _fingerprint(loaded)
        config = node_config(self.task, loaded["train"][0], recipe.model)
        self.model = IGNNForNodeClassification(config)
        self.parts = {split: node_parts(config, loaded[split], split) for split in SPLITS}
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        self.epoch = 0
        self.best = -1.0
        self.weights = self._copy()
        self.curve: list[dict[str, float]] = []
        self.changes: list[dict[str, Any]] = []
        self.seconds = self.cpu_seconds = 0.0

    def describe(self) -> dict[str, Any]:
        """Sizes of model and data, without training anything."""
        graphs = [part.graphs for parts in self.parts.values() for part in parts]
        return {
            "name": self.recipe.name,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "largest_graph": max(g.features.shape[0] for g in graphs),
            "steps_per_epoch": len(self.parts["train"]),
            "epochs": self.recipe.epochs,
            "data_fingerprint": self.fingerprint,
        }

    def train(self, out: Path, progress: bool = True) -> dict[str, Any]:
        """Train the epochs that are left, and write the result.

        Returns:
            The record: recipe, curve on the validation part, figures of the best epoch's weights
            on the validation and test parts, times, versions and the data's fingerprint.
        """
        saved = time.monotonic()
        if self.epoch == 0:
            self._snapshot(out)
        bar = tqdm(
            total=self.recipe.epochs, initial=self.epoch, desc=self.recipe.name, unit="epoch",
            disable=not progress,
        )  # fmt: skip
        with bar:
            while self.epoch < self.recipe.epochs:
                bar.set_postfix(self.step())
                bar.update()
                if self.epoch in _snapshot_epochs(self.recipe.epochs):
                    self._snapshot(out)
                if time.monotonic() - saved > SAVE_SECONDS:
                    self.save(out / "checkpoints")
                    saved = time.monotonic()
        return self._finish(out)

    def step(self) -> dict[str, float]:
        """Train an epoch, evaluate where it is due, and return what was found."""
        start, cpu_start = time.perf_counter(), time.process_time()
        self.epoch += 1
        found = {"loss": round(self._train_epoch(), 5)}
        if self.epoch % self.recipe.evaluate_every == 0 or self.epoch == self.recipe.epochs:
            figures = evaluate_parts(self.model, self.parts["validation"])
            self.curve.append({"epoch": self.epoch, **found, **figures})
            found[self.task.figure] = figure = figures[self.task.figure]
            if figure > self.best:
                self.best, self.weights = figure, self._copy()
        self.seconds += time.perf_counter() - start
        self.cpu_seconds += time.process_time() - cpu_start
        return found

    def _train_epoch(self) -> float:
        self.model.train()
        parts = self.parts["train"]
        total = 0.0
        for i in torch.randperm(len(parts)).tolist():
            output = parts[i].run(self.model)
            self.optimizer.zero_grad()
            output.loss.backward()
            self.optimizer.step()
            self.model.project_()
            total += float(output.loss.detach())
        return total / len(parts)

    def _finish(self, out: Path) -> dict[str, Any]:
        record = {
            "recipe": dataclasses.asdict(self.recipe),
            "seconds": round(self.seconds, 1),
            "cpu_seconds": round(self.cpu_seconds, 1),
            "threads": torch.get_num_threads(),
            **peak_memory(),
            "versions": versions(),
            "data_fingerprint": self.fingerprint,
            **({"changes": self.changes} if self.changes else {}),
            "curve": self.curve,
        }
        self.model.load_state_dict(self.weights)
        for part in (*self.parts["validation"], *self.parts["test"]):
            part.states = None  # the reported steps are those of a cold start
        record["validation"] = evaluate_parts(self.model, self.parts["validation"])
        record["test"] = evaluate_parts(self.model, self.parts["test"])
        with replacing(out / "model") as fresh:
            self.model.eval().save_pretrained(fresh)
            (fresh / "run.json").write_text(json.dumps(record, indent=1) + "\n")
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        return record

    def _snapshot(self, out: Path) -> None:
        folder = out / "snapshots"
        folder.mkdir(parents=True, exist_ok=True)
        half = {name: t.half() for name, t in self.model.state_dict().items()}
        step = self.epoch * len(self.parts["train"])
        with replacing(folder / f"step-{step:07d}.safetensors") as fresh:
            save_file(half, fresh)
        self.model.config.architectures = [type(self.model).__name__]
        self.model.config.save_pretrained(folder)

    def _copy(self) -> dict[str, Tensor]:
        return {key: value.clone() for key, value in self.model.state_dict().items()}

    def save(self, folder: Path) -> None:
        """Write everything that decides how the run goes on, as a checkpoint of the folder."""
        state = {
            "conditions": self.conditions(),
            "recipe": dataclasses.asdict(self.recipe),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "states": {split: [p.states for p in parts] for split, parts in self.parts.items()},
            **{key: getattr(self, key) for key in _COUNTERS},
        }
        checkpoint = folder / f"checkpoint-{self.epoch}"
        checkpoint.mkdir(parents=True, exist_ok=True)
        torch.save(state, checkpoint / "state.pt")
        mark_complete(checkpoint)
        keep_newest(folder)

    def conditions(self) -> dict[str, Any]:
        """What, beside the recipe and the weights, decides how a run goes on."""
        return {"data": self.fingerprint, "threads": torch.get_num_threads()}

    def restore(self, checkpoint: Path, accept_changes: bool = False) -> None:
        """Go on from a checkpoint that `save` wrote.

        Raises:
            UserError: it belongs to another recipe; or it was made with other data or threads, and
                that is not accepted.
        """
        state = torch.load(checkpoint / "state.pt", weights_only=True)
        if state["recipe"] != dataclasses.asdict(self.recipe):
            out = checkpoint.parent.parent
            raise UserError(f"{out} holds a run of another recipe; choose another --output")
        changed = differences(state["conditions"], self.conditions())
        if changed:
            refuse_changes(checkpoint, changed, accept_changes)
            state["changes"].append({"epoch": state["epoch"], "changed": changed})
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        for split, parts in self.parts.items():
            for part, equilibria in zip(parts, state["states"][split], strict=True):
                part.states = equilibria
        for key in _COUNTERS:
            setattr(self, key, state[key])


_COUNTERS = ("epoch", "best", "weights", "curve", "seconds", "cpu_seconds", "changes")


def train_nodes(
    recipe: NodeRecipe,
    root: str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    progress: bool = True,
    accept_changes: bool = False,
) -> dict[str, Any]:
    """Train a node classifier and keep the weights of the best validation epoch.

    Args:
        recipe: what to train.
        root: folder of the data sets.
        out: folder of the run; the checkpoint is its folder `model`.
        resume: go on with a run that was cut off, or start if there is none.
        progress: show a progress bar.
        accept_changes: go on although data or threads are others than before; the record says so.

    Returns:
        The record, see `NodeRun.train`.

    Raises:
        UserError: the folder holds another run, or data or settings do not fit.
    """
    out = Path(out)
    checkpoints, finished = out / "checkpoints", out / "model" / "run.json"
    restore(out / "model")
    begun = bool(complete_checkpoints(checkpoints))
    if not resume and (begun or finished.exists()):
        raise UserError(f"{out} already holds a run; add --resume to go on, or remove it")
    if resume and finished.exists() and not begun:
        record = json.loads(finished.read_text(encoding="utf-8"))
        if record["recipe"] != dataclasses.asdict(recipe):
            raise UserError(f"{out} holds a run of another recipe; choose another --output")
        return record
    make_folder(out)
    run = NodeRun(recipe, root)
    last = latest_checkpoint(checkpoints)
    if last is not None:
        run.restore(Path(last), accept_changes)
    return run.train(out, progress)


def _snapshot_epochs(epochs: int) -> set[int]:
    return {round(i * epochs / (N_SNAPSHOTS - 1)) for i in range(N_SNAPSHOTS)}


def _fingerprint(loaded: dict[str, list[Any]]) -> str:
    """SHA-256 over features, edges, labels and masks of all splits."""
    digest = hashlib.sha256()
    for split, graphs in loaded.items():
        for graph in graphs:
            for name in ("x", "edge_index", "y", "train_mask", "val_mask", "test_mask"):
                value = getattr(graph, name, None)
                if value is not None:
                    digest.update(f"{split} {name} {tuple(value.shape)}".encode())
                    digest.update(value.detach().cpu().to_dense().contiguous().numpy().tobytes())
    return digest.hexdigest()
