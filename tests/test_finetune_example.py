"""The text fine-tuning example on a tiny model, and mistakes in the examples' arguments."""

import importlib.util
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from deqzoo import DEQModel
from deqzoo.errors import UserError
from deqzoo.models.deq_transformer import DEQTransformerConfig, DEQTransformerForCausalLM
from deqzoo.models.deq_transformer.tokenization_deq_transformer import build_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    spec = importlib.util.spec_from_file_location("finetune_text", EXAMPLES / "finetune_text.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(tmp_path: Path) -> str:
    torch.manual_seed(0)
    words = ["<eos>", "the", "<unk>", ",", ".", "dog", "cat", "saw"]
    config = DEQTransformerConfig(
        vocab_size=len(words), d_model=16, d_embed=16, n_head=2, d_inner=16, tgt_len=8,
        initializer_range=0.1,
    )  # fmt: skip
    DEQTransformerForCausalLM(config).save_pretrained(tmp_path / "model")
    build_tokenizer(words, "wikitext").save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_finetuning_helps(example: ModuleType, model: str, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("the dog saw the cat, the bird.\n" * 40)
    arguments = [str(text), "--model", model, "--output", str(tmp_path / "out")]
    before, after = example.main([*arguments, "--lr", "0.02"])
    assert after < 0.7 * before
    assert DEQModel.from_pretrained(tmp_path / "out").config.vocab_size == 8


def test_short_texts(example: ModuleType, model: str, tmp_path: Path) -> None:
    """Shorter than a segment of eight words; one line cannot be held out from itself."""
    text = tmp_path / "notes.txt"
    arguments = [str(text), "--model", model, "--output", str(tmp_path / "out")]
    text.write_text("the dog saw\nthe cat\n\n")
    assert example.read_text(text) == (["the dog saw"], ["the cat"])
    before, after = example.main([*arguments, "--lr", "0.01"])
    assert after != before
    text.write_text("the dog saw the cat, the bird.\n")
    with pytest.raises(UserError, match="at least two are needed"):
        example.main(arguments)
    text.write_text("\nthe cat\n")
    with pytest.raises(UserError, match="no word to train on"):
        example.main(arguments)


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("finetune_text", ["absent.txt"], "no file absent.txt"),
        ("finetune_text", ["."], "is a folder"),
        ("finetune_text", ["picture.png"], "binary file"),
        ("finetune_text", ["words.txt", "--model", "nothing"], "unknown model 'nothing'"),
        ("finetune_text", ["words.txt", "--output", "words.txt"], "File exists"),
        ("showcase", ["absent.png"], "absent.png does not exist"),
        ("showcase", ["."], "is a folder"),
        ("showcase", ["words.txt"], "no picture"),
        ("showcase", ["picture.png", "--model", "nothing"], "unknown model 'nothing'"),
        ("showcase", ["picture.png", "--output", "o.none"], "cannot write o.none"),
    ],
)
def test_mistakes_are_one_line(
    script: str, arguments: list[str], message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("the dog\nsaw the cat\n")
    Image.new("RGB", (8, 8)).save("picture.png")
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"{script}.py: ") and message in said
