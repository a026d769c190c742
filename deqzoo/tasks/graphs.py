"""Graphs in the engine of recipes: fixed batches, each solve from where its last one ended."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deqzoo.data.graphs import (
    Fold,
    GraphSet,
    collate_graphs,
    honest_folds,
    load_graph_set,
    load_own_graphs,
    published_folds,
)
from deqzoo.data.own import HELD_OUT, graph_digests, stratified, three_parts, write_record
from deqzoo.errors import UserError
from deqzoo.models.ignn.configuration_ignn import IGNNConfig
from deqzoo.models.ignn.inputs import GraphBatch, graph_fields
from deqzoo.models.ignn.sparse import Adjacency, SparseMatrix
from deqzoo.models.ignn.symmetry import merge_equal_nodes
from deqzoo.models.names import family_class
from deqzoo.recipe import Recipe, Stage
from deqzoo.tasks.base import (
    Plan,
    Probe,
    Task,
    build_config,
    check_options,
    class_names,
    epoch_order,
    own_path,
)
from deqzoo.tasks.finetuning import LEAST_STEPS, Job, Settings
from deqzoo.tasks.metrics import best_threshold, classification_figures, joined_summary
from deqzoo.zoo import read_json

OWN = "graphs"
"""Name of graphs of one's own in a recipe."""
FOLD = "fold.json"
"""In a checkpoint: the data set, and the indices of its parts, that it was trained on."""
PROTOCOLS = {"honest": honest_folds, "published": published_folds}
IGNORED = -100
"""Label of what no loss and no figure counts."""


@dataclass
class GraphPart:
    """A fixed batch.

    Attributes:
        graphs: normalised and checked.
        labels: of graphs or nodes, (r,) int64 or (r, c) of 0 and 1.
        mask: (r,) bool, which of them count; None for all.
    """

    graphs: GraphBatch
    labels: Tensor
    mask: Tensor | None = None

    @property
    def rows(self) -> Any:
        """Index of the rows that count."""
        return slice(None) if self.mask is None else self.mask

    def inputs(self, like: Tensor) -> dict[str, Any]:
        """Keyword arguments of a model; the part moves to the device of the tensor `like`."""
        if self.labels.device != like.device:
            self.graphs, self.labels = self.graphs.to(like), self.labels.to(like.device)
            self.mask = None if self.mask is None else self.mask.to(like.device)
        inputs: dict[str, Any] = {"x": self.graphs, "labels": self.labels}
        return inputs if self.mask is None else {**inputs, "mask": self.mask}


def read_fold(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The data set of a checkpoint, and the indices of its parts where the set has none of its own.

    Raises:
        UserError: its folder does not say.
    """
    file, old = Path(folder) / FOLD, Path(folder) / "run.json"
    if file.is_file():
        return read_json(file)
    recipe = read_json(old).get("recipe", {}) if old.is_file() else {}  # of nodes, in version 0.1
    if "data" not in recipe:
        raise UserError(f"no {file}: this checkpoint does not say what it was trained on")
    return {"data": recipe["data"]}


class GraphTask(Task, ABC):
    """What the tasks on graphs share: a model with a norm bound, batches that are made once.

    Every batch keeps its equilibria, at which its next solve begins: they are unique, so that only
    the number of steps changes.

    Raises:
        UserError: settings that graphs do not have, several processes, or data that do not fit.
    """

    metric = "accuracy"
    head = ""
    of_nodes = False
    """Whether labels are those of nodes."""
    one_process = True
    shuffled = False
    """Whether an epoch takes the batches in an order of its own."""

    def __init__(
        self, recipe: Recipe, data: str | os.PathLike[str] | None, stand_in: bool = False
    ) -> None:
        for key in ("label_smoothing", "whiten", "augment", "compile"):
            if getattr(recipe, key):
                raise UserError(f"{key} is no setting of graphs; remove it")
        for number, stage in enumerate(recipe.stages):
            for key in ("resolution", "shallow", "jacobian"):
                if getattr(stage, key):
                    raise UserError(f"stages[{number}].{key} is no setting of graphs; remove it")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("graphs are trained by one process; start it without torchrun")
        if data is None and not recipe.data.path:
            raise UserError("graphs are read from a local folder: name it with --data")
        self.recipe = recipe
        self.record: dict[str, Any] | None = None
        self.fold: dict[str, Any] | None = None
        self.training: list[GraphPart] = []
        self.validation: list[GraphPart] = []
        self.states: dict[int, tuple[Tensor, ...]] = {}
        self._part = 0
        self._load(Path(own_path(recipe, data)))

    config: IGNNConfig

    @abstractmethod
    def _load(self, root: Path) -> None:
        """Fill in the configuration, the parts, and what identifies them."""

    def _config(self, **sizes: Any) -> Any:
        return build_config(
            family_class(self.recipe.model.family, "Config"), self.recipe.model, **sizes
        )

    def model(self) -> PreTrainedModel:
        return family_class(self.recipe.model.family, self.head)(self.config)

    @property
    def solves(self) -> int:
        """Equilibria of a forward pass, whose steps an output adds up."""
        return len(self.config.hidden_sizes) + bool(self.config.implicit_head)

    def steps_per_epoch(self, stage: Stage) -> int:
        return -(-len(self.training) // self.recipe.accumulate)

    def batch(self, plan: Plan, micro_step: int, rank: int, world: int) -> dict[str, Any]:
        """The number of a part, and its labels."""
        step, part = divmod(micro_step, plan.accumulate)
        epoch, position = plan.position(step)
        order = self.order(epoch)
        number = int(order[(position * plan.accumulate + part) % len(order)])
        return {"part": number, "labels": self.training[number].labels}

    def order(self, epoch: int) -> Tensor:
        """Numbers of the parts (n,) int64 as an epoch takes them."""
        if not self.shuffled:
            return torch.arange(len(self.training))
        return epoch_order(self.recipe.seed, epoch, len(self.training))

    def resident(self, device: torch.device) -> ResidentGraphs:
        """The training batches on a device, for steps that never wait for it."""
        return ResidentGraphs(self, device)

    def before_forward(self, model: PreTrainedModel, batch: dict[str, Any]) -> dict[str, Any]:
        batch = dict(batch)
        self._part = batch.pop("part")
        like = next(model.parameters())
        states = self.states.get(self._part)
        return {
            **batch,
            **self.training[self._part].inputs(like),
            "initial_states": None if states is None else [state.to(like) for state in states],
            "output_hidden_states": True,
        }

    def after_forward(self, outputs: Any) -> None:
        self.states[self._part] = outputs.hidden_states

    def state_dict(self) -> dict[str, Any]:
        return {str(i): [state.cpu() for state in states] for i, states in self.states.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.states = {int(i): tuple(states) for i, states in state.items()}

    @torch.no_grad()
    def evaluate(self, model: PreTrainedModel, stage: Stage, samples: int) -> dict[str, float]:
        """Figures and the solver's report of the validation part, each solve from a cold start.

        With several labels per sample, those above the best threshold are named; the threshold is
        stored in the model's configuration.
        """
        like, logits, labels, reports = next(model.parameters()), [], [], []
        for part in self.validation:
            inputs = part.inputs(like)
            output = model(inputs["x"])
            logits.append(output.logits[part.rows].float().cpu())
            labels.append(part.labels[part.rows].cpu())
            reports.append([t.cpu() for t in (output.n_steps, output.residual, output.converged)])
            if sum(map(len, labels)) >= samples:
                break
        answers, truth, threshold = torch.cat(logits), torch.cat(labels), 0.5
        if truth.ndim == 2:
            threshold = model.config.decision_threshold = best_threshold(answers, truth)
        return {**classification_figures(answers, truth, threshold), **joined_summary(reports)}

    def probe(self, model: PreTrainedModel, stage: Stage, n: int = 1) -> Probe:
        """The maps of all layers together, of n copies of a training graph of median size."""
        like = next(model.parameters())
        graphs = repeated(self._typical_graph(), n).to(like)
        base: Any = model.base_model
        x, maps = graphs.features, list[Any]()
        for layer in base.layers:
            maps.append(layer(x, graphs.adjacency, base.radius(graphs)))
            x = maps[-1].injection

        def f(states: Sequence[Tensor]) -> list[Tensor]:
            return [layer_map(state) for layer_map, state in zip(maps, states, strict=True)]

        return Probe(f, [layer_map.injection for layer_map in maps], partial(model, graphs))

    @abstractmethod
    def _typical_graph(self) -> GraphBatch:
        """A training graph of median size."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Data set, splits and fingerprints."""

    def save_processor(self, folder: str) -> None:
        if self.record is not None:
            write_record(Path(folder), self.record)
        if self.fold is not None:
            (Path(folder) / FOLD).write_text(json.dumps(self.fold) + "\n", encoding="utf-8")


def published_fold(
    root: Path, name: str, *, fold: int = 0, protocol: str = "honest"
) -> tuple[GraphSet, Fold]:
    """One of the ten folds of a published set.

    Raises:
        UserError: no such fold, protocol or set.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"data.options.protocol must be {' or '.join(PROTOCOLS)}, got {protocol!r}")
    graphs = load_graph_set(name, root)
    folds = PROTOCOLS[protocol](graphs.labels)
    if fold >= len(folds):
        raise UserError(f"data.options.fold must be below {len(folds)}, got {fold}")
    return graphs, folds[fold]


def own_fold(
    path: Path, name: str, *, held_out: float = HELD_OUT, seed: int = 0
) -> tuple[GraphSet, Fold]:
    """Graphs of one's own, a share of every class held out.

    Raises:
        UserError: they cannot be read, or there is nothing to learn or to hold out.
    """
    if not isinstance(held_out, (int, float)) or not 0 < held_out < 1:
        raise UserError(f"data.options.held_out must be a share in (0, 1), got {held_out!r}")
    graphs = _learnable_graphs(path)
    digests = graph_digests(graphs.graphs)
    rows, held_out_rows = stratified(graphs.labels, held_out, seed, digests)
    if not held_out_rows:
        raise UserError(f"{graphs.name} has one graph of each class; give at least two")
    # In the order of their classes the first samples of a validation would be of one class.
    held_out_rows = sorted(held_out_rows, key=digests.__getitem__)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return graphs, Fold([rows[i] for i in order], held_out_rows, [])


def _learnable_graphs(path: str | Path) -> GraphSet:
    graphs = load_own_graphs(path)
    if len(graphs.labels.unique()) < 2:
        raise UserError(f"{graphs.name} holds graphs of one class; at least two are needed")
    return graphs


class GraphClassificationTask(GraphTask):
    """Classes of graphs: a fold of a published set, or graphs of one's own.

    Batches are the same in every epoch, as published, and hold one row per set of nodes whose
    states are equal after any number of steps. Without a validation part (the published protocol)
    the test part takes its place, evaluated with A + A^T.
    """

    head = "ForGraphClassification"

    def _load(self, root: Path) -> None:
        name, options = self.recipe.data.name, self.recipe.data.options
        load = own_fold if name == OWN else published_fold
        check_options(load, options)
        self.graphs, fold = load(root, name, **options)
        self.config = self._config(
            num_features=self.graphs.num_features, **class_settings(self.graphs)
        )
        self.graphs.require_readable(self.config)
        held_out = fold.validation or fold.test
        self.training = self._parts(fold.train)
        self.validation = self._parts(held_out, symmetrize=not fold.validation)
        digests = graph_digests(self.graphs.graphs)
        self.fingerprints = {
            split: hashlib.sha256("".join(digests[i] for i in index).encode()).hexdigest()
            for split, index in (("train", fold.train), ("validation", held_out))
        }
        self.counts = {"train": len(fold.train), "validation": len(held_out)}
        self.sizes = [(self.graphs.graphs[i].num_nodes, i) for i in fold.train]
        if name == OWN:
            train_digests = [digests[i] for i in fold.train]
            self.record = {"kind": "graphs", "name": self.graphs.name, "train": train_digests}
            if self.recipe.evaluation.keep == "best":
                self.record |= {"one_hold_out": True, "validation": [digests[i] for i in held_out]}
        else:
            parts = {"train": fold.train, "validation": fold.validation, "test": fold.test}
            fold_options = {"protocol": "honest", "fold": 0, **options}
            self.fold = {"data": self.graphs.name, **fold_options, **parts}

    def _parts(self, index: Sequence[int], symmetrize: bool = False) -> list[GraphPart]:
        size = self.recipe.batch_size
        chunks = [index[i : i + size] for i in range(0, len(index), size)]
        return [self._part_of(chunk, symmetrize) for chunk in chunks]

    def _part_of(self, index: Sequence[int], symmetrize: bool = False) -> GraphPart:
        batch = self.graphs.batch(index)
        graphs = GraphBatch.build(self.config, **graph_fields(batch), symmetrize=symmetrize)
        return GraphPart(merge_equal_nodes(graphs), batch.y)

    def _typical_graph(self) -> GraphBatch:
        _, number = sorted(self.sizes)[len(self.sizes) // 2]
        return self._part_of([number]).graphs

    def describe(self) -> dict[str, Any]:
        return {
            split: {
                "name": self.graphs.name.lower(),
                "split": split,
                "graphs": self.counts[split],
                "fingerprint": self.fingerprints[split],
            }
            for split in ("train", "validation")
        }


def class_settings(data: GraphSet) -> dict[str, Any]:
    """Settings of a configuration that say what a set's classes and features stand for."""
    if data.encoding is None:
        return {"num_labels": data.num_classes}
    names = [str(label) for label in data.encoding.classes]
    return {**class_names(names), "graph_encoding": data.encoding.to_dict()}


def repeated(graphs: GraphBatch, n: int) -> GraphBatch:
    """A batch of n copies of a batch."""
    if n == 1:
        return graphs
    rows, count, adjacency = graphs.features.shape[0], graphs.n_graphs, graphs.adjacency
    index = torch.cat([adjacency.index + i * rows for i in range(n)], 1)
    return GraphBatch(
        torch.cat([graphs.features] * n),
        Adjacency(index, adjacency.values.repeat(n), n * rows),
        torch.cat([graphs.index + i * count for i in range(n)]),
        n * count,
        None if graphs.counts is None else graphs.counts.repeat(n),
    )


class ResidentGraphs:
    """Batches of graphs on a device, padded to one size by a last graph; implements `Resident`.

    Args:
        task: its training parts and model.
        device: where they live. Sparse features become dense ones.
    """

    def __init__(self, task: GraphTask, device: torch.device) -> None:
        self.task = task
        graphs = [part.graphs for part in task.training]
        adjacencies = [batch.adjacency for batch in graphs]
        self.rows = 1 + max(batch.features.shape[0] for batch in graphs)
        self.entries = max(len(adjacency.values) for adjacency in adjacencies)
        self.n_graphs = 1 + max(batch.n_graphs for batch in graphs)
        self.symmetric = all(adjacency.is_symmetric for adjacency in adjacencies)
        needs_radius = task.config.known_radius is None
        self.radius = (
            max(adjacency.spectral_radius for adjacency in adjacencies) if needs_radius else 0.0
        )
        padded_parts = [self._padded_tensors(part) for part in task.training]
        self.parts = {
            key: torch.stack([tensors[key] for tensors in padded_parts]).to(device)
            for key in padded_parts[0]
        }
        widths: list[Any] = list(task.config.hidden_sizes)
        widths += [task.config.num_labels] if task.config.implicit_head else []
        self.states = [torch.zeros(len(padded_parts), self.rows, m, device=device) for m in widths]
        self._number = torch.zeros(1, dtype=torch.int64, device=device)

    def _padded_tensors(self, part: GraphPart) -> dict[str, Tensor]:
        """The tensors of a part; the padding belongs to the last row and the last graph."""
        graphs, of_nodes = part.graphs, self.task.of_nodes
        x, n = graphs.features.to_dense(), graphs.features.shape[0]
        mask = torch.ones(len(part.labels), dtype=torch.bool) if part.mask is None else part.mask
        size = self.rows if of_nodes else self.n_graphs
        tensors = {
            "features": _pad(x, self.rows),
            "index": _pad(graphs.index, self.rows, self.n_graphs - 1),
            "labels": _pad(part.labels, size, 0 if part.labels.ndim == 2 else IGNORED),
            "mask": _pad(mask, size),
        }
        if not of_nodes:
            counts = x.new_ones(n) if graphs.counts is None else graphs.counts
            tensors["counts"] = _pad(counts, self.rows)
        matrices: dict[str, SparseMatrix] = {"": graphs.adjacency}
        if not self.symmetric:
            matrices["transposed_"] = graphs.adjacency.transposed
        for prefix, matrix in matrices.items():
            starts = _pad(matrix.csr.crow_indices(), self.rows + 1, len(matrix.values))
            starts[-1] = self.entries
            columns = _pad(matrix.index.T, self.entries, self.rows - 1).T
            values = _pad(matrix.values, self.entries)
            tensors |= {f"{prefix}starts": starts, f"{prefix}entries": columns}
            tensors[f"{prefix}values"] = values
        return tensors

    def epoch(self, number: int, stage: Stage) -> Tensor:
        """Numbers of the parts that each step of an epoch takes, (steps, accumulate) int64."""
        order, accumulate = self.task.order(number), self.task.recipe.accumulate
        steps = self.task.steps_per_epoch(stage)
        index = torch.arange(steps * accumulate) % len(order)
        return order[index].reshape(steps, accumulate).to(self._number.device)

    def inputs(self, rows: Tensor, epoch: Tensor, stage: Stage) -> dict[str, Any]:
        """The part of number `rows` (1,), padded, and the equilibria that it had last."""
        tensors = {
            key: tensor.index_select(0, rows).squeeze(0) for key, tensor in self.parts.items()
        }
        self._number = rows

        def matrix(prefix: str, transposed: Adjacency | None = None) -> Adjacency:
            entries, starts = tensors[f"{prefix}entries"], tensors[f"{prefix}starts"]
            values = tensors[f"{prefix}values"]
            return Adjacency.of_rows(entries, starts, values, self.rows, transposed, self.radius)

        transposed_matrix = None if self.symmetric else matrix("transposed_")
        graphs = GraphBatch(
            tensors["features"], matrix("", transposed_matrix), tensors["index"], self.n_graphs,
            tensors.get("counts"),
        )  # fmt: skip
        inputs = {
            "x": graphs,
            "labels": tensors["labels"],
            "initial_states": [states.index_select(0, rows).squeeze(0) for states in self.states],
            "output_hidden_states": True,
        }
        return {**inputs, "mask": tensors["mask"]} if self.task.of_nodes else inputs

    @torch.no_grad()
    def keep(self, outputs: Any) -> None:
        """Take over the equilibria of a step."""
        for states, new_states in zip(self.states, outputs.hidden_states, strict=True):
            new_states = new_states.to(states.dtype).nan_to_num(0.0, 0.0, 0.0)
            states.index_copy_(0, self._number, new_states.unsqueeze(0))

    def tensors(self) -> list[Tensor]:
        """The equilibria, for checkpoints."""
        return self.states


def _pad(tensor: Tensor, n: int, value: float = 0) -> Tensor:
    """A tensor with its first axis lengthened to n."""
    filled_tensor = tensor.new_full((n, *tensor.shape[1:]), value)
    filled_tensor[: len(tensor)] = tensor
    return filled_tensor


def finetuning(load: Callable[..., Any], data: str | Path, settings: Settings) -> Job:
    """A graph classifier and graphs of one's own for it, divided class by class.

    Raises:
        UserError: fewer than two classes, or no class with two graphs.
    """
    graphs = _learnable_graphs(data)
    model = load(
        num_features=graphs.num_features, **class_settings(graphs), ignore_mismatched_sizes=True
    )
    graphs.require_readable(model.config)
    share, digests = settings.held_out, graph_digests(graphs.graphs)
    rows, validation, test = three_parts(graphs.labels, share, share / 2, settings.seed, digests)
    if not test:
        raise UserError(f"{graphs.name} has one graph of each class; give at least two")
    counts = np.bincount(graphs.labels.numpy())
    names = graphs.encoding.classes if graphs.encoding else range(len(counts))
    class_counts = ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))
    return Job(
        model=model,
        train=[graphs.graphs[i] for i in rows],
        held_out=[graphs.graphs[i] for i in validation or test],
        collate=collate_graphs,
        save_processor=lambda folder: None,
        record={
            "kind": "graphs",
            "name": graphs.name,
            "train": [digests[i] for i in rows],
            "validation": [digests[i] for i in validation or test],
            "one_hold_out": not validation,
        },
        last_layers=("dense", "classifier"),
        lr=5e-3,
        least_steps=4 * LEAST_STEPS,  # they are cheap, and 200 left rings, paths and stars mixed
        unit="graphs",
        n_test=len(test) if validation else 0,
        notes=[f"graphs of the classes {class_counts}"],
    )
