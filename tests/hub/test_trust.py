"""Files of strangers: their text is no code, their links lead nowhere, their damage is found."""

from __future__ import annotations

import ast
import json
import shutil
import threading
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, PreTrainedModel

import deqzoo
from deqzoo import DEQModel, DEQTransformerForCausalLM, UserError, list_models
from deqzoo.cli import run
from deqzoo.hub.cards import render_card, snippet
from deqzoo.hub.catalogue import entry
from deqzoo.hub.integrity import check_checksums
from deqzoo.hub.verify import verify_model
from deqzoo.models.deq_transformer.tokenization_deq_transformer import build_tokenizer
from deqzoo.zoo import checkpoints_root

PICTURE = Path(__file__).parents[2] / "examples" / "pictures" / "chelsea.png"
WORDS = "<eos> <unk> , . the of and to a in was".split()


@pytest.fixture
def sealed(tiny_mdeq: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny_mdeq, tmp_path / "mdeq-test"))
    assert run(["seal", str(folder)]) == 0
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    torch.manual_seed(0)
    config = deqzoo.DEQTransformerConfig(
        vocab_size=len(WORDS), d_model=16, d_embed=16, n_head=2, d_inner=32, local_size=8,
        mem_len=8,
    )  # fmt: skip
    DEQTransformerForCausalLM(config).save_pretrained(folder)
    build_tokenizer(WORDS, "wikitext").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "name",
    [
        'x"); open("PWNED", "w"); ("',
        "x'); open('PWNED', 'w'); ('",
        '"""\nopen("PWNED", "w")\n"""',
        "{0.__class__}{name}",
        "back\\slash\\",
    ],
)
def test_a_folders_name_is_no_code(tiny_mdeq: Path, tmp_path: Path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / name.replace("/", "_")
    shutil.copytree(tiny_mdeq, folder)
    assert not [fault for fault in verify_model(str(folder)) if "example" in fault]
    assert not list(tmp_path.rglob("PWNED"))
    found = entry(str(folder))
    for literal in (snippet(found, str(folder)), snippet(found)):
        tree = ast.parse(literal)
        loads = [
            node.args[0].value
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained"
            and isinstance(node.args[0], ast.Constant)
        ]  # fmt: skip
        # Model and image processor, each by the one name.
        assert set(loads) in ({str(folder)}, {f"deqzoo/{folder.name}"})
        assert len(tree.body) == len(ast.parse(snippet(found, "org/name")).body)
    assert render_card(found)


def poison(folder: Path) -> None:
    """Ask for the repository's own code in every JSON file that an Auto class reads."""
    classes = ("Config", "Model", "ModelForCausalLM", "ModelForImageClassification", "Processor")
    classes += ("ImageProcessor", "FeatureExtractor")
    asked = {f"Auto{name}": "evil.Evil" for name in classes}
    asked |= {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    names = ["config.json", "preprocessor_config.json", "tokenizer_config.json"]
    for name in (*names, "processor_config.json", "generation_config.json"):
        path = folder / name
        content = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**content, "auto_map": asked}))
    code = f"open({str(folder / 'PWNED')!r}, 'w')\nclass Evil:\n    pass\n"
    (folder / "evil.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code + "def generate(*a, **k): pass\n")


def test_no_entry_point_runs_or_offers_a_repositorys_code(
    tiny_mdeq: Path, text: Path, tmp_path: Path, monkeypatch, capfd
) -> None:
    def ask(*_: object) -> str:
        raise AssertionError("the user was asked")

    monkeypatch.setattr("builtins.input", ask)
    image = Path(shutil.copytree(tiny_mdeq, tmp_path / "image"))
    poison(image)
    poison(text)
    words = tmp_path / "words.txt"
    words.write_text("the of and\n")
    for command in (
        ["classify", PICTURE, "--model", image],
        ["perplexity", words, "--model", text],
        ["info", image],
        ["seal", image, text],
        ["verify", image, text],
        ["publish", image, "--repo-id", "org/name", "--dry-run"],
    ):
        code = run([str(part) for part in command])
        said = capfd.readouterr()
        assert code in (0, 2) and "Traceback" not in said.err, (command, said.err)
        assert "custom code" not in said.out + said.err or "trust_remote_code" in said.err
    for folder in (image, text):
        DEQModel.from_pretrained(folder)
        with pytest.raises(UserError, match="no code of a repository"):
            DEQModel.from_pretrained(folder, trust_remote_code=True)
    assert not list(tmp_path.rglob("PWNED"))


def test_loads_follow_each_other(text: Path, monkeypatch) -> None:
    """transformers replaces a method of all models while it loads one."""
    own, inside, most = PreTrainedModel.tie_weights, [], []
    build = DEQTransformerForCausalLM.__init__

    def slowly(self, *arguments, **keywords) -> None:
        inside.append(self)
        most.append(len(inside))
        time.sleep(0.05)
        build(self, *arguments, **keywords)
        inside.remove(self)

    monkeypatch.setattr(DEQTransformerForCausalLM, "__init__", slowly)
    loads = (DEQModel.from_pretrained, DEQTransformerForCausalLM.from_pretrained)
    threads = [threading.Thread(target=load, args=(text,)) for load in 3 * loads]
    threads.append(threading.Thread(target=AutoModel.from_pretrained, args=(text,)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 6 and max(most) == 1
    assert PreTrainedModel.tie_weights is own
    assert DEQModel.from_pretrained(text)(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_damaged_weights_of_a_sealed_folder_are_refused(sealed: Path, capsys) -> None:
    """Although they load; by every class."""
    path = sealed / "model.safetensors"
    tensors = load_file(path)
    tensors["classifier.weight"].flatten()[0] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})
    for load in (DEQModel, AutoModel, deqzoo.MDEQForImageClassification):
        with pytest.raises(UserError, match="model.safetensors is not as SHA256SUMS beside it"):
            load.from_pretrained(sealed)
    assert run(["classify", str(PICTURE), "--model", str(sealed)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert run(["seal", str(sealed)]) == 0  # the change is theirs
    assert type(DEQModel.from_pretrained(sealed)) is deqzoo.MDEQForImageClassification


def test_the_seal_covers_every_figure_and_word(sealed: Path) -> None:
    (sealed / "evaluation").mkdir()
    (sealed / "evaluation" / "cifar10-test.json").write_text('{"results": {"accuracy": 0.85}}')
    (sealed / "notes.md").write_text("Measured in 10 seconds.\n")
    assert run(["seal", str(sealed)]) == 0
    assert check_checksums(sealed) == []
    for name, old, new in (
        ("evaluation/cifar10-test.json", "0.85", "0.95"),
        ("notes.md", "10", "1"),
        ("preprocessor_config.json", "32", "33"),
        ("golden.json", "0.", "1."),
    ):
        path = sealed / name
        whole = path.read_text()
        path.write_text(whole.replace(old, new, 1))
        assert check_checksums(sealed) == [f"{name} has changed"]
        path.write_text(whole)


def test_a_new_evaluation_keeps_the_seal(sealed: Path, cifar_folder: Path) -> None:
    arguments = ["evaluate", str(sealed), "--data", str(cifar_folder), "--split", "test"]
    assert run(arguments) == 0
    assert (sealed / "evaluation" / "cifar10-test.json").is_file()
    assert check_checksums(sealed) == []


@pytest.mark.parametrize("what", ["weights", "secret", "folder"])
def test_links_out_of_a_folder_are_refused(sealed: Path, tmp_path: Path, capsys, what) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.json").write_text('{"secret": 1}')
    if what == "weights":
        shutil.move(sealed / "model.safetensors", outside)
        (sealed / "model.safetensors").symlink_to(outside / "model.safetensors")
    elif what == "secret":
        (sealed / "extra.json").symlink_to(outside / "secret.json")
    else:
        (sealed / "evaluation").symlink_to(outside)
    with pytest.raises(UserError, match="link that leads out"):
        DEQModel.from_pretrained(sealed)
    commands = (["seal"], ["verify"], ["publish", "--repo-id", "org/name", "--dry-run"])
    for command, *options in commands:
        capsys.readouterr()
        assert run([command, str(sealed), *options]) == 2
        said = capsys.readouterr()
        assert "link that leads out" in said.out + said.err and "secret" not in said.out


def test_links_inside_the_hubs_cache_are_followed(tiny_mdeq: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    shutil.copytree(tiny_mdeq, cache / "blobs")
    folder = cache / "snapshots" / "0123"
    folder.mkdir(parents=True)
    for path in (cache / "blobs").iterdir():
        (folder / path.name).symlink_to(Path("../../blobs") / path.name)
    assert DEQModel.from_pretrained(folder).num_parameters() > 0
    (folder / "extra.json").symlink_to(PICTURE)
    with pytest.raises(UserError, match="link that leads out"):
        DEQModel.from_pretrained(folder)


def test_an_index_names_only_files_beside_it(tiny_mdeq: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_mdeq, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    shutil.move(folder / "model.safetensors", tmp_path / "other.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "../other.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for load in (DEQModel, AutoModel):
        with pytest.raises(UserError, match="names '../other.safetensors'"):
            load.from_pretrained(folder)


def test_pickles_do_not_load(tiny_mdeq: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_mdeq, tmp_path / "model"))
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="model.safetensors"):
        DEQModel.from_pretrained(folder)
    with pytest.raises(UserError, match="safetensors only"):
        DEQModel.from_pretrained(folder, use_safetensors=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(text: Path, value: float) -> None:
    path = text / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].flatten()[0] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="1 of their tensors hold numbers that are not finite"):
        DEQModel.from_pretrained(text)


def test_the_notice_names_the_data_of_every_checkpoint() -> None:
    words = (Path(__file__).parents[2] / "NOTICE").read_text().replace(",", " ").split()
    patterns = [word for word in words if word.endswith("*")]
    assert [n for n in list_models() if not any(fnmatch(n, p) for p in patterns)] == []


def test_bundled_checkpoints_are_as_sealed() -> None:
    faults = {name: check_checksums(checkpoints_root() / name) for name in list_models()}
    assert not {name: found for name, found in faults.items() if found}, (
        "run `deqzoo seal` on these"
    )
