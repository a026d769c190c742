"""What a training run needs to know about a kind of data."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from deqzoo.errors import UserError, as_user_error
from deqzoo.recipe import Model, Recipe, Stage

_Config = TypeVar("_Config", bound=PreTrainedConfig)


class Task(Protocol):
    """Data, model and metrics of a recipe. One object serves one run.

    Methods with a body are defaults that a class which derives from this one inherits.
    """

    metric: str
    """Validation figure that says which weights are better, a key of `METRICS`."""
    one_process: bool = False
    """Whether several processes cannot train it together."""

    def model(self) -> PreTrainedModel:
        """A new model, initialised from the global random state."""
        ...

    def steps_per_epoch(self, stage: Stage) -> int:
        """Optimiser steps of one epoch."""
        ...

    def batch(self, plan: Plan, micro_step: int, rank: int, world: int) -> dict[str, Any]:
        """The keyword arguments of the model for one micro-batch of one process.

        A function of its arguments and the recipe's seed alone, so that a resumed run sees the
        same batches.
        """
        ...

    def resident(self, device: torch.device) -> Resident:
        """The training data on a device, for steps that never wait for it."""
        ...

    def loss(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        """The training loss of a forward pass."""
        return outputs.loss

    def forward_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What the model takes of a batch; the rest is for `loss`."""
        return batch

    def before_forward(self, model: PreTrainedModel, batch: dict[str, Any]) -> dict[str, Any]:
        """Add to a batch the state that earlier steps left (a language model's memory)."""
        return batch

    def after_forward(self, outputs: Any) -> None:
        """Keep what the next step needs."""
        return

    def state_dict(self) -> dict[str, Any]:
        """Tensors that a checkpoint must hold beside the Trainer's own."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        return

    @property
    def solves(self) -> int:
        """Equilibria of a forward pass, one after another; an output's steps are their sum."""
        return 1

    def sample_size(self, stage: Stage) -> int:
        """Samples, as `evaluate` counts them, in one sample of a batch: words of a text segment."""
        return 1

    def evaluate(self, model: PreTrainedModel, stage: Stage, samples: int) -> dict[str, float]:
        """Validation figures, the metric and the solver's report among them."""
        ...

    def probe(self, model: PreTrainedModel, stage: Stage, n: int = 1) -> Probe:
        """A few samples of a stage, to count what a training step costs."""
        ...

    def describe(self) -> dict[str, Any]:
        """Data set, splits and fingerprints, for the record."""
        ...

    def save_processor(self, folder: str) -> None:
        """Write the image processor or tokenizer beside the weights."""
        ...


class Resident(Protocol):
    """Training data that live on the device, and what one step leaves to the next.

    `inputs` and `keep` read no tensor on the host and make no shape that depends on a value: they
    are captured with the step. Draws come from the device's own generator.
    """

    def epoch(self, number: int, stage: Stage) -> Tensor:
        """The `rows` of `inputs` for every optimiser step of an epoch, (steps, ...) int64."""
        ...

    def inputs(self, rows: Tensor, epoch: Tensor, stage: Stage) -> dict[str, Any]:
        """Keyword arguments of the model for some rows of a step, "labels" among them."""
        ...

    def keep(self, outputs: Any) -> None:
        """Write what the next step needs into tensors that stay (a language model's memory)."""
        ...

    def tensors(self) -> list[Tensor]:
        """Those tensors, for checkpoints."""
        ...


@dataclass(frozen=True)
class Probe:
    """The map of some samples, the state it starts from, and a forward of the whole model.

    `forward` takes `solver` and `gradient`, as the model does. Where a model solves several
    equilibria one after another, `f` is the maps of all.
    """

    f: Callable[[Any], Any]
    state: Any
    forward: Callable[..., Any]


@dataclass(frozen=True)
class Plan:
    """Where each stage of a run begins and ends, in optimiser steps."""

    stages: tuple[Stage, ...]
    starts: tuple[int, ...]
    steps_per_epoch: tuple[int, ...]
    accumulate: int
    total: int

    @classmethod
    def of(cls, recipe: Recipe, task: Task) -> Plan:
        per_epoch = tuple(task.steps_per_epoch(stage) for stage in recipe.stages)
        if not all(per_epoch):
            size = recipe.batch_size * recipe.accumulate
            raise UserError(f"a batch of {size} is more than the training data hold")
        lengths = [
            max(1, round(stage.epochs * n))
            for stage, n in zip(recipe.stages, per_epoch, strict=True)
        ]
        starts = _running_sum(lengths)
        return cls(recipe.stages, starts[:-1], per_epoch, recipe.accumulate, starts[-1])

    def index(self, step: int) -> int:
        """Number of the stage that an optimiser step belongs to; the last one beyond the end."""
        return max(i for i, start in enumerate(self.starts) if start <= max(step, 0))

    def stage(self, step: int) -> Stage:
        return self.stages[self.index(step)]

    def position(self, step: int) -> tuple[int, int]:
        """Number of the epoch that an optimiser step belongs to, and of the step in that epoch."""
        per_epoch = self.steps_per_epoch[self.index(step)]
        epoch = int(self.epoch(step) + 1e-9)
        return epoch, round((self.epoch(step) - epoch) * per_epoch) % per_epoch

    def epoch(self, step: int) -> float:
        """Epochs trained before an optimiser step, over all stages."""
        epochs = 0.0
        for i, start in enumerate(self.starts):
            end = self.starts[i + 1] if i + 1 < len(self.starts) else self.total
            epochs += max(0, min(step, end) - start) / self.steps_per_epoch[i]
        return epochs


def build_config(kind: type[_Config], model: Model, **sizes: Any) -> _Config:
    """The configuration of a recipe's model: its preset, sizes from the data, and its overrides.

    Raises:
        UserError: unknown preset or setting, settings that do not fit together, or overrides that
            contradict the data.
    """
    with settings_checked(kind, model.overrides, "model.overrides"):
        settings = sizes | model.overrides
        family: Any = kind
        config: Any = (
            family.from_preset(model.preset, **settings) if model.preset else kind(**settings)
        )
    override_names = {kind.attribute_map.get(name, name) for name in model.overrides}
    if override_names & {"id2label", "label2id"}:
        override_names.add("num_labels")  # which their length decides
    for name in sizes:
        if name in override_names and getattr(config, name) != sizes[name]:
            raise UserError(
                f"model.overrides change {name}, which the data decide: leave it out of the recipe"
            )
    return config


def class_names(names: Sequence[str]) -> dict[str, Any]:
    """Settings of a configuration that name its classes."""
    label2id = {name: number for number, name in enumerate(names)}
    return {"num_labels": len(names), "id2label": dict(enumerate(names)), "label2id": label2id}


@contextmanager
def settings_checked(
    kind: type[PreTrainedConfig], settings: Mapping[str, Any], place: str
) -> Iterator[None]:
    """Refuse settings that a configuration class does not have, and report those that it refuses.

    The class itself stores unknown settings without a word, as the library allows.

    Raises:
        UserError: the message names the place.
    """
    valid_names = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    for name in settings:
        if name not in valid_names | {"num_labels"}:
            raise UserError(f"unknown key {place}.{name}; it is no setting of {kind.__name__}")
    with as_user_error("model settings", ValueError, TypeError, StrictDataclassError):
        yield


def check_options(load: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuse data options that a loader does not have.

    Raises:
        UserError: unknown option, or a value of another type than a whole number.
    """
    parameters = inspect.signature(load).parameters
    valid_names = [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name, value in options.items():
        if name not in valid_names:
            raise UserError(
                f"unknown key data.options.{name}; valid keys are {', '.join(valid_names)}"
            )
        if isinstance(parameters[name].default, int) and (type(value) is not int or value < 0):
            raise UserError(f"data.options.{name} must be a whole number, got {value!r}")


def own_path(recipe: Recipe, data: str | os.PathLike[str] | None) -> str:
    """Where data of one's own are: --data, else the recipe's `data.path`.

    Raises:
        UserError: neither says.
    """
    path = recipe.data.path if data is None else str(data)
    if not path:
        raise UserError(f"say where the {recipe.data.name} is: data.path in the recipe, or --data")
    return path


def mixed_seed(*numbers: int) -> int:
    """A seed from several numbers, equal on every platform."""
    seed = 0x9E3779B97F4A7C15
    for number in numbers:
        seed = ((seed ^ number) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % (1 << 63)
    return seed


def epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    """Order (n,) int64 in which an epoch takes its samples, the same after a resume."""
    generator = torch.Generator().manual_seed(mixed_seed(seed, epoch, 1 << 20))
    return torch.randperm(n, generator=generator)


def _running_sum(lengths: Sequence[int]) -> tuple[int, ...]:
    total, sums = 0, [0]
    for length in lengths:
        total += length
        sums.append(total)
    return tuple(sums)
