"""Anytime inference: what a checkpoint scores for a solver budget or tolerance, and at what speed.

    python benchmarks/studies/anytime.py MODEL [...] --data ROOT [--limit 256]

For every model (zoo name or folder): accuracy, perplexity or F1 against the number of solver steps
(tolerance 0) and against the tolerance (100 steps), with CPU time per picture, token or graph
(preparing the data included); how far logits move when a sample is computed alone instead of in its
batch; and, for pictures and texts, the time that TorchDEQ's Anderson solver takes for the same map
and tolerance, with the residual that both reach. ROOT holds the data sets in folders of their own
(cifar10, imagenette, wikitext, ptb_text_only, graphs). Figures of weights that have been replaced
since are measured anew.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cells import Cells, markdown_table, write_text

import deqzoo
from deqzoo.equilibrium.layout import Causal
from deqzoo.equilibrium.maps import BatchMap
from deqzoo.equilibrium.solvers import make_solver
from deqzoo.equilibrium.state import StatePacker
from deqzoo.evaluation.chart import line_chart
from deqzoo.evaluation.dispatch import evaluator_of
from deqzoo.evaluation.files import weights_digest
from deqzoo.fidelity.batches import make_batch, part
from deqzoo.hub.catalogue import entry

BUDGETS = (1, 2, 4, 8, 16, 30)
TOLERANCES = (1e-1, 3e-2, 1e-2, 1e-3, 1e-4)

Measure = Callable[[dict[str, Any] | None], tuple[str, float, int]]
"""Solver settings (None: the model's own) -> (name of the figure, figure, samples)."""


def folder_of(model: Any, root: Path) -> Path:
    """Where the model's data lie under ROOT."""
    kind, config = model.config.model_type, model.config
    if kind == "ignn":
        return root / "graphs"
    if kind == "mdeq":
        cifar = "airplane" in config.id2label.values()
        return root / ("cifar10" if cifar else "imagenette")
    return root / ("ptb_text_only" if config.vocab_size == 10000 else "wikitext")


def figure_of(model: Any, data: Path, limit: int) -> Measure:
    """How to score a model of any task; node classifiers read whole graphs."""
    kind = type(model).__name__
    most = None if "Node" in kind else 20 * limit if "CausalLM" in kind else limit
    evaluator = evaluator_of(model, "test", data, batch_size=64, limit=most, progress=False)
    samples = evaluator.describe()["samples"]

    def score(solver: dict[str, Any] | None) -> tuple[str, float, int]:
        return evaluator.metric, evaluator.measure(solver)[evaluator.metric], samples

    return score


def wanted_of(name: str) -> list[str]:
    """The cells of a model: one graph has no batch, and TorchDEQ drives pictures and texts."""
    architecture = entry(name).architecture
    parts = ["own", *(f"steps {n}" for n in BUDGETS), *(f"tol {t:g}" for t in TOLERANCES)]
    if "Node" not in architecture:
        parts.append("batch")
    if "IGNN" not in architecture:
        parts.append("torchdeq")
    return [f"{name}: {part}" for part in parts]


@cache
def loaded(name: str, root: Path, limit: int) -> tuple[Any, Measure]:
    """A model and how to score it, read once."""
    model = deqzoo.DEQModel.from_pretrained(name)
    return model, figure_of(model, folder_of(model, root), limit)


@cache
def digest(name: str) -> str | None:
    """Digest of a model's stored weights, read once."""
    return weights_digest(entry(name).folder)


def measure(key: str, root: Path, limit: int) -> dict[str, Any]:
    """One cell: "MODEL: steps 4", "MODEL: tol 0.01", "MODEL: own", "… batch" or "… torchdeq"."""
    name, what = key.split(": ")
    model, score = loaded(name, root, limit)
    data = folder_of(model, root)
    if what == "batch":
        return invariance(model, data)
    if what == "torchdeq":
        return against_torchdeq(model, data)
    solver = None
    if what.startswith("steps"):
        solver = {"max_steps": int(what.split()[1]), "tol": 0.0}
    elif what.startswith("tol"):
        solver = {"max_steps": 100, "tol": float(what.split()[1])}
    started = time.process_time()
    figure, value, samples = score(solver)
    seconds = time.process_time() - started
    return {"figure": figure, "value": value, "samples": samples, "seconds": seconds}


@torch.inference_mode()
def invariance(model: Any, data: Path) -> dict[str, float]:
    """Largest difference of a logit between a batch of eight and its first sample alone."""
    batch, _ = make_batch(model, data, split="test", size=8)
    batch = {**batch, **({"return_logits": True} if "return_logits" in batch else {})}
    first = part(batch, slice(1))
    if "x" in batch:
        first = {"x": batch["x"].get_example(0), "labels": batch["labels"][:1]}
    together, alone = model(**batch), model(**first)
    scale = together.logits[:1].abs().max()
    return {
        "largest_difference": float((together.logits[:1] - alone.logits).abs().max() / scale),
        "steps_together": float(together.n_steps[0]),
        "steps_alone": float(alone.n_steps[0]),
    }


@torch.inference_mode()
def against_torchdeq(model: Any, data: Path, tol: float = 1e-3) -> dict[str, Any]:
    """CPU seconds and residuals of both Anderson solvers on the same map."""
    from torchdeq.solver import anderson_solver

    batch, _ = make_batch(model, data, split="test", size=32)
    name = model.main_input_name
    memory = (batch["memory"],) if "memory" in batch else ()
    f, z0 = model.base_model.equilibrium_map(batch[name], *memory)
    packer = StatePacker(z0)

    def flat(z: torch.Tensor) -> torch.Tensor:
        return packer.pack(f(packer.unpack(z)))

    def residual(z: torch.Tensor) -> list[float]:
        value = flat(z)
        return ((value - z).norm(dim=1) / value.norm(dim=1)).tolist()

    layout = Causal() if name == "input_ids" else None
    ours = make_solver({"name": "anderson", "max_steps": 60, "tol": tol})
    found: dict[str, Any] = {"samples": len(batch[name]), "tol": tol}
    for side in ("ours", "TorchDEQ"):
        times = []
        for _ in range(3):
            started = time.process_time()
            if side == "ours":
                options = {} if layout is None else {"layout": layout}
                solution = ours.solve(f, z0, compact=isinstance(f, BatchMap), **options)
                z = packer.pack(solution.state)
            else:
                z = anderson_solver(
                    flat, packer.pack(z0), max_iter=60, tol=tol, stop_mode="rel", return_final=False
                )[0]
            times.append(time.process_time() - started)
        residuals = residual(z)
        found[side] = {
            "seconds": min(times),
            "residual_max": max(residuals),
            "residual_mean": sum(residuals) / len(residuals),
        }
    return found


def report(cells: dict[str, dict[str, Any]]) -> str:
    """One row per cell that has a figure, and what the other two kinds say."""
    rows, others = [], []
    for key, cell in cells.items():
        name, what = key.split(": ")
        if "figure" in cell:
            per = 1000 * cell["seconds"] / max(cell["samples"], 1)
            rows.append([name, what, f"{cell['value']:.4g} {cell['figure']}", f"{per:.2f}"])
        elif "largest_difference" in cell:
            others.append(
                f"- {name}: in a batch of eight and alone, logits differ by at most "
                f"{cell['largest_difference']:.1e} of the largest one; "
                f"{cell['steps_together']:.0f} and {cell['steps_alone']:.0f} steps."
            )
        elif "ours" in cell:
            sides = [
                f"{side} {cell['samples'] / cell[side]['seconds']:.1f} samples/s, largest residual "
                f"{cell[side]['residual_max']:.1e}"
                for side in ("ours", "TorchDEQ")
            ]
            others.append(f"- {name}: Anderson to {cell['tol']:g}: {'; '.join(sides)}.")
    head = ["model", "solver", "figure", "CPU ms per sample"]
    return markdown_table(head, rows) + "\n" + "\n".join(others) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="names or folders; all bundled ones by default")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--limit", type=int, default=256, help="pictures; words are 20 times that")
    arguments = parser.parse_args()
    names = arguments.models or deqzoo.list_models()
    cells = Cells("anytime")
    wanted = [key for name in names for key in wanted_of(name)]
    missing = cells.fill(
        wanted,
        lambda key: measure(key, arguments.data, arguments.limit),
        weights_of=lambda key: digest(key.split(": ")[0]),
    )
    print(report(cells.done))
    print("missing:", ", ".join(missing) or "nothing")
    write_text("anytime_table.md", report(cells.done))
    for figure in ("accuracy", "perplexity"):
        series: dict[str, list[tuple[float, float]]] = {}
        for key, cell in cells.done.items():
            name, what = key.split(": ")
            if cell.get("figure") == figure and what.startswith("steps"):
                series.setdefault(name, []).append((float(what.split()[1]), cell["value"]))
        if series:
            drawing = line_chart(
                series, title="Anytime inference", x_label="solver steps", y_label=figure,
                log_x=True, log_y=figure == "perplexity",
            )  # fmt: skip
            write_text(f"anytime_{figure}.svg", drawing)


if __name__ == "__main__":
    main()
