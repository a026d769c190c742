"""Static precision: cosine between phantom and exact gradient in a synthetic setting.

    python benchmarks/studies/static_precision.py

Maps F(h) = tanh(W h + x + b) with a random W scaled to a chosen spectral norm: below 1, F is a
contraction with at most that factor. The loss is ½‖h* − y‖². For each factor the parameter gradient
of NPG (equal to UPG at the exact equilibrium) is compared with the exact one over k and λ, in
float64: h* is iterated to 1e-13 and the adjoint is solved densely. Three kinds of W: Gaussian (its
spectrum fills a disc), positive semidefinite (slow modes that the series reaches last) and negative
semidefinite (modes in which undamped iterations swing).
"""

from __future__ import annotations

import argparse

import torch
from cells import Cells, markdown_table, write_text

from deqzoo.evaluation.chart import line_chart

FACTORS = (0.3, 0.5, 0.7, 0.9, 0.99)
BEYOND = {"negative": (1.5, 2.0)}
KINDS = ("gaussian", "positive", "negative")
DAMPINGS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
STEPS = 20
WIDTH, BATCH, SEEDS = 64, 16, 5


def measure(kind: str, factor: float) -> dict[str, list[float]]:
    """Mean cosine over seeds, for each λ a list over k = 1 … 20, and ρ(J)."""
    sums: dict[str, torch.Tensor] = {}
    radius = 0.0
    for seed in range(SEEDS):
        curves, rho = one_seed(kind, factor, seed)
        radius += rho / SEEDS
        for damping, curve in curves.items():
            key = f"{damping:g}"
            sums[key] = sums.get(key, torch.zeros(STEPS, dtype=torch.float64)) + curve / SEEDS
    return {"radius": [radius], **{key: curve.tolist() for key, curve in sums.items()}}


def one_seed(kind: str, factor: float, seed: int) -> tuple[dict[float, torch.Tensor], float]:
    """Cosines (k,) by λ of one random problem, and the mean spectral radius at h*."""
    torch.manual_seed(seed)
    w = torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    if kind != "gaussian":
        w = (w @ w.T) * (1 if kind == "positive" else -1)
    w *= factor / torch.linalg.matrix_norm(w, 2)
    x = torch.randn(BATCH, WIDTH, dtype=torch.float64) / 4
    y = torch.randn(BATCH, WIDTH, dtype=torch.float64)
    h = torch.zeros_like(x)
    for _ in range(4000):
        step = torch.tanh(h @ w.T + x) - h
        # Half steps also find equilibria from which plain iterations swing away.
        h = h + (step if factor < 1 else step / 2)
        if float(step.norm()) < 1e-13:
            break
    slope = 1 - torch.tanh(h @ w.T + x).square()  # (B, d); row b of J is slope_b ∘ W
    cotangent = h - y

    def product(v: torch.Tensor) -> torch.Tensor:
        return (v * slope) @ w

    def gradient(v: torch.Tensor) -> torch.Tensor:
        inner = v * slope
        return torch.cat([(inner.T @ h).flatten(), inner.sum(0)])

    jacobians = slope[:, :, None] * w
    exact = torch.linalg.solve(
        torch.eye(WIDTH, dtype=w.dtype) - jacobians.transpose(1, 2), cotangent.unsqueeze(2)
    )
    exact = gradient(exact.squeeze(2))
    curves = {}
    for damping in DAMPINGS:
        total, cosines = torch.zeros_like(cotangent), []
        for _ in range(STEPS):
            total = cotangent + damping * product(total) + (1 - damping) * total
            cosines.append(torch.cosine_similarity(gradient(total), exact, dim=0))
        curves[damping] = torch.stack(cosines)
    radius = torch.linalg.eigvals(jacobians).abs().amax(1).mean()
    return curves, float(radius)


def report(cells: dict[str, dict[str, list[float]]]) -> str:
    """Cosine at k = 5, and the k that reaches 0.95, by factor and λ."""
    rows = []
    for key, cell in sorted(cells.items()):
        kind, factor = key.split()
        for label, read in (
            ("cosine at k=5", lambda curve: f"{curve[4]:.3f}"),
            ("k for 0.95", lambda curve: str(first(curve)) if first(curve) else f">{STEPS}"),
        ):
            values = [read(cell[f"{x:g}"]) for x in DAMPINGS]
            rows.append([kind, factor, f"{cell['radius'][0]:.2f}", label, *values])
    head = ["W", "‖W‖₂", "ρ(J)", "", *(f"λ={x:g}" for x in DAMPINGS)]
    return markdown_table(head, rows)


def first(curve: list[float]) -> int | None:
    """The smallest k whose cosine reaches 0.95."""
    return next((k + 1 for k, value in enumerate(curve) if value >= 0.95), None)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    cells = Cells("static_precision")
    wanted = [
        f"{kind} {factor:g}" for kind in KINDS for factor in (*FACTORS, *BEYOND.get(kind, ()))
    ]
    missing = cells.fill(wanted, lambda key: measure(key.split()[0], float(key.split()[1])))
    print(report(cells.done))
    print("missing:", ", ".join(missing) or "nothing")
    write_text("static_precision_table.md", report(cells.done))
    for kind in KINDS:
        series = {
            f"{factor:g}, λ={x:g}": list(enumerate(cells.done[f"{kind} {factor:g}"][f"{x:g}"], 1))
            for factor in ((0.9, 0.99, 1.5) if kind in BEYOND else (0.5, 0.9, 0.99))
            for x in (0.5, 1.0)
        }
        drawing = line_chart(
            series,
            title=f"Cosine with the exact gradient, {kind} W",
            x_label="k",
            y_label="cosine",
        )
        write_text(f"static_precision_{kind}.svg", drawing)


if __name__ == "__main__":
    main()
