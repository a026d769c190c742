"""A family in a few lines gets recipes, evaluation, store, card, verification and commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

from deqzoo.cli import run
from deqzoo.equilibrium import Gradient, Solver
from deqzoo.hub.card_texts import FAMILY_TEXTS, FamilyText
from deqzoo.hub.catalogue import entry
from deqzoo.models import names
from deqzoo.models.auto import add_family
from deqzoo.models.base import DEQConfigMixin, DEQPreTrainedModel, per_sample
from deqzoo.tasks import images


@strict
class ToyConfig(DEQConfigMixin, PreTrainedConfig):
    model_type = "toy"
    solver: dict | str | Solver | None = None
    gradient: dict | str | Gradient | None = None
    image_size: int = 8
    width: int = 16
    stem_downsamples: int = 0

    def __post_init__(self, **settings):
        self.complete_equilibrium()
        super().__post_init__(**settings)


class ToyForImageClassification(DEQPreTrainedModel):
    config_class = ToyConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.injection = nn.Linear(3, config.width)
        self.map = nn.Linear(config.width, config.width)
        self.classifier = nn.Linear(config.width, config.num_labels)
        self.post_init()

    def equilibrium_map(self, pixel_values):
        injected = self.injection(pixel_values.mean((2, 3)))
        return lambda h: torch.tanh(0.3 * self.map(h) + injected), torch.zeros_like(injected)

    def forward(self, pixel_values, labels=None, solver=None, gradient=None, shallow=False):
        solution = self.solve(*self.equilibrium_map(pixel_values), None, solver, gradient)
        return ModelOutput(logits=self.classifier(solution.state), **per_sample(solution))


RECIPE = {
    "name": "toy-cifar",
    "task": "image-classification",
    "data": {"name": "cifar10"},
    "model": {"family": "toy", "overrides": {"width": 12}},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "batch_size": 8,
    "precision": "float32",
    "stages": [{"epochs": 1, "gradient": {"name": "npg", "steps": 2, "damping": 1.0}}],
    "evaluation": {"samples": 20, "snapshots": 2},
}
SNIPPET = """\
import torch
from deqzoo import DEQModel

print(DEQModel.from_pretrained(MODEL)(torch.zeros(1, 3, 8, 8)).n_steps)
"""


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The family, as CONTRIBUTING adds one; taken away again afterwards."""
    for known in (names.FAMILY_CLASSES, names.CLASSES, FAMILY_TEXTS):
        monkeypatch.setitem(known, "toy", None)
    here = "tests_toy_family"
    monkeypatch.setitem(__import__("sys").modules, here, __import__("types").ModuleType(here))
    for kind in (ToyConfig, ToyForImageClassification):
        setattr(__import__("sys").modules[here], kind.__name__, kind)
    add_family("toy", {"ToyConfig": here, "ToyForImageClassification": here})
    about = "This is a toy: one linear map of a picture's mean colour."
    FAMILY_TEXTS["toy"] = FamilyText(about, "image-classification", SNIPPET, ("deq",))


def test_a_toy_family_gets_everything(
    toy: None,
    tmp_path: Path,
    cifar_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "hub_configs").mkdir()
    for module in ("deqzoo.zoo", "deqzoo.hub.store", "deqzoo.hub.cards"):
        monkeypatch.setattr(f"{module}.checkpoints_root", lambda: tmp_path / "hub_configs")
    (tmp_path / "README.md").write_text("<!-- models:begin -->\n<!-- models:end -->\n")
    parts = [
        images.Pictures(
            torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8),
            torch.arange(n) % 10, images.CIFAR10.classes, split, "made", False, "cifar10",
        )
        for n, split in ((24, "train"), (20, "validation"))
    ]  # fmt: skip
    monkeypatch.setitem(images.LOADERS, "cifar10", lambda *_, **options: parts[0])
    monkeypatch.setattr(images, "divide", lambda *_: parts)
    recipe, out = tmp_path / "toy.yaml", tmp_path / "runs" / "toy-cifar"
    recipe.write_text(yaml.safe_dump(RECIPE))
    data = ["--data", str(cifar_folder)]
    assert run(["train", str(recipe), "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["pflop"] > 0
    assert run(["train", str(recipe), *data, "--output", str(out), "--quiet"]) == 0
    record = json.loads((out / "record.json").read_text())
    assert record["finished"] and len(record["validation"]) == 1
    assert run(["store", str(out), *data]) == 0  # a contraction: it passes the gate
    found = entry("toy-cifar")
    assert found.task == "image classification"
    assert found.config["width"] == 12 and set(found.evaluations) == {
        "cifar10-test", "cifar10-validation"
    }  # fmt: skip
    capsys.readouterr()
    assert run(["list"]) == 0 and "toy-cifar" in capsys.readouterr().out
    assert run(["cards"]) == 0
    card = (tmp_path / "model_cards" / "toy-cifar.md").read_text()
    assert "This is a toy" in card and "| solver steps | accuracy |" in card
    assert run(["verify", "toy-cifar"]) == 0
    assert run(["evaluate", "toy-cifar", *data]) == 0
    assert run(["classify", "examples/pictures/chelsea.png", "--model", "toy-cifar"]) == 0
