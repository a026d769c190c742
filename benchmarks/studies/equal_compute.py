"""Equal compute: final accuracy of short training runs that cost as many FLOPs, by gradient.

    python benchmarks/studies/equal_compute.py --data CIFAR [--epochs 0.4] [--seeds 5]

The runs of `ablation.py`, with fewer or more epochs by what an epoch of each gradient cost there:
every run takes the FLOPs of `--epochs` with NPG. The learning rate falls to zero in each.
"""

from __future__ import annotations

import statistics
from dataclasses import replace

from ablation import IMPLICIT, recipe_of
from cells import Cells
from short_runs import by_variant, main

from deqzoo.recipe import Recipe

REFERENCE = "npg k=5 λ=0.5"
VARIANTS = (IMPLICIT, "upg k=5 λ=0.5", REFERENCE, "jfb")


def pflop_per_epoch(variant: str) -> float:
    """What an epoch of a variant cost in the ablation, mean over seeds."""
    cells = by_variant(Cells("ablation").done, [variant])[variant].values()
    return statistics.mean(cell["pflop"] / cell["epochs"] for cell in cells)


def equal_compute(variant: str, epochs: float) -> Recipe:
    """The short recipe of a variant, as long as its compute lasts."""
    recipe = recipe_of(variant, epochs)
    (stage,) = recipe.stages
    as_long = epochs * pflop_per_epoch(REFERENCE) / pflop_per_epoch(variant)
    return replace(recipe, stages=(replace(stage, epochs=as_long),))


if __name__ == "__main__":
    main("equal_compute", __doc__.splitlines()[0], VARIANTS, equal_compute, against=IMPLICIT)
