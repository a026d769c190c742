"""`deqzoo perplexity`: figures, errors with exit code 2, every option."""

import gzip
import io
import json
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from deqzoo.cli import run
from deqzoo.models.deq_transformer import DEQTransformerConfig, DEQTransformerForCausalLM
from deqzoo.models.deq_transformer.tokenization_deq_transformer import build_tokenizer, prepare_text

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


def scored(capsys: pytest.CaptureFixture, *arguments: object) -> list[dict]:
    assert run(["perplexity", *map(str, arguments), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


TEXT = "The dog, the cat.\nthe dog\n"


def test_the_same_text_in_every_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Plain, compressed, UTF-16, JSON lines and parquet cost the same."""
    data = tmp_path / "texts"
    data.mkdir()
    lines = TEXT.splitlines()
    (data / "a.txt").write_text(TEXT)
    (data / "b.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    (data / "c.txt").write_bytes(TEXT.encode("utf-16"))
    (data / "d.txt").write_bytes(TEXT.encode("utf-8-sig"))
    records = [json.dumps({"id": "x y", "text": line}) for line in lines]
    (data / "e.jsonl").write_text("\n".join(records))
    table = pa.table({"title": ["cat"] * 2, "text": lines, "n": [1, 2]})
    pq.write_table(table, data / "f.parquet")
    (data / "g.md").write_text(TEXT.replace("\n", "\r\n"))
    rows = scored(capsys, data, "--model", folder)
    assert [Path(row["file"]).name[0] for row in rows] == list("abcdefg")
    for row in rows[1:]:
        assert row | {"file": ""} == rows[0] | {"file": ""}


def test_unclear_tables_ask(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"title": ["cat cat cat"], "plot": ["dog"]}), file)
    assert run(["perplexity", str(file), "--model", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "--column" in error and "title, plot" in error
    (row,) = scored(capsys, file, "--model", folder, "--column", "plot")
    assert row["tokens"] == 2
    (tmp_path / "broken.jsonl").write_text('{"text": "dog"}\n{no\n')
    (tmp_path / "numbers.jsonl").write_text('{"text": "dog"}\n{"text": 3}\n')
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(TEXT.encode() * 99)[:40])
    (tmp_path / "fake.txt.gz").write_text(TEXT)
    for name in ("broken.jsonl", "numbers.jsonl", "cut.txt.gz", "fake.txt.gz"):
        assert run(["perplexity", str(tmp_path / name), "--model", str(folder)]) == 2, name
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.splitlines()[-1].startswith("deqzoo: "), name


def test_goes_on_after_a_bad_text(folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text(TEXT)
    assert run(["perplexity", str(tmp_path), "--model", str(folder), "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["tokens"] == 10 and "empty" in err and err.count("\n") == 1


def test_solver_options(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "notes.txt"
    file.write_text(TEXT)
    options = ["--solver", "fixed_point", "--max-steps", 2, "--tol", 0]
    (row,) = scored(capsys, file, "--model", folder, *options)
    assert row["n_steps_max"] == 2
    traced = tmp_path / "trace.json"
    scored(capsys, file, "--model", folder, *options, "--trace", traced)
    assert len(json.loads(traced.read_text())[str(file)]) == 2


@pytest.mark.parametrize(
    "text",
    (
        "the caf\u0065\u0301 dog",  # as macOS writes é
        "the ca\u00adf\u00e9 d\u00ado\u200bg",  # hyphens of web pages, zero-width spaces
        "\ufeffthe caf\u00e9\u2060 \ufeffdog\u200d",
    ),
)
def test_unicode_forms_of_one_text_are_equal(text: str) -> None:
    vocabulary = {"<eos>", "<unk>", "the", "caf\u00e9", "dog"}
    for style in ("wikitext", "ptb"):
        prepared = prepare_text(text, vocabulary, style)
        assert prepared.text == "the caf\u00e9 dog" and prepared.n_unknown == 0
