"""Tests run offline and on one thread; small stand-ins for checkpoints and data."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from deqzoo import MDEQConfig, MDEQForImageClassification, MDEQImageProcessor
from deqzoo.data import CIFAR10
from deqzoo.evaluation.options import Waiting
from deqzoo.models.mdeq.native_norm import native_norm_available


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compile the CPU's group norm before any test's time is counted; under load it takes minutes.

    Training runs use it, in processes of their own too, and find it built then.
    """
    if any("training" in item.path.parts or "mdeq" in item.path.name for item in session.items):
        native_norm_available()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Small tensors gain nothing from more threads, and results stay the same everywhere."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def warnings_of_models() -> None:
    """Commands silence the models' warnings for the rest of their process; tests share one."""
    logging.getLogger("deqzoo.models").setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def no_waiting_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of stderr are counted; on a loaded machine one more would say that a command waits."""
    monkeypatch.setattr(Waiting, "after", 600.0)


@pytest.fixture(scope="session")
def tiny_mdeq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained MDEQ with a few thousand weights and CIFAR-10's labels."""
    torch.manual_seed(0)
    config = MDEQConfig(
        channels=[8, 8],
        head_channels=[2, 4],
        final_channels=16,
        expansion=1,
        num_groups=4,
        id2label=dict(enumerate(CIFAR10.classes)),
        label2id={name: index for index, name in enumerate(CIFAR10.classes)},
    )
    folder = tmp_path_factory.mktemp("zoo") / "mdeq-test"
    MDEQForImageClassification(config).save_pretrained(folder)
    MDEQImageProcessor.for_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def overflowing_mdeq(tiny_mdeq: Path, tmp_path: Path) -> Path:
    """The same with finite weights that no state survives."""
    folder = tmp_path / "mdeq-overflowing"
    model = MDEQForImageClassification.from_pretrained(tiny_mdeq)
    with torch.no_grad():
        model.mdeq.stem.convolutions[0].weight.fill_(3e38)
    model.save_pretrained(folder)
    MDEQImageProcessor.from_pretrained(tiny_mdeq).save_pretrained(folder)
    return folder


@pytest.fixture
def zoo(tiny_mdeq: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo whose only bundled checkpoint is `mdeq-test`."""
    monkeypatch.setattr("deqzoo.zoo.checkpoints_root", lambda: tiny_mdeq.parent)
    return tiny_mdeq.parent


def write_pictures(path: Path, count: int, seed: int, reverse: bool = False) -> None:
    """A parquet file in the layout of the Hub's CIFAR-10, with random pictures."""
    generator = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        stream = io.BytesIO()
        pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(stream, "PNG")
        rows.append(({"bytes": stream.getvalue(), "path": f"{index}.png"}, index % 10))
    rows = rows[::-1] if reverse else rows
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"img": [row[0] for row in rows], "label": [row[1] for row in rows]})
    pq.write_table(table, path)


@pytest.fixture(scope="session")
def cifar_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10's layout with 80 training and 40 test pictures."""
    folder = tmp_path_factory.mktemp("cifar10")
    write_pictures(folder / "plain_text" / "train-00000-of-00001.parquet", 80, seed=0)
    write_pictures(folder / "plain_text" / "test-00000-of-00001.parquet", 40, seed=1)
    return folder
