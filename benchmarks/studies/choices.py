"""Choices of the image recipes, one changed at a time: optimiser, initialisation, data, gradient.

    python benchmarks/studies/choices.py --data CIFAR [--epochs 0.4] [--seeds 2] [--limit-cells N]

The first row is the recipe `mdeq-tiny-cifar-upg`, cut down to one stage at 16 × 16 pixels; every
other row changes what its name says. All rows see the same pictures; the last column says what
they cost. Scored on the first 2,000 validation pictures.
"""

from __future__ import annotations

from dataclasses import replace

from short_runs import main, shortened

from deqzoo.recipe import Optimizer, Recipe

SGD = {"weight_decay": 5e-4, "momentum": 0.9}
OPTIMIZERS = {
    "Muon 0.01": Optimizer("muon", 0.01, other_lr=0.004, weight_decay=0.01),
    "Muon 0.04": Optimizer("muon", 0.04, other_lr=0.004, weight_decay=0.01),
    "SGD 0.1": Optimizer("sgd", 0.1, **SGD),
    "SGD 0.3": Optimizer("sgd", 0.3, **SGD),
    "AdamW 0.003": Optimizer("adamw", 3e-3, weight_decay=0.01),
    "AdamW 0.01": Optimizer("adamw", 1e-2, weight_decay=0.01),
}
GRADIENTS = {
    "NPG k=2 λ=0.9": {"name": "npg", "steps": 2, "damping": 0.9},
    "JFB": {"name": "jfb"},
}
BASE = "recipe (Muon 0.02, UPG k=2 λ=0.9)"
OTHERS = ("no whitening", "random flip", "no label smoothing", "no Jacobian penalty")
VARIANTS = (BASE, *OPTIMIZERS, *GRADIENTS, *OTHERS)


def recipe_of(variant: str, epochs: float) -> Recipe:
    """The short recipe with one thing changed."""
    recipe = shortened(epochs)
    if variant == BASE:
        return recipe
    if variant in OPTIMIZERS:
        return replace(recipe, optimizer=OPTIMIZERS[variant])
    if variant in GRADIENTS:
        return replace(recipe, stages=(replace(recipe.stages[0], gradient=GRADIENTS[variant]),))
    changed = {
        "no whitening": {"whiten": False},
        "random flip": {"augment": {**recipe.augment, "flip": "random"}},
        "no label smoothing": {"label_smoothing": 0.0},
        "no Jacobian penalty": {"stages": (replace(recipe.stages[0], jacobian=None),)},
    }[variant]
    return replace(recipe, **changed)


if __name__ == "__main__":
    main("choices", __doc__.splitlines()[0], VARIANTS, recipe_of)
