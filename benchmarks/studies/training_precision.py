"""Precision during training: cosine of phantom and exact gradient along the snapshots of a run.

    python benchmarks/studies/training_precision.py runs/NAME --data FOLDER [--batches 6] [--size 4]

Reads `snapshots/` (half-precision weights from initialisation to the end) of a run made by
`deqzoo train`. At every snapshot, for several small batches of training data, the phantom
gradients from the model's own forward solution are held against the exact gradient of a tightly
solved equilibrium, over the parameters behind the equilibrium.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from cells import Cells, markdown_table, write_text
from safetensors.torch import load_file

from deqzoo.evaluation.chart import line_chart
from deqzoo.fidelity.batches import make_batch, part
from deqzoo.fidelity.study import EQUILIBRIUM, Comparison
from deqzoo.models.auto import load_class
from deqzoo.zoo import read_json

SETTINGS = ((1, 1.0), (2, 0.9), (3, 0.8), (5, 0.5), (5, 1.0), (10, 0.5))
BINS = (-1.0, 0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)


def snapshot(run: Path, step: int) -> Any:
    """The model of a snapshot, in evaluation mode."""
    folder = run / "snapshots"
    config = read_json(folder / "config.json")
    cls = load_class(config["architectures"][0])
    model = cls(cls.config_class.from_pretrained(folder)).float()
    weights = load_file(folder / f"step-{step:07d}.safetensors")
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    # Processor and tokenizer lie beside the result.
    model.config._name_or_path = str(run / "model")
    if hasattr(model, "use_native_norm"):
        model.use_native_norm()
    return model.eval()


def measure(run: Path, step: int, data: Path, batches: int, size: int) -> dict[str, Any]:
    """Cosines and relative errors (one per batch) by setting, and the spectral radii."""
    model = snapshot(run, step)
    found: dict[str, Any] = {"radius": [], "residual": [], "cosine": {}, "error": {}}
    whole, _ = make_batch(model, data, size=batches * size)  # the same samples for every snapshot
    if "x" in whole:
        batches = 1  # graphs stay together
    for number in range(batches):
        fidelity = Comparison(model, part(whole, slice(number * size, (number + 1) * size)))
        found["radius"] += fidelity.radius(25)
        found["residual"].append(float(fidelity.recorded.solutions[0].rel_residual.max()))
        for steps, damping in SETTINGS:
            row = fidelity.neumann(steps, damping)
            name = f"k={steps} λ={damping:g}"
            found["cosine"].setdefault(name, []).append(row.cosine[EQUILIBRIUM])
            found["error"].setdefault(name, []).append(row.relative_error[EQUILIBRIUM])
    return found


def report(cells: dict[str, dict[str, Any]]) -> str:
    """Median and smallest cosine by snapshot and setting, then the histogram of all of them."""
    names = [f"k={k} λ={x:g}" for k, x in SETTINGS]
    rows = []
    for step, cell in cells.items():
        values = [
            f"{statistics.median(cell['cosine'][n]):.3f} ({min(cell['cosine'][n]):.3f})"
            for n in names
        ]
        rows.append([step, f"{statistics.median(cell['radius']):.2f}", *values])
    head = ["step", "ρ(J), median", *(f"{n}: median (min)" for n in names)]
    counts = []
    for name in names:
        cosines = [c for cell in cells.values() for c in cell["cosine"][name]]
        bins = [
            str(sum(low < c <= high for c in cosines))
            for low, high in zip(BINS[:-1], BINS[1:], strict=True)
        ]
        counts.append([name, *bins])
    bins = [f"{low:g}–{high:g}" for low, high in zip(BINS[:-1], BINS[1:], strict=True)]
    histogram = markdown_table(["cosines in", *bins], counts)
    return markdown_table(head, rows) + "\n" + histogram


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--size", type=int, default=4)
    arguments = parser.parse_args()
    stem = f"training_precision_{arguments.run.name}"
    files = sorted((arguments.run / "snapshots").glob("step-*.safetensors"))
    steps = [str(int(file.stem.split("-")[1])) for file in files]
    cells = Cells(stem)
    # Every third one first, from the end: a study that is cut off still shows the course.
    order = sorted(range(len(steps)), key=lambda i: (i % 3, -i))
    missing = cells.fill(
        [steps[i] for i in order],
        lambda step: measure(
            arguments.run, int(step), arguments.data, arguments.batches, arguments.size
        ),
    )
    done = {step: cells.done[step] for step in steps if step in cells.done}
    if not done:
        raise SystemExit(f"no snapshot of {arguments.run} could be measured")
    print(report(done))
    print("missing:", ", ".join(missing) or "nothing")
    write_text(f"{stem}_table.md", report(done))
    series = {
        name: [(int(step), statistics.mean(cell["cosine"][name])) for step, cell in done.items()]
        for name in next(iter(done.values()))["cosine"]
    }
    drawing = line_chart(
        series,
        title=f"Cosine with the exact gradient during training, {arguments.run.name}",
        x_label="optimiser step",
        y_label="mean cosine",
    )
    write_text(f"{stem}.svg", drawing)


if __name__ == "__main__":
    main()
