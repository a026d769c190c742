"""The evidence on two pages: every figure of REPORT.md, read from the files that commands wrote.

    python benchmarks/report.py

No number of the report is typed by hand: the text below holds places that are filled from
evaluation files and from the results of the studies. A test renders it and compares.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from studies.cells import markdown_table
from studies.intervals import by_seed, differences, half_interval, spread

from deqzoo.hub.card_texts import DATA_TEXTS
from deqzoo.hub.catalogue import Entry, below_baseline, entries, main_value
from deqzoo.tasks.metrics import METRICS
from deqzoo.zoo import list_models

HERE = Path(__file__).resolve().parent


def cells(name: str) -> dict[str, Any]:
    """Cells of a study by name."""
    file = HERE / "studies" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8"))["cells"]


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share of n independent answers (Wilson 1927)."""
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return middle - half, middle + half


def mean_interval(values: list[float]) -> str:
    """Mean, standard deviation (ddof 1) and half of the 95 % interval of the mean, in %."""
    percent = [100 * value for value in values]
    return f"{spread(percent)} (mean ± {half_interval(percent):.1f})"


def checkpoint_rows() -> Iterable[list[str]]:
    """Test figures of the checkpoints, with interval, baseline, equilibrium and file."""
    for found in entries():
        stem = next((s for s in found.evaluations if s.endswith("-test")), None)
        if stem is None:
            continue
        evaluation = found.evaluations[stem]
        results, data = evaluation["results"], evaluation["data"]
        interval = ""
        if evaluation["metric"] == "accuracy":
            low, high = wilson(results["accuracy"], data["samples"])
            interval = f"{100 * low:.1f} to {100 * high:.1f} %"
        yield [
            found.name,
            main_value(evaluation) or "",
            interval,
            beside(found, evaluation),
            f"{100 * results['converged_share']:.1f} %",
            f"{results['n_steps_mean']:.1f}",
            str(data["looks"]),
            f"`{stem}.json`",
        ]


def beside(found: Entry, evaluation: dict[str, Any]) -> str:
    """The baseline in the file and what others reached."""
    baseline = METRICS[evaluation["metric"]].baseline
    parts = []
    if baseline in evaluation["results"]:
        value = f"{100 * evaluation['results'][baseline]:.1f} %"
        parts.append(f"{'**not above** ' if below_baseline(evaluation) else ''}constant: {value}")
    text = DATA_TEXTS.get(evaluation["data"]["name"])
    if text is not None and text.beside:
        parts.append(text.beside)
    return "; ".join(parts)


def gradient_rows() -> Iterable[list[str]]:
    """Study 6: accuracy by seed, and paired differences to the implicit gradient."""
    for gradient, runs, against in by_gradient("comparison", ", seed ", "implicit"):
        yield [
            gradient,
            mean_interval([run["accuracy"] for run in runs]),
            against,
            f"{runs[0]['evaluations_per_step']:.1f}",
            f"{runs[0]['pflop']:.2f}",
        ]


def short_rows(study: str) -> Iterable[list[str]]:
    """Short runs, and paired differences to the implicit gradient."""
    for gradient, runs, against in by_gradient(study, " seed ", "implicit tol 1e-3"):
        yield [
            gradient,
            str(len(runs)),
            mean_interval([run["accuracy"] for run in runs]),
            against,
            f"{statistics.mean(run['epochs'] for run in runs):.2f}",
            f"{1000 * statistics.mean(run['pflop'] for run in runs):.1f}",
        ]


def by_gradient(
    study: str, mark: str, reference: str
) -> Iterable[tuple[str, list[dict[str, float]], str]]:
    """Gradient, runs, and differences to the runs of a reference with the same seeds, of a study.

    Args:
        mark: what stands before the seed in the name of a cell.
    """
    table = by_seed(cells(study), mark)
    accuracy = {
        gradient: {seed: run["accuracy"] for seed, run in runs.items()}
        for gradient, runs in table.items()
    }
    for gradient, runs in table.items():
        points = differences(accuracy[gradient], accuracy[reference])
        against = "" if gradient == reference else mean_interval(points)
        yield gradient, list(runs.values()), against


def graph_rows() -> Iterable[list[str]]:
    """Ten folds of the graph sets: three rules of choosing the epoch, beside baselines."""
    folds = json.loads((HERE / "ignn" / "results.json").read_text())["folds"].values()
    baselines = json.loads((HERE / "ignn" / "baselines.json").read_text())["graphs"]
    for name, baseline in baselines.items():
        for method in ("implicit", "upg-5-0.5"):
            mine = [f for f in folds if f["data"] == name and f["method"] == method]
            honest = [f for f in mine if f["protocol"] == "honest"]
            published = [f["best_test_accuracy"] for f in mine if f["protocol"] == "published"]
            if len(honest) != 10:
                continue
            yield [
                name,
                method,
                mean_interval([f["test_accuracy"] for f in honest]),
                mean_interval(above_regression(honest, baseline["folds"])),
                *every_epoch(honest),
                f"{100 * statistics.mean(published):.1f}" if len(published) == 10 else "",
                f"{100 * baseline['majority']:.1f}",
                f"{100 * baseline['logistic_regression']:.1f} ± {100 * baseline['deviation']:.1f}",
            ]


def tuned(name: str) -> dict[str, str]:
    """A graph set with settings of its own: ten folds, and how far the regression is from them."""
    file = HERE / "ignn" / name / "results.json"
    folds = list(json.loads(file.read_text())["folds"].values())
    baseline = json.loads((HERE / "ignn" / "baselines.json").read_text())["graphs"][name.upper()]
    return {
        name: mean_interval([f["test_accuracy"] for f in folds]),
        f"{name}_above": mean_interval(above_regression(folds, baseline["folds"])),
    }


def above_regression(folds: list[dict[str, Any]], regression: list[float]) -> list[float]:
    """By how much each fold is above the regression's accuracy on the same fold."""
    return [f["test_accuracy"] - regression[f["fold"]] for f in folds]


def every_epoch(folds: list[dict[str, Any]]) -> tuple[str, str]:
    """Last epoch, and the gain of the best one; empty where only the kept weights were tested."""
    if not all("last_test_accuracy" in f for f in folds):
        return "", ""
    gain = [f["best_test_accuracy"] - f["test_accuracy"] for f in folds]
    return (
        mean_interval([f["last_test_accuracy"] for f in folds]),
        f"{100 * statistics.mean(gain):.1f}",
    )


def theorem_rows() -> Iterable[list[str]]:
    """Theorem 1 over all checkpoints, by setting."""
    found = cells("theorem1")
    for setting in next(iter(found.values()))["distance"]:
        refuted = sum(
            all(side > cell["allowed"] for side in cell["distance"][setting].values())
            for cell in found.values()
        )
        cosines = {
            name: [cell["agreement"][setting][name]["cosine"] for cell in found.values()]
            for name in ("npg", "upg")
        }
        yield [
            setting,
            f"{refuted} of {len(found)}",
            *(f"{min(values):.3f}, {statistics.median(values):.3f}" for values in cosines.values()),
        ]


def fidelity(study: str) -> str:
    """Cosines by spectral radius, the second of the three tables of a study of fidelity."""
    text = (HERE / "studies" / f"{study}_table.md").read_text(encoding="utf-8")
    return text.split("\n\n")[1]


def explicit() -> dict[str, str]:
    """An explicit network of equal cost, and the release of the tiny MDEQ that it is beside."""
    (cell,) = cells("explicit").values()
    folder = HERE / "studies" / "explicit_reference"
    record, test = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("training", "cifar10-test")
    )
    shares = {
        "explicit": (cell["accuracy"], cell["test_pictures"]),
        "explicit_mdeq": (test["results"]["accuracy"], test["data"]["pictures"]),
    }
    places = {}
    for name, (share, n) in shares.items():
        low, high = wilson(share, n)
        places[name] = f"{100 * share:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
    return {
        **places,
        "explicit_gflop": f"{cell['flops_per_picture'] / 1e9:.2f}",
        "explicit_pflop": f"{record['pflop']:.2f}",
        "explicit_parameters": f"{cell['parameters'] / 1e6:.1f}M",
        "explicit_mdeq_parameters": f"{test['model']['parameters'] / 1e6:.2f}M",
        "explicit_epochs": f"{cell['epochs']:.1f}",
        "explicit_mdeq_epochs": f"{record['epochs']:.0f}",
    }


def anytime() -> dict[str, str]:
    """What the tiny MDEQ names within a few steps, by the sums of the study's cells."""
    name, found = "mdeq-tiny-cifar-upg", cells("anytime")
    curve, compared = (
        [cell for key, cell in found.items() if key.startswith(f"{name}: {what} ")]
        for what in ("curve", "solvers")
    )

    def share(measured: list[Any], budget: str, *side: str) -> str:
        hits = 0
        for cell in measured:
            right = cell["right"]
            for name in side:
                right = right[name]
            hits += right[budget]
        return f"{100 * hits / sum(cell['pictures'] for cell in measured):.1f}"

    eight, thirty = (sum(cell["only"]["8"][side] for cell in curve) for side in (0, 1))
    return {
        "anytime_pictures": f"{sum(cell['pictures'] for cell in curve):,}",
        "anytime_curve": ", ".join(share(curve, n) for n in "1248"),
        "anytime_last": share(curve, "30"),
        "anytime_pairs": f"{eight} against {thirty}",
        "solver_pictures": f"{sum(cell['pictures'] for cell in compared):,}",
        "solver_own": ", ".join(share(compared, n, "own") for n in "248"),
        "solver_plain": ", ".join(share(compared, n, "plain") for n in "248"),
        "solver_TorchDEQ": share(compared, "4", "TorchDEQ"),
    }


def fill() -> str:
    """REPORT.md."""
    studies = cells("broyden")["mdeq-cifar-large"]["seconds"]
    npg = studies["NPG, k = 5, λ = 0.5"]
    broyden = [value / npg for name, value in studies.items() if "Broyden" in name]
    theorem3 = cells("theorem3")
    worst, mild = theorem3["error 0.3"], theorem3["error 0.03"]
    exact = theorem3["error 0"]
    places = {
        "checkpoints": markdown_table(
            ["checkpoint", "test split", "95 % interval", "beside", "converged", "steps",
             "looks", "file"],
            checkpoint_rows(),
        ),
        "gradients": markdown_table(
            ["gradient", "test accuracy, %", "against implicit, same seed", "evaluations per step",
             "PFLOP"],
            gradient_rows(),
        ),
        **{
            study: markdown_table(
                ["gradient", "seeds", "validation accuracy, %", "against implicit, same seed",
                 "epochs", "TFLOP"],
                short_rows(study),
            )
            for study in ("equal_epochs", "equal_compute")
        },
        "graphs": markdown_table(
            ["data", "gradient", "epoch by validation", "above the regression, same folds",
             "last epoch", "gain of the best test epoch", "published protocol",
             "most frequent class", "logistic regression"],
            graph_rows(),
        ),
        **tuned("mutag"),
        **tuned("nci1"),
        "theorem": markdown_table(
            ["setting", "condition refuted", "cosine of NPG: least, median",
             "cosine of UPG: least, median"],
            theorem_rows(),
        ),
        "theorem_models": str(len(cells("theorem1"))),
        "withdrawn": str(len(cells("theorem1").keys() - set(list_models()))),
        "fidelity_text": fidelity("fidelity_seeds"),
        "fidelity_pictures": fidelity("fidelity_pictures"),
        **explicit(),
        "slowest": f"{min(broyden):.1f}",
        "fastest": f"{max(broyden):.1f}",
        "jfb_slowest": f"{npg / studies['JFB'] * min(broyden):.1f}",
        "jfb_fastest": f"{npg / studies['JFB'] * max(broyden):.1f}",
        "worst_error": f"{worst['error']:g}",
        "worst_excess": f"{worst['means'][-1] - exact['means'][-1]:.3f}",
        "mild_error": f"{mild['error']:g}",
        "mild_excess": f"{mild['means'][-1] - exact['means'][-1]:.4f}",
        "one_term_error": f"{theorem3['terms 1']['error']:.2f}",
        "one_term_last": f"{theorem3['terms 1']['last']:.0e}",
        **anytime(),
    }  # fmt: skip
    text = (HERE / "REPORT.template.md").read_text(encoding="utf-8")
    for name, value in places.items():
        assert f"{{{name}}}" in text, name
        text = text.replace(f"{{{name}}}", value.rstrip())
    return text


def main() -> None:
    (HERE / "REPORT.md").write_text(fill(), encoding="utf-8")
    print(HERE / "REPORT.md")


if __name__ == "__main__":
    main()
