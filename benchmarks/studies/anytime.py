"""Anytime inference: what a checkpoint scores for a solver budget or tolerance, and at what speed.

    python benchmarks/studies/anytime.py MODEL [...] --data ROOT [--limit 256]

For every model (zoo name or folder): accuracy, perplexity or F1 against the number of solver steps
(tolerance 0) and against the tolerance (100 steps), with CPU time per picture, token or graph
(preparing the data included); how far logits move when a sample is computed alone instead of in its
batch; and, for pictures, the time that TorchDEQ's Anderson solver takes for the same map and
tolerance, with the residual that both reach (texts: `benchmarks/text_solver.py`). ROOT holds the
data sets in folders of their own (cifar10, imagenette, wikitext, ptb_text_only, graphs). Figures of
weights that have been replaced since are measured anew, those of names that are gone are dropped.

With `--curve N` classifiers of pictures are also measured on the first N test pictures by one solve
each, a thousand to a cell, so that budgets are compared picture by picture (McNemar's exact test).
With `--solvers N` so are the model's own solver, plain iteration (the unrolled network of these
weights) and TorchDEQ's Anderson solver on the same map from the same start, budget by budget.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cells import Cells, markdown_table, write_text

import deqzoo
from deqzoo.equilibrium.maps import BatchMap
from deqzoo.equilibrium.solvers import make_solver
from deqzoo.equilibrium.state import StatePacker
from deqzoo.evaluation.chart import line_chart
from deqzoo.evaluation.dispatch import evaluator_of
from deqzoo.evaluation.files import weights_digest
from deqzoo.evaluation.images import ImageEvaluator
from deqzoo.fidelity.batches import make_batch, part
from deqzoo.hub.catalogue import entry
from deqzoo.models.readers import to_batch

BUDGETS = (1, 2, 4, 8, 16, 30)
TOLERANCES = (1e-1, 3e-2, 1e-2, 1e-3, 1e-4)

CURVE_PART = 1000
SIDES = ("plain", "TorchDEQ")
"""What the model's own solver is compared with, picture by picture."""

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
    """The cells of a model: one graph has no batch, and TorchDEQ drives pictures here."""
    architecture = entry(name).architecture
    parts = ["own", *(f"steps {n}" for n in BUDGETS), *(f"tol {t:g}" for t in TOLERANCES)]
    if "Node" not in architecture:
        parts.append("batch")
    if "ForImage" in architecture:
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
def curve(model: Any, data: Path, first: int, count: int) -> dict[str, Any]:
    """What a classifier of pictures names within each budget, by one solve of the largest.

    A budget's answer is that of the iterate with the least residual so far, as a solve that ends
    there would give. Of the `count` test pictures from `first` on, `right` holds by budget how many
    are named right, and `only` how many are right there and wrong at the last budget, and the other
    way round.
    """
    right: dict[int, list[torch.Tensor]] = {n: [] for n in BUDGETS}
    started = time.process_time()
    for batch, labels in batches(model, data, first, count):
        for n, found in budget_logits(model, batch).items():
            right[n].append(found.argmax(-1) == labels)
    joined = {n: torch.cat(parts) for n, parts in right.items()}
    last = joined[BUDGETS[-1]]
    return {
        "pictures": len(last),
        "dtype": str(model.dtype).removeprefix("torch."),
        "right": {str(n): int(found.sum()) for n, found in joined.items()},
        "only": {
            str(n): [int((found & ~last).sum()), int((last & ~found).sum())]
            for n, found in joined.items()
        },
        "seconds": time.process_time() - started,
    }


def batches(
    model: Any, data: Path, first: int, count: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Test pictures (B, 3, H, W), as the model takes them, and their labels (B,)."""
    evaluator = ImageEvaluator(model, "test", data, batch_size=64, limit=None, progress=False)
    pictures = evaluator.pictures
    stop = min(first + count, len(pictures))
    for start in range(first, stop, 64):
        rows = range(start, min(start + 64, stop))
        batch = to_batch(evaluator.processor, [pictures.picture(row) for row in rows], model)
        yield batch, pictures.labels[rows.start : rows.stop]


@torch.inference_mode()
def solvers(model: Any, data: Path, first: int, count: int) -> dict[str, Any]:
    """What three solvers of one map name within each budget of evaluations.

    `right` holds by solver and budget how many pictures are named right, and `only` how many by the
    model's own solver alone, and by the other alone, at the same budget.
    """
    names = ("own", *SIDES)
    right: dict[str, dict[int, list[torch.Tensor]]] = {name: {} for name in names}
    for batch, labels in batches(model, data, first, count):
        answers = {
            "own": budget_logits(model, batch),
            "plain": budget_logits(model, batch, "fixed_point"),
            "TorchDEQ": torchdeq_logits(model, batch),
        }
        for name, found in answers.items():
            for n, logits in found.items():
                right[name].setdefault(n, []).append(logits.argmax(-1) == labels)
    joined = {
        name: {n: torch.cat(parts) for n, parts in found.items()} for name, found in right.items()
    }
    own = joined["own"]
    return {
        "pictures": len(own[BUDGETS[0]]),
        "right": {
            name: {str(n): int(hits.sum()) for n, hits in found.items()}
            for name, found in joined.items()
        },
        "only": {
            side: {
                str(n): [int((own[n] & ~hits).sum()), int((hits & ~own[n]).sum())]
                for n, hits in joined[side].items()
            }
            for side in SIDES
        },
    }


def torchdeq_logits(model: Any, batch: torch.Tensor) -> dict[int, torch.Tensor]:
    """As `budget_logits`, of TorchDEQ's Anderson solver, which gives nothing before three steps."""
    from torchdeq.solver import anderson_solver

    f, z0 = model.base_model.equilibrium_map(batch)
    packer = StatePacker(z0)
    budgets = [n for n in BUDGETS if n > 3]
    _, states, _ = anderson_solver(
        lambda z: packer.pack(f(packer.unpack(z))), packer.pack(z0), max_iter=budgets[-1], tol=0.0,
        stop_mode="rel", indexing=budgets, return_final=False,
    )  # fmt: skip
    return {
        n: model.classifier(model.head(packer.unpack(z))).float()
        for n, z in zip(budgets, states, strict=True)
    }


def budget_logits(
    model: Any, batch: torch.Tensor, solver: str | None = None
) -> dict[int, torch.Tensor]:
    """Logits (B, classes) after each budget of solver steps, of pictures (B, 3, H, W).

    Args:
        solver: name; the model's own if None.
    """
    f, z0 = model.base_model.equilibrium_map(batch)
    packer, logits = StatePacker(z0), {}
    best = least = None

    def keep(k: int, z: torch.Tensor, residual: torch.Tensor) -> None:
        nonlocal best, least
        if best is None or least is None:
            best, least = z, residual
        else:
            better = residual < least
            best = torch.where(better.unsqueeze(1), z, best)
            least = torch.where(better, residual, least)
        if k in BUDGETS:
            logits[k] = model.classifier(model.head(packer.unpack(best))).float()

    settings = {"max_steps": BUDGETS[-1], "tol": 0.0} | ({"name": solver} if solver else {})
    model.solve(f, z0, solver=settings, callback=keep)
    return logits


def mcnemar(one: int, other: int) -> float:
    """Two-sided exact p of so many pairs that only one or only the other side has right."""
    n = one + other
    tail = sum(math.comb(n, i) for i in range(min(one, other) + 1))
    return min(1.0, 2 * tail / 2**n)


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
    pictures = batch["pixel_values"]
    f, z0 = model.base_model.equilibrium_map(pictures)
    packer = StatePacker(z0)

    def flat(z: torch.Tensor) -> torch.Tensor:
        return packer.pack(f(packer.unpack(z)))

    def residual(z: torch.Tensor) -> list[float]:
        value = flat(z)
        return ((value - z).norm(dim=1) / value.norm(dim=1)).tolist()

    ours = make_solver({"name": "anderson", "max_steps": 60, "tol": tol})
    found: dict[str, Any] = {"samples": len(pictures), "tol": tol}
    for side in ("ours", "TorchDEQ"):
        times = []
        for _ in range(3):
            started = time.process_time()
            if side == "ours":
                solution = ours.solve(f, z0, compact=isinstance(f, BatchMap))
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
    others += [f"- {name}: {curve_words(whole)}" for name, whole in curves(cells).items()]
    others += [f"- {name}: {solver_words(whole)}" for name, whole in compared(cells).items()]
    head = ["model", "solver", "figure", "CPU ms per sample"]
    return markdown_table(head, rows) + "\n" + "\n".join(others) + "\n"


def curves(cells: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The paired curves by model: sums over the cells of one dtype that follow one another."""
    found: dict[str, dict[str, Any]] = {}
    for key, cell in sorted(cells.items()):
        name, what = key.split(": ")
        if not what.startswith("curve"):
            continue
        whole = found.setdefault(name, {"pictures": 0, "dtype": cell["dtype"]})
        if int(what.split()[1]) != whole["pictures"] or cell["dtype"] != whole["dtype"]:
            continue
        whole["pictures"] += cell["pictures"]
        for n in cell["right"]:
            whole.setdefault("right", {}).setdefault(n, 0)
            whole["right"][n] += cell["right"][n]
            before = whole.setdefault("only", {}).get(n, (0, 0))
            whole["only"][n] = tuple(a + b for a, b in zip(before, cell["only"][n], strict=True))
    return {name: whole for name, whole in found.items() if whole["pictures"]}


def curve_words(whole: dict[str, Any]) -> str:
    """A curve in a line: accuracies by budget, and each budget against the last."""
    last = str(BUDGETS[-1])
    accuracies = ", ".join(
        f"{100 * count / whole['pictures']:.1f} % ({n})" for n, count in whole["right"].items()
    )
    pairs = ", ".join(
        f"{n}: {one} to {other}, p = {mcnemar(one, other):.2g}"
        for n, (one, other) in whole["only"].items()
        if n != last
    )
    return (
        f"the first {whole['pictures']:,} test pictures, {whole['dtype']}, after so many steps: "
        f"{accuracies}. Pictures that only this budget and only {last} steps have right, "
        f"with McNemar's exact p: {pairs}."
    )


def compared(cells: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The comparisons of solvers by model: sums over the cells that follow one another."""
    found: dict[str, dict[str, Any]] = {}
    keys = [key for key in cells if key.split(": ")[1].startswith("solvers")]
    for key in sorted(keys, key=lambda key: int(key.split()[-1])):
        whole = found.setdefault(key.split(": ")[0], {"pictures": 0, "right": {}, "only": {}})
        if int(key.split()[-1]) != whole["pictures"]:
            continue
        whole["pictures"] += cells[key]["pictures"]
        for name, counts in cells[key]["right"].items():
            sums = whole["right"].setdefault(name, {})
            for n, count in counts.items():
                sums[n] = sums.get(n, 0) + count
        for side, pairs in cells[key]["only"].items():
            sums = whole["only"].setdefault(side, {})
            for n, (own, other) in pairs.items():
                before = sums.get(n, (0, 0))
                sums[n] = (before[0] + own, before[1] + other)
    return {name: whole for name, whole in found.items() if whole["pictures"]}


def solver_words(whole: dict[str, Any]) -> str:
    """Three solvers in a line: accuracies by budget, and the pairs of which one alone is right."""
    n_pictures = whole["pictures"]
    accuracies = "; ".join(
        f"{name} " + ", ".join(f"{100 * c / n_pictures:.1f} % ({n})" for n, c in counts.items())
        for name, counts in whole["right"].items()
    )
    pairs = "; ".join(
        f"{side} "
        + ", ".join(f"{n}: {a} to {b}, p = {mcnemar(a, b):.2g}" for n, (a, b) in counts.items())
        for side, counts in whole["only"].items()
    )
    return (
        f"the first {n_pictures:,} test pictures by solver and evaluations of the map: "
        f"{accuracies}. Pictures that only the model's own and only the other solver has right: "
        f"{pairs}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="names or folders; all bundled ones by default")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--limit", type=int, default=256, help="pictures; words are 20 times that")
    parser.add_argument("--curve", type=int, default=0, help="pictures of the paired curve")
    parser.add_argument("--solvers", type=int, default=0, help="pictures named by three solvers")
    parser.add_argument("--bf16", action="store_true", help="the paired curve in bfloat16")
    arguments = parser.parse_args()
    names = arguments.models or deqzoo.list_models()
    cells = Cells("anytime")
    there = deqzoo.list_models()
    for key in [key for key in cells.done if key.split(": ")[0] not in (*there, *names)]:
        del cells.done[key]
    wanted = [key for name in names for key in wanted_of(name)]
    for name in names:
        if "ForImage" in entry(name).architecture:
            wanted += [f"{name}: curve {i}" for i in range(0, arguments.curve, CURVE_PART)]
            wanted += [f"{name}: solvers {i}" for i in range(0, arguments.solvers, CURVE_PART)]

    def measured(key: str) -> dict[str, Any]:
        name, what = key.split(": ")
        if not what.startswith(("curve", "solvers")):
            return measure(key, arguments.data, arguments.limit)
        half = arguments.bf16 and what.startswith("curve")
        dtype = torch.bfloat16 if half else torch.float32
        model = deqzoo.DEQModel.from_pretrained(name, dtype=dtype)
        first = int(what.split()[1])
        run, most = (
            (curve, arguments.curve) if what.startswith("curve") else (solvers, arguments.solvers)
        )
        count = min(CURVE_PART, most - first)
        return run(model, folder_of(model, arguments.data), first, count)

    missing = cells.fill(
        wanted,
        measured,
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
        if figure == "accuracy":  # curves of more pictures take the place of the cells
            for name, whole in curves(cells.done).items():
                right = whole["right"].items()
                series[name] = [(float(n), count / whole["pictures"]) for n, count in right]
        if series:
            drawing = line_chart(
                series, title="Anytime inference", x_label="solver steps", y_label=figure,
                log_x=True, log_y=figure == "perplexity",
            )  # fmt: skip
            write_text(f"anytime_{figure}.svg", drawing)


if __name__ == "__main__":
    main()
