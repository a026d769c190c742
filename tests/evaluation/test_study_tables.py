"""Intervals of the studies, and tables of their README that are drawn from cells."""

from __future__ import annotations

import random
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
    assert comparison.against_implicit(cells, "JFB") == "3.0 ± 2.6 (-3.6 to 9.6)"
    assert comparison.against_implicit(cells, "implicit") == ""
    del cells["implicit, seed 1"], cells["JFB, seed 2"]
    assert comparison.against_implicit(cells, "JFB") == ""


def test_readme_quotes_the_paired_differences(study: Callable[[str], ModuleType]) -> None:
    comparison = study("comparison")
    cells = comparison.Cells("comparison").done
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for gradient in comparison.GRADIENTS:
        runs = comparison.by_gradient(cells)[gradient]
        accuracy = comparison.spread([100 * run["accuracy"] for run in runs])
        assert (
            f"| {gradient} | {accuracy} | {comparison.against_implicit(cells, gradient)} |" in text
        )
    assert comparison.report(cells) == (FOLDER / "comparison_table.md").read_text(encoding="utf-8")


def test_short_runs_are_paired_by_seed(study: Callable[[str], ModuleType]) -> None:
    """The tables of short runs are those of their cells; README quotes that of equal FLOPs."""
    runs, ablation, equal = (study(n) for n in ("short_runs", "ablation", "equal_compute"))
    for name, variants in (("ablation", ablation.GRADIENTS), ("equal_compute", equal.VARIANTS)):
        table = runs.report(runs.Cells(name).done, variants, ablation.IMPLICIT)
        assert table == (FOLDER / f"{name}_table.md").read_text(encoding="utf-8")
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for line in table.splitlines()[2:]:
        variant, _, accuracy, against, epochs, *_ = (part.strip() for part in line.split("|")[1:])
        assert f"| {variant} | {epochs} | {accuracy} | {against} |" in text
    seeds = runs.by_variant(runs.Cells("equal_compute").done, equal.VARIANTS)
    compute = [cell["pflop"] for cells in seeds.values() for cell in cells.values()]
    assert max(compute) < 1.05 * min(compute)


def test_intervals_hold_the_spread_of_seeds(study: Callable[[str], ModuleType]) -> None:
    """Seeds that differ widen the interval, though the values are the same."""
    fidelity = study("fidelity_seeds")
    draw = random.Random(0)
    values = [draw.gauss(0, 1) for _ in range(48)]
    mixed = [values[0::3], values[1::3], values[2::3]]
    ordered = sorted(values)
    apart = [ordered[:16], ordered[16:32], ordered[32:]]

    def width(by_seed: list[list[float]]) -> float:
        low, high = fidelity.interval(by_seed, fidelity.statistics.fmean)
        assert low < fidelity.statistics.fmean(values) < high
        return high - low

    assert width(apart) > 2 * width(mixed)
    assert fidelity.interval([[1.0], [1.0]], fidelity.statistics.fmean) == (1.0, 1.0)


def test_fall_compares_both_sides_of_one(study: Callable[[str], ModuleType]) -> None:
    fidelity = study("fidelity_seeds")
    assert fidelity.fall([(0.5, 1.0), (0.9, 0.8), (1.0, 0.5), (2.0, 0.3)]) == pytest.approx(0.5)
    assert fidelity.fall([(0.5, 1.0)]) != fidelity.fall([(0.5, 1.0)])  # NaN


def test_table_of_fidelity_takes_the_seeds_that_are_done(
    study: Callable[[str], ModuleType],
) -> None:
    fidelity = study("fidelity_seeds")

    def cell(radius: float, cosine: float) -> dict[str, object]:
        names = fidelity.SETTINGS
        return {
            "radius": [radius] * 2 + [9.0],
            "cosine": {name: [cosine] * 2 + [-1.0] for name in names},
            "residual": [1e-6, 1e-5, 0.3],  # no exact gradient for the last batch
        }

    cells = {
        "seed 0: step 0": cell(0.9, 0.1),  # initialisation is no part of the comparison
        "seed 0: step 5": cell(0.5, 0.9),
        "seed 1: step 5": cell(0.5, 0.9),
        "seed 0: step 10": cell(2.0, 0.4),
    }
    table = fidelity.report(cells)
    value = "0.900 (0.900 to 0.900)"
    assert f"| 5 | 2 | 4 | 0.500 (0.500 to 0.500) | {value} |" in table
    assert "| 10 | 1 | 2 | 2.000" in table
    assert "| k=5 λ=1 | 4 | 2 | 0.500 (0.500 to 0.500) |" in table


def test_fidelity_table_is_up_to_date(study: Callable[[str], ModuleType]) -> None:
    fidelity = study("fidelity_seeds")
    stored = (FOLDER / "fidelity_seeds_table.md").read_text(encoding="utf-8")
    assert fidelity.report(fidelity.Cells("fidelity_seeds").done) == stored
    *_, falls = stored.split("\n\n")
    assert falls in (FOLDER / "README.md").read_text(encoding="utf-8")
