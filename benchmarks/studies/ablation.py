"""Ablation: final accuracy of short training runs by λ, k and kind of phantom gradient.

    python benchmarks/studies/ablation.py --data CIFAR [--epochs 1] [--seeds 3] [--limit-cells N]

Every cell is a run of the recipe `mdeq-tiny-cifar-upg` cut down to one stage at 16 × 16 pixels,
with its own gradient and seed, scored on the first 2,000 validation pictures. Cells are kept as
they finish; a run that was cut off goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from cells import HERE, Cells, markdown_table, write_text

from deqzoo.training.recipe import Recipe, load_recipe
from deqzoo.training.run import run_recipe

RECIPE = HERE.parents[1] / "recipes" / "mdeq-tiny-cifar-upg.yaml"
GRADIENTS: dict[str, dict[str, Any]] = {
    "upg k=5 λ=0.5": {"name": "upg", "steps": 5, "damping": 0.5},
    "npg k=5 λ=0.5": {"name": "npg", "steps": 5, "damping": 0.5},
    "jfb": {"name": "jfb"},
    "implicit tol 1e-3": {
        "name": "implicit", "solver": {"name": "anderson", "max_steps": 20, "tol": 1e-3},
    },
    "npg k=5 λ=1": {"name": "npg", "steps": 5, "damping": 1.0},
    "npg k=5 λ=0.3": {"name": "npg", "steps": 5, "damping": 0.3},
    "npg k=1 λ=0.5": {"name": "npg", "steps": 1, "damping": 0.5},
    "npg k=2 λ=0.5": {"name": "npg", "steps": 2, "damping": 0.5},
    "npg k=10 λ=0.5": {"name": "npg", "steps": 10, "damping": 0.5},
    "upg k=2 λ=0.9": {"name": "upg", "steps": 2, "damping": 0.9},
}  # fmt: skip


def recipe_of(gradient: str, seed: int, epochs: float) -> Recipe:
    """The tiny recipe with one short stage."""
    recipe = load_recipe(RECIPE)
    stage = replace(
        recipe.stages[0],
        epochs=epochs,
        resolution=16,
        solver={"name": "anderson", "max_steps": 8, "tol": 1e-3},
        gradient=GRADIENTS[gradient],
    )
    evaluation = replace(recipe.evaluation, per_epoch=1 / math.ceil(epochs), samples=2000)
    evaluation = replace(evaluation, snapshots=0)
    return replace(
        recipe, name=f"ablation-{gradient}-{seed}", seed=seed, stages=(stage,),
        evaluation=evaluation,
    )  # fmt: skip


def measure(key: str, data: Path, runs: Path, epochs: float) -> dict[str, float]:
    """Train one cell and read its last validation."""
    gradient, seed = key.rsplit(" seed ", 1)
    out = runs / key.replace(" ", "_")
    run_recipe(recipe_of(gradient, int(seed), epochs), data, out, resume=True, progress=False)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "eval_accuracy" in line)
    record = json.loads((out / "record.json").read_text())
    return {
        "accuracy": last["eval_accuracy"],
        "residual": last["eval_residual_median"],
        "pflop": record["pflop"],
        "steps": record["steps"],
        "epochs": epochs,
    }


def report(cells: dict[str, dict[str, float]]) -> str:
    """Mean and spread over seeds."""
    rows = []
    for gradient in GRADIENTS:
        found = [cell for key, cell in cells.items() if key.startswith(f"{gradient} seed")]
        if not found:
            continue
        accuracies = [cell["accuracy"] for cell in found]
        spread = statistics.stdev(accuracies) if len(found) > 1 else float("nan")
        pflop = statistics.mean(cell["pflop"] for cell in found)
        values = f"{statistics.mean(accuracies):.3f} ± {spread:.3f}"
        rows.append([gradient, str(len(found)), values, f"{1000 * pflop:.2f}"])
    return markdown_table(["gradient", "seeds", "validation accuracy", "TFLOP spent"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--limit-cells", type=int, help="stop after so many new cells")
    arguments = parser.parse_args()
    cells = Cells("ablation")
    wanted = [f"{g} seed {s}" for s in range(arguments.seeds) for g in GRADIENTS]
    fresh = [key for key in wanted if key not in cells.done][: arguments.limit_cells]
    cells.fill(fresh, lambda key: measure(key, arguments.data, arguments.runs, arguments.epochs))
    missing = cells.save(wanted)
    print(report(cells.done))
    print("missing:", ", ".join(missing) or "nothing")
    write_text("ablation_table.md", report(cells.done))


if __name__ == "__main__":
    main()
