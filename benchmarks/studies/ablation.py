"""Ablation: final accuracy of short training runs by λ, k and kind of phantom gradient.

    python benchmarks/studies/ablation.py --data CIFAR [--epochs 0.4] [--seeds 3] [--variants V ...]

Every cell is a run of the recipe `mdeq-tiny-cifar-upg` cut down to one stage at 16 × 16 pixels,
with its own gradient and seed, scored on the first 2,000 validation pictures. Cells are kept as
they finish; a run that was cut off goes on from its checkpoint.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from short_runs import main, shortened

from deqzoo.recipe import Recipe

IMPLICIT = "implicit tol 1e-3"
GRADIENTS: dict[str, dict[str, Any]] = {
    "upg k=5 λ=0.5": {"name": "upg", "steps": 5, "damping": 0.5},
    "npg k=5 λ=0.5": {"name": "npg", "steps": 5, "damping": 0.5},
    "jfb": {"name": "jfb"},
    IMPLICIT: {
        "name": "implicit", "solver": {"name": "anderson", "max_steps": 20, "tol": 1e-3},
    },
    "npg k=5 λ=1": {"name": "npg", "steps": 5, "damping": 1.0},
    "npg k=5 λ=0.3": {"name": "npg", "steps": 5, "damping": 0.3},
    "npg k=1 λ=0.5": {"name": "npg", "steps": 1, "damping": 0.5},
    "npg k=2 λ=0.5": {"name": "npg", "steps": 2, "damping": 0.5},
    "npg k=10 λ=0.5": {"name": "npg", "steps": 10, "damping": 0.5},
    "upg k=2 λ=0.9": {"name": "upg", "steps": 2, "damping": 0.9},
    "npg k=5 λ=0.5, 13 steps": {"name": "npg", "steps": 5, "damping": 0.5},
}  # fmt: skip
STEPS = {"npg k=5 λ=0.5, 13 steps": 13}
"""Solver steps where they are not 8: as many as those of UPG and its five unrolled ones."""


def recipe_of(gradient: str, epochs: float) -> Recipe:
    """The short recipe with a solver that converges early on, and the gradient."""
    recipe = shortened(epochs)
    solver = {"name": "anderson", "max_steps": STEPS.get(gradient, 8), "tol": 1e-3}
    stage = replace(recipe.stages[0], solver=solver, gradient=GRADIENTS[gradient])
    return replace(recipe, stages=(stage,))


if __name__ == "__main__":
    main("ablation", __doc__.splitlines()[0], GRADIENTS, recipe_of, against=IMPLICIT)
