"""`deqzoo perplexity`: figures, errors with exit code 2, every option."""

import io
import json
import types
from pathlib import Path

import pytest
import torch

from deqzoo.cli import run
from deqzoo.models.deq_transformer import DEQTransformerConfig, DEQTransformerForCausalLM
from deqzoo.models.deq_transformer.tokenization_deq_transformer import build_tokenizer

WORDS = ["<eos>", "the", "<unk>", ",", ".", "dog", "cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = DEQTransformerConfig(vocab_size=len(WORDS), d_model=8, d_embed=8, n_head=2, d_inner=8)
    path = tmp_path_factory.mktemp("zoo") / "tiny"
    DEQTransformerForCausalLM(config).save_pretrained(path)
    build_tokenizer(WORDS, "wikitext").save_pretrained(path)
    return path


def test_text_and_json(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("The dog, the cat.\n")
    assert run(["perplexity", str(file), "--model", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "perplexity" in out and "not converged" in out and "<unk>" in out
    assert run(["perplexity", str(file), "--model", str(folder), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["tokens"] == 7 and figures["unknown_share"] == pytest.approx(1 / 7)
    assert figures["characters"] == 18 and "surprisal" not in figures
    arguments = ["--model", str(folder), "--json", "--surprisal", "--pretokenized"]
    assert run(["perplexity", str(file), *arguments]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert [word for word, _ in figures["surprisal"]] == ["<unk>", "<unk>", "the", "<unk>", "<eos>"]


def test_standard_input_and_one_word(
    folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(b"dog")))
    assert run(["perplexity", "-", "--model", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 2


def test_mistakes_are_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty").write_text("")
    (tmp_path / "binary").write_bytes(b"\0\1\2")
    for name in ("missing", "", "empty", "binary"):
        assert run(["perplexity", str(tmp_path / name), "--model", str(folder)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
