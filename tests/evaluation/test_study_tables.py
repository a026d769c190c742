"""Intervals of the studies, and tables of their README that are drawn from cells."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

from deqzoo.evaluation.files import weights_digest
from deqzoo.hub.catalogue import entries
from tests.scripts import ROOT, load_script

FOLDER = ROOT / "benchmarks" / "studies"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    return lambda name: load_script(f"benchmarks/studies/{name}.py")


def words(text: str) -> str:
    """A text without its line breaks."""
    return " ".join(text.split())


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


@pytest.mark.parametrize(
    "name",
    ["anytime", "broyden", "cost", "penalty", "static_precision", "theorem1", "theorem3"],
)
def test_tables_are_those_of_their_cells(study: Callable[[str], ModuleType], name: str) -> None:
    module = study(name)
    stored = (FOLDER / f"{name}_table.md").read_text(encoding="utf-8")
    assert module.report(module.Cells(name).done) == stored


@pytest.mark.parametrize("name", ["anytime", "penalty", "theorem1"])
def test_studies_of_checkpoints_are_of_the_stored_weights(
    study: Callable[[str], ModuleType], name: str
) -> None:
    """Cells of weights that were replaced since are measured anew by the study's command."""
    measured = study(name).Cells(name).done.items()
    digests = {e.name: weights_digest(e.folder) for e in entries()}
    models = [(key.split(": ")[0], cell["weights_sha256"]) for key, cell in measured]
    assert {model for model, _ in models} & digests.keys()
    assert all(sha256 == digests[model] for model, sha256 in models if model in digests)


def test_short_runs_are_paired_by_seed(study: Callable[[str], ModuleType]) -> None:
    """The tables of short runs are those of their cells; README quotes that of equal FLOPs."""
    runs, ablation, equal = (study(n) for n in ("short_runs", "ablation", "equal_compute"))
    for name, variants, reference in (
        ("ablation", ablation.GRADIENTS, ablation.IMPLICIT),
        ("choices", study("choices").VARIANTS, None),
        ("equal_epochs", study("equal_epochs").VARIANTS, ablation.IMPLICIT),
        ("equal_compute", equal.VARIANTS, ablation.IMPLICIT),
    ):
        table = runs.report(runs.Cells(name).done, variants, reference)
        assert table == (FOLDER / f"{name}_table.md").read_text(encoding="utf-8")
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for line in table.splitlines()[2:]:
        variant, _, accuracy, against, epochs, *_ = (part.strip() for part in line.split("|")[1:])
        assert f"| {variant} | {epochs} | {accuracy} | {against} |" in text
    stored = (FOLDER / "equal_epochs_table.md").read_text(encoding="utf-8")
    for line in stored.splitlines()[2:]:
        cells = [part.strip() for part in line.split("|")[1:-1]]
        assert f"| {cells[0]} | {cells[2]} | {cells[3]} | {cells[-1]} |" in text
    upg, npg, longer = "upg k=5 λ=0.5", "npg k=5 λ=0.5", "npg k=5 λ=0.5, 13 steps"
    for name, one, other in (
        ("equal_epochs", upg, npg),
        ("equal_epochs", longer, npg),
        ("equal_epochs", "jfb", npg),
        ("equal_compute", "jfb", npg),
    ):
        seeds = runs.by_variant(runs.Cells(name).done, (one, other))
        assert runs.paired(*(runs.accuracies(seeds[v]) for v in (one, other))) in words(text)
    seeds = runs.by_variant(runs.Cells("equal_compute").done, equal.VARIANTS)
    compute = [cell["pflop"] for cells in seeds.values() for cell in cells.values()]
    assert max(compute) < 1.05 * min(compute)


def test_intervals_of_fidelity_are_those_of_seeds(study: Callable[[str], ModuleType]) -> None:
    """Batches of one training are no independent values: only the seeds' means count."""
    fidelity = study("fidelity_seeds")
    assert fidelity.words([[1.0, 3.0], [2.0], [2.0, 2.0]]) == "2.000 ± 0.000"
    half = 4.303 * 1.0 / 3**0.5  # t with two degrees of freedom
    assert fidelity.words([[1.0] * 16, [2.0] * 2, [3.0]]) == f"2.000 ± {half:.3f}"
    assert fidelity.words([[1.0, 2.0]]) == "1.500"


def test_fall_compares_both_sides_of_one(study: Callable[[str], ModuleType]) -> None:
    fidelity = study("fidelity_seeds")
    assert fidelity.fall([(0.5, 1.0), (0.9, 0.8), (1.0, 0.5), (2.0, 0.3)]) == pytest.approx(0.5)
    assert fidelity.fall([(0.5, 1.0)]) is None


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
    value = "0.900 ± 0.000"
    assert f"| 5 | 2 | 4 | 0.500 ± 0.000 | {value} |" in table
    assert "| 10 | 1 | 2 | 2.000 |" in table
    assert f"| 0 to 1 | 2 | 4 | {value} |" in table
    assert "| 2 to 3 | 1 | 2 | 0.400 |" in table
    assert "| k=5 λ=1 | 1 | 0.500 |" in table


@pytest.mark.parametrize("name", ["fidelity_seeds", "fidelity_pictures"])
def test_fidelity_tables_are_up_to_date(study: Callable[[str], ModuleType], name: str) -> None:
    fidelity = study("fidelity_seeds")
    stored = (FOLDER / f"{name}_table.md").read_text(encoding="utf-8")
    assert fidelity.report(fidelity.Cells(name).done) == stored
    _, by_radius, _ = stored.split("\n\n")
    assert by_radius in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_recipes_of_fidelity_are_recipes(study: Callable[[str], ModuleType]) -> None:
    fidelity = study("fidelity_seeds")
    for _, settings in fidelity.MODELS.values():
        assert fidelity.from_plain(fidelity.Recipe, settings, "").evaluation.snapshots == 9


def test_explicit_network_costs_as_much(study: Callable[[str], ModuleType]) -> None:
    """As many FLOPs to use and to train as the MDEQ; its table is that of its cells."""
    explicit = study("explicit")
    (cell,) = explicit.Cells("explicit").done.values()
    table = explicit.report(explicit.Cells("explicit").done)
    assert table == (FOLDER / "explicit_table.md").read_text(encoding="utf-8")
    assert table in (FOLDER / "README.md").read_text(encoding="utf-8")
    reference = explicit.read_json(explicit.REFERENCE / "training.json")
    assert cell["pflop"] == pytest.approx(reference["pflop"], rel=0.01)
    assert cell["flops_per_picture"] == pytest.approx(cell["reference_flops_per_picture"], rel=0.05)
    model = explicit.network(8)
    twice = explicit.network_flops(explicit.network(16), 32) / explicit.network_flops(model, 32)
    assert 3.5 < twice < 4.5
    recipe = explicit.from_plain(explicit.Recipe, reference["recipe"], "")
    steps = explicit.steps_of(recipe, model, 1e13)
    assert [round(n / steps[2], 1) for n in steps] == [5.0, 3.0, 1.0]
