"""A hundred seeded malformed inputs for every entry point: each ends in one line, none in a trace.

Bytes, tables, graphs, recipes and configurations are made by damaging sound ones; whatever is
still readable by chance may be answered.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import zipfile
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
from deqzoo.errors import UserError
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


def refused_or(work: Callable[[], object], *others: type[Exception]) -> bool:
    """Whether a call was refused in one line; it may also answer."""
    try:
        work()
    except (UserError, *others) as error:
        assert str(error).strip()
        return True
    return False


def test_uploads_of_the_demo(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    from deqzoo.demo import graphs, images, text

    refused = 0
    for draws in seeds():
        file = tmp_path / f"{draws.randrange(10**9)}{draws.choice(('.png', '.jpg', '', '.txt'))}"
        file.write_bytes(damaged(draws, picture(draws)))
        refused += refused_or(lambda file=file: images.open_picture(file))
        content = draws.choice(("the dog , café\n".encode() * 3, "dog".encode("utf-16"), b"\0\0"))
        file.write_bytes(damaged(draws, content))
        refused += refused_or(lambda file=file: text.read_text_file(file))
        folder = tmp_path / str(draws.randrange(10**9))
        folder.mkdir()
        for part, lines in TU.items():
            chosen = [draws.choice(CELLS) if draws.random() < 0.1 else line for line in lines]
            if draws.random() > 0.1:
                (folder / f"T_{part}.txt").write_text("\n".join(chosen))
        uploads = sorted(folder.iterdir())
        refused += refused_or(lambda uploads=uploads: graphs.uploaded_graphs(uploads, None))
    assert COUNT < refused < 3 * COUNT


def pictures_to_learn(draws: random.Random, folder: Path) -> Path:
    """A zip or a table of labelled pictures with something wrong."""
    files = [(f"{draws.choice(('cat', 'dog', ''))}/{i}.png", picture(draws)) for i in range(6)]
    if draws.random() < 0.3:
        files[0] = (files[0][0], draws.randbytes(40))
    if draws.random() < 0.5:
        path = folder / "p.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files:
                archive.writestr(name, content)
        if draws.random() < 0.5:
            path.write_bytes(damaged(draws, path.read_bytes()))
        return path
    rows = [draws.choice(("path,label", "path", "x,y", "file,class,class", ""))]
    for number, (name, content) in enumerate(files):
        if draws.random() > 0.1:
            (folder / f"{number}.png").write_bytes(content)
        rows.append(draws.choice((f"{number}.png,{name.partition('/')[0]}", f"{number}.png", ",,")))
    path = folder / "p.csv"
    text = "\n".join(rows).encode()
    path.write_bytes(damaged(draws, text) if draws.random() < 0.3 else text)
    return path


def text_to_learn(draws: random.Random, folder: Path) -> Path:
    suffix = draws.choice((".txt", ".jsonl", ".txt.gz", ".parquet", ""))
    sound = "\n".join(json.dumps({"text": "the dog"}) for _ in range(4)).encode()
    content = draws.choice((sound, b"the dog .\n" * 30, b"", b"\n\n", "dog\n".encode("utf-16")))
    path = folder / f"t{suffix}"
    path.write_bytes(damaged(draws, content) if draws.random() < 0.7 else content)
    return path


def graphs_to_learn(draws: random.Random, folder: Path) -> Path:
    from torch_geometric.data import Data

    fields = [
        {"x": torch.rand(2, 3), "edge_index": torch.tensor([[0, 1], [1, 0]]), "y": number % 2}
        for number in range(draws.choice((0, 1, 8, 8, 8)))
    ]
    wrong: tuple[tuple[str, tuple[object, ...]], ...] = (
        ("x", (None, torch.rand(2, 2), torch.full((2, 3), float("nan")), torch.zeros(0, 3), "x")),
        ("edge_index", (None, torch.tensor([[0], [9]]), torch.zeros(2, 2), torch.tensor([0]))),
        ("y", (None, 1.5, torch.tensor([1, 0]), -(10**12), "cat", float("nan"))),
    )
    if fields and draws.random() < 0.6:
        name, values = draws.choice(wrong)
        draws.choice(fields)[name] = draws.choice(values)
    path = folder / "g.pt"
    torch.save([Data(**one) for one in fields], path)
    if draws.random() < 0.3:
        path.write_bytes(damaged(draws, path.read_bytes()))
    return path


@pytest.mark.parametrize("kind", ("mdeq", "deq_transformer", "ignn"))
def test_data_to_learn(
    kind: str, tiny_mdeq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    pytest.importorskip("torch_geometric")
    from deqzoo.tasks.finetuning import Settings
    from deqzoo.training.finetune import prepare

    torch.manual_seed(0)
    model = tmp_path / "model"
    if kind == "deq_transformer":
        sizes = {"vocab_size": len(WORDS), "d_model": 8, "d_embed": 8, "n_head": 2, "d_inner": 8}
        deqzoo.DEQTransformerForCausalLM(deqzoo.DEQTransformerConfig(**sizes)).save_pretrained(
            model
        )
        build_tokenizer(WORDS, "wikitext").save_pretrained(model)
        make = text_to_learn
    elif kind == "ignn":
        config = deqzoo.IGNNConfig(num_features=3, hidden_sizes=[4])
        deqzoo.IGNNForGraphClassification(config).save_pretrained(model)
        make = graphs_to_learn
    else:
        model, make = tiny_mdeq, pictures_to_learn
    refused = 0
    for draws in seeds():
        folder = tmp_path / str(draws.randrange(10**9))
        folder.mkdir()
        path = make(draws, folder)

        def learn(path: Path = path) -> None:
            job = prepare(model, path, Settings())
            assert len(job.train) and len(job.held_out)  # type: ignore[arg-type]
            assert job.train[0] is not None and job.held_out[0] is not None

        refused += refused_or(learn)
    assert COUNT // 4 < refused < COUNT


BAD_TENSORS: tuple[object, ...] = (
    None, 3, "x", [], {}, torch.zeros(0), torch.zeros(1), torch.zeros(2, 3),
    torch.zeros(1, 3, 7, 9),
    torch.full((1, 3, 8, 8), float("nan")), torch.zeros(1, 4, dtype=torch.long) - 1,
    torch.full((1, 4), 99), torch.zeros(1, 4, dtype=torch.bool), torch.eye(3).to_sparse(),
    np.zeros((2, 2)), [[1, 2], [3]],
)  # fmt: skip


def test_calls_of_models(tiny_mdeq: Path) -> None:
    sizes = {"vocab_size": len(WORDS), "d_model": 8, "d_embed": 8, "n_head": 2, "d_inner": 8}
    text = deqzoo.DEQTransformerForCausalLM(deqzoo.DEQTransformerConfig(**sizes)).eval()
    graph = deqzoo.IGNNForGraphClassification(deqzoo.IGNNConfig(num_features=3, hidden_sizes=[4]))
    edges = torch.tensor([[0, 1], [1, 0]])
    sound: list[tuple[torch.nn.Module, dict[str, object]]] = [
        (deqzoo.DEQModel.from_pretrained(tiny_mdeq),
         {"pixel_values": torch.zeros(1, 3, 8, 8), "labels": torch.tensor([1])}),
        (text, {"input_ids": torch.tensor([[1, 5, 6]]), "attention_mask": torch.ones(1, 3)}),
        (graph.eval(), {"x": torch.eye(3)[:2], "edge_index": edges, "edge_weight": torch.ones(2),
                        "batch": torch.zeros(2, dtype=torch.long), "labels": torch.tensor([0])}),
    ]  # fmt: skip
    for model, arguments in sound:
        raw: dict[str, int] = {}
        for draws in seeds():
            wrong = {**arguments, draws.choice(list(arguments)): draws.choice(BAD_TENSORS)}
            if draws.random() < 0.3:
                wrong["solver"] = draws.choice(({"max_steps": -1}, {"name": "x"}, 3, {"tol": "x"}))
            try:
                with torch.no_grad():
                    model(**wrong, **({} if "solver" in wrong else {"solver": {"max_steps": 2}}))
            except (UserError, ValueError) as error:
                assert str(error).strip()
            except Exception as error:
                raw[f"{type(error).__name__}: {error}"[:120]] = raw.get(str(error), 0) + 1
        assert not raw, (type(model).__name__, raw)
