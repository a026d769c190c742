"""Fidelity along training over seeds: phantom gradients against the spectral radius.

    python benchmarks/studies/fidelity_seeds.py --data PTB
    python benchmarks/studies/fidelity_seeds.py --model pictures --data CIFAR

A small model is trained with each of three seeds so that its spectral radius passes one: a
DEQ-Transformer on Penn Treebank for 500 steps without a Jacobian penalty, or the tiny MDEQ on
CIFAR-10 at 16 × 16 pixels, for a fifth of its steps with a penalty (a fresh one has no equilibrium
that the solver finds) and without one from there on. At nine snapshots the gradients of three
settings are held against the exact one (a forward solve to 1e-6, an adjoint to 1e-7) on sixteen
batches of four segments or pictures, the same ones throughout, over the parameters behind the
equilibrium; batches on which one of the two solves ends above 1e-4 are left out. The spectral
radius is by 300 power iterations. Intervals are of 95 %, by Student's t over the means of the
seeds: the batches of a seed are of one training. About six minutes of one core for text, an hour
for pictures; resumable snapshot by snapshot.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from cells import Cells, markdown_table, write_text
from intervals import half_interval
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
RADII = (0.0, 1.0, 1.5, 2.0, 3.0)
"""Where the bins of spectral radii begin."""
EXACT = 1e-4
"""Largest relative residual of the two solves up to which a gradient counts as exact."""
TRAINING = {"name": "upg", "steps": 3, "damping": 0.5}
TEXT = {
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
STAGE = {
    "resolution": 16,
    "gradient": {"name": "upg", "steps": 2, "damping": 0.9},
    "solver": {"name": "anderson", "max_steps": 6, "tol": 1e-3},
}
PICTURES = {
    "name": "fidelity-pictures",
    "task": "image-classification",
    "data": {"name": "cifar10"},
    "model": {
        "family": "mdeq",
        "preset": "mdeq-phantom-cifar-small",
        "overrides": {
            "image_size": 16, "dropout": 0.0, "gradient": STAGE["gradient"],
            "solver": {"name": "anderson", "max_steps": 60, "tol": 1e-3},
        },
    },
    "batch_size": 128,
    "optimizer": {"name": "muon", "lr": 0.02, "other_lr": 0.004, "weight_decay": 0.01},
    "schedule": {"name": "constant", "warmup": 0.05},
    "average": 0.0,
    "label_smoothing": 0.1,
    "augment": {"crop": 4, "flip": "alternating"},
    "whiten": True,
    "evaluation": {"per_epoch": 1, "samples": 500, "snapshots": 9},
    "stages": [
        {"epochs": 0.4, "jacobian": {"weight": 1.0, "every": 8}, **STAGE},
        {"epochs": 1.6, **STAGE},
    ],
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("fidelity_seeds", TEXT),
    "pictures": ("fidelity_pictures", PICTURES),
}
"""Name of a study's files, and how its models are trained."""


def trained(settings: dict[str, Any], seed: int, runs: Path, data: Path) -> Path:
    """The folder of a seed's finished run, which is trained or resumed where it is not there."""
    recipe = with_seed(from_plain(Recipe, settings, ""), seed)
    folder = runs / recipe.name
    record = folder / "record.json"
    if not record.is_file() or not read_json(record)["finished"]:
        run_recipe(recipe, data, folder, resume=True, progress=False)
    return folder


def steps_of(run: Path) -> list[int]:
    """Steps of a run's snapshots, in order."""
    return sorted(int(file.stem.split("-")[1]) for file in (run / "snapshots").glob("step-*"))


def measure(run: Path, step: int, data: Path) -> dict[str, Any]:
    """Per batch: the largest and median radius of its samples, and the cosine of each setting."""
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
    """Radius and cosines along training, by radius, and below one less above."""
    steps = grouped(cells)
    rows = []
    for step, seeds in steps.items():
        radii = [cell["radius"] for cell in seeds.values()]
        row = [str(step), str(len(seeds)), str(sum(len(one) for one in radii)), words(radii)]
        row += [words([cell["cosine"][name] for cell in seeds.values()]) for name in SETTINGS]
        rows.append(row)
    columns = [f"cosine, {name}" for name in SETTINGS]
    by_step = markdown_table(["step", "seeds", "batches", "spectral radius", *columns], rows)
    pairs = {name: pairs_of(steps, name) for name in SETTINGS}
    rows = []
    for low, high in zip(RADII, (*RADII[1:], math.inf), strict=True):
        row = [f"{low:g} to {high:g}" if high < math.inf else f"from {low:g}"]
        for by_seed in pairs.values():
            inside = [[c for radius, c in one if low <= radius < high] for one in by_seed]
            inside = [one for one in inside if one]
            if len(row) == 1:
                row += [str(len(inside)), str(sum(len(one) for one in inside))]
            row.append(words(inside) if inside else "")
        if row[1] != "0":
            rows.append(row)
    by_radius = markdown_table(["spectral radius", "seeds", "batches", *columns], rows)
    rows = []
    for name, by_seed in pairs.items():
        falls = [value for one in by_seed if (value := fall(one)) is not None]
        rows.append([name, str(len(falls)), words([[value] for value in falls]) if falls else ""])
    head = ["setting", "seeds with both", "mean cosine below one less above"]
    return "\n".join([by_step, by_radius, markdown_table(head, rows)])


def pairs_of(
    steps: dict[int, dict[int, dict[str, Any]]], setting: str
) -> list[list[tuple[float, float]]]:
    """Radius and cosine of every batch after initialisation, for each seed that has some."""
    by_seed = [
        [
            pair
            for step, seeds in steps.items()
            if step > 0 and seed in seeds
            for pair in zip(seeds[seed]["radius"], seeds[seed]["cosine"][setting], strict=True)
        ]
        for seed in SEEDS
    ]
    return [one for one in by_seed if one]


def fall(pairs: list[tuple[float, float]]) -> float | None:
    """Mean cosine of batches with a radius below one, less that of others, if there are both."""
    below = [cosine for radius, cosine in pairs if radius < 1]
    above = [cosine for radius, cosine in pairs if radius >= 1]
    if not below or not above:
        return None
    return statistics.mean(below) - statistics.mean(above)


def words(by_seed: Sequence[Sequence[float]]) -> str:
    """Mean of the seeds' means, with half of its 95 % interval where there are several."""
    means = [statistics.fmean(one) for one in by_seed]
    text = f"{statistics.fmean(means):.3f}"
    return f"{text} ± {half_interval(means):.3f}" if len(means) > 1 else text


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
    parser.add_argument("--data", type=Path, required=True, help="Penn Treebank or CIFAR-10")
    parser.add_argument("--model", choices=MODELS, default="text")
    parser.add_argument("--runs", type=Path, default=Path("runs/fidelity"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    name, settings = MODELS[arguments.model]
    cells, missing = Cells(name), []
    for seed in SEEDS:
        run = trained(settings, seed, arguments.runs, arguments.data)
        missing += cells.fill(
            [f"seed {seed}: step {step}" for step in steps_of(run)],
            lambda key, run=run: measure(run, int(key.split()[-1]), arguments.data),
        )
        write_text(f"{name}_table.md", report(cells.done))
        write_text(f"{name}.svg", draw(cells.done))
    print(report(cells.done))
    print("missing:", ", ".join(missing) or "nothing")


if __name__ == "__main__":
    main()
