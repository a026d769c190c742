"""The paper's comparison at TINY: four gradients, equal epochs, three seeds, the test split.

    python recipes/work.py --data DATA      # trains the runs, in order of value
    python benchmarks/studies/comparison.py --data CIFAR [--pictures 2000] [--runs runs]

A cell is a finished run of one of the recipes `mdeq-tiny-cifar-{implicit,upg55,npg,jfb}`: its test
accuracy is measured once, on the stored half-precision weights, at the model's default budget, on
the first `--pictures` of the split (all by default, about seven minutes a run on one core). What a
training step of each gradient costs is measured here too, one after another on one machine, since
the runs' own wall time depends on what else ran beside them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from cells import HERE, Cells, markdown_table, write_text
from cost import clocked
from dots import dot_chart
from intervals import by_seed, paired, spread

from deqzoo import DEQModel
from deqzoo.evaluation.dispatch import evaluate_model
from deqzoo.recipe import load_recipe

GRADIENTS = {
    "implicit": "mdeq-tiny-cifar-implicit",
    "UPG, k = 5, λ = 0.5": "mdeq-tiny-cifar-upg55",
    "NPG, k = 5, λ = 0.5": "mdeq-tiny-cifar-npg",
    "JFB": "mdeq-tiny-cifar-jfb",
}
SEEDS = (0, 1, 2)
BATCH = 64


def run_folder(runs: Path, gradient: str, seed: int) -> Path:
    """Where the queue trains a gradient with a seed."""
    folder = runs / f"{GRADIENTS[gradient]}-s{seed}"
    record = folder / "record.json"
    if not record.is_file() or not json.loads(record.read_text())["finished"]:
        raise RuntimeError(f"{folder} is not finished; train it with the queue")
    return folder


def score(folder: Path, data: Path, pictures: int | None) -> dict[str, Any]:
    """Test accuracy of a run, and what its log says about its training."""
    record = json.loads((folder / "record.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    model = DEQModel.from_pretrained(folder / "model")
    evaluation = evaluate_model(
        model, folder.name, data=data, limit=pictures, budget_samples=0, progress=False
    )
    results = evaluation["results"]
    return {
        "accuracy": results["accuracy"],
        "test_pictures": evaluation["data"]["samples"],
        "negative_log_likelihood": results["negative_log_likelihood"],
        "residual_median": results["residual_median"],
        "evaluations_per_step": statistics.mean(line["evaluations"] for line in logged),
        "validation_accuracy": record["validation"][-1]["accuracy"],
        **{key: record[key] for key in ("epochs", "steps", "seconds", "pflop", "threads")},
    }


def step_cost(folder: Path, recipe: str, threads: int) -> dict[str, Any]:
    """CPU seconds and memory of a training step at full resolution, with a run's final weights."""
    torch.set_num_threads(threads)
    stage = load_recipe(HERE.parents[1] / "recipes" / f"{recipe}.yaml").stages[-1]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = DEQModel.from_pretrained(folder / "model").float().to(device).train()
    torch.manual_seed(0)
    pixels = torch.randn(BATCH, 3, 32, 32, device=device)
    labels = torch.arange(BATCH, device=device) % 10
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        out = model(pixels, labels=labels, solver=stage.solver, gradient=stage.gradient)
        torch.autograd.grad(out.loss, parameters, allow_unused=True)

    seconds, peak = clocked(step, device, repeats=4)
    return {"step_seconds": seconds, "step_peak_mib": peak, "batch": BATCH, "threads": threads}


def by_gradient(cells: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The scored runs of every gradient that has some."""
    return {
        gradient: runs
        for gradient in GRADIENTS
        if (runs := [cells[k] for s in SEEDS if (k := f"{gradient}, seed {s}") in cells])
    }


def report(cells: dict[str, dict[str, Any]]) -> str:
    """Mean ± standard deviation over seeds, and costs, by gradient."""
    rows = []
    for gradient, runs in by_gradient(cells).items():
        cost = cells.get(f"{gradient}, step")
        step = [f"{cost['step_seconds']:.2f}", f"{cost['step_peak_mib']:.0f}"] if cost else ["", ""]
        rows.append(
            [
                gradient,
                str(len(runs)),
                spread([100 * run["accuracy"] for run in runs]),
                against_implicit(cells, gradient),
                spread([100 * run["validation_accuracy"] for run in runs]),
                f"{statistics.mean(run['residual_median'] for run in runs):.1e}",
                f"{statistics.mean(run['evaluations_per_step'] for run in runs):.1f}",
                f"{statistics.mean(run['pflop'] for run in runs):.3f}",
                f"{statistics.mean(run['seconds'] for run in runs) / 60:.0f}",
                *step,
            ]
        )
    counts = sorted({run["test_pictures"] for runs in by_gradient(cells).values() for run in runs})
    tested = f"test accuracy, % ({' or '.join(f'{n:,}' for n in counts)} pictures)"
    against = "against implicit, same seed (95 % interval of the mean)"
    head = ["gradient", "seeds", tested, against, "validation accuracy, % (1,000 pictures)"]
    head += ["median relative residual", "evaluations of F per step (backward: 2)"]
    head += ["PFLOP", "minutes"]
    head += [f"CPU s of a step ({BATCH} pictures, 32 px)", "peak MiB of it"]
    return markdown_table(head, rows)


def against_implicit(cells: dict[str, dict[str, Any]], gradient: str) -> str:
    """Differences of test accuracy to the implicit runs of the same seeds, in points."""
    table = by_seed(cells, ", seed ")
    mine, other = (
        {seed: 100 * run["accuracy"] for seed, run in table.get(g, {}).items()}
        for g in (gradient, "implicit")
    )
    return "" if gradient == "implicit" else paired(mine, other)


def plot(cells: dict[str, dict[str, Any]]) -> str:
    """Test accuracy of every run by gradient as SVG."""
    rows = {
        gradient: {"": [100 * run["accuracy"] for run in runs]}
        for gradient, runs in by_gradient(cells).items()
    }
    return dot_chart(
        rows, title="Gradients at equal epochs", x_label="test accuracy of each run, %; bar: mean"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--pictures", type=int, help="test pictures; all by default")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    def measure(key: str) -> dict[str, Any]:
        gradient, what = key.rsplit(", ", 1)
        if what == "step":
            folder = run_folder(arguments.runs, gradient, SEEDS[0])
            return step_cost(folder, GRADIENTS[gradient], arguments.threads)
        folder = run_folder(arguments.runs, gradient, int(what[5:]))
        return score(folder, arguments.data, arguments.pictures)

    wanted = [f"{g}, seed {seed}" for seed in SEEDS for g in GRADIENTS]
    wanted += [f"{g}, step" for g in GRADIENTS]
    cells = Cells("comparison")
    missing = cells.fill(wanted, measure)
    table = report(cells.done)
    print(table)
    print("missing:", ", ".join(missing) or "nothing")
    write_text("comparison_table.md", table)
    if by_gradient(cells.done):
        write_text("comparison.svg", plot(cells.done))


if __name__ == "__main__":
    main()
