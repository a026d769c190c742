"""The report on the evidence: its figures are those of the files that it names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deqzoo.hub.card_texts import DATA_TEXTS
from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[1]
report = load_script("benchmarks/report.py")


def test_the_report_is_up_to_date() -> None:
    stored = (ROOT / "benchmarks" / "REPORT.md").read_text(encoding="utf-8")
    assert report.fill() == stored, "run `python benchmarks/report.py` and commit the result"


def test_files_that_the_report_names_exist() -> None:
    text = (ROOT / "benchmarks" / "REPORT.template.md").read_text(encoding="utf-8")
    named = [part for part in text.split("`") if part.startswith(("benchmarks/", "hub_configs/"))]
    assert named
    for name in named:
        if "NAME" not in name:
            assert (ROOT / name.split()[0]).exists(), name


def test_what_stands_beside_the_graph_figures_comes_from_files() -> None:
    """Card and table texts against the results of benchmarks/ignn."""
    folder = ROOT / "benchmarks" / "ignn"
    baselines = json.loads((folder / "baselines.json").read_text())
    folds = json.loads((folder / "results.json").read_text())["folds"]
    for name in ("Twitch", "HumLoc", "EukLoc"):
        row = baselines["nodes"][name]
        own, wider = row["logistic_regression"], row["with_neighbours"]
        words = f"{100 * own:.1f} %, with its neighbours' means {100 * wider:.1f} %"
        if row["metric"] == "auc":
            words = f"AUC {own:.3f}, with its neighbours' means {wider:.3f}"
        assert words in DATA_TEXTS[name.lower()].beside
    for name in ("PROTEINS", "COX2"):
        own = [folds[f"{name}-upg-5-0.5-honest-{i}"]["test_accuracy"] for i in range(10)]
        regression = baselines["graphs"][name]["logistic_regression"]
        beside = DATA_TEXTS[name.lower()].beside
        assert f"this recipe {100 * sum(own) / 10:.1f} %" in beside
        assert f"on counts {100 * regression:.1f} %" in beside


def test_what_stands_beside_the_text_figures_comes_from_files() -> None:
    file = ROOT / "benchmarks" / "results" / "ngrams.json"
    for name, row in json.loads(file.read_text())["corpora"].items():
        assert f"Kneser-Ney 5-grams: {row['perplexity']['5']:.0f};" in DATA_TEXTS[name].beside


def test_the_table_of_the_text_study_comes_from_its_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = ROOT / "benchmarks" / "studies"
    monkeypatch.syspath_prepend(str(folder))
    study = load_script("benchmarks/studies/text_gradients.py")
    table = study.report()
    assert (folder / "text_gradients_table.md").read_text(encoding="utf-8") == table
    assert table in (folder / "README.md").read_text(encoding="utf-8")
    for run in study.FILES.iterdir():
        files = [
            json.loads((run / f"wikitext-2-{s}.json").read_text()) for s in ("validation", "test")
        ]
        assert files[0]["model"]["weights_sha256"] == files[1]["model"]["weights_sha256"]
        assert all(file["model"]["name"] == run.name and file["data"]["complete"] for file in files)


def test_folds_stand_beside_the_regression_on_the_same_folds() -> None:
    folds = [{"fold": 1, "test_accuracy": 0.75}, {"fold": 0, "test_accuracy": 0.5}]
    assert report.above_regression(folds, [0.25, 0.5]) == [0.25, 0.25]
    assert report.every_epoch(folds) == ("", "")
    tested = [{**f, "last_test_accuracy": 0.6, "best_test_accuracy": 0.8} for f in folds]
    last, gain = report.every_epoch(tested)
    assert last.startswith("60.0 ± 0.0") and gain == "17.5"


def test_wilson_interval() -> None:
    """Against the closed form for no success, z² / (n + z²), and symmetry."""
    low, high = report.wilson(0.0, 20, z=2.0)
    assert low == pytest.approx(0.0) and high == pytest.approx(4 / 24)
    mirrored = report.wilson(0.3, 50)
    assert report.wilson(0.7, 50) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]))
