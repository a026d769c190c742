"""Perplexity: exact counts, streaming, agreement with the evaluation, errors."""

import gzip
import io
import json
import math
import os
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from deqzoo.data import lines as reading
from deqzoo.data.lines import Fragment, read_lines
from deqzoo.errors import UserError
from deqzoo.evaluation import text as evaluation
from deqzoo.evaluation.dispatch import evaluate_model
from deqzoo.evaluation.perplexity import perplexity
from deqzoo.models.deq_transformer import DEQTransformerConfig, DEQTransformerForCausalLM
from deqzoo.models.deq_transformer.tokenization_deq_transformer import build_tokenizer

WORDS = ["<eos>", "the", "<unk>", ",", ".", "dog", "cat", "saw", "a", "'s", "@-@"]
LINES = ["", " the dog saw a cat . ", "xylophone the", "a cat , a dog"]


@pytest.fixture(scope="module")
def model() -> DEQTransformerForCausalLM:
    torch.manual_seed(0)
    config = DEQTransformerConfig(
        vocab_size=len(WORDS), d_model=16, d_embed=16, n_head=2, d_inner=16, initializer_range=0.2,
        local_size=6, mem_len=5, tgt_len=4, solver={"tol": 1e-10, "max_steps": 200},
    )  # fmt: skip
    model = DEQTransformerForCausalLM(config).double().eval()
    with torch.no_grad():  # well inside the contracting range, so that solves are exact
        for name, parameter in model.named_parameters():
            if "embedding" in name or "injection.weight" in name:
                parameter.normal_(0, 0.4)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(WORDS, "wikitext")


@torch.no_grad()
def joint_nll(model: DEQTransformerForCausalLM, tokens: list[int]) -> torch.Tensor:
    inputs = torch.tensor([[0, *tokens[:-1]]])
    return model(inputs, labels=torch.tensor([tokens]), shift=False, return_logits=False).nll[0]


def test_every_token_is_scored_once(model, tokenizer) -> None:
    report = perplexity(model, LINES, tokenizer, pretokenized=True, keep_surprisal=True)
    tokens = [0, 1, 5, 7, 8, 6, 4, 0, 2, 1, 0, 8, 6, 3, 8, 5, 0]
    expected = joint_nll(model, tokens)
    assert report.tokens == len(tokens) and report.unknown == 1
    assert report.characters == sum(len(line) + 1 for line in LINES)
    assert report.nll == pytest.approx(expected.sum().item(), rel=1e-4)
    assert report.perplexity == pytest.approx(math.exp(expected.mean()), rel=1e-4)
    bits = expected.sum().item() / math.log(2) / report.characters
    assert report.bits_per_character == pytest.approx(bits, rel=1e-4)
    assert [word for word, _ in report.surprisal] == [WORDS[i] for i in tokens]
    values = torch.tensor([nats for _, nats in report.surprisal], dtype=torch.float64)
    torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-4)
    assert report.unconverged == 0 and 0 < report.max_residual <= 1e-10
    assert report.to_dict()["n_steps_mean"] > 1


@pytest.mark.parametrize("length", [1, 3, 100])
def test_segments_do_not_matter(model, tokenizer, length: int) -> None:
    expected = perplexity(model, LINES, tokenizer, pretokenized=True)
    report = perplexity(model, LINES, tokenizer, pretokenized=True, segment_length=length)
    assert report.nll == pytest.approx(expected.nll, rel=1e-4)


def test_unconverged_tokens_are_reported(model, tokenizer) -> None:
    solver = {"max_steps": 1, "tol": 1e-7}
    report = perplexity(model, LINES, tokenizer, pretokenized=True, solver=solver)
    assert report.unconverged == report.tokens and report.max_steps == 1


def test_raw_text_is_prepared(model, tokenizer) -> None:
    raw = perplexity(model, ["the cat-dog's"], tokenizer, keep_surprisal=True)
    assert [word for word, _ in raw.surprisal] == ["the", "cat", "@-@", "dog", "'s", "<eos>"]
    plain = perplexity(model, ["the cat-dog's"], tokenizer, pretokenized=True)
    assert plain.tokens == 3 and plain.unknown == 1


def test_fragments_are_one_line(model, tokenizer) -> None:
    whole = perplexity(model, ["the dog saw a cat"], tokenizer, pretokenized=True)
    parts = [Fragment("the dog "), Fragment("saw "), "a cat"]
    parted = perplexity(model, parts, tokenizer, pretokenized=True)
    assert (parted.tokens, parted.characters) == (whole.tokens, whole.characters)
    assert parted.nll == pytest.approx(whole.nll)


def test_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffone\r\n\nzwei drei ä".encode())
    assert list(read_lines(file)) == ["one\r\n", "\n", "zwei drei ä"]
    monkeypatch.setattr(reading, "BLOCK_BYTES", 3)
    assert list(read_lines(file)) == ["one\r\n", "\n", "zwei drei ä"]
    monkeypatch.setattr(reading, "LONGEST_LINE", 6)
    assert list(read_lines(file)) == ["one\r\n", "\n", "zwei ", "drei ä"]
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(b"x y\n")))
    assert list(read_lines("-")) == ["x y\n"]
    rows = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"n": [1, 2, 3], "text": ["", "a b", "c"]}), rows)
    assert list(read_lines(rows)) == ["", "a b", "c"]


@pytest.mark.parametrize("block", [1 << 20, 4, 5])
def test_lines_of_old_macs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Ended by \\r alone, wherever a piece that is read may end."""
    monkeypatch.setattr(reading, "BLOCK_BYTES", block)
    file, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
    file.write_bytes(b"one two\rthree\r\rfour\r\nfive")
    assert list(read_lines(file)) == ["one two\n", "three\n", "\n", "four\r\n", "five"]
    rows.write_text(json.dumps({"text": "a\rb"}))
    assert list(read_lines(rows)) == ["a", "b"]


def test_records_with_nothing_and_with_half_a_character(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": null}\n{"text": "a"}\n')
    assert list(read_lines(file)) == ["", "a"] and reading.text_column(file) == "text"
    file.write_text('{"mine": null}\n')
    assert reading.text_column(file, "mine") == "mine"
    file.write_text('{"text": "a \\ud800"}\n')
    with pytest.raises(UserError, match="half a character"):
        list(read_lines(file))


def test_suffixes_in_capitals(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Read as what they say; files that no text is taken from are told of, once."""
    record = json.dumps({"text": "a b"}).encode()
    (tmp_path / "a.JSONL").write_bytes(record)
    (tmp_path / "b.Jsonl.GZ").write_bytes(gzip.compress(record))
    (tmp_path / "c.TXT").write_text("a b")
    pq.write_table(pa.table({"text": ["a b"]}), tmp_path / "d.PARQUET")
    files = reading.text_files(tmp_path)
    assert [file.name for file in files] == ["a.JSONL", "b.Jsonl.GZ", "c.TXT", "d.PARQUET"]
    assert [list(read_lines(file)) for file in files] == [["a b"]] * 4 and not caplog.records
    assert [reading.holds_records(file) for file in files] == [True, True, False, True]
    assert reading.text_column(tmp_path / "b.Jsonl.GZ") == "text"
    for name in ("e.CSV", "f.json", "g.docx", ".hidden", "Thumbs.db"):
        (tmp_path / name).write_text("{}")
    for _ in range(2):
        assert reading.text_files(tmp_path) == files
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("3 file(s) of ") and "as e.CSV: give .txt or .md, or .parquet" in said


def test_cut_off_tables_are_one_line(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps({"text": "a b", "n": list(range(99))}).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot read .*a.jsonl.gz: Compressed file ended"):
        reading.text_column(tmp_path / "a.jsonl.gz")


def test_linked_texts(tmp_path: Path) -> None:
    """Folders behind links are read, and links that lead nowhere are not passed over."""
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "b.txt").write_text("the cat")
    near = tmp_path / "near"
    near.mkdir()
    (near / "a.txt").write_text("the dog")
    (near / "more").symlink_to(tmp_path / "far")
    assert [file.name for file in reading.text_files(near)] == ["a.txt", "b.txt"]
    (near / "c.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(UserError, match="no file .*c.txt"):
        [list(read_lines(file)) for file in reading.text_files(near)]


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.tsv", "a.csv.gz", "a.CSV"])
def test_tables_are_not_scored_as_words(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"text,label\n")
    with pytest.raises(UserError, match="marks would be scored as words"):
        list(read_lines(tmp_path / name))


def test_a_pipe_of_the_shell() -> None:
    """`deqzoo perplexity <(zcat a.gz)` names one."""
    read, write = os.pipe()
    os.write(write, b"a b\n")
    os.close(write)
    (path,) = reading.text_files(f"/dev/fd/{read}")
    assert list(read_lines(path)) == ["a b\n"]
    os.close(read)


@pytest.mark.parametrize("space", (" ", "\t", "\u00a0", "\u3000"))
def test_overlong_lines_are_cut_at_any_white_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, space: str
) -> None:
    monkeypatch.setattr(reading, "LONGEST_LINE", 10)
    file = tmp_path / "long.txt"
    file.write_text(space.join(["word"] * 20), encoding="utf-8")
    pieces = list(read_lines(file))
    assert len(pieces) > 5 and [w for piece in pieces for w in piece.split()] == ["word"] * 20


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_empty_texts(model, tokenizer, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "empty.txt"
    file.write_bytes(content)
    with pytest.raises(UserError, match="empty"):
        perplexity(model, read_lines(file), tokenizer)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin").write_bytes("é è".encode("latin-1"))
    (tmp_path / "x.parquet").write_bytes(b"nothing")
    for name, message in (
        ("missing", "no file"),
        ("", "folder"),
        ("binary", "binary"),
        ("latin", "UTF-8"),
        ("x.parquet", "cannot read"),
    ):
        with pytest.raises(UserError, match=message):
            list(read_lines(tmp_path / name))


def test_evaluation_equals_perplexity(model, tokenizer, tmp_path, monkeypatch) -> None:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = DEQTransformerForCausalLM.from_pretrained(tmp_path / "model")
    source = next(iter(evaluation.SOURCES.values()))
    small = type(source)(**(vars(source) | {"vocabulary_size": len(WORDS)}))
    monkeypatch.setattr(evaluation, "SOURCES", {small.name: small})
    data = tmp_path / "data"
    data.mkdir()
    lines = [line.replace("xylophone", "<unk>") for line in LINES]  # a corpus holds its own words
    for split in ("train", "validation", "test"):
        pq.write_table(pa.table({"text": lines}), data / f"{split}-0.parquet")
    content = evaluate_model(loaded, "tiny", data=data, progress=False)
    direct = perplexity(model, read_lines(data / "test-0.parquet"), tokenizer, pretokenized=True)
    assert content["results"]["perplexity"] == pytest.approx(direct.perplexity)
    assert content["data"]["samples"] == direct.tokens == 17
    assert content["data"]["complete"] is False
    assert [row["max_steps"] for row in content["budget"]["steps"]] == [
        *(2, 4, 8, 16, 30, loaded.config.solver["max_steps"])
    ]
    limited = evaluate_model(loaded, "tiny", data=data, limit=5, progress=False)
    assert limited["data"]["samples"] == 5 and "--limit 5" in limited["command"]


def test_models_of_unknown_corpora(model, tokenizer, tmp_path) -> None:
    with pytest.raises(UserError, match="no known corpus"):
        evaluation.corpus_of(tokenizer)
    (tmp_path / "notes.txt").write_text("the dog")
    assert evaluation._is_text(tokenizer, tmp_path, "test")
    with pytest.raises(UserError, match="no tokenizer"):
        evaluation.load_tokenizer(model)
