"""A solver and a gradient of your own in a trained model, held against those of the zoo.

    python examples/own_parts.py [PICTURE ...] [--model mdeq-tiny-cifar-upg]

A solver is a dataclass with a `name` and a rule for one step; a gradient is one with a `name` and
`attach`. Both are passed to a model as they are. To use their names too (in configs, recipes and
`set_solver`), add the classes to `deqzoo.equilibrium.SOLVERS` and `GRADIENTS`. The command line
knows them in a script that does so and then calls it: `deqzoo.cli.run(["train", "recipe.yaml"])`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from deqzoo import DEQModel
from deqzoo.data.pictures import read_picture
from deqzoo.equilibrium import (
    NPG,
    Anderson,
    FixedPointIteration,
    Gradient,
    Layout,
    Problem,
    Selection,
    Solver,
    StepRule,
    attach_cotangent,
    gradient_fidelity,
)
from deqzoo.errors import UserError
from deqzoo.models.readers import load_processor, to_batch

PICTURES = sorted((Path(__file__).parent / "pictures").iterdir())


@dataclass(frozen=True)
class HeavyBall(Solver):
    """Polyak's method: h ← h + β (F(h) − h) + μ (h − h of the step before)."""

    momentum: float = 0.2
    damping: float = 0.6

    name: ClassVar[str] = "heavy_ball"

    def start(self, matrix: Tensor, layout: Layout) -> StepRule:
        return _Rolling(self, matrix, layout)


class _Rolling(StepRule):
    """The velocity (R, D) of every row. A cell (a sample, here) may cover several rows."""

    def __init__(self, solver: HeavyBall, matrix: Tensor, layout: Layout) -> None:
        self.solver = solver
        self.layout = layout
        self.velocity = torch.zeros_like(matrix)

    def propose(
        self,
        z: Tensor,
        fz: Tensor,
        residual: Tensor,
        active: Tensor,
        stalled: Tensor | None,
        scale: Tensor | None,
    ) -> Tensor:
        if stalled is not None:
            self.restart(stalled)
        step = self.solver.damping * residual
        if scale is not None:
            step = step * self.layout.spread(scale).unsqueeze(1).to(step.dtype)
        self.velocity = step + self.solver.momentum * self.velocity
        return z + self.velocity

    def restart(self, cells: Tensor) -> None:
        # Filled, not multiplied by zero: what a broken cell leaves behind may not be finite.
        self.velocity.masked_fill_(self.layout.spread(cells).unsqueeze(1), 0)

    def select(self, layout: Layout, selection: Selection) -> None:
        self.layout = layout
        self.velocity = self.velocity.index_select(0, selection.rows)


@dataclass(frozen=True)
class Cesaro(Gradient):
    """Mean of the first k partial sums of the Neumann series: Σ_t (1 − t/k) (Jᵀ)ᵗ g.

    Late terms, which swing or grow where the spectral radius is near one, count less.
    """

    terms: int = 6

    name: ClassVar[str] = "cesaro"

    def attach(self, problem: Problem, state: Tensor) -> Tensor:
        def series(product, cotangent: Tensor) -> Tensor:
            total, term = cotangent, cotangent
            for t in range(1, self.terms):
                term = product(term)
                total = total + (1 - t / self.terms) * term
            return total

        return attach_cotangent(problem, state, series)


def main(argv: list[str] | None = None) -> None:
    """Solve with every solver, differentiate with every gradient, print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", type=Path, nargs="*", default=PICTURES)
    parser.add_argument("--model", default="mdeq-tiny-cifar-upg")
    arguments = parser.parse_args(argv)
    pictures = [read_picture(path) for path in arguments.pictures]
    model = DEQModel.from_pretrained(arguments.model).eval()
    pixels = to_batch(load_processor(model), pictures, model)

    print(f"{'solver':<22}{'steps':>8}{'residual':>10}   answers")
    for solver in (Anderson(50), FixedPointIteration(50), HeavyBall(50)):
        with torch.inference_mode():
            output = model(pixels, solver=solver)
        answers = [model.config.id2label[index] for index in output.logits.argmax(1).tolist()]
        steps, residual = output.n_steps.float().mean(), output.residual.max()
        print(f"{solver.name:<22}{steps:8.1f}{residual:10.1e}   {', '.join(answers)}")

    batch = {"pixel_values": pixels, "labels": output.logits.argmax(1)}
    gradients = [NPG(k, damping) for k in (3, 6) for damping in (1.0, 0.5)]
    gradients += [Cesaro(3), Cesaro(6)]
    solver = Anderson(max_steps=50, tol=1e-4)
    print(f"\n{'gradient':<28}{'cosine with the exact one':>26}{'relative error':>16}")
    for found in gradient_fidelity(model, batch, gradients, solver=solver):
        settings = ", ".join(f"{k} {v}" for k, v in found.gradient.items() if k != "name")
        print(
            f"{found.gradient['name'] + ': ' + settings:<28}{found.cosine['all']:>26.3f}"
            f"{found.relative_error['all']:>16.2f}"
        )


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        print(f"own_parts.py: {error}", file=sys.stderr)
        sys.exit(2)
