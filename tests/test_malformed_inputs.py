"""A hundred seeded malformed inputs for every entry point: each ends in one line, none in a trace.

Bytes, tables, graphs, recipes and configurations are made by damaging sound ones; whatever is
still readable by chance may be answered.
"""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import deqzoo
from deqzoo.cli import run
from deqzoo.models.deq_transformer.tokenization_deq_transformer import build_tokenizer

COUNT = 100
WORDS = ["<eos>", "the", "<unk>", ",", ".", "dog", "cat"]
VALUES: tuple[object, ...] = (
    None, True, -1, 0, 3, 10**12, 1e308, float("nan"), float("inf"), "", "x", "../../x", [], {},
    [[]], {"name": "x"}, [1, "a"], "\0", "é" * 50,
)  # fmt: skip


def damaged(draws: random.Random, content: bytes) -> bytes:
    """Bytes cut, flipped, doubled or replaced."""
    kind = draws.randrange(6)
    if kind == 0 or not content:
        return draws.randbytes(draws.randrange(0, 200))
    if kind == 1:
        return content[: draws.randrange(len(content))]
    if kind == 2:
        return content[draws.randrange(len(content)) :]
    changed = bytearray(content)
    for _ in range(draws.choice((1, 4, 64))):
        changed[draws.randrange(len(changed))] = draws.randrange(256)
    if kind == 3:
        place = draws.randrange(len(changed))
        changed[place:place] = draws.randbytes(draws.randrange(1, 64))
    return bytes(changed)


def changed(draws: random.Random, value: object) -> object:
    """A nested value with something replaced, removed or added somewhere."""
    if isinstance(value, dict) and value and draws.random() < 0.9:
        key = draws.choice(list(value))
        result = dict(value)
        kind = draws.random()
        if kind < 0.15:
            del result[key]
        elif kind < 0.3:
            result[draws.choice(("x", "nmae", ""))] = draws.choice(VALUES)
        else:
            result[key] = changed(draws, value[key])
        return result
    if isinstance(value, list) and value and draws.random() < 0.7:
        place = draws.randrange(len(value))
        return [changed(draws, v) if i == place else v for i, v in enumerate(value)]
    return draws.choice(VALUES)


@pytest.fixture
def ends_well(capsys: pytest.CaptureFixture[str]) -> Callable[..., int]:
    """Runs a command; it must answer, or say one line and leave with 1 or 2."""

    def call(*arguments: object) -> int:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        lines = [line for line in printed.err.splitlines() if line.startswith("deqzoo: ")]
        assert code in (0, 1, 2), (code, printed.err)
        assert "Traceback" not in printed.err + printed.out
        assert (code == 0) == (not lines), printed.err
        assert all(len(line) < 1000 for line in lines)
        return code

    return call


def picture(draws: random.Random) -> bytes:
    mode = draws.choice(("RGB", "L", "RGBA", "P", "I;16", "1", "CMYK"))
    kind = "JPEG" if mode in ("RGB", "L", "CMYK") and draws.random() < 0.4 else "PNG"
    if mode == "CMYK":
        kind = "JPEG"
    values = np.random.default_rng(draws.randrange(1 << 30)).integers(0, 256, (9, 13, 3), np.uint8)
    image = Image.fromarray(values)
    image = image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def seeds() -> Iterator[random.Random]:
    return (random.Random(seed) for seed in range(COUNT))


def test_pictures(zoo: Path, tmp_path: Path, ends_well) -> None:
    codes = []
    for draws in seeds():
        suffix = draws.choice((".png", ".jpg", ".gif", ".webp", "", ".tiff"))
        path = tmp_path / f"{draws.randrange(10**6)}{suffix}"
        path.write_bytes(damaged(draws, picture(draws)))
        codes.append(ends_well("classify", path, "--model", "mdeq-test", "--max-steps", 1))
    assert codes.count(2) > COUNT // 2


def test_parquet_of_pictures(zoo: Path, tmp_path: Path, ends_well) -> None:
    for draws in seeds():
        n = draws.randrange(4)
        cells: list[object] = [{"bytes": picture(draws), "path": "x"} for _ in range(n)]
        labels: list[object] = [draws.randrange(12) for _ in range(n)]
        if n and draws.random() < 0.5:
            cells[0] = draws.choice((None, {"bytes": b"no picture", "path": None}, {"bytes": None}))
        if draws.random() < 0.3:
            labels = draws.choice((["cat"] * n, [None] * n, [1.5] * n, [[1]] * n))
        table = pa.table({draws.choice(("img", "image", "x")): cells, "label": labels})
        if draws.random() < 0.3:
            note = draws.choice((b"{no", b"[]", b'{"info": 3}', b'{"info": {"features": []}}'))
            table = table.replace_schema_metadata({b"huggingface": note})
        folder = tmp_path / str(draws.randrange(10**9))
        folder.mkdir()
        file = folder / "test-0.parquet"
        pq.write_table(table, file)
        if draws.random() < 0.3:
            file.write_bytes(damaged(draws, file.read_bytes()))
        ends_well("evaluate", "mdeq-test", "--data", folder, "--output", tmp_path / "e.json")


def test_texts(tmp_path: Path, ends_well) -> None:
    torch.manual_seed(0)
    config = deqzoo.DEQTransformerConfig(
        vocab_size=len(WORDS), d_model=8, d_embed=8, n_head=2, d_inner=8
    )
    model = tmp_path / "model"
    deqzoo.DEQTransformerForCausalLM(config).save_pretrained(model)
    build_tokenizer(WORDS, "wikitext").save_pretrained(model)
    records = "\n".join(json.dumps({"text": "the dog", "n": 1}) for _ in range(4)).encode()
    stream = io.BytesIO()
    pq.write_table(pa.table({"text": ["the dog", None], "b": ["x", "y"]}), stream)
    sound = {
        ".txt": "the dog , caf\u00e9 .\n".encode() * 3, ".jsonl": records, ".gz": b"\x1f\x8b" * 9,
        ".parquet": stream.getvalue(), ".txt.xz": b"\xfd7zXZ\0", "": "the dog".encode("utf-16"),
    }  # fmt: skip
    for draws in seeds():
        suffix = draws.choice(list(sound))
        path = tmp_path / f"{draws.randrange(10**9)}{suffix}"
        path.write_bytes(damaged(draws, sound[suffix]))
        ends_well("perplexity", path, "--model", model, "--max-steps", 1)


TU = {
    "A": ["1, 2", "2, 1", "3, 4", "4, 3"],
    "graph_indicator": ["1", "1", "2", "2"],
    "graph_labels": ["1", "2"],
    "node_labels": ["0", "1", "2", "0"],
}
CELLS = (
    "",
    "x",
    "-1",
    "0",
    "9",
    "1.5",
    "1e30",
    "nan",
    "1, 2, 3",
    "1 2",
    "\0",
    "99999999999999999999",
)


def test_graphs(tmp_path: Path, ends_well) -> None:
    pytest.importorskip("torch_geometric")
    encoding = {"classes": [1, 2], "node_labels": [[0, 1, 2]], "attributes": 0}
    config = deqzoo.IGNNConfig(num_features=3, hidden_sizes=[4], graph_encoding=encoding)
    model = tmp_path / "model"
    deqzoo.IGNNForGraphClassification(config).save_pretrained(model)
    codes = []
    for draws in seeds():
        folder = tmp_path / str(draws.randrange(10**9))
        folder.mkdir()
        for part, lines in TU.items():
            lines = list(lines)
            if draws.random() < 0.5:
                lines[draws.randrange(len(lines))] = draws.choice(CELLS)
            content = "\n".join(lines).encode()
            if draws.random() < 0.1:
                content = damaged(draws, content)
            if draws.random() > 0.05:
                (folder / f"T_{part}.txt").write_bytes(content)
        codes.append(ends_well("predict-graphs", model, folder, "--max-steps", 1))
    assert codes.count(2) > COUNT // 2
    data = pytest.importorskip("torch_geometric.data").Data
    edges = torch.tensor([[0, 1], [1, 0]])
    for draws in seeds():
        fields = {
            "x": draws.choice((torch.eye(3)[:2], None, torch.eye(4), torch.zeros(0, 3), 3, "x")),
            "edge_index": draws.choice((edges, edges.float(), edges + 7, edges[0], None, -edges)),
            "y": draws.choice((torch.tensor([1]), None, torch.tensor([1.5]), torch.zeros(3), 2)),
        }
        path = tmp_path / f"{draws.randrange(10**9)}.pt"
        graphs = draws.choice(([data(**fields)], [data(**fields), 3], data(**fields), fields))
        torch.save(graphs, path)
        if draws.random() < 0.3:
            path.write_bytes(damaged(draws, path.read_bytes()))
        ends_well("predict-graphs", model, path, "--max-steps", 1)


RECIPE = {
    "name": "x",
    "task": "image-classification",
    "seed": 0,
    "data": {"name": "cifar10", "options": {"seed": 0}},
    "model": {
        "family": "mdeq",
        "preset": "mdeq-phantom-cifar-small",
        "overrides": {
            "channels": [8, 8], "head_channels": [4, 4], "final_channels": 16, "expansion": 1,
            "num_groups": 2, "solver": {"name": "anderson", "max_steps": 3},
        },
    },
    "optimizer": {"name": "sgd", "lr": 0.1, "betas": [0.9, 0.99]},
    "schedule": {"name": "linear", "warmup": 0.1},
    "augment": {"crop": 4, "flip": "random"},
    "batch_size": 4,
    "stages": [
        {"epochs": 1, "resolution": 16, "gradient": {"name": "upg", "steps": 2, "damping": 0.5},
         "jacobian": {"weight": 1.0, "every": 4}},
    ],
}  # fmt: skip


def test_recipes(tmp_path: Path, ends_well) -> None:
    for draws in seeds():
        content = RECIPE
        for _ in range(draws.choice((1, 1, 2))):
            content = changed(draws, content)  # type: ignore[assignment]
        path = tmp_path / "recipe.yaml"
        text = yaml.safe_dump(content).encode()
        path.write_bytes(damaged(draws, text) if draws.random() < 0.2 else text)
        ends_well("train", path, "--dry-run")


def test_configurations(zoo: Path, tmp_path: Path, ends_well) -> None:
    image = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(image)
    for draws in seeds():
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(zoo / "mdeq-test", folder)
        name = draws.choice(("config.json", "preprocessor_config.json"))
        content = json.loads((folder / name).read_text())
        if draws.random() < 0.7:
            (folder / name).write_text(json.dumps(changed(draws, content)))
        else:
            name = draws.choice((name, "model.safetensors"))
            (folder / name).write_bytes(damaged(draws, (folder / name).read_bytes()))
        ends_well("classify", image, "--model", folder, "--max-steps", 1)


def test_converter(tmp_path: Path, ends_well) -> None:
    settings = {
        "channels": [8, 8], "head_channels": [2, 2], "final_channels": 8, "expansion": 1,
        "num_groups": 4, "stem_downsamples": 0, "image_size": 8, "num_classes": 3,
    }  # fmt: skip
    tensors = {"fullstage.x": torch.zeros(2), "stage0.0.weight": torch.ones(3, 3)}
    for draws in seeds():
        config, source = (
            tmp_path / "config.json",
            tmp_path / f"w{draws.choice(('.pth', '.safetensors'))}",
        )
        config.write_text(json.dumps(changed(draws, settings)))
        (save_file if source.suffix == ".safetensors" else torch.save)(tensors, source)
        if draws.random() < 0.5:
            source.write_bytes(damaged(draws, source.read_bytes()))
        family = draws.choice(("mdeq", "ignn", "deq-transformer"))
        code = ends_well(
            "convert", family, source, "--config", config, "--output", tmp_path / "out"
        )
        assert code == 2
