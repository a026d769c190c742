"""ImageNet's recipes on a small folder in its layout: lazy decoding, crops, a run."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from deqzoo import DEQModel
from deqzoo.data.imagenet import load_imagenet
from deqzoo.errors import UserError
from deqzoo.recipe import Recipe, from_plain
from deqzoo.tasks.augmentation import random_resized_crop
from deqzoo.tasks.base import Plan
from deqzoo.training.run import build_task, run_recipe

CLASSES = ["tench", "goldfish", "shark"]


def encoded(seed: int, mode: str = "RGB") -> bytes:
    generator = np.random.default_rng(seed)
    side = generator.integers(40, 80, 2)
    pixels = generator.integers(0, 256, (*side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imagenet")
    names = {"_type": "ClassLabel", "names": CLASSES}
    features = {"image": {"_type": "Image"}, "label": names}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    (path / "data").mkdir()
    for split, n in (("train", 18), ("validation", 6)):
        pictures = [
            {"bytes": encoded(i, "L" if i == 4 else "RGB"), "path": f"{i}.JPEG"} for i in range(n)
        ]
        table = pa.table({"image": pictures, "label": [i % 3 for i in range(n)]})
        table = table.replace_schema_metadata(metadata)
        pq.write_table(table, path / "data" / f"{split}-00000-of-00001.parquet")
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    content = {
        "name": "small",
        "task": "image-classification",
        "data": {"name": "imagenet", "options": {"cache_dir": str(tmp_path / "cache")}},
        "model": {
            "family": "mdeq",
            "preset": "mdeq-phantom-cifar-small",
            "overrides": {"stem_downsamples": 2, "image_size": 32, "solver": {"max_steps": 3}},
        },
        "precision": "float32",
        "optimizer": {"name": "sgd", "lr": 0.01},
        "batch_size": 3,
        "augment": {"area": [0.1, 1.0], "aspect": [0.8, 1.25], "flip": "random"},
        "whiten": True,
        "evaluation": {"per_epoch": 1, "samples": 5, "snapshots": 0},
        "stages": [
            {"epochs": 1, "resolution": 24, "gradient": {"name": "jfb"}},
            {"epochs": 1, "resolution": 32, "gradient": {"name": "upg", "steps": 1}},
        ],
    }
    return from_plain(Recipe, content, "")


def test_splits(folder: Path, tmp_path: Path) -> None:
    splits = {
        name: load_imagenet(name, folder, cache_dir=str(tmp_path))
        for name in ("train", "validation", "train+validation", "test")
    }
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 9, "validation": 9, "train+validation": 18, "test": 6,
    }  # fmt: skip
    assert not set(splits["train"].rows) & set(splits["validation"].rows)
    assert splits["train"].classes == tuple(CLASSES)
    row = int(np.flatnonzero(splits["train+validation"].rows == 4)[0])
    assert splits["train+validation"].picture(row).mode == "RGB"
    assert splits["train"].fingerprint != splits["validation"].fingerprint


def test_run_on_a_small_folder(folder: Path, tmp_path: Path, recipe: Recipe) -> None:
    model = DEQModel.from_pretrained(run_recipe(recipe, folder, tmp_path / "run", progress=False))
    assert model.config.id2label[2] == "shark"
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["finished"] and record["steps"] == 6
    assert record["data"]["train"]["pictures"] == 9


def test_batches_do_not_depend_on_what_was_asked_before(folder: Path, recipe: Recipe) -> None:
    task, other = (build_task(recipe, folder) for _ in range(2))
    plan = Plan.of(recipe, task)
    in_order = [task.batch(plan, step, 0, 1)["pixel_values"] for step in range(plan.total)]
    assert [batch.shape[-1] for batch in in_order] == [24] * 3 + [32] * 3
    assert torch.equal(other.batch(plan, 4, 0, 1)["pixel_values"], in_order[4])
    assert not torch.equal(in_order[4], in_order[5])


def test_validation_pictures_are_the_processors(folder: Path, recipe: Recipe) -> None:
    task = build_task(recipe, folder)
    pixels, labels = task._validation_batch(0, 2, 32)
    expected = task.processor([task.validation.picture(i) for i in range(2)], return_tensors="pt")
    assert torch.equal(pixels, expected["pixel_values"])
    assert labels.tolist() == task.validation.labels[:2].tolist()
    assert task._validation_batch(0, 2, 24)[0].shape == (2, 3, 24, 24)


def test_flip_is_drawn() -> None:
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    crops = [
        random_resized_crop(picture, 4, (1, 1), (1, 1), True, np.random.default_rng(seed))
        for seed in range(8)
    ]
    plain = random_resized_crop(picture, 4, (1, 1), (1, 1), False, np.random.default_rng(0))
    flipped = sum(torch.equal(crop, plain.flip(2)) for crop in crops)
    assert 0 < flipped < 8 and all(
        torch.equal(crop, plain) or torch.equal(crop, plain.flip(2)) for crop in crops
    )


@pytest.mark.parametrize(
    ("augment", "message"),
    [({"crop": 4}, "unknown augmentation 'crop'"), ({"flip": "alternating"}, "must be random")],
)
def test_wrong_augmentation(recipe: Recipe, augment: dict, message: str) -> None:
    content = {**recipe.to_dict(), "augment": augment}
    content["stages"] = [{"epochs": 1}]
    with pytest.raises(UserError, match=message):
        build_task(from_plain(Recipe, content, ""), None, stand_in=True)


def test_missing_folder_and_split(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_imagenet("train", "/nowhere")
    with pytest.raises(UserError, match="no split 'val'"):
        load_imagenet("val", folder)
    with pytest.raises(UserError, match="no train-"):
        load_imagenet("train", tmp_path)
