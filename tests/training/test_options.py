"""Every option of a recipe changes what is trained; the shallow phase is one of them."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from deqzoo.recipe import Recipe, from_plain
from deqzoo.tasks import images
from deqzoo.tasks.base import Plan
from deqzoo.training import run
from deqzoo.training.callbacks import AverageCallback
from deqzoo.training.run import run_recipe, use_bf16
from deqzoo.training.trainer import moving_average

STAGE = {
    "epochs": 1,
    "resolution": 8,
    "solver": {"name": "anderson", "max_steps": 3, "tol": 0.0},
    "gradient": {"name": "upg", "steps": 1},
}
RECIPE = {
    "name": "tiny",
    "task": "image-classification",
    "data": {"name": "cifar10"},
    "model": {
        "family": "mdeq",
        "preset": "mdeq-phantom-cifar-small",
        "overrides": {
            "channels": [8, 8], "head_channels": [4, 4], "final_channels": 16, "expansion": 1,
            "num_groups": 2,
        },
    },
    "precision": "float32",
    "optimizer": {"name": "muon", "lr": 0.02, "weight_decay": 0.01},
    "batch_size": 8,
    "evaluation": {"per_epoch": 1, "samples": 4, "snapshots": 0},
    "stages": [STAGE],
}  # fmt: skip

CHANGES = {
    "seed": {"seed": 1},
    "lr": {"optimizer": {"lr": 0.01}},
    "other_lr": {"optimizer": {"other_lr": 0.01}},
    "weight_decay": {"optimizer": {"weight_decay": 0.5}},
    "momentum": {"optimizer": {"momentum": 0.5}},
    "nesterov": {"optimizer": {"nesterov": False}},
    "clip": {"optimizer": {"clip": 1e-4, "name": "sgd"}},
    "adamw": {"optimizer": {"name": "adamw"}},
    "schedule": {"schedule": {"name": "cosine", "warmup": 0.0}},
    "final": {"schedule": {"final": 0.5}},
    "average": {"average": 0.5},
    "label_smoothing": {"label_smoothing": 0.2},
    "crop": {"augment": {"crop": 2}},
    "flip": {"augment": {"flip": "random"}},
    "cutout": {"augment": {"cutout": 8}},
    "cutmix": {"augment": {"cutmix": 0.5}},
    "whiten": {"whiten": True},
    "accumulate": {"batch_size": 4, "accumulate": 2},
    "bf16": {"precision": "bf16"},
    "solver": {"stages": [{**STAGE, "solver": {"name": "fixed_point", "max_steps": 3, "tol": 0}}]},
    "gradient": {"stages": [{**STAGE, "gradient": {"name": "upg", "steps": 3}}]},
    "resolution": {"stages": [{**STAGE, "resolution": 16}]},
    "jacobian": {"stages": [{**STAGE, "jacobian": {"weight": 5.0, "every": 1}}]},
    "shallow": {"stages": [{**STAGE, "shallow": True}]},
}


@pytest.fixture(scope="module", autouse=True)
def pictures():
    """24 training and 8 validation pictures in place of CIFAR-10."""

    def load(split, data=None, **options):
        n = 24 if split == "train" else 8
        generator = torch.Generator().manual_seed(n)
        pixels = torch.randint(256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
        names = images.CIFAR10.classes
        return images.Pictures(pixels, torch.arange(n) % 10, names, split, "made", False, "cifar10")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(images.LOADERS, "cifar10", load)
        patch.setattr(images, "divide", lambda *_: (load("train"), load("validation")))
        yield


def weights(folder: Path, change: dict) -> dict[str, Tensor]:
    content = copy.deepcopy(RECIPE)
    for key, value in change.items():
        content[key] = content.get(key, {}) | value if isinstance(value, dict) else value
    run_recipe(from_plain(Recipe, content, ""), None, folder / "run", progress=False)
    return load_file(folder / "run" / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return weights(tmp_path_factory.mktemp("usual"), {})


def test_the_same_recipe_gives_the_same_weights(usual, tmp_path: Path) -> None:
    again = weights(tmp_path, {})
    assert all(torch.equal(again[name], value) for name, value in usual.items())


@pytest.mark.parametrize("name", CHANGES)
def test_option_changes_the_weights(usual, name: str, tmp_path: Path) -> None:
    changed = weights(tmp_path, CHANGES[name])
    assert changed.keys() == usual.keys()
    learned = [key for key in usual if "running" not in key and "num_batches" not in key]
    assert any(not torch.equal(changed[key], usual[key]) for key in learned)
    assert all(bool(value.isfinite().all()) for value in changed.values())


def test_averages_of_fresh_weights_forget_the_start():
    """Those of trained weights, which a run starts from, do not."""
    found = {}
    for warm_up in (True, False):
        rule, average = moving_average(0.99, warm_up=warm_up), [torch.ones(1)]
        for n in range(20):
            rule(average, [torch.zeros(1)], n)
        found[warm_up] = float(average[0])
    assert found[True] < 1e-4
    assert found[False] == pytest.approx(0.99**20)


def test_batch_statistics_of_the_average_belong_to_the_stage():
    """At a new resolution they are those of its pictures at once; the weights are averaged on."""
    model = nn.BatchNorm1d(1)
    rule = moving_average(0.9, warm_up=False)
    average = AveragedModel(model, multi_avg_fn=rule, use_buffers=True)
    stages = from_plain(Recipe, {**RECIPE, "stages": [STAGE, STAGE]}, "").stages
    plan = Plan(stages, (0, 100), (100, 100), 1, 200)
    callback = AverageCallback(SimpleNamespace(model=model, average=average, plan=plan))

    def after(step: int, mean: float) -> tuple[float, float]:
        model.running_mean.fill_(mean)
        model.weight.data.fill_(mean)
        callback.on_step_end(None, SimpleNamespace(global_step=step), None)
        return average.module.running_mean.item(), average.module.weight.item()

    assert after(1, 1.0)[0] == 1.0
    assert after(100, 3.0)[0] == pytest.approx(1.2)
    assert after(101, 7.0) == (7.0, pytest.approx(0.9 * 1.2 + 0.1 * 7.0))
    assert after(151, 8.0)[0] == pytest.approx(7.1)


def test_precision_by_itself_is_the_faster_one(monkeypatch):
    recipe = from_plain(Recipe, {**RECIPE, "precision": "auto"}, "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for fast in (True, False):
        monkeypatch.setattr(run, "has_fast_bfloat16", lambda fast=fast: fast)
        assert use_bf16(recipe) is fast
