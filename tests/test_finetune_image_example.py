"""The image fine-tuning example, on a tiny model and a few pictures."""

import importlib.util
import io
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from deqzoo import DEQModel
from deqzoo.errors import UserError
from deqzoo.models.mdeq.configuration_mdeq import MDEQConfig
from deqzoo.models.mdeq.image_processing_mdeq import MDEQImageProcessor
from deqzoo.models.mdeq.modeling_mdeq import MDEQForImageClassification

EXAMPLE = Path(__file__).parents[1] / "examples" / "finetune_image.py"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    spec = importlib.util.spec_from_file_location("finetune_image", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(tmp_path: Path) -> str:
    torch.manual_seed(0)
    config = MDEQConfig(
        channels=[8, 8], head_channels=[4, 4], final_channels=16, expansion=1, num_groups=2,
        image_size=16, num_labels=5, solver={"max_steps": 8},
    )  # fmt: skip
    folder = tmp_path / "model"
    MDEQForImageClassification(config).save_pretrained(folder)
    MDEQImageProcessor.for_config(config).save_pretrained(folder)
    return str(folder)


def picture(label: int, seed: int) -> Image.Image:
    """Red for 0, green for 1, blue for 2, with noise."""
    pixels = np.random.default_rng(seed).integers(0, 100, (20, 24, 3), dtype=np.uint8)
    pixels[..., label] += 150
    return Image.fromarray(pixels)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(tmp_path / "nowhere")], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("finetune_image.py: ") and "Traceback" not in done.stderr


def test_folder_of_pictures(example: ModuleType, model: str, tmp_path: Path) -> None:
    for name, label in (("blue", 2), ("green", 1), ("red", 0)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(20):
            picture(label, i).save(tmp_path / "pictures" / name / f"{i}.png")
    reached = example.main(
        [
            *(str(tmp_path / "pictures"), "--model", model, "--output", str(tmp_path / "out")),
            *("--epochs", "40", "--lr", "0.01", "--cache", str(tmp_path / "cache")),
        ]
    )
    assert reached > 0.9
    tuned = DEQModel.from_pretrained(tmp_path / "out")
    assert tuned.config.id2label == {0: "blue", 1: "green", 2: "red"}
    assert tuned.classifier.weight.shape == (3, 16)


def test_merged_classes_and_frozen_norms(example: ModuleType, model: str, tmp_path: Path) -> None:
    metadata = (
        '{"info": {"features": {"img": {"_type": "Image"}, '
        '"label": {"_type": "ClassLabel", "names": ["red", "green", "blue"]}}}}'
    )
    folder = tmp_path / "data"
    folder.mkdir()
    for split, n in (("train", 24), ("test", 6)):
        rows = []
        for i in range(n):
            file = io.BytesIO()
            picture(i % 3, i).save(file, "PNG")
            rows.append({"bytes": file.getvalue(), "path": None})
        table = pa.table({"img": rows, "label": [i % 3 for i in range(n)]})
        table = table.replace_schema_metadata({"huggingface": metadata})
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    arguments = [str(folder), "--model", model, "--cache", str(tmp_path / "cache")]
    groups = ["--groups", "warm=red", "cold=green,blue"]
    example.main(
        [*arguments, *groups, "--output", str(tmp_path / "out"), "--max-steps", "3"]
        + ["--freeze-norm"]
    )
    tuned, before = DEQModel.from_pretrained(tmp_path / "out"), DEQModel.from_pretrained(model)
    assert tuned.config.label2id == {"warm": 0, "cold": 1}
    statistics = [name for name in dict(tuned.named_buffers()) if "running" in name]
    assert statistics
    for name in statistics:
        assert torch.equal(tuned.get_buffer(name), before.get_buffer(name))
    with pytest.raises(UserError, match="no class 'pink'"):
        example.main([*arguments, "--groups", "a=pink", "b=red"])
