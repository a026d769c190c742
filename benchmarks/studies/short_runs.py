"""Short training runs that are compared with each other: variants × seeds of one recipe."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cells import HERE, Cells, markdown_table, write_text
from dots import dot_chart
from intervals import by_seed, paired, spread

from deqzoo.recipe import Recipe, load_recipe
from deqzoo.training.run import run_recipe

RECIPE = HERE.parents[1] / "recipes" / "mdeq-tiny-cifar-upg.yaml"


def shortened(epochs: float) -> Recipe:
    """The tiny CIFAR recipe cut to one stage at 16 × 16 pixels, scored on 2,000 pictures."""
    recipe = load_recipe(RECIPE)
    stage = replace(recipe.stages[0], epochs=epochs, resolution=16)
    evaluation = replace(
        recipe.evaluation, per_epoch=1 / math.ceil(epochs), samples=2000, snapshots=0
    )
    return replace(recipe, stages=(stage,), average=0.98, evaluation=evaluation)


def train(recipe: Recipe, data: Path, out: Path) -> dict[str, float]:
    """Run a recipe, from its checkpoint if it was cut off, and read its last validation."""
    run_recipe(recipe, data, out, resume=True, progress=False)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "eval_accuracy" in line)
    record = json.loads((out / "record.json").read_text())
    return {
        "accuracy": last["eval_accuracy"],
        "nll": last["eval_negative_log_likelihood"],
        "residual": last["eval_residual_median"],
        "pflop": record["pflop"],
        "steps": record["steps"],
        "epochs": record["epochs"],
    }


def by_variant(
    cells: dict[str, dict[str, float]], variants: Iterable[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """The cells by seed of every variant that has some, in the order of the variants."""
    table = by_seed(cells, " seed ")
    return {variant: table[variant] for variant in variants if variant in table}


def accuracies(seeds: dict[str, dict[str, float]]) -> dict[str, float]:
    """Accuracy in % by seed."""
    return {seed: 100 * cell["accuracy"] for seed, cell in seeds.items()}


def plot(cells: dict[str, dict[str, float]], variants: Iterable[str], description: str) -> str:
    """Accuracy of every run by variant as SVG."""
    rows = {
        variant: {"": list(accuracies(seeds).values())}
        for variant, seeds in by_variant(cells, variants).items()
    }
    title = description.split(":", 1)[0]
    return dot_chart(rows, title=title, x_label="validation accuracy of each run, %; bar: mean")


def report(
    cells: dict[str, dict[str, float]], variants: Iterable[str], against: str | None = None
) -> str:
    """Mean and standard deviation over seeds, in the order of the variants.

    Args:
        against: a variant; differences to it, by seed, get a column.
    """
    table = by_variant(cells, variants)
    rows = []
    for variant, seeds in table.items():
        mine = accuracies(seeds)
        row = [variant, str(len(seeds)), spread(list(mine.values()))]
        if against is not None:
            same = variant == against or against not in table
            row.append("" if same else paired(mine, accuracies(table[against])))
        means = {
            k: statistics.mean(cell[k] for cell in seeds.values())
            for k in ("epochs", "nll", "residual", "pflop")
        }
        rows.append(
            [
                *row,
                f"{means['epochs']:.2f}",
                f"{means['nll']:.3f}",
                f"{means['residual']:.0e}",
                f"{1000 * means['pflop']:.1f}",
            ]
        )
    head = ["variant", "seeds", "validation accuracy, %"]
    if against is not None:
        head.append(f"against {against}, same seeds (95 % interval of the mean)")
    head += ["epochs", "validation loss", "median relative residual", "TFLOP"]
    return markdown_table(head, rows)


def main(
    name: str,
    description: str,
    variants: Iterable[str],
    recipe: Callable[[str, float], Recipe],
    against: str | None = None,
) -> None:
    """The command line of a study.

    Args:
        name: of its files.
        description: for `--help`.
        variants: names of what is compared.
        recipe: gives the recipe of a variant for a number of epochs.
        against: the variant that others are held against.
    """
    variants = list(variants)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10")
    parser.add_argument("--epochs", type=float, default=0.4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=variants, help="train these; default: all")
    parser.add_argument("--runs", type=Path, default=Path("runs") / name)
    parser.add_argument("--limit-cells", type=int, help="stop after so many new cells")
    arguments = parser.parse_args()

    def measure(key: str) -> dict[str, Any]:
        variant, seed = key.rsplit(" seed ", 1)
        wanted = replace(recipe(variant, arguments.epochs), name=key, seed=int(seed))
        return train(wanted, arguments.data, arguments.runs / key.replace(" ", "_"))

    cells = Cells(name)
    wanted = [
        f"{v} seed {s}" for s in range(arguments.seeds) for v in arguments.variants or variants
    ]
    fresh = [key for key in wanted if key not in cells.done][: arguments.limit_cells]
    cells.fill(fresh, measure)
    missing = cells.save(wanted)
    table = report(cells.done, variants, against)
    print(table)
    print("missing:", ", ".join(missing) or "nothing")
    write_text(f"{name}_table.md", table)
    if cells.done:
        write_text(f"{name}.svg", plot(cells.done, variants, description))
