"""Imagenette (Howard, fast.ai; version 2 split): ten classes of ImageNet, photographs."""

from __future__ import annotations

import os

from PIL import Image, ImageOps

from deqzoo.data.images import SPLIT_SEED, ImageSource, Pictures, load_pictures

IMAGENETTE = ImageSource(
    name="imagenette",
    title="Imagenette",
    repository="frgfm/imagenette",
    config="160px",
    classes=(
        "tench", "English springer", "cassette player", "chain saw", "church", "French horn",
        "garbage truck", "gas pump", "golf ball", "parachute",
    ),
    parts={
        "train": ("train", "train"),
        "validation": ("train", "validation"),
        "train+validation": ("train", None),
        "test": ("validation", None),
    },
    rows={"train": 9_469, "validation": 3_925},
    validation_per_class=95,
)  # fmt: skip


def load_imagenette(
    split: str,
    data: str | os.PathLike[str] | None = None,
    *,
    size: int = 64,
    seed: int = SPLIT_SEED,
) -> Pictures:
    """Imagenette as uint8 (N, 3, size, size).

    Args:
        split: "train", "validation" (95 pictures of each class, from the published training split),
            "train+validation" (that whole split), or "test" (the published validation split).
        data: a local folder in the layout of the Hub's data set; fetched from there if None.
        size: side after scaling the shorter side and cropping the centre.
        seed: of the division into training and validation part.

    Raises:
        UserError: unknown split, or data that cannot be had or are not Imagenette.
    """

    def crop(picture: Image.Image) -> Image.Image:
        return ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)

    return load_pictures(IMAGENETTE, split, data, transform=crop, seed=seed)
