"""CIFAR-10 (Krizhevsky 2009), with 45,000 pictures to train, 5,000 to validate, 10,000 to test."""

from __future__ import annotations

import os

from deqzoo.data.images import SPLIT_SEED, ImageSource, Pictures, load_pictures

CIFAR10 = ImageSource(
    name="cifar10",
    title="CIFAR-10",
    repository="uoft-cs/cifar10",
    config="plain_text",
    classes=(
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    ),
    parts={
        "train": ("train", "train"),
        "validation": ("train", "validation"),
        "train+validation": ("train", None),
        "test": ("test", None),
    },
    rows={"train": 50_000, "test": 10_000},
    side=32,
    validation_per_class=500,
    fingerprints={
        "train": "d59acf989e068e709ce686cda292672c7b212c08d29d3d3e6d8c3aa99eba6a85",
        "test": "899683d46c3a8c66fd56e1af12202e69fe5a4517be10b0f68e04c78fe585c57c",
    },
)  # fmt: skip


def load_cifar10(
    split: str, data: str | os.PathLike[str] | None = None, *, seed: int = SPLIT_SEED
) -> Pictures:
    """CIFAR-10 as uint8 (N, 3, 32, 32).

    Args:
        split: "train" (45,000), "validation" (5,000, as many of each class), "train+validation"
            (50,000) or "test" (10,000).
        data: a local folder in the layout of the Hub's data set; fetched from there if None.
        seed: of the division into training and validation part.

    Raises:
        UserError: unknown split, or data that cannot be had or are not CIFAR-10.
    """
    return load_pictures(CIFAR10, split, data, seed=seed)
