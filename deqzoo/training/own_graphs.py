"""Recipes that train a graph classifier from nothing on graphs of one's own."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import set_seed

from deqzoo.data.graphs import load_own_graphs
from deqzoo.errors import UserError
from deqzoo.models.ignn.configuration_ignn import IGNNConfig
from deqzoo.models.ignn.modeling_ignn import IGNNForGraphClassification
from deqzoo.training.finetune import Job, Settings, graph_job, train
from deqzoo.training.graphs import class_settings, read_yaml
from deqzoo.training.recipe import Data, check_name
from deqzoo.training.task import settings_checked


@dataclass(frozen=True)
class GraphRecipe:
    """How a graph classifier is trained on graphs of one's own.

    Attributes:
        name: of the run.
        task: says that it is such a recipe.
        data: name "graphs" and the path, as `load_own_graphs` takes it.
        model: settings of `IGNNConfig`; widths of features and classes come from the data.
        epochs, batch_size, lr, seed: see `deqzoo.training.finetune.Settings`.
        held_out: share of every class that is held out.
    """

    name: str
    task: Literal["graph-classification"]
    data: Data
    model: dict[str, Any] = field(default_factory=dict)
    epochs: float | None = None
    batch_size: int | None = None
    lr: float = 1e-3
    seed: int = 0
    held_out: float = 0.2
    report_to: tuple[str, ...] = ("none",)

    @classmethod
    def read(cls, path: str | Path) -> GraphRecipe:
        """Read a YAML file.

        Raises:
            UserError: missing or damaged file, unknown keys or values out of range.
        """
        recipe = read_yaml(cls, path)
        try:
            check_name(recipe.name)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        if recipe.data.name != "graphs":
            raise UserError(f"{path}: data.name must be graphs, got {recipe.data.name!r}")
        return recipe

    @staticmethod
    def describes(path: str | Path) -> bool:
        """Whether a file looks like such a recipe."""
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            return False
        return isinstance(content, dict) and content.get("task") == "graph-classification"

    def settings(self) -> Settings:
        """As the training takes them."""
        return Settings(
            epochs=self.epochs, batch_size=self.batch_size, lr=self.lr, seed=self.seed,
            held_out=self.held_out, freeze="none", report_to=self.report_to,
        )  # fmt: skip


def build(recipe: GraphRecipe, data: str | Path | None) -> Job:
    """The new model of a recipe with its graphs.

    Raises:
        UserError: nobody says where the graphs are, they cannot be learnt, or settings that do not
            fit.
    """
    if data is None and not recipe.data.path:
        raise UserError("say where the graphs are: data.path in the recipe, or --data")
    settings = recipe.settings()
    graphs = load_own_graphs(recipe.data.path if data is None else data)
    set_seed(recipe.seed)
    sizes = {"num_features": graphs.num_features, **class_settings(graphs)}
    with settings_checked(IGNNConfig, recipe.model, "model"):
        try:
            config = IGNNConfig(**{**sizes, **recipe.model})
        except StrictDataclassError as error:
            raise ValueError(error) from error
    return graph_job(IGNNForGraphClassification(config), graphs, settings)


def describe(recipe: GraphRecipe, data: str | Path | None) -> dict[str, Any]:
    """What a run would be, without training."""
    job = build(recipe, data)
    return {
        "recipe": asdict(recipe),
        "parameters": sum(parameter.numel() for parameter in job.model.parameters()),
        "train": len(job.train),  # type: ignore[arg-type]
        "held_out": len(job.held_out),  # type: ignore[arg-type]
    }


def train_graphs(
    recipe: GraphRecipe,
    data: str | Path | None,
    out: Path,
    *,
    resume: bool = False,
    progress: bool = True,
) -> Path:
    """Train a recipe; the folder `model` in `out` is the result. See `finetune.train`."""
    job = build(recipe, data)
    return train(job, out / "model", recipe.settings(), resume=resume, progress=progress)
