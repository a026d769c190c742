"""The tutorials run from data to a checkpoint that a stand-in Hub serves again."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

import deqzoo
from deqzoo.models.deq_transformer.tokenization_deq_transformer import build_tokenizer

pytest.importorskip("datasets")
EXAMPLES = Path(__file__).parents[1] / "examples"
_SPEC = importlib.util.spec_from_file_location(
    "hub_double", Path(__file__).parent / "hub" / "hub_double.py"
)
hub_double = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(hub_double)


@pytest.fixture(scope="module")
def hub() -> Iterator[hub_double.HubDouble]:
    server = hub_double.HubDouble()
    yield server
    server.shutdown()
    server.server_close()


def tutorial(hub: hub_double.HubDouble, folder: Path, name: str, *arguments: object) -> str:
    """Run a tutorial in a process of its own, whose Hub is the stand-in."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": hub_double.TOKEN,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(EXAMPLES.parent),
    }
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(
        [*command, "--publish", f"org/{name}"],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    published = hub.files(f"org/{name}")
    assert "README.md" in published and "SHA256SUMS" in published
    assert any(file.startswith("evaluation/") for file in published)
    return done.stdout


@pytest.mark.slow
def test_pictures(hub, tiny_mdeq: Path, tmp_path: Path) -> None:
    arguments = ["--model", tiny_mdeq, "--count", 5, "--max-steps", 6]
    printed = tutorial(hub, tmp_path, "own_pictures", *arguments)
    assert "on shapes test" in printed and "residual by solver step" in printed
    model = deqzoo.DEQModel.from_pretrained(tmp_path / "my-pictures")
    assert list(model.config.id2label.values()) == ["circle", "square", "triangle"]


@pytest.mark.slow
def test_text(hub, tmp_path: Path) -> None:
    words = ["<eos>", "the", "<unk>", ",", ".", "of", "a"]
    torch.manual_seed(0)
    config = deqzoo.DEQTransformerConfig(
        vocab_size=len(words), d_model=8, d_embed=8, n_head=2, d_inner=8
    )
    deqzoo.DEQTransformerForCausalLM(config).save_pretrained(tmp_path / "base")
    build_tokenizer(words, "wikitext").save_pretrained(tmp_path / "base")
    arguments = ["--model", tmp_path / "base", "--characters", 4000, "--max-steps", 6]
    assert "on python-help test" in tutorial(hub, tmp_path, "own_text", *arguments)
    assert deqzoo.DEQModel.from_pretrained(tmp_path / "my-text").config.vocab_size > 100


@pytest.mark.slow
def test_graphs(hub, tmp_path: Path) -> None:
    pytest.importorskip("torch_geometric")
    printed = tutorial(hub, tmp_path, "own_graphs", "--count", 10, "--epochs", 3)
    assert "on graphs test" in printed and "of 30 as stored" in printed


def test_paths_of_graphs_are_quoted_in_the_recipe(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("torch_geometric")
    spec = importlib.util.spec_from_file_location("own_graphs", EXAMPLES / "own_graphs.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "step", lambda *arguments: None)
    monkeypatch.chdir(tmp_path)
    example.main(["mine, all: #1.pt"])
    assert yaml.safe_load(Path("my-graphs.yaml").read_text())["data"]["path"] == "mine, all: #1.pt"
