"""Intervals of the studies, and tables of their README that are drawn from cells."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

from tests.scripts import ROOT, load_script

FOLDER = ROOT / "benchmarks" / "studies"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    return lambda name: load_script(f"benchmarks/studies/{name}.py")


def test_gradients_are_paired_by_seed(study: Callable[[str], ModuleType]) -> None:
    """The mean of 1, 2 and 6 points is 3 ± 2.65; t with two degrees of freedom makes it ± 6.57."""
    comparison = study("comparison")
    cells = {
        f"{gradient}, seed {seed}": {"accuracy": value / 100}
        for gradient, values in (("implicit", (50, 60, 70)), ("JFB", (51, 62, 76)))
        for seed, value in enumerate(values)
    }
    assert comparison.paired(cells, "JFB") == "3.0 ± 2.6 (-3.6 to 9.6)"
    assert comparison.paired(cells, "implicit") == ""
    del cells["implicit, seed 1"], cells["JFB, seed 2"]
    assert comparison.paired(cells, "JFB") == ""


def test_readme_quotes_the_paired_differences(study: Callable[[str], ModuleType]) -> None:
    comparison = study("comparison")
    cells = comparison.Cells("comparison").done
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for gradient in comparison.GRADIENTS:
        runs = comparison.by_gradient(cells)[gradient]
        accuracy = comparison.spread([100 * run["accuracy"] for run in runs])
        assert f"| {gradient} | {accuracy} | {comparison.paired(cells, gradient)} |" in text
    assert comparison.report(cells) == (FOLDER / "comparison_table.md").read_text(encoding="utf-8")
