"""Metrics against hand-computed numbers, and the evaluation of an image classifier."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from deqzoo import DEQModel, UserError
from deqzoo.data import load_cifar10
from deqzoo.evaluation import images
from deqzoo.evaluation.base import forward_all
from deqzoo.evaluation.classify import classify
from deqzoo.evaluation.dispatch import budget_curve, evaluate_model, evaluator_of
from deqzoo.evaluation.files import finite, weights_digest, write_evaluation
from deqzoo.hub.catalogue import main_figure
from deqzoo.tasks import metrics


def test_metrics_by_hand() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    logits, labels = probabilities.log(), torch.tensor([0, 1, 1])
    assert metrics.accuracy(logits, labels) == pytest.approx(2 / 3)
    assert metrics.per_class_accuracy(logits, labels) == [1.0, 0.5]
    expected = -(math.log(0.9) + math.log(0.4) + math.log(0.8)) / 3
    assert metrics.negative_log_likelihood(logits, labels) == pytest.approx(expected, abs=1e-6)
    # confidences 0.9 (right), 0.6 (wrong), 0.8 (right), each in a bin of its own
    assert metrics.expected_calibration_error(logits, labels) == pytest.approx(
        (0.1 + 0.6 + 0.2) / 3, abs=1e-6
    )


def test_classes_without_rows_are_no_number() -> None:
    assert math.isnan(metrics.per_class_accuracy(torch.eye(3), torch.tensor([0, 1, 1]))[2])


def test_calibration_pools_within_a_bin() -> None:
    logits = torch.tensor([[0.72, 0.28], [0.72, 0.28]]).log()
    error = metrics.expected_calibration_error(logits, torch.tensor([0, 1]), n_bins=10)
    assert error == pytest.approx(0.22, abs=1e-6)


def test_equilibrium_summary() -> None:
    summary = metrics.equilibrium_summary(
        torch.tensor([2, 4, 6]),
        torch.tensor([1e-4, 1e-3, float("nan")]),
        torch.tensor([True, True, False]),
    )
    assert summary["n_steps_mean"] == 4 and summary["f_evaluations_per_sample"] == 5
    assert summary["residual_median"] == pytest.approx(5.5e-4)
    assert summary["converged_share"] == pytest.approx(2 / 3)


def test_evaluation_file(tiny_mdeq: Path, cifar_folder: Path, tmp_path: Path) -> None:
    model = DEQModel.from_pretrained(tiny_mdeq)
    content = evaluate_model(
        model, "mdeq-test", data=cifar_folder, budget_samples=0, progress=False
    )
    assert content["model"]["weights_sha256"] == weights_digest(tiny_mdeq)
    assert content["model"]["parameters"] == model.num_parameters()
    assert content["budget"] is None
    results = content["results"]
    assert len(results["per_class_accuracy"]) == 10
    mean = sum(results["per_class_accuracy"].values()) / 10
    assert results["accuracy"] == pytest.approx(mean)  # four pictures of each class
    written = write_evaluation(tmp_path / "new" / "file.json", content)
    assert json.loads(written.read_text())["results"]["accuracy"] == results["accuracy"]


def test_evaluation_file_says_which_path_made_it(
    tiny_mdeq: Path, cifar_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def path() -> tuple[str, bool]:
        model = DEQModel.from_pretrained(tiny_mdeq)
        content = evaluate_model(
            model, "mdeq-test", data=cifar_folder, limit=4, budget_samples=0, progress=False
        )
        weight = model.mdeq.stem.convolutions[1].weight
        laid_out = weight.is_contiguous(memory_format=torch.channels_last)
        return content["environment"]["inference"], laid_out

    found, laid_out = path()
    assert found.startswith("channels last") and laid_out
    monkeypatch.setenv("DEQZOO_PLAIN_INFERENCE", "1")
    assert path() == ("plain", False)


def test_only_many_pictures_are_worth_a_compilation(
    tiny_mdeq: Path, cifar_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(images, "native_norm_available", lambda wait: asked.append(wait))
    for least in (41, 40):
        monkeypatch.setattr(images, "WORTH_COMPILING", least)
        evaluator_of(DEQModel.from_pretrained(tiny_mdeq), data=cifar_folder, progress=False)
    assert asked == [False]  # once, without waiting for another process


def test_classify_agrees_with_the_evaluation(tiny_mdeq: Path, cifar_folder: Path) -> None:
    model = DEQModel.from_pretrained(tiny_mdeq)
    pictures = load_cifar10("test", cifar_folder)
    evaluator = evaluator_of(model, data=cifar_folder, batch_size=16, progress=False)
    outputs = forward_all(model, evaluator.batches(None))
    images = [Image.fromarray(row.numpy()) for row in pictures.pixels.permute(0, 2, 3, 1)]
    named = classify(model, images, top_k=1, batch_size=7)
    expected = [model.config.id2label[index] for index in outputs.logits.argmax(-1).tolist()]
    assert [result.labels[0][0] for result in named] == expected
    assert [result.n_steps for result in named] == outputs.n_steps.tolist()


def test_budgets_bound_the_steps(tiny_mdeq: Path, cifar_folder: Path) -> None:
    model = DEQModel.from_pretrained(tiny_mdeq)
    evaluator = evaluator_of(model, data=cifar_folder, batch_size=8, progress=False)
    curve = budget_curve(evaluator, model, 40, 8, budgets=(2, 12))
    assert curve["samples"] == 8
    few, many = curve["steps"]
    assert many["residual_median"] < few["residual_median"]
    assert evaluator.measure({"max_steps": 2})["n_steps_p95"] <= 2
    assert [row["max_steps"] for row in budget_curve(evaluator, model, 40, 4)["steps"]][-1] == 30
    model.set_solver(max_steps=40)  # more steps than the default's must not change the answer
    assert [row["max_steps"] for row in budget_curve(evaluator, model, 40, 4)["steps"]][-1] == 40


def test_a_figure_of_some_pictures_says_so(tiny_mdeq: Path, cifar_folder: Path) -> None:
    model = DEQModel.from_pretrained(tiny_mdeq)
    content = evaluate_model(model, "x", data=cifar_folder, limit=5, budget_samples=0)
    assert str(main_figure(content)).endswith("on cifar10 test (the first 5 pictures only)")


def test_limit_is_recorded(tiny_mdeq: Path, cifar_folder: Path) -> None:
    model = DEQModel.from_pretrained(tiny_mdeq)
    content = evaluate_model(
        model, "x", data=cifar_folder, limit=5, budget_samples=0, progress=False
    )
    assert content["data"]["samples"] == 5 and content["data"]["limit"] == 5
    assert content["command"].endswith("--limit 5")


def test_unknown_labels_and_other_models_are_refused(tiny_mdeq: Path) -> None:
    model = DEQModel.from_pretrained(tiny_mdeq)
    model.config.id2label = {i: str(i) for i in range(10)}
    with pytest.raises(UserError, match="no known data set"):
        evaluate_model(model, "x")
    with pytest.raises(UserError, match="classify pictures"):
        classify(model.mdeq, [])


def test_numbers_that_json_lacks_become_null() -> None:
    assert finite({"a": [float("nan"), 1.5], "b": float("inf")}) == {"a": [None, 1.5], "b": None}
