"""Equal epochs: final accuracy of short training runs by gradient, five seeds on one machine.

    python benchmarks/studies/equal_epochs.py --data CIFAR [--epochs 0.4] [--seeds 5]

The runs of `ablation.py` for the four gradients that `equal_compute.py` compares, and for NPG with
as many more solver steps as UPG unrolls. All were made by one commit on one processor: a variant
that is trained later than the others differs by more than its gradient.
"""

from __future__ import annotations

from ablation import IMPLICIT, recipe_of
from short_runs import main

VARIANTS = (
    IMPLICIT,
    "upg k=5 λ=0.5",
    "npg k=5 λ=0.5",
    "npg k=5 λ=0.5, 13 steps",
    "jfb",
)

if __name__ == "__main__":
    main("equal_epochs", __doc__.splitlines()[0], VARIANTS, recipe_of, against=IMPLICIT)
