"""Fidelity along training over seeds: phantom gradients against the spectral radius.

    python benchmarks/studies/fidelity_seeds.py --data PTB [--runs runs/fidelity]

A small DEQ-Transformer is trained on Penn Treebank for 500 steps with each of three seeds, without
a Jacobian penalty. At nine snapshots the gradients of three settings are held against the exact one
(a forward solve to 1e-6, an adjoint to 1e-7) on sixteen batches of four segments, the same ones
throughout, over the parameters behind the equilibrium; batches on which one of the two solves ends
above 1e-4 are left out. The spectral radius is by 300 power iterations. Intervals are of 95 %, from
resampling the seeds that are done, and batches within them. About six minutes of one core;
resumable snapshot by snapshot.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from cells import Cells, markdown_table, write_text
from training_precision import snapshot

from deqzoo.evaluation.chart import line_chart
from deqzoo.fidelity.batches import make_batch, part
from deqzoo.fidelity.study import EQUILIBRIUM, Comparison
from deqzoo.recipe import Recipe, from_plain, with_seed
from deqzoo.training.run import run_recipe
from deqzoo.zoo import read_json

SEEDS = (0, 1, 2)
SETTINGS = {"k=1 λ=1": (1, 1.0), "k=5 λ=1": (5, 1.0), "k=5 λ=0.5": (5, 0.5)}
BATCHES, SIZE = 16, 4
RESAMPLES = 2000
EXACT = 1e-4
"""Largest relative residual of the two solves up to which a gradient counts as exact."""
TRAINING = {"name": "upg", "steps": 3, "damping": 0.5}
RECIPE = {
    "name": "fidelity",
    "task": "language-modeling",
    "data": {"name": "ptb"},
    "model": {
        "family": "deq_transformer",
        "preset": "deq-transformer-ptb",
        "overrides": {
            "d_model": 64, "d_embed": 64, "n_head": 2, "d_inner": 128, "cutoffs": [1000],
            "initializer_range": 0.05, "dropout": 0.0, "dropword": 0.0, "local_size": 32,
            "mem_len": 31, "tgt_len": 32, "gradient": TRAINING,
            "solver": {"name": "anderson", "max_steps": 60, "tol": 1e-3, "patience": 8},
        },
    },
    "batch_size": 16,
    "optimizer": {
        "name": "muon", "lr": 0.02, "other_lr": 0.003, "weight_decay": 0.01, "momentum": 0.95,
        "clip": 1.0,
    },
    "schedule": {"name": "constant", "warmup": 0.02},
    "average": 0.0,
    "evaluation": {"per_epoch": 1, "samples": 2000, "snapshots": 9},
    "stages": [{
        "epochs": 0.275, "gradient": TRAINING,
        "solver": {"name": "anderson", "max_steps": 6, "tol": 1e-3},
    }],
}  # fmt: skip


def trained(seed: int, runs: Path, data: Path) -> Path:
    """The folder of a seed's finished run, which is trained or resumed where it is not there."""
    recipe = with_seed(from_plain(Recipe, RECIPE, ""), seed)
    folder = runs / recipe.name
    record = folder / "record.json"
    if not record.is_file() or not read_json(record)["finished"]:
        run_recipe(recipe, data, folder, resume=True, progress=False)
    return folder


def steps_of(run: Path) -> list[int]:
    """Steps of a run's snapshots, in order."""
    return sorted(int(file.stem.split("-")[1]) for file in (run / "snapshots").glob("step-*"))


def measure(run: Path, step: int, data: Path) -> dict[str, Any]:
    """Per batch: the largest and median radius of its segments, and the cosine of each setting."""
    model = snapshot(run, step)
    whole, _ = make_batch(model, data, size=BATCHES * SIZE)
    found: dict[str, Any] = {"radius": [], "radius_max": [], "residual": [], "cosine": {}}
    for number in range(BATCHES):
        fidelity = Comparison(model, part(whole, slice(number * SIZE, (number + 1) * SIZE)))
        radii = fidelity.radius(300)
        found["radius"].append(statistics.median(radii))
        found["radius_max"].append(max(radii))
        found["residual"].append(max(fidelity.exact_residuals))
        for name, (k, damping) in SETTINGS.items():
            row = fidelity.neumann(k, damping)
            found["cosine"].setdefault(name, []).append(row.cosine[EQUILIBRIUM])
    return found


def interval(
    by_seed: Sequence[Sequence[Any]], statistic: Callable[[list[Any]], float], seed: int = 0
) -> tuple[float, float]:
    """95 % interval of a statistic by resampling seeds, and batches within each seed drawn.

    Args:
        by_seed: values of the batches of every seed.
        statistic: of the values of all batches; NaN leaves a draw out.
        seed: of the draws.
    """
    draw = random.Random(seed)
    values = []
    for _ in range(RESAMPLES):
        chosen = draw.choices(by_seed, k=len(by_seed))
        value = statistic(
            [one for batches in chosen for one in draw.choices(batches, k=len(batches))]
        )
        if value == value:
            values.append(value)
    values.sort()
    return values[int(0.025 * len(values))], values[int(0.975 * len(values)) - 1]


def fall(pairs: list[tuple[float, float]]) -> float:
    """Mean cosine of batches with a radius below one, less that of the others; NaN without both."""
    below = [cosine for radius, cosine in pairs if radius < 1]
    above = [cosine for radius, cosine in pairs if radius >= 1]
    if not below or not above:
        return float("nan")
    return statistics.mean(below) - statistics.mean(above)


def grouped(cells: dict[str, dict[str, Any]]) -> dict[int, dict[int, dict[str, Any]]]:
    """Cells by step and seed, without the batches whose exact gradient was not found."""
    by_step: dict[int, dict[int, dict[str, Any]]] = {}
    for key, cell in cells.items():
        seed, step = (int(word) for word in key.replace(":", "").split()[1::2])
        kept = [i for i, residual in enumerate(cell["residual"]) if residual <= EXACT]
        if kept:
            by_step.setdefault(step, {})[seed] = {
                "radius": [cell["radius"][i] for i in kept],
                "cosine": {n: [values[i] for i in kept] for n, values in cell["cosine"].items()},
            }
    return {step: by_step[step] for step in sorted(by_step)}


def report(cells: dict[str, dict[str, Any]]) -> str:
    """Radius and cosines along training, then what happens as the radius passes one."""
    steps, rows = grouped(cells), []
    for step, seeds in steps.items():
        radii = [cell["radius"] for cell in seeds.values()]
        row = [str(step), str(len(seeds)), str(sum(len(one) for one in radii)), words(radii)]
        row += [words([cell["cosine"][name] for cell in seeds.values()]) for name in SETTINGS]
        rows.append(row)
    head = [
        "step",
        "seeds",
        "batches",
        "spectral radius",
        *(f"cosine, {name}" for name in SETTINGS),
    ]
    trained_steps = [step for step in steps if step > 0]
    falls = []
    for name in SETTINGS:
        pairs = [
            [
                pair
                for step in trained_steps
                for cell in (steps[step].get(seed),)
                if cell is not None
                for pair in zip(cell["radius"], cell["cosine"][name], strict=True)
            ]
            for seed in SEEDS
        ]
        pairs = [one for one in pairs if one]
        together = [pair for one in pairs for pair in one]
        low, high = interval(pairs, fall)
        below = sum(radius < 1 for radius, _ in together)
        count = [str(below), str(len(together) - below)]
        falls.append([name, *count, f"{fall(together):.3f} ({low:.3f} to {high:.3f})"])
    second = ["setting", "batches below one", "from one on", "mean cosine below less above"]
    return markdown_table(head, rows) + "\n" + markdown_table(second, falls)


def words(by_seed: Sequence[Sequence[float]]) -> str:
    """Mean over seeds and batches, with its interval."""
    low, high = interval(by_seed, statistics.fmean)
    mean = statistics.fmean([value for one in by_seed for value in one])
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"


def draw(cells: dict[str, dict[str, Any]]) -> str:
    """Mean cosines and spectral radius along training as SVG."""
    steps = grouped(cells)

    def mean(step: int, values: Callable[[dict[str, Any]], list[float]]) -> float:
        return statistics.fmean(v for cell in steps[step].values() for v in values(cell))

    series = {
        f"cosine, {name}": [
            (k, mean(k, lambda cell, name=name: cell["cosine"][name])) for k in steps
        ]
        for name in SETTINGS
    }
    series["spectral radius"] = [(k, mean(k, lambda cell: cell["radius"])) for k in steps]
    return line_chart(
        series,
        title="Fidelity and spectral radius along training",
        x_label="optimiser step",
        y_label="mean over seeds and batches",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="Penn Treebank")
    parser.add_argument("--runs", type=Path, default=Path("runs/fidelity"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cells, missing = Cells("fidelity_seeds"), []
    for seed in SEEDS:
        run = trained(seed, arguments.runs, arguments.data)
        missing += cells.fill(
            [f"seed {seed}: step {step}" for step in steps_of(run)],
            lambda key, run=run: measure(run, int(key.split()[-1]), arguments.data),
        )
        write_text("fidelity_seeds_table.md", report(cells.done))
        write_text("fidelity_seeds.svg", draw(cells.done))
    print(report(cells.done))
    print("missing:", ", ".join(missing) or "nothing")


if __name__ == "__main__":
    main()
