"""Recipes: a YAML file that says how a checkpoint is trained, validated before anything runs."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from deqzoo.equilibrium import make_gradient, make_solver
from deqzoo.errors import UserError, as_user_error

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def seconds_of(text: str | float, place: str) -> float:
    """Seconds from "90s", "8m", "1.5h", or a number.

    Raises:
        UserError: anything else, or nothing above 0; the message names the place.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([smh]?)\s*", str(text))
    seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not seconds > 0:
        raise UserError(f"{place} is a time such as 90s, 8m or 1.5h, got {text!r}")
    return seconds


@dataclass(frozen=True)
class Data:
    """The data set; splits are fixed by the data modules of the package.

    `imagefolder`, `text` and `graphs` are data of one's own, which lie at `path`.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    path: str = ""


@dataclass(frozen=True)
class Model:
    """A preset of the family's config class (its defaults if none), and what differs from it.

    `start` names trained weights to go on from (zoo name, folder, or repository) in place of fresh
    ones; what they cost counts as spent.
    """

    family: str
    preset: str = ""
    overrides: dict[str, Any] = field(default_factory=dict)
    start: str = ""

    @property
    def parent(self) -> str:
        """Name of the run or checkpoint whose weights `start` names; runs/NAME/model is NAME's."""
        path = PurePath(self.start)
        return path.parent.name if path.name == "model" else path.name


@dataclass(frozen=True)
class Optimizer:
    """Optimiser settings.

    "muon" orthogonalises the momentum of hidden matrices and convolutions and gives everything
    else to AdamW with `other_lr`; "sgd" and "adamw" treat all parameters alike. Weight decay never
    touches gains, biases and norms.
    """

    name: Literal["muon", "sgd", "adamw", "adam"]
    lr: float
    other_lr: float = 3e-3
    weight_decay: float = 0.0
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.99)
    nesterov: bool = True
    clip: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up over a share of all steps, then decay to `final` times the peak.

    A "step" falls to it at once, after the share `at` of what follows the warm-up.
    """

    name: Literal["linear", "cosine", "constant", "step"] = "linear"
    warmup: float = 0.1
    final: float = 0.0
    at: float = 0.5


@dataclass(frozen=True)
class Jacobian:
    """Jacobian regularisation: weight γ, every n-th step, probes per sample.

    `difference` is the size ε of a finite difference in place of a double backward, which a
    compiled map does not have; 0 for the exact one. 0.1 suits bfloat16.
    """

    weight: float = 1.0
    every: int = 4
    probes: int = 1
    difference: float = 0.0


@dataclass(frozen=True)
class Stage:
    """A part of the run; `epochs` are shares of the time where the recipe has a `time_budget`.

    `resolution` is the side of the pictures, or the number of tokens of a segment; None keeps
    the data's own. `shallow` trains the unrolled network instead of the equilibrium.
    """

    epochs: float
    solver: dict[str, Any] = field(default_factory=dict)
    gradient: dict[str, Any] = field(default_factory=dict)
    resolution: int | None = None
    jacobian: Jacobian | None = None
    shallow: bool = False

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the model in a training step, beside its batch."""
        own: dict[str, Any] = {"solver": self.solver or None, "gradient": self.gradient or None}
        return {**own, "shallow": True} if self.shallow else own


@dataclass(frozen=True)
class Evaluation:
    """Validation during the run: how often, on how much; `snapshots` half-precision copies.

    `keep` says which weights are the result: the last, or the best on the validation split.
    """

    per_epoch: float = 1.0
    samples: int = 1000
    snapshots: int = 10
    keep: Literal["last", "best"] = "last"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run; see recipes/README.md for the meaning of each key."""

    name: str
    task: str
    data: Data
    model: Model
    optimizer: Optimizer
    stages: tuple[Stage, ...]
    batch_size: int
    schedule: Schedule = Schedule()
    evaluation: Evaluation = Evaluation()
    accumulate: int = 1
    seed: int = 0
    precision: Literal["float32", "bf16", "auto"] = "auto"
    compile: bool = False
    channels_last: bool = True
    gradient_checkpointing: bool = False
    average: float = 0.0
    label_smoothing: float = 0.0
    augment: dict[str, Any] = field(default_factory=dict)
    whiten: bool = False
    checkpoint_minutes: float = 5.0
    time_budget: str = ""
    budget_pflop: float | None = None
    report_to: tuple[str, ...] = ()
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data, for the record beside a result."""
        return dataclasses.asdict(self)


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read and check a recipe.

    A recipe with the key `base` is that recipe with other `gradients`.

    Raises:
        UserError: no such file, no YAML, unknown or missing keys, values of a wrong type, or
            solver and gradient settings that do not exist; the message names the place.
    """
    path = Path(path)
    content = read_mapping(path)
    try:
        if "base" in content:
            content = _derive(read_mapping(path.parent / str(content["base"])), content)
        recipe = from_plain(Recipe, content, "")
        _check(recipe)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"recipe {path}: {error}{_hint(content)}") from error
    return recipe


def _hint(content: dict[str, Any]) -> str:
    """What to write where a recipe looks like one of graphs of version 0.1."""
    if isinstance(content.get("data"), str) or {"lr", "epochs"} & set(content):
        return (
            "; recipes of graphs are written like all others now, see recipes/ignn-humloc-upg.yaml"
        )
    return ""


def recorded_recipe(record: Any) -> Recipe | None:
    """The recipe in a run's record; None where this version could not have written it."""
    try:
        return from_plain(Recipe, record["recipe"], "")
    except (ValueError, TypeError, KeyError):
        return None


class _Loader(yaml.SafeLoader):
    """Refuses a key that a mapping holds twice, of which YAML's own loader keeps the last, and
    reads 1e-3 as the number that it is in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    line = key.start_mark.line + 1
                    raise yaml.YAMLError(f"the key {key.value} stands twice, again in line {line}")
                keys.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?\d+[eE][-+]?\d+|[-+]?\d+\.\d*[eE]\d+"),
    [*"-+0123456789"],
)


def read_mapping(path: Path) -> dict[str, Any]:
    """The content of a recipe's file.

    Raises:
        UserError: no such file, no YAML, or no mapping.
    """
    with as_user_error(f"cannot read recipe {path}", OSError):
        data = path.read_bytes()
    with as_user_error(f"recipe {path} is not YAML", yaml.YAMLError, ValueError, RecursionError):
        content = yaml.load(data.decode("utf-8"), _Loader)
    if not isinstance(content, dict):
        raise UserError(f"recipe {path} must be a mapping of keys to values")
    return content


def _derive(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """The base with other gradients: one per stage, the last of them the model's own.

    Everything else but name, budget and note stays, so that the two runs can be compared.
    """
    allowed_keys = {"base", "name", "gradients", "budget_pflop", "note"}
    unknown = sorted(set(change) - allowed_keys)
    if unknown:
        raise ValueError(
            f"key {unknown[0]} beside base; such a recipe has {', '.join(sorted(allowed_keys))} "
            "only; to change anything else, copy the file"
        )
    if "name" not in change:
        raise ValueError("missing key name")
    if "base" in base:
        raise ValueError(f"base {change['base']} has a base itself; name that one")
    content = copy.deepcopy(base)
    gradients = change.get("gradients")
    stages = content.get("stages") or []
    if isinstance(stages, list):  # those that YAML's anchors make one become several
        stages = content["stages"] = [copy.deepcopy(stage) for stage in stages]
    if not isinstance(gradients, list) or len(gradients) != len(stages):
        raise ValueError(f"gradients must be a list of {len(stages)}, one for each stage of base")
    for stage, gradient in zip(stages, gradients, strict=True):
        if not isinstance(stage, dict):
            raise ValueError(f"base {change['base']} has a stage that is no mapping")
        stage["gradient"] = gradient
    model = content.get("model")
    if not isinstance(model, dict) or not isinstance(model.setdefault("overrides", {}), dict):
        raise ValueError(f"base {change['base']} has no mapping model with overrides")
    model["overrides"]["gradient"] = gradients[-1]
    for key in ("name", "budget_pflop", "note"):
        content.pop(key, None)
        if key in change:
            content[key] = change[key]
    return content


def with_seed(recipe: Recipe, seed: int) -> Recipe:
    """The same recipe with another seed, which its name then says."""
    return dataclasses.replace(recipe, seed=seed, name=f"{recipe.name}-s{seed}")


#: Smallest values of numbers, by the kind of settings that holds them.
_AT_LEAST: dict[type, dict[str, float]] = {
    Recipe: {"batch_size": 1, "accumulate": 1, "checkpoint_minutes": 0, "seed": 0},
    Optimizer: {"lr": 0, "other_lr": 0, "weight_decay": 0, "clip": 0},
    Schedule: {"warmup": 0, "final": 0, "at": 0},
    Jacobian: {"weight": 0, "every": 1, "probes": 1, "difference": 0},
    Stage: {"resolution": 1},
    Evaluation: {"per_epoch": 0, "samples": 2, "snapshots": 0},
}
#: Numbers in [0, 1).
_SHARES = {Recipe: ("average", "label_smoothing"), Optimizer: ("momentum",)}


def _check_numbers(settings: Any, place: str = "") -> None:
    for key, least in _AT_LEAST[type(settings)].items():
        value = getattr(settings, key)
        if value is not None and not value >= least:
            raise ValueError(f"{_join(place, key)} must be at least {least}, got {value}")
    for key in _SHARES.get(type(settings), ()):
        value = getattr(settings, key)
        if not 0 <= value < 1:
            raise ValueError(f"{_join(place, key)} must be in [0, 1), got {value}")


def check_name(name: str) -> None:
    """Refuse a name that is no name of a folder.

    Raises:
        ValueError: an empty one, or one with other characters than letters, digits, _ . and -.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ValueError(f"name names a folder: letters, digits, _, . and - only, got {name!r}")


def _check(recipe: Recipe) -> None:
    check_name(recipe.name)
    if recipe.seed >= 2**32:
        raise ValueError(f"seed must be below 2^32, got {recipe.seed}")
    if not all(0 <= beta < 1 for beta in recipe.optimizer.betas):
        raise ValueError(f"optimizer.betas must be in [0, 1), got {list(recipe.optimizer.betas)}")
    _check_numbers(recipe)
    if recipe.time_budget:
        seconds_of(recipe.time_budget, "time_budget")
    _check_numbers(recipe.optimizer, "optimizer")
    _check_numbers(recipe.schedule, "schedule")
    _check_numbers(recipe.evaluation, "evaluation")
    if recipe.schedule.warmup > 1:
        raise ValueError(
            f"schedule.warmup is a share of all steps, at most 1, got {recipe.schedule.warmup}"
        )
    if not recipe.stages:
        raise ValueError("stages: at least one is needed")
    for number, stage in enumerate(recipe.stages):
        _check_stage(stage, f"stages[{number}]")
        _check_checkpointing(recipe, stage, f"stages[{number}]")


def _check_stage(stage: Stage, place: str) -> None:
    _check_numbers(stage, place)
    if stage.epochs <= 0:
        raise ValueError(f"{place}.epochs must be positive, got {stage.epochs}")
    if stage.jacobian is not None:
        _check_numbers(stage.jacobian, f"{place}.jacobian")
    for key, make in (("solver", make_solver), ("gradient", make_gradient)):
        settings = getattr(stage, key)
        if not settings:
            continue
        if "name" not in settings:
            raise ValueError(f"{place}.{key} needs a name")
        try:
            make(settings)
        except ValueError as error:
            raise ValueError(f"{place}.{key}: {error}") from error


def _check_checkpointing(recipe: Recipe, stage: Stage, place: str) -> None:
    """Refuse it here: the model would do so only after the stages before."""
    settings = stage.gradient or recipe.model.overrides.get("gradient")
    if not recipe.gradient_checkpointing or stage.shallow or not settings:
        return
    gradient = make_gradient(settings)
    if not gradient.can_checkpoint:
        raise ValueError(
            f"gradient_checkpointing has no effect on gradient {gradient.name!r} of {place}, "
            "which keeps one graph anyway; leave it out"
        )


def from_plain(kind: Any, value: Any, place: str) -> Any:
    """Turn plain data into a dataclass, checking names and types.

    Raises:
        ValueError: unknown or missing keys, or a value that is none of a choice.
        TypeError: a value of a wrong type; both messages name the place below `place`.
    """
    if dataclasses.is_dataclass(kind):
        return _settings(kind, value, place)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and type(None) in arguments:
            return None
        return from_plain(next(a for a in arguments if a is not type(None)), value, place)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{place} must be one of {', '.join(arguments)}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{place} must be a list, got {value!r}")
        kinds = arguments if arguments[-1] is not ... else (arguments[0],) * len(value)
        if len(kinds) != len(value):
            raise ValueError(f"{place} must have {len(kinds)} entries, got {value!r}")
        return tuple(
            from_plain(t, item, f"{place}[{i}]")
            for i, (t, item) in enumerate(zip(kinds, value, strict=True))
        )
    return _scalar(origin or kind, value, place)


def _settings(kind: Any, value: Any, place: str) -> Any:
    """A dataclass of a mapping."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{place or 'the recipe'} must be a mapping, got {value!r}")
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(set(value) - set(fields), key=str):
        raise ValueError(
            f"unknown key {_join(place, unknown[0])}; valid keys are {', '.join(fields)}"
        )
    for name, f in fields.items():
        if f.default is f.default_factory is dataclasses.MISSING and name not in value:
            raise ValueError(f"missing key {_join(place, name)}")
    return kind(
        **{key: from_plain(hints[key], item, _join(place, key)) for key, item in value.items()}
    )


def _scalar(kind: Any, value: Any, place: str) -> Any:
    if kind is float and isinstance(value, str):
        try:
            value = float(value)  # "0.5", as other programs write numbers
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1e300 else math.inf
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{place} must be of type {kind.__name__}, got {value!r}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{place} must be finite, got {value}")
    return value


def _join(place: str, key: str) -> str:
    return f"{place}.{key}" if place else str(key)
