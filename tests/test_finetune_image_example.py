"""The image fine-tuning example, on a tiny model and pictures that colour tells apart."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deqzoo import DEQModel

EXAMPLE = Path(__file__).parents[1] / "examples" / "finetune_image.py"


def test_finetuning_to_new_labels(
    tiny_mdeq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    spec = importlib.util.spec_from_file_location("finetune_image", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    generator = np.random.default_rng(0)
    for part, count in (("train", 48), ("test", 12)):
        for channel, name in enumerate(("red", "green", "blue")):
            folder = tmp_path / "pictures" / part / name
            folder.mkdir(parents=True)
            for index in range(count // 3):
                pixels = generator.integers(0, 120, (40, 36, 3), dtype=np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(folder / f"{index}.png")
    arguments = [str(tmp_path / "pictures"), "--model", str(tiny_mdeq)]
    output = tmp_path / "out"
    arguments += ["--output", str(output), "--epochs", "12", "--lr", "0.01"]
    before, after = example.main(arguments)
    assert after > max(before, 0.6)
    model = DEQModel.from_pretrained(output)
    assert sorted(model.config.id2label.values()) == ["blue", "green", "red"]
