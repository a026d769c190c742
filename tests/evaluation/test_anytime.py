"""The paired curve of the anytime study: one solve in place of one per budget."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from deqzoo import DEQModel, MDEQConfig, MDEQForImageClassification
from tests.scripts import ROOT, load_script


@pytest.fixture
def anytime(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "studies"))
    return load_script("benchmarks/studies/anytime.py")


def test_one_solve_gives_what_a_solve_per_budget_gives(anytime: ModuleType) -> None:
    """Noise solves badly: the iterate with the least residual is not always the last."""
    torch.manual_seed(0)
    model = DEQModel.from_pretrained("mdeq-tiny-cifar-upg").eval()
    pixels = 2 * torch.randn(6, 3, 32, 32)
    with torch.inference_mode():
        found = anytime.budget_logits(model, pixels)
        assert tuple(found) == anytime.BUDGETS
        for n, logits in found.items():
            alone = model(pixels, solver={"max_steps": n, "tol": 0.0}).logits
            torch.testing.assert_close(logits, alone, rtol=1e-3, atol=1e-3)


def test_curve_is_that_of_evaluations(anytime: ModuleType, cifar_folder: Path) -> None:
    """Accuracy by budget, and the pairs that make its differences, in two cells."""
    model = DEQModel.from_pretrained("mdeq-tiny-cifar-upg")
    parts = {
        f"m: curve {first}": anytime.curve(model, cifar_folder, first, 10) for first in (0, 10)
    }
    assert parts["m: curve 10"]["pictures"] == 10
    whole = anytime.curves(parts)["m"]
    assert whole["pictures"] == 20 and whole["dtype"] == "float32"
    evaluator = anytime.ImageEvaluator(
        model, "test", cifar_folder, batch_size=8, limit=20, progress=False
    )
    for n, right in whole["right"].items():
        alone = evaluator.measure({"max_steps": int(n), "tol": 0.0})["accuracy"]
        assert right / 20 == pytest.approx(alone)
        gained, lost = whole["only"][n]
        assert right - whole["right"]["30"] == gained - lost
    assert any(sum(pair) for pair in whole["only"].values()) and whole["only"]["30"] == (0, 0)
    assert "first 20 test pictures" in anytime.curve_words(whole)
    # A gap, or another dtype, is no part of the curve.
    parts["m: curve 10"]["dtype"] = "bfloat16"
    assert anytime.curves(parts)["m"]["pictures"] == 10
    assert anytime.curves({"m: curve 10": parts["m: curve 10"]}) == {}


def test_solvers_are_compared_picture_by_picture(anytime: ModuleType, cifar_folder: Path) -> None:
    pytest.importorskip("torchdeq")
    model = DEQModel.from_pretrained("mdeq-tiny-cifar-upg")
    parts = {
        f"m: solvers {first}": anytime.solvers(model, cifar_folder, first, 10) for first in (0, 10)
    }
    whole = anytime.compared(parts)["m"]
    assert whole["pictures"] == 20
    assert whole["right"]["own"] == anytime.curve(model, cifar_folder, 0, 20)["right"]
    evaluator = anytime.ImageEvaluator(
        model, "test", cifar_folder, batch_size=8, limit=20, progress=False
    )
    plain = evaluator.measure({"name": "fixed_point", "max_steps": 8, "tol": 0.0})["accuracy"]
    assert whole["right"]["plain"]["8"] / 20 == pytest.approx(plain)
    assert list(whole["right"]["TorchDEQ"]) == ["4", "8", "16", "30"]
    for side in anytime.SIDES:
        for n, (own, other) in whole["only"][side].items():
            assert whole["right"]["own"][n] - whole["right"][side][n] == own - other
    assert any(sum(pair) for pair in whole["only"]["plain"].values())
    assert "first 20 test pictures by solver" in anytime.solver_words(whole)
    assert anytime.compared({"m: solvers 10": parts["m: solvers 10"]}) == {}


def test_torchdeq_solves_the_same_equation(anytime: ModuleType) -> None:
    pytest.importorskip("torchdeq")
    torch.manual_seed(0)
    config = MDEQConfig(
        channels=[8, 16], head_channels=[4, 8], final_channels=16, num_groups=4, image_size=16
    )
    model = MDEQForImageClassification(config).eval()
    pixels = torch.randn(4, 3, 16, 16)
    with torch.inference_mode():
        theirs = anytime.torchdeq_logits(model, pixels)[30]
        ours = model(pixels, solver={"max_steps": 60, "tol": 1e-6}).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)


def test_mcnemar(anytime: ModuleType) -> None:
    """Against sums of binomial probabilities by hand."""
    assert anytime.mcnemar(0, 5) == pytest.approx(2 / 32)
    assert anytime.mcnemar(7, 5) == pytest.approx(2 * (1 + 12 + 66 + 220 + 495 + 792) / 4096)
    assert anytime.mcnemar(3, 3) == anytime.mcnemar(0, 0) == 1.0
