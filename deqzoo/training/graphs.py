"""Training of single folds of the graph table."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from deqzoo.data.graphs import Fold, GraphSet
from deqzoo.errors import UserError
from deqzoo.models.ignn.configuration_ignn import IGNNConfig
from deqzoo.models.ignn.inputs import GraphBatch, graph_fields
from deqzoo.models.ignn.modeling_ignn import IGNNForGraphClassification
from deqzoo.models.ignn.symmetry import merge_equal_nodes
from deqzoo.training.recipe import from_plain, read_mapping

ADJOINT = {"name": "fixed_point", "max_steps": 300, "tol": 1e-3}

EVALUATION_TOL = 1e-5
"""Tolerance of the reported solves: no prediction should hang on where a solve stopped."""

METHODS: dict[str, dict[str, Any]] = {
    "implicit": {"name": "implicit", "solver": ADJOINT},
    "upg-5-0.5": {"name": "upg", "steps": 5, "damping": 0.5},
    "upg-5-1.0": {"name": "upg", "steps": 5, "damping": 1.0},
    "npg-5-0.5": {"name": "npg", "steps": 5, "damping": 0.5},
}
"""Columns of the graph table: how the equilibria are differentiated."""


_Settings = TypeVar("_Settings")


def read_yaml(cls: type[_Settings], path: str | Path) -> _Settings:
    """Read a YAML mapping into a dataclass.

    Raises:
        UserError: missing or damaged file, unknown or missing keys, values of a wrong type.
    """
    content = read_mapping(Path(path))
    try:
        return from_plain(cls, content, "")
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error


@dataclass(frozen=True)
class FoldSettings:
    """How one fold is trained; the defaults are the published protocol.

    Attributes:
        epochs: passes over the training part.
        batch_size: graphs per step; batches are the same in every epoch, as published.
        lr: of Adam.
        halve_after: epochs after which the learning rate is halved, once.
        tol: relative residual per graph at which a solve stops.
        warm_start: start each solve at the equilibrium that the same batch had in the epoch
            before. The equilibrium is unique, so only the number of steps changes.
        seed: of a fold's weights and dropout; the fold's number is added.
    """

    epochs: int = 200
    batch_size: int = 128
    lr: float = 1e-3
    halve_after: int = 50
    tol: float = 1e-3
    warm_start: bool = True
    seed: int = 42

    @classmethod
    def read(cls, path: str | Path) -> FoldSettings:
        """Read a YAML file with these settings.

        Raises:
            UserError: missing or damaged file, or unknown keys.
        """
        return read_yaml(cls, path)


@dataclass
class FoldRecord:
    """What one fold gave. Curves have one entry per epoch.

    Attributes:
        train_loss: mean training loss of the epoch.
        test_accuracy: on the fold's test part; with A + A^T, as the published code evaluates,
            where there is no validation part, else with the adjacency of training.
        validation_accuracy: empty without a validation part; likewise `validation_loss`.
        steps: solver updates per graph and layer in training, the mean.
        unconverged: share of training graphs above the tolerance in any layer.
        seconds: wall-clock time of training alone; `evaluation_seconds` that of evaluation.
        peak_memory_mib: largest resident memory of the process.
        chosen_test_accuracy: of the epoch that validation chose, solved to `EVALUATION_TOL`.
    """

    train_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    validation_accuracy: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    unconverged: list[float] = field(default_factory=list)
    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory_mib: float = 0.0
    parameters: int = 0
    chosen_test_accuracy: float | None = None

    @property
    def chosen_epoch(self) -> int:
        """Epoch (from 0) with the best validation accuracy; ties go to the lower loss."""
        keys = zip(self.validation_accuracy, (-x for x in self.validation_loss), strict=True)
        ranked = list(keys)
        return max(range(len(ranked)), key=ranked.__getitem__)


class _Part:
    """A fixed batch with its labels and the equilibria of the last call on it."""

    def __init__(self, graphs: GraphBatch, labels: Tensor) -> None:
        self.graphs = graphs
        self.labels = labels
        self.states: tuple[Tensor, ...] | None = None

    def run(self, model: IGNNForGraphClassification, settings: FoldSettings) -> Any:
        output = model(
            self.graphs,
            labels=self.labels,
            initial_states=self.states,
            output_hidden_states=settings.warm_start,
        )
        self.states = output.hidden_states
        return output


def class_settings(data: GraphSet) -> dict[str, Any]:
    """Settings of `IGNNConfig` that say what a set's classes and features stand for."""
    if data.encoding is None:
        return {"num_labels": data.num_classes}
    names = [str(label) for label in data.encoding.classes]
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
        "graph_encoding": data.encoding.to_dict(),
    }


class FoldRun:
    """Trains a new model on one fold and records its curves.

    Args:
        data: the graph set.
        fold: indices of its parts.
        method: a key of `METHODS`.
        settings: of the training.
        number: the fold's number, added to the seed.
    """

    def __init__(
        self, data: GraphSet, fold: Fold, method: str, settings: FoldSettings, number: int
    ) -> None:
        torch.manual_seed(settings.seed + number)
        self.settings = settings
        config = IGNNConfig(
            num_features=data.num_features,
            **class_settings(data),
            solver={"tol": settings.tol},
            gradient=METHODS[method],
        )
        self.model = IGNNForGraphClassification(config)
        self.best_weights: dict[str, Tensor] | None = None
        size = settings.batch_size
        chunks = [fold.train[i : i + size] for i in range(0, len(fold.train), size)]
        self.train_parts = [self._part(data, chunk) for chunk in chunks]
        # Without a validation part this is the published protocol, which evaluates with A + A^T.
        self.test = self._part(data, fold.test, symmetrize=not fold.validation)
        self.validation = self._part(data, fold.validation) if fold.validation else None
        self.record = FoldRecord(parameters=sum(p.numel() for p in self.model.parameters()))

    def _part(self, data: GraphSet, index: Sequence[int], symmetrize: bool = False) -> _Part:
        batch = data.batch(index)
        fields = graph_fields(batch)
        graphs = GraphBatch.build(self.model.config, **fields, symmetrize=symmetrize)
        return _Part(merge_equal_nodes(graphs), batch.y)

    def run(self) -> FoldRecord:
        """Train all epochs."""
        settings, record = self.settings, self.record
        optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.lr, fused=True)
        cpu_start = time.process_time()
        for epoch in range(settings.epochs):
            if epoch == settings.halve_after:
                optimizer.param_groups[0]["lr"] = settings.lr / 2
            start = time.perf_counter()
            self._train_epoch(optimizer)
            middle = time.perf_counter()
            self._evaluate(epoch)
            record.seconds += middle - start
            record.evaluation_seconds += time.perf_counter() - middle
        record.cpu_seconds = time.process_time() - cpu_start
        self._measure_chosen()
        record.peak_memory_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return record

    @torch.inference_mode()
    def _measure_chosen(self) -> None:
        """Load the chosen epoch's weights and test them with a tight solve from a cold start.

        The tolerance stays with the model, so that a checkpoint repeats the figure.
        """
        if self.best_weights is None:
            return
        self.model.load_state_dict(self.best_weights)
        self.model.set_solver(tol=EVALUATION_TOL)
        self.model.eval()
        self.test.states = None
        output = self.test.run(self.model, self.settings)
        self.record.chosen_test_accuracy = _accuracy(self.test, output)

    def _train_epoch(self, optimizer: torch.optim.Optimizer) -> None:
        self.model.train()
        n_layers = len(self.model.config.hidden_sizes)
        loss_sum = steps = unconverged = n = 0.0
        for part in self.train_parts:
            output = part.run(self.model, self.settings)
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            self.model.project_()
            size = len(part.labels)
            n += size
            loss_sum += float(output.loss.detach()) * size
            steps += float(output.n_steps.sum()) / n_layers
            unconverged += float((~output.converged).sum())
        self.record.train_loss.append(loss_sum / n)
        self.record.steps.append(steps / n)
        self.record.unconverged.append(unconverged / n)

    @torch.inference_mode()
    def _evaluate(self, epoch: int) -> None:
        self.model.eval()
        record = self.record
        record.test_accuracy.append(_accuracy(self.test, self.test.run(self.model, self.settings)))
        if self.validation is None:
            return
        output = self.validation.run(self.model, self.settings)
        record.validation_accuracy.append(_accuracy(self.validation, output))
        record.validation_loss.append(float(output.loss))
        if record.chosen_epoch == epoch:
            state = self.model.state_dict()
            self.best_weights = {key: value.clone() for key, value in state.items()}


def _accuracy(part: _Part, output: Any) -> float:
    return float((output.logits.argmax(1) == part.labels).double().mean())
