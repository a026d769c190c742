"""Theorem 3 where all is known in closed form: how a gradient's error limits training.

    python benchmarks/studies/theorem3.py

Geng et al. (2021), Theorem 3: where the loss is smooth and bounded below, gradients are bounded,
and a phantom gradient is never further than ε from the exact one, descent with steps of O(1/√n)
brings the step-weighted mean of the squared gradient norm to O(ε + log N / √N).

The equilibrium of h = W h + U x with W = 0.9 Q diag(tanh a) Qᵀ is a contraction for every a; a and
U are trained on a bounded smooth loss of a linear head. All is float64 and dense, so that the
exact gradient, the phantom one and the distance between them are closed forms. Two kinds of error:

- controlled: the exact gradient plus a vector of norm ε that points against it (as far as it is
  long enough), the worst case of the theorem;
- phantom: the Neumann gradient with k terms. ε is the largest distance met along the run.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from cells import Cells, markdown_table, write_text
from torch import Tensor

from deqzoo.evaluation.chart import line_chart

WIDTH, INPUTS, SAMPLES, SEEDS = 12, 6, 64, 5
STEPS = 10_000
MARKS = (100, 300, 1_000, 3_000, 10_000)
ERRORS = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3)
TERMS = (1, 2, 3, 5, 10, 20)
RATE = 0.5


class Problem:
    """Data and closed forms of one seed."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.basis = torch.linalg.qr(draw(WIDTH, WIDTH))[0]
        self.x = draw(SAMPLES, INPUTS)
        self.head = draw(WIDTH) / WIDTH**0.5
        self.target = torch.tanh(draw(SAMPLES))
        self.start = (draw(WIDTH), draw(WIDTH, INPUTS) / INPUTS**0.5)
        self.eye = torch.eye(WIDTH, dtype=torch.float64)

    def gradient(self, a: Tensor, u: Tensor, terms: int | None) -> tuple[Tensor, Tensor]:
        """Gradients (a: (WIDTH,), u: (WIDTH, INPUTS)): exact, or Neumann with so many terms."""
        scale = 0.9 * torch.tanh(a)
        w = self.basis * scale @ self.basis.T  # symmetric, so that J = Jᵀ = w
        inverse = torch.linalg.inv(self.eye - w)
        state = self.x @ u.T @ inverse
        out = torch.tanh(state @ self.head)
        error = (out - self.target) * (1 - out.square()) / SAMPLES
        cotangent = error[:, None] * self.head  # of ½ mean (tanh(c·h) − y)²
        if terms is None:
            adjoint = cotangent @ inverse
        else:
            adjoint = cotangent
            for _ in range(terms - 1):
                adjoint = cotangent + adjoint @ w
        into_w = adjoint.T @ state
        into_scale = ((self.basis.T @ into_w) * self.basis.T).sum(1)
        return into_scale * 0.9 * (1 - torch.tanh(a).square()), adjoint.T @ self.x


def run(seed: int, error: float, terms: int | None) -> dict[str, Any]:
    """Step-weighted mean of ‖∇R‖² at each mark, the largest error met and the largest ‖∇R‖."""
    problem = Problem(seed)
    a, u = (part.clone() for part in problem.start)
    total = weights = largest_error = largest = 0.0
    means = []
    for n in range(1, STEPS + 1):
        exact = problem.gradient(a, u, None)
        norm = float(sum(g.square().sum() for g in exact)) ** 0.5
        used = exact
        if terms is not None:
            used = problem.gradient(a, u, terms)
            distance = sum((g - e).square().sum() for g, e in zip(used, exact, strict=True))
            largest_error = max(largest_error, float(distance) ** 0.5)
        elif error:
            used = tuple(g * (1 - error / max(norm, 1e-30)) for g in exact)
            largest_error = error
        rate = RATE / n**0.5
        total, weights = total + rate * norm**2, weights + rate
        largest = max(largest, norm)
        a, u = a - rate * used[0], u - rate * used[1]
        if n in MARKS:
            means.append(total / weights)
    return {"means": means, "error": largest_error, "bound": largest, "last": norm**2}


def measure(key: str) -> dict[str, Any]:
    """A cell, "error 0.1" or "terms 3": means over seeds, and their spread (ddof 1) at the end."""
    kind, value = key.split()
    error, terms = (float(value), None) if kind == "error" else (0.0, int(value))
    runs = [run(seed, error, terms) for seed in range(SEEDS)]
    ends = torch.tensor([r["means"][-1] for r in runs], dtype=torch.float64)
    return {
        "means": [sum(r["means"][i] for r in runs) / SEEDS for i in range(len(MARKS))],
        "spread": float(ends.std()),
        "error": max(r["error"] for r in runs),
        "gradient_bound": max(r["bound"] for r in runs),
        "last": sum(r["last"] for r in runs) / SEEDS,
    }


def report(cells: dict[str, dict[str, Any]]) -> str:
    """The table: how far each run came, beside the exact run and beside what ε allows."""
    exact = cells["error 0"]
    rows = []
    for key, cell in cells.items():
        kind, value = key.split()
        label = f"controlled, ε = {value}" if kind == "error" else f"NPG, k = {value}"
        allowed = cell["gradient_bound"] * cell["error"]
        excess = cell["means"][-1] - exact["means"][-1]
        rows.append(
            [label, f"{cell['error']:.2g}", *(f"{m:.2e}" for m in cell["means"]),
             f"{cell['spread']:.1e}", f"{cell['last']:.1e}", f"{excess:.1e}", f"{allowed:.1e}"]
        )  # fmt: skip
    head = ["gradient", "ε", *(f"N = {n:,}" for n in MARKS), "spread over seeds", "last ‖∇R‖²",
            "above the exact run", "G ε"]  # fmt: skip
    return markdown_table(head, rows)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    cells = Cells("theorem3")
    wanted = [*(f"error {e:g}" for e in ERRORS), *(f"terms {k}" for k in TERMS)]
    missing = cells.fill(wanted, measure)
    print("missing:", ", ".join(missing) or "nothing")
    if missing:
        return
    ordered = {key: cells.done[key] for key in wanted}
    print(report(ordered))
    write_text("theorem3_table.md", report(ordered))
    shown = {"exact": "error 0", "ε = 0.01": "error 0.01", "ε = 0.1": "error 0.1",
             "NPG, k = 1": "terms 1", "NPG, k = 5": "terms 5"}  # fmt: skip
    drawing = line_chart(
        {
            label: [
                (math.log10(n), math.log10(mean))
                for n, mean in zip(MARKS, ordered[key]["means"], strict=True)
            ]
            for label, key in shown.items()
        },
        title="Step-weighted mean of the squared gradient norm",
        x_label="log10 of steps",
        y_label="log10 of the mean",
    )  # fmt: skip
    write_text("theorem3.svg", drawing)


if __name__ == "__main__":
    main()
