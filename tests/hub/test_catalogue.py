"""What `deqzoo list` and `deqzoo info` read from a checkpoint's files."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest

import deqzoo
from deqzoo.cli import run
from deqzoo.hub.catalogue import count_parameters, entry


@pytest.mark.parametrize("norm", ["none", "spectral"])
def test_spectral_norms_buffers_are_no_parameters(tmp_path: Path, norm: str) -> None:
    config = deqzoo.IGNNConfig(num_features=3, hidden_sizes=[8], weight_norm=norm)
    model = deqzoo.IGNNForGraphClassification(config)
    model.save_pretrained(tmp_path)
    assert entry(str(tmp_path)).parameters == model.num_parameters()


def test_damaged_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(deqzoo.UserError, match="no sound safetensors"):
        count_parameters(tmp_path / "model.safetensors")


def test_sizes_and_figures_are_those_of_readme_s_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list", "ignn-proteins-upg"]) == 0
    assert capsys.readouterr().out.split()[1] == "25k"
    assert run(["info", "ignn-proteins-upg"]) == 0
    facts = capsys.readouterr().out
    assert re.search(r"^parameters +24,\d{3}$", facts, flags=re.MULTILINE)
    assert re.search(r"^evaluations +\S+ % on proteins test, fold 0, ", facts, flags=re.MULTILINE)


def test_info_refuses_other_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {"model_type": "bert", "architectures": ["BertModel"]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert run(["info", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert "'bert'" in printed.err and "mdeq, deq_transformer, ignn" in printed.err


def test_the_list_is_sorted_and_printed_as_csv(capsys: pytest.CaptureFixture[str]) -> None:
    def names(*arguments: str) -> list[str]:
        assert run(["list", *arguments, "--json"]) == 0
        return [row["name"] for row in json.loads(capsys.readouterr().out)]

    assert names() == sorted(names())
    sizes = [entry(name).parameters for name in names("--sort", "parameters")]
    assert sizes == sorted(sizes) and len(set(sizes)) > 3
    proteins = names("ignn-humloc*", "--sort", "result")  # small: a wheel has them, too
    figures = [entry(name).best_test("micro_f1") for name in proteins]
    assert figures == sorted(figures, reverse=True) and len(figures) > 1
    ranked = names("mdeq*cifar*", "--sort", "result")
    figures = [entry(name).best_test("accuracy") for name in ranked]
    assert figures == sorted(figures, reverse=True)
    texts = names("deq-transformer-wikitext2*", "--sort", "result")
    figures = [entry(name).best_test("perplexity") for name in texts]
    assert figures == sorted(figures)
    assert run(["list", "--csv", "--json"]) == 2 and "choose one" in capsys.readouterr().err
    assert run(["list", "mdeq*", "--sort", "result", "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    best = next(row for row in rows if row["name"] == ranked[0])
    assert float(best["value"]) == entry(ranked[0]).best_test("accuracy")
    assert best["metric"] == "accuracy" and best["split"] == "test" and best["data"] == "cifar10"
    assert int(best["parameters"]) == entry(ranked[0]).parameters
    assert run(["list", "--sort", "colour"]) == 2
    assert "--sort is one of name, parameters, result" in capsys.readouterr().err
