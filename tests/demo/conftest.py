"""A running demo over the bundled checkpoints, with stand-ins for families that have none."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("gradio", reason="the demo needs Gradio: pip install -e '.[demo]'")

import deqzoo.zoo
from deqzoo import (
    DEQTransformerConfig,
    DEQTransformerForCausalLM,
    IGNNConfig,
    IGNNForGraphClassification,
    IGNNForNodeClassification,
)
from deqzoo.models.deq_transformer.tokenization_deq_transformer import build_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "examples" / "pictures"
WORDS = "<eos> <unk> , . the of and to a in was its for river city sea town band north".split()

SERVER = """
import sys
from pathlib import Path
import deqzoo.zoo
deqzoo.zoo.checkpoints_root = lambda: Path(sys.argv[1])
from deqzoo.demo.app import build_demo, launch
pictures = Path(sys.argv[3])
launch(build_demo(pictures, Path(sys.argv[4])), port=int(sys.argv[2]), examples=pictures)
"""


@dataclass(frozen=True)
class Served:
    """Where the demo runs, and the checkpoints it shows."""

    url: str
    zoo: Path
    image: str
    text: str
    graph: str


def text_stand_in(folder: Path) -> None:
    """An untrained language model of a few words."""
    torch.manual_seed(0)
    config = DEQTransformerConfig(
        vocab_size=len(WORDS), d_model=16, d_embed=16, n_head=2, d_inner=32, initializer_range=0.2,
        local_size=12, mem_len=11, tgt_len=8, solver={"tol": 1e-3, "max_steps": 60},
    )  # fmt: skip
    DEQTransformerForCausalLM(config).save_pretrained(folder)
    build_tokenizer(WORDS, "wikitext").save_pretrained(folder)


def graph_stand_in(folder: Path) -> None:
    """An untrained graph classifier."""
    torch.manual_seed(0)
    IGNNForGraphClassification(
        IGNNConfig(num_features=3, hidden_sizes=[8], num_labels=2)
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "deq-transformer-wikitext2-test"
    text_stand_in(folder)
    return folder


@pytest.fixture(scope="session")
def graph_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graph") / "ignn-test"
    graph_stand_in(folder)
    return folder


@pytest.fixture(scope="session")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained classifier of nodes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("node") / "ignn-nodes-test"
    config = IGNNConfig(num_features=6, hidden_sizes=[8], num_labels=2)
    IGNNForNodeClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def graph_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PROTEINS' format with two tiny graphs: a triangle of class 1 and an edge of class 2."""
    root = tmp_path_factory.mktemp("graphs")
    write_graphs(root / "PROTEINS", "PROTEINS")
    return root


def write_graphs(folder: Path, name: str) -> list[Path]:
    folder.mkdir()
    edges = [(1, 2), (2, 3), (3, 1), (4, 5)]
    edges += [(b, a) for a, b in edges]
    contents = {
        "A": "\n".join(f"{a}, {b}" for a, b in sorted(edges)),
        "graph_indicator": "\n".join("11122"),
        "graph_labels": "1\n2",
        "node_labels": "\n".join("01202"),
    }
    for part, content in contents.items():
        (folder / f"{name}_{part}.txt").write_text(content + "\n")
    return sorted(folder.iterdir())


@pytest.fixture(scope="session")
def served(
    tiny_mdeq: Path,
    text_folder: Path,
    graph_folder: Path,
    node_folder: Path,
    graph_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    zoo = tmp_path_factory.mktemp("demo") / "hub_configs"
    zoo.mkdir()
    from deqzoo.demo.shelf import GRAPHS, IMAGES, NODES, TEXT, Shelf

    first = {}
    stand_ins = {IMAGES: tiny_mdeq, TEXT: text_folder, GRAPHS: graph_folder, NODES: node_folder}
    for task, stand_in in stand_ins.items():
        found = Shelf().entries(task)
        for folder in [entry.folder for entry in found] or [stand_in]:
            shutil.copytree(folder, zoo / folder.name)
            first.setdefault(task, folder.name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Answers are compared with the library's, to more digits than the fast path's start in bfloat16
    # leaves alike when one process has the compiled group norm already and the other has not.
    settings = {"GRADIO_TEMP_DIR": str(zoo.parent / "uploads"), "DEQZOO_PLAIN_INFERENCE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, zoo, str(port), PICTURES, graph_data],
        cwd=ROOT,
        env=os.environ | settings,
        stdout=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    _wait(url, process)
    yield Served(url, zoo, first[IMAGES], first[TEXT], first[GRAPHS])
    process.terminate()
    process.wait(timeout=300)


def _wait(url: str, process: subprocess.Popen, seconds: float = 1200) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=60):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the demo did not start (exit code {process.poll()})")


@pytest.fixture
def own_zoo(served: Served, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The served checkpoints as this process's zoo, to compare with the library."""
    monkeypatch.setattr(deqzoo.zoo, "checkpoints_root", lambda: served.zoo)
    return served.zoo
